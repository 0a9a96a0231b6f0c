"""COCO captions: photographs with about five captions each."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from align_cli.data.base import Example, draw_caption
from align_cli.errors import UserError
from align_cli.settings import DataSettings

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
LAYOUT = "a folder with train2017/, val2017/ and annotations/captions_train2017.json (or with coco/ of these)"


class CocoDataset:
    """COCO 2017 captions, in the order of the image ids.

    train: one of the image's captions at random at every access; val: always its first. The image is resized
    so that its short side is image_size, cropped to the central square, and scaled to [-1, 1].
    Source: softrepa official data code (torchvision's CocoCaptions, Resize, CenterCrop, Normalize(0.5,
    0.5)); images without a caption, on which random.choice would fail there, are left out with a warning.
    """

    def __init__(
        self, settings: DataSettings, *, seed: int = 0, split: str = "train", pictures: bool = True
    ) -> None:
        """Read the annotations and look whether the images are there, unless no `pictures` are wanted.

        `seed` has no use here: the order of the examples and the choice of captions are the loop's.

        Raises:
            UserError: no such folder, no annotations, annotations that are no COCO captions, missing images.
        """
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val, got {split!r}")
        self.settings, self.split, self.pictures = settings, split, pictures
        root = find_root(settings.path)
        self.folder = root / f"{split}2017"
        path = root / "annotations" / f"captions_{split}2017.json"
        self.ids, self.files, self.captions = read_captions(path)
        if settings.num_examples:
            n = settings.num_examples
            self.ids, self.files, self.captions = self.ids[:n], self.files[:n], self.captions[:n]
        if not self.ids:
            raise UserError(
                f"{path} holds no captions; it should be the file of that name from cocodataset.org"
            )
        if pictures:
            look_for_images(self.folder, self.files, LAYOUT)

    def __len__(self) -> int:
        return len(self.ids)

    def get(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`; `rng` chooses the caption."""
        captions = self.captions[index]
        chosen = draw_caption(captions, rng) if self.split == "train" else 0
        pixels = self._pixels(index) if self.pictures else None
        return Example(prompt=captions[chosen], pixels=pixels, id=index, extra={"image_id": self.ids[index]})

    def captions_of(self, index: int) -> list[str]:
        """All captions of image `index`."""
        return self.captions[index]

    def fingerprint(self) -> str:
        """Of ids, file names, captions, size and filter; the pixels of the files are not read for it."""
        what = [
            "coco-1", self.split, self.settings.image_size, self.settings.interpolation, self.ids, self.files,
            self.captions,
        ]  # fmt: skip
        return sha256(json.dumps(what).encode()).hexdigest()[:16]

    def _pixels(self, index: int) -> Tensor:
        path = self.folder / self.files[index]
        return square_pixels(path, self.settings.image_size, self.settings.interpolation)


def look_for_images(folder: Path, files: Sequence[str], layout: str) -> None:
    """UserError if one of the files is not in the folder. layout: what --data-path wants, in words."""
    try:
        with os.scandir(folder) as entries:
            there = {entry.name for entry in entries}
    except OSError as error:
        raise UserError(f"no image folder {folder} ({error.strerror}); --data-path wants {layout}") from error
    if missing := [name for name in files if name not in there]:
        raise UserError(
            f"{len(missing)} of {len(files)} images are missing in {folder}, the first is {missing[0]}; "
            f"unpack all of {folder.name}.zip, or use fewer with --set data.num_examples=N"
        )


def read_rgb(path: Path) -> Image.Image:
    """The picture of a file. UserError naming it if it is missing, no image, or cut off."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except UnidentifiedImageError:
        raise UserError(f"{path} is no image that can be read; replace or remove it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, not of the picture
            raise UserError(
                f"image {path} cannot be read ({error.strerror}); is the disk with the data still there?"
            ) from error
        raise UserError(f"image {path} is broken: {error}; fetch it again or remove it") from error


def to_pixels(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [-1, 1] of an RGB picture."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)


def square_pixels(path: Path, size: int, interpolation: str) -> Tensor:
    """(3, size, size) float32 in [-1, 1] of an image file: short side resized to `size`, central square.

    Raises:
        UserError: the file is missing, no image, or cut off; names the file.
    """
    image = read_rgb(path)
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    if (width, height) != image.size:
        image = image.resize((width, height), FILTERS[interpolation])
    # Half to even as torchvision's CenterCrop rounds.
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return to_pixels(image.crop((left, top, left + size, top + size)))


def find_root(path: str) -> Path:
    """The folder with the annotations: `path` or `path`/coco."""
    if not path:
        raise UserError(f"the coco dataset needs --data-path: {LAYOUT}")
    given = Path(path).expanduser()
    if not given.is_dir():
        raise UserError(f"data folder {given} does not exist; --data-path wants {LAYOUT}")
    for root in (given / "coco", given):
        if (root / "annotations").is_dir():
            return root
    raise UserError(f"data folder {given} has no annotations folder; --data-path wants {LAYOUT}")


def read_captions(path: Path) -> tuple[list[int], list[str], list[list[str]]]:
    """Image ids in ascending order, their file names, their captions in the order of the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        files = {int(image["id"]): str(image["file_name"]) for image in raw["images"]}
        captions: dict[int, list[str]] = {i: [] for i in files}
        for note in raw["annotations"]:
            captions[int(note["image_id"])].append(str(note["caption"]))
    except FileNotFoundError:
        raise UserError(f"no annotation file {path}; --data-path wants {LAYOUT}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not valid JSON of COCO captions: {error}") from error
    except KeyError as error:
        raise UserError(f"{path} is no file of COCO captions: it lacks {error.args[0]!r}") from error
    ids = sorted(i for i in files if captions[i])
    if len(ids) < len(files):
        warnings.warn(
            f"{path}: {len(files) - len(ids)} images have no caption and are left out", stacklevel=2
        )
    return ids, [files[i] for i in ids], [captions[i] for i in ids]
