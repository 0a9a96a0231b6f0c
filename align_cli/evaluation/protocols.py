"""Published ways to run a benchmark, where they differ from ours: the noise, the settings, the averages.

Letters: B pictures of a batch, C h w latent, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align_cli.errors import UserError, unknown
from align_cli.models.base import BaseModel
from align_cli.rewards.base import Reward
from align_cli.sampling import sample
from align_cli.settings import SampleSettings


@dataclass(frozen=True)
class Protocol:
    """How a paper ran a benchmark.

    benchmark: the one it belongs to. sample: sampler, steps, guidance; its batch size is part of the
    protocol. seed: of the one generator that all start noise comes from, batch after batch (`start_noise`).
    dtype: of the model. scorers: registered names, in the order reported. preprocessing: of all of them.
    matrix: scorers whose mean is over all B x B pairs of a batch and not over its B own pairs. file: name of
    picture i. Scores are of the decoder's floats, not of the saved picture.
    """

    name: str
    benchmark: str
    sample: SampleSettings
    seed: int
    dtype: str
    scorers: tuple[str, ...]
    preprocessing: str
    matrix: frozenset[str]
    file: str
    source: str


PROTOCOLS = {
    "textcraftor": Protocol(
        name="textcraftor",
        benchmark="parti",
        sample=SampleSettings(
            sampler="ddim", spacing="trailing", steps=25, guidance=7.5, eta=0.0, batch_size=4
        ),
        seed=2023,
        dtype="float32",
        scorers=("clip-g14", "pickscore", "hpsv2", "aesthetic"),
        preprocessing="textcraftor",
        matrix=frozenset({"pickscore"}),
        file="{:03d}.png",
        source="TextCraftor, test_parti.py; its timesteps 999, 959, ..., 39 are DDIM's trailing ones",
    )
}
"""Name -> protocol, as `--protocol` takes it."""


def protocol(name: str, benchmark: str) -> Protocol:
    """The protocol of that name. UserError if there is none, or it is of another benchmark."""
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    found = PROTOCOLS[name]
    if found.benchmark != benchmark:
        raise UserError(f"protocol {name} is of the benchmark {found.benchmark}, not of {benchmark}")
    return found


def run(
    chosen: Protocol,
    model: BaseModel,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    *,
    done: int = 0,
    save: Callable[[int, Tensor], None] | None = None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Draw and score with the model as it is now: (pictures, `batch_means`) of every batch, for `averages`.

    Args:
        rewards: the protocol's scorers with its preprocessing, by name.
        done: batches of an earlier run that are not drawn again; the others come out as they would have.
        save: called as (number of the picture, (3, H, W) float32 in [0, 1]).
    """
    size = chosen.sample.batch_size
    side = (chosen.sample.image_size or model.image_size) // model.vae_factor
    noises = start_noise(chosen, len(prompts), (model.latent_channels, side, side), model.device, done)
    for start, noise in zip(range(done * size, len(prompts), size), noises, strict=True):
        texts = list(prompts[start : start + size])
        images = sample(model, texts, chosen.sample, [chosen.seed] * len(texts), start_noise=noise)
        if save is not None:
            for k, image in enumerate(images):
                save(start + k, image)
        yield len(texts), batch_means(chosen, rewards, images, texts)


def start_noise(
    chosen: Protocol, num: int, shape: tuple[int, int, int], device: torch.device | str, skip: int = 0
) -> Iterator[Tensor]:
    """Start noise (B, C, h, w) float32 of every batch: one generator on `device`, seeded once.

    Picture i so depends on the batch size and on what was drawn before it; and a GPU's generator gives other
    numbers than a CPU's. Every arm of a comparison gets the same.

    Args:
        num: pictures in all; the last batch may be smaller. shape: C, h, w. skip: batches that are drawn
            and not given, for a run that goes on.
    """
    generator = torch.Generator(device).manual_seed(chosen.seed)
    size = chosen.sample.batch_size
    for batch, start in enumerate(range(0, num, size)):
        noise = torch.randn((min(size, num - start), *shape), generator=generator, device=device)
        if batch >= skip:
            yield noise


def batch_means(
    chosen: Protocol, rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[str]
) -> dict[str, float]:
    """What the protocol notes of one batch: scorer -> mean over its pairs, or over all pairs.

    Args:
        rewards: those of the protocol, by name. images: (B, 3, H, W) in [0, 1], from the decoder.
    """
    means = {}
    for name in chosen.scorers:
        if name in chosen.matrix:
            every = images.repeat_interleave(len(prompts), 0)
            scores = rewards[name].score(every, list(prompts) * len(images))
        else:
            scores = rewards[name].score(images, prompts)
        means[name] = float(scores.mean())
    return means


def averages(batches: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The numbers that are printed: batch means, weighted by the batches' sizes.

    Args:
        batches: (pictures, scorer -> mean) of every batch.
    """
    sums: dict[str, float] = {}
    total = 0
    for size, means in batches:
        total += size
        for name, mean in means.items():
            sums[name] = sums.get(name, 0.0) + size * mean
    return {name: value / total for name, value in sums.items()}
