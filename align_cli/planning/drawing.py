"""What drawing pictures and encoding them costs, counted as `step` counts a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from align_cli.models.base import BaseModel
from align_cli.models.empty import MODE, without_weights
from align_cli.planning.batch import PROMPT
from align_cli.planning.counting import Counting, WithoutNumbers
from align_cli.planning.model import planned_model
from align_cli.planning.stand_ins import stand_in_rewards
from align_cli.sampling import draw_latents, sample
from align_cli.settings import ModelSettings, SampleSettings


@dataclass(frozen=True)
class WorkPlan:
    """One batch of `batch` pictures of `side` pixels. weights, peak: bytes; of weights those on the device
    all the time. flops: by part.
    """

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
    batch: int,
    drawing: Callable[[BaseModel], SampleSettings],
    scorers: list[str],
    *,
    as_gpu: bool,
    latents: bool = False,
) -> WorkPlan:
    """Drawing one batch and scoring it. drawing: the settings with nothing left open. latents: nothing is
    decoded.
    """

    def work(made: BaseModel, counting: Counting) -> list[str]:
        weights = dict.fromkeys(scorers, 1.0)
        rewards, unknown = stand_in_rewards(weights, {}, "official", torch.float32, counting)
        given = made, [PROMPT] * batch, drawing(made), list(range(batch))
        if latents:
            list(draw_latents(*given))
            return []
        pictures = sample(*given)
        with torch.no_grad():
            for reward in rewards.values():
                reward.score(pictures, [PROMPT] * batch)
        return [f"the scorer {name}" for name in unknown]

    return _planned(model, batch, work, as_gpu=as_gpu)


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
        weights = counting.count.held
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
        weights=weights,
        peak=counting.count.peak,
        flops=dict(counting.count.flops),
        uncounted=uncounted,
    )
