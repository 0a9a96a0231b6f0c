"""Published ways to run a benchmark, where they differ from ours: the noise, the settings, the averages.

Letters: B pictures of a batch, C h w latent, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from align_cli.errors import UserError, unknown
from align_cli.evaluation.official import hpsv2_table
from align_cli.models.base import BaseModel
from align_cli.pictures import to_uint8
from align_cli.rewards.base import Reward
from align_cli.sampling import sample
from align_cli.settings import SampleSettings


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a paper ran a benchmark.

    benchmark: the one it belongs to. sample: sampler, steps, guidance; its batch size is part of the
    protocol. seed: of the one generator that all start noise comes from, batch after batch (`start_noise`).
    dtype: of the model. scorers: registered names, in the order reported. preprocessing: of all of them.
    matrix: scorers whose mean is over all B x B pairs of a batch and not over its B own pairs. jpeg: scores
    are of the pictures as they come back from JPEG files (`as_jpeg`), else of the decoder's floats. styles:
    reported is HPSv2's table, of pictures in batches of one, else the mean of all.
    """

    name: str
    benchmark: str
    sample: SampleSettings
    seed: int
    dtype: str
    scorers: tuple[str, ...]
    preprocessing: str
    matrix: frozenset[str] = frozenset()
    jpeg: bool = False
    styles: bool = False
    source: str

    def __post_init__(self) -> None:
        if self.styles and self.sample.batch_size != 1:
            raise ValueError(f"styles need batches of one picture, got {self.sample.batch_size}")


def _textcraftor(batch_size: int) -> SampleSettings:
    """Its timesteps 999, 959, ..., 39 are DDIM's trailing ones."""
    return SampleSettings(
        sampler="ddim", spacing="trailing", steps=25, guidance=7.5, eta=0.0, batch_size=batch_size
    )


PROTOCOLS = (
    Protocol(
        name="textcraftor",
        benchmark="parti",
        sample=_textcraftor(4),
        seed=2023,
        dtype="float32",
        scorers=("clip-g14", "pickscore", "hpsv2", "aesthetic"),
        preprocessing="textcraftor",
        matrix=frozenset({"pickscore"}),
        source="TextCraftor, test_parti.py",
    ),
    Protocol(
        name="textcraftor",
        benchmark="hpsv2",
        sample=_textcraftor(1),
        seed=2023,
        dtype="float32",
        scorers=("hpsv2",),
        preprocessing="official",
        jpeg=True,
        styles=True,
        source="TextCraftor, test_hpsv2.py and its copy of hpsv2 (v2.0); pictures that Stable Diffusion's "
        "safety checker blacks out there are kept here, and the scorer runs in float32",
    ),
)
"""All of them; `--protocol` takes the name, the benchmark tells which is meant."""


def protocol(name: str, benchmark: str) -> Protocol:
    """The protocol of that name. UserError if there is none, or none for this benchmark."""
    named = {found.benchmark: found for found in PROTOCOLS if found.name == name}
    if not named:
        raise unknown("protocol", name, {found.name for found in PROTOCOLS})
    if benchmark not in named:
        raise UserError(f"protocol {name} is of the benchmark {' or '.join(named)}, not of {benchmark}")
    return named[benchmark]


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
    if chosen.jpeg:
        images = as_jpeg(images)
    for name in chosen.scorers:
        if name in chosen.matrix:
            every = images.repeat_interleave(len(prompts), 0)
            scores = rewards[name].score(every, list(prompts) * len(images))
        else:
            scores = rewards[name].score(images, prompts)
        means[name] = float(scores.mean())
    return means


def as_jpeg(images: Tensor) -> Tensor:
    """(B, 3, H, W) float32: the pictures once they were written as JPEG files, with Pillow's own quality, and
    read again. One with a NaN is NaN everywhere, so that its score is.
    """
    read = []
    for picture in map(np.ascontiguousarray, to_uint8(images.nan_to_num())):
        file = BytesIO()
        Image.fromarray(picture).save(file, format="JPEG")
        read.append(np.asarray(Image.open(file)))
    pixels = torch.from_numpy(np.stack(read)).to(images.device).permute(0, 3, 1, 2).float() / 255
    return pixels.masked_fill(images.isnan().flatten(1).any(1).view(-1, 1, 1, 1), float("nan"))


def averages(
    chosen: Protocol,
    batches: Iterable[tuple[int, Mapping[str, float]]],
    groups: Sequence[Mapping[str, str]] = (),
) -> dict[str, float]:
    """The numbers that are printed: batch means, weighted by the batches' sizes; or those of HPSv2's table
    (100 x score, and its std) style by style, which in TextCraftor's copy has no line for all pictures.

    Args:
        batches: (pictures, scorer -> mean) of every batch. groups: of every picture's prompt; "Style" is read
            where the protocol wants it.
    """
    noted = list(batches)
    if chosen.styles:
        styles = [group["Style"] for group in groups]
        return {
            f"{name} {label}": value
            for name in chosen.scorers
            for row in hpsv2_table(np.array([means[name] for _, means in noted]), styles)[:-1]
            for label, value in ((row.label, row.value), (f"{row.label} std", row.std or 0.0))
        }
    total = sum(size for size, _ in noted)
    return {name: sum(size * means[name] for size, means in noted) / total for name in chosen.scorers}
