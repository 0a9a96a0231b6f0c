"""TextCraftor's PartiPrompts protocol: its noise and steps against diffusers, its averages by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from align_cli.errors import UserError
from align_cli.evaluation.protocols import averages, batch_means, protocol, run, start_noise
from align_cli.rewards.base import Reward
from align_cli.sampling import sample

PROMPTS = ["a red circle", "a blue square", "two green triangles", "a red square", "a blue circle"]


def test_one_generator_for_all_batches():
    chosen = protocol("textcraftor", "parti")
    whole = list(start_noise(chosen, 10, (4, 8, 8), "cpu"))
    assert [len(part) for part in whole] == [4, 4, 2]
    expected = torch.randn((8, 4, 8, 8), generator=torch.Generator().manual_seed(2023))
    torch.testing.assert_close(torch.cat(whole[:2]), expected, rtol=0, atol=0)
    assert torch.equal(next(start_noise(chosen, 10, (4, 8, 8), "cpu", skip=2)), whole[2])


def test_pictures_are_those_of_a_diffusers_pipeline(tiny_sd15_folder, tiny_models):
    """Batches of four from one generator, 25 DDIM steps 999 ... 39, guidance 7.5."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd15_folder, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2023)
    chosen = protocol("textcraftor", "parti")
    assert chosen.sample.batch_size == 4
    theirs = torch.cat(
        [
            pipe(
                part, num_inference_steps=25, guidance_scale=7.5, generator=generator, output_type="pt"
            ).images
            for part in (PROMPTS[:4], PROMPTS[4:])
        ]
    )
    assert pipe.scheduler.timesteps.tolist() == list(range(999, 0, -40))
    model = tiny_models["sd15"]
    side = model.image_size // model.vae_factor
    noise = torch.cat(list(start_noise(chosen, 5, (model.latent_channels, side, side), model.device)))
    ours = sample(model, PROMPTS, chosen.sample, [0] * 5, start_noise=noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


class Table(Reward):
    """Scores a picture by its first pixel times the length of the prompt."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, version="", source="", preprocessing="", scale="")

    def score(self, images: Tensor, prompts) -> Tensor:
        return images[:, 0, 0, 0] * torch.tensor([float(len(p)) for p in prompts])


def test_averages_by_hand():
    """Own pairs, but all pairs of a batch in PickScore's mean; batches weigh by size."""
    chosen = protocol("textcraftor", "parti")
    rewards = {name: Table(name) for name in chosen.scorers}
    images = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    first = batch_means(chosen, rewards, images[:2], ["a", "abc"])
    assert list(first) == ["clip-g14", "pickscore", "hpsv2", "aesthetic"]
    assert first["hpsv2"] == pytest.approx((1 * 1 + 2 * 3) / 2)
    assert first["pickscore"] == pytest.approx((1 + 3 + 2 + 6) / 4)
    second = batch_means(chosen, rewards, images[2:], ["ab"])
    assert second["pickscore"] == second["aesthetic"] == pytest.approx(6.0)
    found = averages([(2, first), (1, second)])
    assert found["hpsv2"] == pytest.approx((2 * 3.5 + 6) / 3) and found["pickscore"] == pytest.approx(4.0)
    diagonal = replace(chosen, matrix=frozenset())
    assert batch_means(diagonal, rewards, images[:2], ["a", "abc"])["pickscore"] == pytest.approx(3.5)


def test_a_run_that_goes_on_draws_the_same(tiny_models):
    """Two batches in one go, and the second alone after the first."""
    model = tiny_models["sd15"]
    chosen = protocol("textcraftor", "parti")
    chosen = replace(chosen, sample=replace(chosen.sample, steps=2))
    rewards = {name: Table(name) for name in chosen.scorers}
    pictures: dict[int, Tensor] = {}
    whole = list(run(chosen, model, PROMPTS, rewards, save=pictures.__setitem__))
    assert [size for size, _ in whole] == [4, 1] and sorted(pictures) == [0, 1, 2, 3, 4]
    later: dict[int, Tensor] = {}
    assert list(run(chosen, model, PROMPTS, rewards, done=1, save=later.__setitem__)) == whole[1:]
    assert list(later) == [4] and torch.equal(later[4], pictures[4])
    assert whole[1][1] == batch_means(chosen, rewards, pictures[4][None], PROMPTS[4:])
    assert list(run(chosen, model, PROMPTS, rewards, done=2)) == []


def test_unknown_and_misplaced_protocols():
    with pytest.raises(UserError, match="unknown protocol 'textcrafter'; did you mean 'textcraftor'"):
        protocol("textcrafter", "parti")
    with pytest.raises(UserError, match="protocol textcraftor is of the benchmark parti, not of coco"):
        protocol("textcraftor", "coco")
