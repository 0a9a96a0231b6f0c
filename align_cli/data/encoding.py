"""What is to be encoded with what, and the encoders at work on rows of a dataset; layouts: see cache.py."""

from __future__ import annotations

import json
import platform
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from align_cli.checks import one_of, require
from align_cli.data.base import Captioned, Dataset, draw_caption
from align_cli.data.cache import (
    CAPTIONS,
    FORMAT,
    GENERATED,
    LAYOUTS,
    POSTERIORS,
    Index,
    Part,
    Shapes,
    dtype_name,
    encoder_identity,
    reading,
)
from align_cli.data.shards import Field
from align_cli.errors import UserError
from align_cli.models.base import BaseModel, Posterior
from align_cli.settings import DataSettings, ModelSettings
from align_cli.training.order import item_rng

DRAW = 104
"""Third word of the seed of a frozen draw; see training.order for the others."""
AHEAD = 3
"""Batches of pictures that are read while one is encoded."""

Report = Callable[[str, int], None]
"""Called as (kind of rows, how many more are done)."""


@dataclass(frozen=True)
class Request:
    """What is to be encoded with what. batch_size: rows of every encoder call."""

    model: ModelSettings
    data: DataSettings
    seed: int = 42
    batch_size: int = 4
    layout: str = "exact"
    posterior: str = "mean-std"
    captions: str = "random"
    shard_items: int = 256

    def __post_init__(self) -> None:
        one_of("--layout", self.layout, LAYOUTS)
        one_of("--posterior", self.posterior, POSTERIORS)
        one_of("--captions", self.captions, CAPTIONS)
        require(self.batch_size >= 1, f"--batch-size must be >= 1, got {self.batch_size}")
        require(self.shard_items >= 1, f"--shard-items must be >= 1, got {self.shard_items}")

    def to_json(self) -> dict[str, Any]:
        """For the manifest. The devices are this machine's own matter."""
        return asdict(replace(self, model=replace(self.model, device="auto", encoder_device="")))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Self:
        """Inverse of `to_json`. UserError naming `where` if it is none."""
        try:
            model, data = ModelSettings(**raw["model"]), DataSettings(**raw["data"])
            return cls(**{**raw, "model": model, "data": data})
        except (KeyError, TypeError) as error:
            raise cls.unreadable(error, where) from error

    @staticmethod
    def unreadable(error: Exception, where: str) -> UserError:
        """What is said of a manifest whose settings are none."""
        return UserError(f"{where}: settings that cannot be read ({error}); encode again with --overwrite")


def plan_arguments(request: Request, items: int, captions: int) -> dict[str, Any]:
    """Arguments of `cache.plan` besides the shapes."""
    return {
        "layout": request.layout,
        "posterior": request.posterior,
        "items": items,
        "captions": captions,
        "shard_items": request.shard_items,
    }


# ---------------------------------------------------------------- before anything is written


def make_index(dataset: Dataset, request: Request) -> Index:
    """Which captions every item gets.

    first: the first of its captions; random: the one that the first epoch of a run with this seed draws; all.
    A dataset that draws captions from a grammar has no list: first and random are its first epoch's.

    Raises:
        UserError: all captions of such a dataset, unless the text is encoded in the loop.
    """
    listed = dataset if isinstance(dataset, Captioned) else None
    if listed is None and request.captions == "all":
        if request.layout == "captions":
            return Index([], [], [])
        raise UserError(
            f"{request.data.name} draws its captions afresh at every access, so they cannot all be stored; "
            "take --captions random (one each), or --layout captions, which encodes text in the loop"
        )
    numbers: dict[str, int] = {}
    items = []
    for i in range(len(dataset)):
        rng = item_rng(request.seed, 0, i)
        if listed is None:
            texts = [dataset.get(i, rng).prompt]
        elif request.captions == "random":
            captions = listed.captions_of(i)
            texts = [captions[draw_caption(captions, rng)]]
        else:
            texts = listed.captions_of(i)[: 1 if request.captions == "first" else None]
        items.append([numbers.setdefault(text, len(numbers)) for text in texts])
    return Index([] if listed is None else list(listed.ids), list(numbers), items)


@dataclass(frozen=True)
class Measured:
    """What the encoders of a model give. image_size: pixels of the picture; scale, shift: see Posterior."""

    shapes: Shapes
    image_size: int
    scale: float
    shift: float


@torch.no_grad()
def measure(model: BaseModel, pixels: Tensor) -> Measured:
    """Encode a picture (3, H, W) and a caption, to see shapes and dtypes."""
    posterior = model.posterior(pixels[None])
    text = model.encode_text([""])
    channels, height, width = posterior.mean.shape[1:]
    rows, columns = text.tokens.shape[1:]
    parts = [Part("tokens", 0, rows, columns)]
    if model.family == "sd3":
        m: Any = model
        clip = sum(int(encoder.config.hidden_size) for encoder in m.encoders[:2])
        parts = [Part("clip", 0, m.clip_length, clip)]
        if m.t5_tokenizer is not None:
            parts.append(Part("t5", m.clip_length, rows, columns))
    shapes = Shapes(
        latent=(channels, height, width),
        latent_dtype=dtype_name(posterior.mean.dtype),
        text=(rows, columns),
        text_dtype=dtype_name(text.tokens.dtype),
        parts=tuple(parts),
        pooled=0 if text.pooled is None else text.pooled.shape[1],
    )
    return Measured(shapes, pixels.shape[-1], posterior.scale, posterior.shift)


def describe(
    request: Request, dataset: Dataset, index: Index, model: BaseModel, measured: Measured
) -> dict[str, Any]:
    """The manifest of a cache without its shards."""
    data = request.data
    about: dict[str, Any] = {
        "format": FORMAT,
        "model_id": model.model_id,
        "family": model.family,
        "dtype": dtype_name(model.dtype),
        "data": data.name,
        "image_size": measured.image_size,
        **({"mixture": data.mixture} if data.name in GENERATED else {"interpolation": data.interpolation}),
        "num_examples": len(dataset),
        "seed": request.seed,
        "fingerprint": dataset.fingerprint(),
        "layout": request.layout,
        "posterior": request.posterior,
        "captions": request.captions,
        "batch_size": request.batch_size,
        "shard_items": request.shard_items,
        "captions_stored": len(index.captions),
        "index_sha256": sha256(index.to_text().encode()).hexdigest(),
        "shapes": asdict(measured.shapes),
        "scale": measured.scale,
        "shift": measured.shift,
        "encoders": encoder_identity(model, text=request.layout != "captions"),
    }
    if request.layout != "captions":
        about["text"] = reading(model)
    if model.family == "sd3":
        about["t5_length"] = getattr(model, "t5_length", None)
    about["settings"] = request.to_json()
    about["made_on"] = device_name(model.encoder_device)
    packages = ("torch", "diffusers", "transformers")
    about["versions"] = {"python": platform.python_version()} | {name: version(name) for name in packages}
    plain: dict[str, Any] = json.loads(json.dumps(about))  # tuples become lists, as they are when read back
    return plain


def device_name(device: torch.device) -> str:
    """ "NVIDIA H200", "cpu", ..."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---------------------------------------------------------------- encoding


class Rows(Protocol):
    """What gives the rows of a cache."""

    shapes: Shapes
    index: Index

    def fields(self, kind: str) -> list[Field]:
        """Tensors of a shard of this kind."""
        ...

    def rows(self, kind: str, numbers: Sequence[int], report: Report | None = None) -> dict[str, Tensor]:
        """The tensors of pictures or captions by their numbers, (n, ...) each, on the CPU. UserError if they
        cannot be made.
        """
        ...


class Encoder:
    """Rows of a cache from a model and a dataset; every encoder call has `batch_size` rows."""

    def __init__(
        self, model: BaseModel, dataset: Dataset, index: Index, shapes: Shapes, request: Request
    ) -> None:
        self.model, self.dataset, self.index = model, dataset, index
        self.shapes, self.request = shapes, request

    def fields(self, kind: str) -> list[Field]:
        """Tensors of a shard of this kind."""
        if kind == "images":
            return self.shapes.image_fields(self.request.posterior)
        return self.shapes.caption_fields()

    def rows(self, kind: str, numbers: Sequence[int], report: Report | None = None) -> dict[str, Tensor]:
        """The tensors of pictures or captions by their numbers, (n, ...) each, on the CPU.

        Raises:
            UserError: a picture cannot be read, or an encoder gives numbers that are not finite.
        """
        batches = self._images(numbers) if kind == "images" else self._captions(numbers)
        out = {
            f.name: torch.empty(len(numbers), *f.shape, dtype=getattr(torch, f.dtype))
            for f in self.fields(kind)
        }
        start = 0
        for tensors in batches:
            count = min(self.request.batch_size, len(numbers) - start)
            for name, x in tensors.items():
                if not torch.isfinite(x[:count]).all():
                    where = "pictures" if kind == "images" else "captions"
                    raise UserError(
                        f"the encodings of {where} {list(numbers[start : start + count])} are not finite in "
                        f"{x.dtype}; take --dtype bfloat16 or float32 (SDXL's own autoencoder overflows in "
                        "float16: --set model.vae=madebyollin/sdxl-vae-fp16-fix)"
                    )
                out[name][start : start + count] = x[:count]
            start += count
            if report is not None:
                report(kind, count)
        return out

    @torch.no_grad()
    def _images(self, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        for pixels, batch in self._pictures(numbers):
            found = self.model.posterior(torch.stack(pixels))
            assert found.std is not None
            if self.request.posterior == "mean-std":
                yield {"mean": found.mean.cpu(), "std": found.std.cpu()}
            else:
                noise = torch.stack([draw_noise(self.request.seed, i, self.shapes.latent) for i in batch])
                yield {"sample": Posterior(found.mean, found.std, 1.0).draw(noise).cpu()}

    @torch.no_grad()
    def _captions(self, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        for batch in self._batches(numbers):
            yield self.shapes.split(self.model.encode_text([self.index.captions[i] for i in batch]))

    def _batches(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Of equal size: the last one is filled up with its last row."""
        size = self.request.batch_size
        for start in range(0, len(numbers), size):
            batch = list(numbers[start : start + size])
            yield batch + batch[-1:] * (size - len(batch))

    def _pictures(self, numbers: Sequence[int]) -> Iterator[tuple[list[Tensor], list[int]]]:
        """Pixels batch by batch; a few batches are read ahead by threads."""

        def read(i: int) -> Tensor:
            pixels = self.dataset.get(i, item_rng(self.request.seed, 0, i)).pixels
            assert pixels is not None
            return pixels

        waiting: deque[tuple[list[Future[Tensor]], list[int]]] = deque()
        pool = ThreadPoolExecutor(max(1, self.request.data.num_workers))
        try:
            for batch in self._batches(numbers):
                new = {i: pool.submit(read, i) for i in dict.fromkeys(batch)}
                waiting.append(([new[i] for i in batch], batch))
                if len(waiting) > AHEAD:
                    futures, these = waiting.popleft()
                    yield [future.result() for future in futures], these
            for futures, these in waiting:
                yield [future.result() for future in futures], these
        finally:
            pool.shutdown(cancel_futures=True)


def draw_noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """The noise (C, h, w) of the one draw of item `index` that is stored with posterior sample."""
    words = np.random.SeedSequence([seed, index, DRAW]).generate_state(1, np.uint64)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(int(words[0] >> 1)))
