"""What is to be edited: pictures from files, the prompts of both sides, lists of many. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from math import sqrt
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from align_cli.errors import UserError

KEYS = ("prompt", "img_path", "tgt_prompt")
"""Of an entry of a list; those of the official samples/prompts_editing.json."""
FORM = 'a list of {"prompt": ..., "img_path": ..., "tgt_prompt": ...}'


@dataclass(frozen=True)
class EditRequest:
    """One edit. src: what the picture shows; tgt: what it is to show. image: None draws the source from src.

    size: (width, height) pixels of the image, digest: sha256 of its file. where: how errors name it, "" on
    the command line.
    """

    src: str
    tgt: str
    image: Path | None = None
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    where: str = ""


def request(src: str, tgt: str, image: Path | None, where: str = "") -> EditRequest:
    """A request whose prompts and picture were looked at.

    Raises:
        UserError: an empty prompt, prompts that are the same, a picture that cannot be read.
    """
    at = f"{where}: " if where else ""
    names = ("prompt", "tgt_prompt") if where else ("--src-prompt", "--tgt-prompt")
    src, tgt = src.strip(), tgt.strip()
    for name, text in zip(names, (src, tgt), strict=True):
        if not text:
            raise UserError(f"{at}{name} is empty; say what the picture shows and what it is to show")
    if src.split() == tgt.split():
        raise UserError(f"{at}{names[0]} and {names[1]} are the same ({src!r}), so there is nothing to edit")
    if image is None:
        return EditRequest(src, tgt, where=where)
    size = open_picture(image, where).size
    return EditRequest(src, tgt, image, size, sha256(image.read_bytes()).hexdigest(), where)


def read_list(path: Path) -> list[EditRequest]:
    """The edits of a JSON file in the layout of the official prompts_editing.json; image paths are relative
    to the file.

    Raises:
        UserError: no such file, no JSON, no list, nothing in it, or an entry that is wrong (its number is
            named, counted from 1).
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no list {path}; --list wants a JSON file, {FORM}") from None
    except OSError as error:
        raise UserError(f"cannot read the list {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); --list wants {FORM}") from None
    if not isinstance(raw, list):
        raise UserError(f"{path} holds {_kind(raw)}; --list wants {FORM}")
    if not raw:
        raise UserError(f"{path} is an empty list; --list wants {FORM}")
    return [_entry(item, f"{path}, entry {number}", path.parent) for number, item in enumerate(raw, 1)]


def _entry(item: object, where: str, root: Path) -> EditRequest:
    if not isinstance(item, dict):
        raise UserError(f"{where}: is {_kind(item)}; wanted is an object with {', '.join(KEYS)}")
    for key in KEYS:
        if key not in item:
            raise UserError(f"{where}: lacks {key!r} (has: {', '.join(map(str, item)) or 'nothing'})")
        if not isinstance(item[key], str):
            raise UserError(f"{where}: {key} must be a text, got {_kind(item[key])}")
    if not item["img_path"].strip():
        raise UserError(f"{where}: img_path is empty")
    return request(item["prompt"], item["tgt_prompt"], root / Path(item["img_path"]).expanduser(), where)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def open_picture(path: Path, where: str = "") -> Image.Image:
    """The picture of a file, RGB, upright (EXIF orientation applied), transparent parts on white.

    Raises:
        UserError: the file is missing, a folder, no image, cut off, or has more than 8 bits per channel.
    """
    at = f"{where}: " if where else ""
    try:
        with Image.open(path) as file:
            file.load()
            if file.mode == "F" or file.mode.startswith("I"):
                raise UserError(f"{at}image {path} has more than 8 bits per channel; save it as 8-bit RGB")
            picture = ImageOps.exif_transpose(file)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{at}image {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{at}image {path} is a folder; name a picture file, or many with --list") from None
    except UnidentifiedImageError:
        raise UserError(f"{at}{path} is no image that can be read (PNG, JPEG, WebP, ...)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not Pillow's
            raise UserError(f"{at}image {path} cannot be read: {error.strerror}") from None
        raise UserError(f"{at}image {path} is broken: {error}; fetch it again") from None


def fitted_size(width: int, height: int, side: int, *, keep_aspect: bool, factor: int) -> tuple[int, int]:
    """Pixels (width, height) that a picture is resized to.

    side: of the square that it is squeezed to without a crop, as in the official code; -1 leaves its size
    alone. keep_aspect: the area of that square at its own aspect, each side rounded to a multiple of factor.
    """
    if side == -1:
        return width, height
    if not keep_aspect:
        return side, side
    scale = side / sqrt(width * height)
    fit = [max(1, round(n * scale / factor)) * factor for n in (width, height)]
    return fit[0], fit[1]


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bilinear with antialiasing, torchvision's default, which the official code takes."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)
