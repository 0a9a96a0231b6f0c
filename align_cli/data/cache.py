"""Encodings that were computed once: the folder that `t2ialign encode` writes.

manifest.json                 what was encoded with what: model, weights of the encoders, data, layout, and
                              per shard its rows, bytes and sha256
items.json                    per item: its id in the dataset and its captions; every different caption once
images-00000.safetensors ...  per item: mean and std (C, h, w) of the autoencoder, or one sample of it
captions-00000.safetensors .. per different caption: its text tokens and, where the family has it, the pooled
                              embedding (pooled). Tokens are cut into parts that leave out what is always zero
                              (SD3: `clip`, the rows of both CLIPs without their zero half, and `t5`)

Layouts:
exact     all that the encoders say of pictures and captions: the loss has the bits of encoding on the fly
captions  pictures only; the text encoders run in the loop. The same bits, and far smaller

Encoding on the fly and encoding beforehand give the same bits where the encoders see as many rows at once: a
matrix kernel is chosen by the size of the batch. `batch_size` of the cache is that number, and every call has
it (a shorter rest is filled up).

Letters: C h w latent, L D text tokens, P pooled width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_cli.checks import require_multiple
from align_cli.data.shards import Field, Written, file_bytes
from align_cli.errors import UserError
from align_cli.models.base import BaseModel, TextCond

FORMAT = 1
MANIFEST, INDEX, LOCK = "manifest.json", "items.json", ".lock"

LAYOUTS = ("exact", "captions")
POSTERIORS = ("mean-std", "sample")
"""mean-std: every epoch draws afresh. sample: one frozen draw (as the official code stores)."""
CAPTIONS = ("first", "random", "all")
"""Which captions of an item: its first, one picked once at random (as official), or all of them."""

GENERATED = ("shapes",)
"""Datasets that need no files: their captions can be drawn afresh where the cache holds pictures only."""


# ---------------------------------------------------------------- what an item holds


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of the text tokens; of their channels the first `width`, the others are zero."""

    name: str
    start: int
    stop: int
    width: int


@dataclass(frozen=True)
class Shapes:
    """What the encoders of a model give for one picture and one caption.

    latent: (C, h, w). text: (L, D). parts: what of the text is not always zero. pooled: P, or 0.
    """

    latent: tuple[int, int, int]
    latent_dtype: str
    text: tuple[int, int]
    text_dtype: str
    parts: tuple[Part, ...]
    pooled: int

    def image_fields(self, posterior: str) -> list[Field]:
        """Tensors of a shard of pictures."""
        names = ("mean", "std") if posterior == "mean-std" else ("sample",)
        return [Field(name, self.latent_dtype, self.latent) for name in names]

    def caption_fields(self) -> list[Field]:
        """Tensors of a shard of captions."""
        fields = [Field(p.name, self.text_dtype, (p.stop - p.start, p.width)) for p in self.parts]
        return fields + ([Field("pooled", self.text_dtype, (self.pooled,))] if self.pooled else [])

    def split(self, text: TextCond) -> dict[str, Tensor]:
        """Encoded prompts -> the tensors of a shard, on the CPU.

        Raises:
            ValueError: the encoders gave other shapes or dtypes, or numbers where zeros should be.
        """
        if tuple(text.tokens.shape[1:]) != self.text or dtype_name(text.tokens.dtype) != self.text_dtype:
            raise ValueError(
                f"text tokens should be {self.text} {self.text_dtype}, got {tuple(text.tokens.shape[1:])} "
                f"{text.tokens.dtype}"
            )
        rest = text.tokens.clone()
        found = {}
        for p in self.parts:
            found[p.name] = text.tokens[:, p.start : p.stop, : p.width].cpu()
            rest[:, p.start : p.stop, : p.width] = 0
        if rest.any():
            raise ValueError("text tokens hold numbers outside the parts that are stored")
        if self.pooled:
            if text.pooled is None or text.pooled.shape[1] != self.pooled:
                raise ValueError(f"the pooled text should be {self.pooled} wide")
            if text.pooled.dtype != text.tokens.dtype:
                raise ValueError(f"the pooled text is {text.pooled.dtype}, the tokens {text.tokens.dtype}")
            found["pooled"] = text.pooled.cpu()
        return found

    def join(self, row: Mapping[str, Tensor]) -> TextCond:
        """Inverse of `split` for one caption: tokens (L, D), pooled (P,) or None."""
        if len(self.parts) == 1 and row[self.parts[0].name].shape == self.text:
            tokens = row[self.parts[0].name]
        else:
            tokens = torch.zeros(self.text, dtype=getattr(torch, self.text_dtype))
            for p in self.parts:
                tokens[p.start : p.stop, : p.width] = row[p.name]
        return TextCond(tokens, row.get("pooled"))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Shapes:
        """Inverse of `dataclasses.asdict`."""
        channels, height, width = raw["latent"]
        rows, columns = raw["text"]
        parts = tuple(Part(**part) for part in raw["parts"])
        fields = {**raw, "latent": (channels, height, width), "text": (rows, columns), "parts": parts}
        return cls(**fields)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16", ..."""
    return str(dtype).removeprefix("torch.")


_CLIP_ROWS, _T5_WIDTH = 77, 4096
_KNOWN = {
    "sd14": (4, 768, 0), "sd15": (4, 768, 0), "sd21-base": (4, 1024, 0), "sdxl": (4, 2048, 1280),
    "sd3": (16, 2048, 2048), "sd35-medium": (16, 2048, 2048),
}  # fmt: skip
"""Alias -> latent channels, width of the CLIP rows, pooled width."""


def known_shapes(
    model: str, image_size: int, dtype: str, t5_length: int, vae: str = "", clip_rows: int = _CLIP_ROWS
) -> Shapes | None:
    """The shapes of a published model without its weights; None for another.

    vae: of an autoencoder in place of its own; SDXL's own works in float32 where float16 is asked for.
    clip_rows: of SD1.x, SD2.x and SDXL; prompts that are read by sentence have others.

    Raises:
        UserError: a size (pixels) that the model has no latents for.
    Source: the models' published configurations (VAE factor 8, 77 CLIP tokens, T5-XXL 4096 wide).
    """
    if model not in _KNOWN:
        return None
    channels, width, pooled = _KNOWN[model]
    factor = 8 if channels == 4 else 16  # an MMDiT reads patches of 2 x 2 latents
    require_multiple("--image-size", image_size, factor, model)
    latent = (channels, image_size // 8, image_size // 8)
    wide = "float32" if model == "sdxl" and dtype == "float16" and not vae else dtype
    if channels == 4:
        return Shapes(latent, wide, (clip_rows, width), dtype, (Part("tokens", 0, clip_rows, width),), pooled)
    parts = [Part("clip", 0, _CLIP_ROWS, width)]
    rows = _CLIP_ROWS + (t5_length or _CLIP_ROWS)  # without T5, as many zeros as CLIP has rows
    if t5_length:
        parts.append(Part("t5", _CLIP_ROWS, rows, _T5_WIDTH))
    return Shapes(latent, dtype, (rows, _T5_WIDTH), dtype, tuple(parts), pooled)


# ---------------------------------------------------------------- the plan: which shards, how many bytes


@dataclass(frozen=True)
class Shard:
    """A file of the cache. kind: images or captions; it holds the rows [start, stop) of all of that kind."""

    name: str
    kind: str
    start: int
    stop: int
    bytes: int


def plan(
    shapes: Shapes, *, layout: str, posterior: str, items: int, captions: int, shard_items: int
) -> list[Shard]:
    """Every shard with its exact size in bytes.

    Args:
        items, captions: how many pictures and how many different captions. shard_items: rows per shard.
    """
    kinds = [("images", shapes.image_fields(posterior), items)]
    if layout != "captions":
        kinds.append(("captions", shapes.caption_fields(), captions))
    found = []
    for kind, fields, rows in kinds:
        for number, start in enumerate(range(0, rows, shard_items)):
            stop = min(start + shard_items, rows)
            name = f"{kind}-{number:05d}.safetensors"
            found.append(Shard(name, kind, start, stop, file_bytes(fields, stop - start)))
    return found


# ---------------------------------------------------------------- what the folder says about itself


@dataclass(frozen=True)
class Index:
    """Which item has which captions.

    ids: of the items in their dataset, empty if it has none. captions: the different ones. items: per item,
    the numbers of its captions; empty where the dataset draws them.
    """

    ids: list[int]
    captions: list[str]
    items: list[list[int]]

    def to_text(self) -> str:
        """The content of items.json."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")) + "\n"


class Cache:
    """A folder of encodings and its manifest.

    about: the manifest without its shards: what makes it this cache and no other, and how it came to be.
    shards: the finished ones.
    """

    def __init__(self, folder: Path, about: dict[str, Any], shards: dict[str, Written]) -> None:
        self.folder, self.about, self.shards = folder, about, shards
        self.shapes = Shapes.from_json(about["shapes"])

    @classmethod
    def read(cls, folder: Path) -> Cache:
        """Read manifest.json.

        Raises:
            UserError: there is none, it is damaged, or it is of a later version.
        """
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            fmt = raw["format"]
            if not isinstance(fmt, int) or fmt > FORMAT:
                raise UserError(
                    f"{path} has format {fmt}, this t2ialign reads up to {FORMAT}; update t2ialign"
                )
            shards = {name: Written(**record) for name, record in raw.pop("shards").items()}
            return cls(folder, raw, shards)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{folder} holds no encodings (no {MANIFEST}); make them with t2ialign encode --out {folder}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}: {error}); encode again with --overwrite"
            ) from error

    def to_text(self) -> str:
        """The content of manifest.json."""
        shards = {name: asdict(self.shards[name]) for name in sorted(self.shards)}
        return json.dumps({**self.about, "complete": self.complete, "shards": shards}, indent=1) + "\n"

    @cached_property
    def plan(self) -> list[Shard]:
        """Every shard that a finished cache has."""
        a = self.about
        return plan(
            self.shapes,
            layout=a["layout"],
            posterior=a["posterior"],
            items=a["num_examples"],
            captions=a["captions_stored"],
            shard_items=a["shard_items"],
        )

    def place(self, kind: str, number: int) -> tuple[Shard, int]:
        """The shard that holds row `number` of a kind, and which of its rows that is."""
        which, row = divmod(number, self.about["shard_items"])
        return self._by_kind[kind][which], row

    @cached_property
    def _by_kind(self) -> dict[str, list[Shard]]:
        kinds: dict[str, list[Shard]] = {}
        for shard in self.plan:
            kinds.setdefault(shard.kind, []).append(shard)
        return kinds

    @property
    def complete(self) -> bool:
        """Whether every shard is finished."""
        return len(self.shards) == len(self.plan)

    @cached_property
    def index(self) -> Index:
        """items.json. UserError if it is missing or not the one that the manifest was written with."""
        path, repair = self.folder / INDEX, f"repair with: t2ialign encode --resume --out {self.folder}"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {repair}") from error
        if sha256(content).hexdigest() != self.about["index_sha256"]:
            raise UserError(f"{path} is damaged (another sha256); {repair}")
        return Index(**json.loads(content))

    def damaged(self) -> dict[str, str]:
        """Finished shards that are missing or of another size, with what is wrong. Reads no content."""
        found = {}
        for shard in self.plan:
            if shard.name not in self.shards:
                continue
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except OSError as error:
                found[shard.name] = f"shard {path} cannot be read ({error.strerror})"
                continue
            if size < shard.bytes:
                found[shard.name] = f"shard {path} is cut off ({size:,} of {shard.bytes:,} bytes)"
            elif size > shard.bytes:
                found[shard.name] = f"shard {path} has {size:,} bytes, not {shard.bytes:,}"
        return found

    def check_whole(self) -> None:
        """UserError unless every shard is there with its size."""
        go_on = f"t2ialign encode --resume --out {self.folder}"
        if not self.complete:
            raise UserError(
                f"the encodings in {self.folder} are not finished ({len(self.shards)} of {len(self.plan)} "
                f"shards); go on with: {go_on}"
            )
        if bad := list(self.damaged().values()):
            more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise UserError(f"{bad[0]}{more}; repair with: {go_on}")

    def fingerprint(self) -> str:
        """Identity of what is stored, whatever folder it lies in."""
        about = {key: value for key, value in self.about.items() if key not in NOT_IDENTITY}
        records = [(name, self.shards[name].sha256) for name in sorted(self.shards)]
        return sha256(json.dumps([about, records], sort_keys=True).encode()).hexdigest()[:16]


GIVEN, DRAWN = "those of the dataset", "drawn by the model"
"""`pictures` of the manifest: what was encoded (where it does not say), or final latents that the model drew
for the captions; see drawn.py."""

NOT_IDENTITY = ("settings", "model_id", "made_on", "versions", "complete")
"""Keys of the manifest that may differ between equal caches."""

WORDS = {
    "model_id": "the model",
    "family": "the family of the model",
    "dtype": "model.dtype",
    "t5_length": "model.t5_length",
    "data": "the dataset",
    "image_size": "the size of the pictures in pixels",
    "interpolation": "the resize filter",
    "mixture": "data.mixture",
    "fingerprint": "the content of the dataset (its fingerprint)",
    "num_examples": "the number of items",
    "pictures": "the pictures",
    "text": "model.text",
}
"""What a key of the manifest is called in errors."""


PLAIN = "plain"
"""`text` of the manifest where prompts are read as the pipeline does."""
UNSAID = {"text": PLAIN, "pictures": GIVEN}
"""What holds where a manifest does not say."""


def reading(model: BaseModel) -> str:
    """`text` of the manifest."""
    return PLAIN if model.reader is None else model.reader.words()


def identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """Of a manifest, what makes it this cache and no other."""
    return {"pictures": GIVEN} | {key: value for key, value in about.items() if key not in NOT_IDENTITY}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, where `now` differs from what a cache says about itself; only keys of `now` count."""
    found = []
    for key, value in now.items():
        before = saved.get(key, UNSAID.get(key))
        if before == value:
            continue
        if key == "encoders":
            before = before or {}
            for part in value:
                if before.get(part) != value[part]:
                    found.append(
                        f"other weights of the {part} (sha256 {str(before.get(part))[:12]}, now "
                        f"{value[part][:12]})"
                    )
            continue
        found.append(f"{WORDS.get(key, key)} {before!r}, now it is {value!r}")
    return found


def encoder_identity(model: BaseModel, *, text: bool = True) -> dict[str, str]:
    """sha256 of the autoencoder's and the text encoders' weights (names, dtypes, shapes, numbers), and of the
    vocabularies of the tokenizers, as far as a model holds them. text: False for the autoencoder alone.
    """
    found = {}
    for name, part in _encoders(model, text):
        if isinstance(part, torch.nn.Module):
            found[name] = module_sha256(part)
        else:
            words = json.dumps([sorted(part.get_vocab().items()), part.model_max_length])
            found[name] = sha256(words.encode()).hexdigest()
    return found


def drawing_identity(model: BaseModel) -> dict[str, str]:
    """Of all weights that draw a picture: `encoder_identity`, and the denoiser."""
    return {"denoiser": module_sha256(model.denoiser), **encoder_identity(model)}


def _encoders(model: BaseModel, text: bool) -> list[tuple[str, Any]]:
    """vae, text_encoder, text_encoder_2, ..., tokenizer, ...: those that are there."""
    m: Any = model
    found = [("vae", getattr(m, "vae", None))]
    if text:
        number = {0: "", 1: "_2", 2: "_3"}
        modules = list(getattr(m, "encoders", ()))
        words = [*getattr(m, "tokenizers", [getattr(m, "tokenizer", None)]), getattr(m, "t5_tokenizer", None)]
        found += [(f"text_encoder{number[i]}", module) for i, module in enumerate(modules)]
        found += [(f"tokenizer{number[i]}", w) for i, w in enumerate(w for w in words if w is not None)]
    return [(name, part) for name, part in found if part is not None]


def module_sha256(module: torch.nn.Module) -> str:
    """Hash of the state of a module: names, dtypes, shapes, numbers."""

    def digest(entry: tuple[str, Tensor]) -> str:
        name, x = entry
        flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return sha256(
            f"{name} {x.dtype} {list(x.shape)}".encode() + sha256(flat.numpy().data).digest()
        ).hexdigest()

    with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter lock: T5-XXL has 9.5 GB
        return sha256("".join(pool.map(digest, sorted(module.state_dict().items()))).encode()).hexdigest()
