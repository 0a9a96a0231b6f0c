"""What drawing pictures and encoding them costs, counted as `step` counts a training step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from align_cli.models.base import BaseModel
from align_cli.models.empty import MODE, without_weights
from align_cli.planning.batch import PROMPT
from align_cli.planning.counting import Counting, WithoutNumbers
from align_cli.planning.model import planned_model
from align_cli.planning.stand_ins import stand_in_rewards
from align_cli.sampling import own_settings, sample
from align_cli.settings import ModelSettings, SampleSettings


@dataclass(frozen=True)
class WorkPlan:
    """One batch of `batch` pictures of `side` pixels. weights, peak: bytes. flops: by part."""

    batch: int
    side: int
    as_gpu: bool
    frozen: dict[str, int]
    weights: int
    peak: int
    flops: dict[str, int]
    uncounted: list[str] = field(default_factory=list)


def plan_drawing(
    model: ModelSettings,
    drawing: SampleSettings,
    scorers: list[str],
    open_keys: Collection[str],
    *,
    as_gpu: bool,
) -> WorkPlan:
    """Drawing one batch and scoring it. open_keys: settings that the model chooses itself."""

    def work(made: BaseModel, counting: Counting) -> list[str]:
        weights = dict.fromkeys(scorers, 1.0)
        rewards, unknown = stand_in_rewards(weights, {}, "official", torch.float32, counting)
        count = drawing.batch_size
        settings = own_settings(made, drawing, open_keys)
        pictures = sample(made, [PROMPT] * count, settings, list(range(count)))
        with torch.no_grad():
            for reward in rewards.values():
                reward.score(pictures, [PROMPT] * count)
        return [f"the scorer {name}" for name in unknown]

    return _planned(model, drawing.batch_size, work, as_gpu=as_gpu)


def plan_encoding(
    model: ModelSettings, batch: int, latent: tuple[int, int, int], *, text: bool, as_gpu: bool
) -> WorkPlan:
    """Encoding one batch of pictures with latents (C, h, w), and as many captions if `text`."""

    def work(made: BaseModel, _counting: Counting) -> list[str]:
        side = latent[1] * made.vae_factor
        with torch.no_grad():
            made.posterior(torch.zeros(batch, 3, side, side))
            if text:
                made.encode_text([PROMPT] * batch)
        return []

    return _planned(model, batch, work, as_gpu=as_gpu, denoiser=False)


def _planned(
    model: ModelSettings,
    batch: int,
    work: Callable[[BaseModel, Counting], list[str]],
    *,
    as_gpu: bool,
    denoiser: bool = True,
) -> WorkPlan:
    counting = Counting()
    with WithoutNumbers(as_gpu=as_gpu), without_weights():
        with MODE, counting:
            made = planned_model(model, counting, as_gpu=as_gpu, denoiser=denoiser)
        with counting:
            uncounted = work(made, counting)
    modules = {"denoiser": made.denoiser, "vae": made.vae}
    modules |= {f"text encoder {i + 1}": m for i, m in enumerate(made.encoders)}
    held = [m for name, m in modules.items() if denoiser or name != "denoiser"]
    return WorkPlan(
        batch=batch,
        side=made.image_size,
        as_gpu=as_gpu,
        frozen={name: sum(p.numel() for p in m.parameters()) for name, m in modules.items() if m in held},
        weights=sum(x.nbytes for m in held for x in m.parameters()),
        peak=counting.count.peak,
        flops=dict(counting.count.flops),
        uncounted=uncounted,
    )
