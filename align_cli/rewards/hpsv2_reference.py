"""The official hpsv2 package as a second scorer to compare our HPSv2 with.

Its PyPI wheel (1.2.0) cannot be imported as it comes: it lacks CLIP's BPE vocabulary and imports a name from
turtle. Both are supplied while it is imported; nothing is written anywhere. What `hpsv2.score` adds to model,
preprocessing and tokenizer is done here instead: it would fetch LAION's weights only to overwrite them, keep
one model for all versions, read the checkpoint again for each picture, and let pickles run code.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from align_cli.cuts import Cut
from align_cli.errors import UserError, first_line
from align_cli.pictures import to_uint8
from align_cli.rewards.base import Reward, rgb
from align_cli.rewards.clip import HPS_FILES, KINDS
from align_cli.rewards.places import option, place
from align_cli.rewards.weights import read_tensors

PACKAGE = "hpsv2.src.open_clip"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
LIMIT = 77
"""Tokens that are read, start and end included. Source: the package's `tokenize`."""
MERGES = 48894
"""Lines of the file, after its first, that CLIP's tokenizer reads."""
MERGES_HASH = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
"""sha256 of these lines, joined by newlines."""
SHIPPED_IN = ("open_clip", "clip")
"""Packages that hold the vocabulary: open_clip_torch (PyPI) and OpenAI's."""
INSTALL = (
    "pip install 't2ialign[hpsv2]' into an environment of its own (it pins pytest 7.2.0 and protobuf < 4)"
)


class HPSv2Reference(Reward):
    """Cosine of image and text by the official model, `preprocess_val` and tokenizer; no gradients.

    In float32 on a CPU, under float16 autocast on CUDA, as the official `score` runs.
    Source: hpsv2 1.2.0, img_score.py. Deviations: RGBA loses its alpha (the original fails), several prompts
    at a time, one model object per `load_reference`, tensors only from the checkpoint.
    """

    differentiable = False

    def __init__(self, model: Any, preprocess: Any, tokenize: Any, **facts: Any) -> None:
        super().__init__(
            preprocessing="official package: preprocess_val", scale="cosine of image and text", **facts
        )
        self.model, self.preprocess, self.tokenize = model, preprocess, tokenize

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`. The pictures are rounded to 8 bit, as if they came from files; one with a NaN
        scores NaN.
        """
        images = rgb(images, prompts)
        pictures = [Image.fromarray(np.ascontiguousarray(x)) for x in to_uint8(images.nan_to_num())]
        pixels = torch.stack([self.preprocess(picture) for picture in pictures]).to(self.device)
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.device.type == "cuda"):
            out = self.model(pixels, self.tokenize(list(prompts)).to(self.device))
            score = (out["image_features"] * out["text_features"]).sum(-1).float()
        return score.masked_fill(images.isnan().flatten(1).any(1).to(self.device), float("nan"))

    def audit(self, prompts: Sequence[str]) -> list[Cut]:
        """The lost words are lower case, as the official tokenizer makes them."""
        return [_cut(sys.modules[f"{PACKAGE}.tokenizer"]._tokenizer, prompt) for prompt in prompts]


def _cut(words: Any, prompt: str) -> Cut:
    """What the official `tokenize` leaves out of a prompt, from the start of the first word that is cut."""
    ids = words.encode(prompt)
    seen = LIMIT - 2
    if len(ids) <= seen:
        return Cut(LIMIT, len(ids) + 2, "")
    while seen and not words.decoder[ids[seen - 1]].endswith("</w>"):
        seen -= 1
    return Cut(LIMIT, len(ids) + 2, words.decode(ids[seen:]).strip())


def load_reference(
    name: str = "hpsv2.1",
    *,
    source: str | None = None,
    device: torch.device | str = "cpu",
    layout: str | Path = "ViT-H-14",
) -> HPSv2Reference:
    """The official scorer.

    Args:
        name: hpsv2 or hpsv2.1. source: hub id, folder or file of the weights, as for our reward of that name;
        a folder may also hold CLIP's merges.txt or tokenizer.json. layout: name of one of the package's model
        configurations, or a JSON file like them.
    Raises:
        UserError: the package or its vocabulary is not there (says what to install); it does not work with
        the installed versions; no weights, or misfitting ones.
    """
    kind = KINDS[name]
    home = place(name, source or "", kind.source)
    weights = home.weights([HPS_FILES[kind.version]])
    open_clip = import_official([] if home.folder is None else [home.folder])
    if isinstance(layout, Path):
        open_clip.add_model_config(layout)
        layout = layout.stem
    model, _, preprocess = open_clip.create_model_and_transforms(
        layout, None, precision="fp32", device=str(device), light_augmentation=True, output_dict=True
    )
    try:
        model.load_state_dict(read_tensors(weights, name))
    except RuntimeError as error:
        raise UserError(f"{name}: {weights} does not fit: {first_line(error)}") from error
    return HPSv2Reference(
        model.eval().requires_grad_(False),
        preprocess,
        open_clip.get_tokenizer(layout),
        name=f"{name}-reference",
        version=f"{kind.version}, official package",
        source=source or kind.source,
        device=device,
    )


def import_official(folders: Sequence[Path] = ()) -> ModuleType:
    """`hpsv2.src.open_clip`, with what its wheel lacks.

    Args:
        folders: where merges.txt or tokenizer.json of a CLIP tokenizer may lie.
    Raises:
        UserError: see `load_reference`.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    spec = find_spec("hpsv2")
    if spec is None or spec.origin is None:
        raise UserError(f"the reference scorer needs the official package hpsv2: {INSTALL}")
    own = Path(spec.origin).parent / "src" / "open_clip" / VOCABULARY
    text = None if own.is_file() else _vocabulary(folders)
    with _repaired(text):
        try:
            return import_module(PACKAGE)
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            for module in [m for m in sys.modules if m.partition(".")[0] == "hpsv2"]:
                del sys.modules[module]
            raise UserError(
                f"the package hpsv2 does not work with what is installed: {first_line(error)}; {INSTALL}"
            ) from error


@contextmanager
def _repaired(vocabulary: bytes | None) -> Iterator[None]:
    """Inside, gzip.open finds the missing vocabulary, and `from turtle import forward` needs no tkinter."""
    opened, turtle = gzip.open, sys.modules.get("turtle")

    def find(file: Any, *args: Any, **options: Any) -> Any:
        if vocabulary is not None and str(file).endswith(VOCABULARY):
            return BytesIO(vocabulary)
        return opened(file, *args, **options)

    empty = ModuleType("turtle")
    empty.forward = None  # type: ignore[attr-defined]
    sys.modules["turtle"] = empty
    gzip.open = find  # type: ignore[assignment]
    try:
        yield
    finally:
        gzip.open = opened
        del sys.modules["turtle"]
        if turtle is not None:
            sys.modules["turtle"] = turtle


def _vocabulary(folders: Sequence[Path]) -> bytes:
    """Content of the missing file, from an installed package or a CLIP tokenizer. UserError if none is."""
    for name in SHIPPED_IN:
        spec = find_spec(name)
        file = None if spec is None or spec.origin is None else Path(spec.origin).parent / VOCABULARY
        if file is not None and file.is_file():
            with gzip.open(file) as stream:
                lines = stream.read().decode("utf-8").split("\n")[1 : MERGES + 1]
            return _checked(lines, file)
    for folder in folders:
        if (file := folder / "merges.txt").is_file():
            return _checked(file.read_text(encoding="utf-8").split("\n")[1 : MERGES + 1], file)
        if (file := folder / "tokenizer.json").is_file():
            merges = json.loads(file.read_text(encoding="utf-8"))["model"]["merges"]
            return _checked([m if isinstance(m, str) else " ".join(m) for m in merges], file)
    raise UserError(
        f"the official package hpsv2 lacks its vocabulary {VOCABULARY}: install open_clip_torch, which ships "
        "it (`pip install --no-deps open_clip_torch`), or put merges.txt of openai/clip-vit-large-patch14 "
        f"beside the weights and pass the folder with {option('hpsv2')}"
    )


def _checked(merges: list[str], file: Path) -> bytes:
    """The file's content for these merges. UserError if they are not CLIP's."""
    if sha256("\n".join(merges).encode()).hexdigest() != MERGES_HASH:
        raise UserError(
            f"{file} holds another vocabulary than CLIP's; the official package hpsv2 needs CLIP's"
        )
    return "\n".join(["#version: 0.2", *merges, ""]).encode()
