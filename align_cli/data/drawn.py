"""Latents that a model itself draws for the prompts of a dataset, stored in the folder of cache.py.

For methods that learn from examples of what the original model draws (CoMat keeps its look by them). A row of
a shard of pictures holds `sample`, the final latent (C, h, w) float32 in the scale of the denoiser. Text is
encoded in the loop. Source: CoMat's tools/gan_gt_generate.py, for all prompts of a list, in its order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align_cli.checks import one_of
from align_cli.data.base import Dataset
from align_cli.data.cache import DRAWN, Index, Shapes, drawing_identity, known_shapes, reading
from align_cli.data.encoding import Measured, Report, Request, describe, device_name
from align_cli.data.shards import Field
from align_cli.diffusion.samplers import samplers_of
from align_cli.errors import UserError
from align_cli.models.base import BaseModel
from align_cli.sampling import check_settings, draw_latents, own_settings
from align_cli.settings import SampleSettings

NOISE = 105
"""Third word of the seed of an item's noise; see training.order and data.encoding for others."""


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """How a method wants its examples drawn. image_size: pixels per side, at most; a smaller model draws at
    its own size.
    """

    sampler: str
    steps: int
    guidance: float
    image_size: int
    batch_size: int

    def settings(self) -> SampleSettings:
        """The picture's size is left open."""
        return SampleSettings(sampler=self.sampler, steps=self.steps, guidance=self.guidance)


PURPOSES = {"comat": Purpose(sampler="ddpm", steps=50, guidance=7.5, image_size=512, batch_size=8)}
"""Values of `t2ialign encode --for` besides pictures. Source: gan_gt_generate.py."""


@dataclass(frozen=True)
class DrawRequest(Request):
    """What is to be drawn with what, for which method.

    own_spacing: nobody chose sample.spacing, so that the model's own holds. own_sampler: nobody chose
    sample.sampler, so that a flow draws with its own. sample.image_size 0: see Purpose.
    """

    layout: str = "captions"
    posterior: str = "sample"
    shard_items: int = 64
    purpose: str = ""
    sample: SampleSettings = field(default_factory=SampleSettings)
    own_spacing: bool = True
    own_sampler: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("--for", self.purpose, tuple(PURPOSES))
        if self.captions == "all":
            raise UserError(
                "a picture is drawn for one caption, so not for all of an item; take --captions first or "
                "random (one each)"
            )

    def drawing(self, model: BaseModel) -> SampleSettings:
        """The settings with nothing left open. UserError for some that the model cannot draw with."""
        side = self.sample.image_size or min(PURPOSES[self.purpose].image_size, model.image_size)
        settings = replace(self.sample, image_size=side, batch_size=self.batch_size)
        open_keys = {"spacing"} if self.own_spacing else set()
        if self.own_sampler and settings.sampler not in samplers_of(model.process):
            open_keys.add("sampler")
        settings = own_settings(model, settings, open_keys)
        check_settings(model, settings)
        return settings

    def known_latent(self) -> tuple[int, int, int] | None:
        """(C, h, w) for a published model, without its files; None for another."""
        side = self.sample.image_size or PURPOSES[self.purpose].image_size
        found = known_shapes(self.model.name, side, "float32", 0)
        return None if found is None else found.latent


def saved_request(raw: Mapping[str, Any], where: str) -> Request:
    """Inverse of `Request.to_json`, of a DrawRequest, too. UserError naming `where` if it is none."""
    if "purpose" not in raw:
        return Request.from_json(raw, where)
    try:
        sample = SampleSettings(**raw["sample"])
    except (KeyError, TypeError) as error:
        raise Request.unreadable(error, where) from error
    return DrawRequest.from_json({**raw, "sample": sample}, where)


def latent_of(model: BaseModel, settings: SampleSettings) -> tuple[int, int, int]:
    """(C, h, w) of what is drawn."""
    side = settings.image_size // model.vae_factor
    return model.latent_channels, side, side


def shapes_of(latent: tuple[int, int, int]) -> Shapes:
    """Of a cache that holds latents (C, h, w) alone."""
    return Shapes(latent, "float32", (0, 0), "float32", (), 0)


def describe_drawn(
    request: DrawRequest, dataset: Dataset, index: Index, model: BaseModel, settings: SampleSettings
) -> dict[str, Any]:
    """The manifest of a cache of drawn latents without its shards. settings: with nothing left open."""
    measured = Measured(shapes_of(latent_of(model, settings)), settings.image_size, 1.0, 0.0)
    about = describe(request, dataset, index, model, measured)
    about.pop("interpolation", None)
    drawn = {"pictures": DRAWN, "for": request.purpose, "text": reading(model)}
    facts = {key: value for key, value in asdict(settings).items() if key in DRAWING}
    return about | drawn | facts | {"encoders": drawing_identity(model), "made_on": device_name(model.device)}


DRAWING = ("sampler", "spacing", "steps", "guidance", "eta")
"""Settings that the manifest names besides those that every manifest has."""


def item_seed(seed: int, index: int) -> int:
    """In [0, 2**63): all noise of item `index` comes from it."""
    return int(np.random.SeedSequence([seed, index, NOISE]).generate_state(1, np.uint64)[0] >> 1)


class Drawer:
    """Rows of a cache, drawn by a model; see `data.encoding.Rows`.

    The noise of item i depends on (seed, i) alone. Every forward pass has `batch_size` rows (the last one is
    filled up), so that a folder that was stopped and resumed has the bits of one that was not.
    """

    def __init__(
        self, model: BaseModel, index: Index, request: DrawRequest, settings: SampleSettings
    ) -> None:
        self.model, self.index, self.request, self.settings = model, index, request, settings
        self.shapes = shapes_of(latent_of(model, settings))

    def fields(self, kind: str) -> list[Field]:
        """The one tensor of a shard."""
        return self.shapes.image_fields(self.request.posterior)

    def rows(self, kind: str, numbers: Sequence[int], report: Report | None = None) -> dict[str, Tensor]:
        """sample (n, C, h, w) float32 of the items by their numbers, on the CPU.

        Raises:
            UserError: latents that are not finite.
        """
        size = self.settings.batch_size
        short = -len(numbers) % size
        padded = [*numbers, *[numbers[-1]] * short]
        drawn = draw_latents(
            self.model,
            [self.index.captions[self.index.items[i][0]] for i in padded],
            self.settings,
            [item_seed(self.request.seed, i) for i in padded],
        )
        found: list[Tensor] = []
        for start, z in zip(range(0, len(numbers), size), drawn, strict=True):
            part = z[: len(numbers) - start].float().cpu()
            if not torch.isfinite(part).all():
                raise UserError(
                    f"the latents of prompts {list(numbers[start : start + size])} are not finite in "
                    f"{self.model.dtype}; take --dtype bfloat16 or float32"
                )
            found.append(part)
            if report is not None:
                report(kind, len(part))
        return {"sample": torch.cat(found)}
