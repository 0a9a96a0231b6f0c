"""TextCraftor's protocols: noise and steps against diffusers, averages by hand, the whole command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reward_helpers import save_hps, tiny_clip
from torch import Tensor
from typer.testing import CliRunner

from align_cli.cli.main import app
from align_cli.errors import UserError
from align_cli.evaluation import protocols
from align_cli.evaluation.protocols import as_jpeg, averages, batch_means, protocol, run, start_noise
from align_cli.evaluation.sets import HPSV2_STYLES
from align_cli.pictures import to_uint8
from align_cli.rewards.base import Reward
from align_cli.rewards.loading import load_reward
from align_cli.sampling import sample

PROMPTS = ["a red circle", "a blue square", "two green triangles", "a red square", "a blue circle"]


def test_one_generator_for_all_batches():
    chosen = protocol("textcraftor", "parti")
    whole = list(start_noise(chosen, 10, (4, 8, 8), "cpu"))
    assert [len(part) for part in whole] == [4, 4, 2]
    expected = torch.randn((8, 4, 8, 8), generator=torch.Generator().manual_seed(2023))
    torch.testing.assert_close(torch.cat(whole[:2]), expected, rtol=0, atol=0)
    assert torch.equal(next(start_noise(chosen, 10, (4, 8, 8), "cpu", skip=2)), whole[2])


@pytest.mark.slow
@pytest.mark.parametrize(("benchmark", "size", "num"), [("parti", 4, 5), ("hpsv2", 1, 2)])
def test_pictures_are_those_of_a_diffusers_pipeline(tiny_sd15_folder, tiny_models, benchmark, size, num):
    """Batches of four, or of one, from one generator, 25 DDIM steps 999 ... 39, guidance 7.5."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd15_folder, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2023)
    chosen = protocol("textcraftor", benchmark)
    assert chosen.sample.batch_size == size and chosen.seed == 2023 and chosen.dtype == "float32"
    theirs = torch.cat(
        [
            pipe(
                part, num_inference_steps=25, guidance_scale=7.5, generator=generator, output_type="pt"
            ).images
            for part in (PROMPTS[i : min(i + size, num)] for i in range(0, num, size))
        ]
    )
    assert pipe.scheduler.timesteps.tolist() == list(range(999, 0, -40))
    model = tiny_models["sd15"]
    side = model.image_size // model.vae_factor
    noise = torch.cat(list(start_noise(chosen, num, (model.latent_channels, side, side), model.device)))
    ours = sample(model, PROMPTS[:num], chosen.sample, [0] * num, start_noise=noise)
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
    found = averages(chosen, [(2, first), (1, second)])
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


class Seen(Reward):
    """The mean of what it is shown, and keeps it."""

    def __init__(self) -> None:
        super().__init__(name="hpsv2", version="", source="", preprocessing="", scale="")
        self.images: list[Tensor] = []

    def score(self, images: Tensor, prompts) -> Tensor:
        self.images.extend(images)
        return images.flatten(1).mean(1)


def test_hpsv2_scores_what_is_in_the_jpeg_files(tiny_models, tmp_path):
    """The official script saves NAME.jpg and scores the files."""
    chosen = protocol("textcraftor", "hpsv2")
    assert chosen.scorers == ("hpsv2",) and chosen.preprocessing == "official"
    chosen = replace(chosen, sample=replace(chosen.sample, steps=2))
    drawn: dict[int, Tensor] = {}
    seen = Seen()
    noted = list(run(chosen, tiny_models["sd15"], PROMPTS, {"hpsv2": seen}, save=drawn.__setitem__))
    assert [size for size, _ in noted] == [1] * 5
    for i, image in drawn.items():
        Image.fromarray(to_uint8(image[None])[0]).save(tmp_path / f"{i:05d}.jpg")
        file = torch.from_numpy(np.array(Image.open(tmp_path / f"{i:05d}.jpg"))).permute(2, 0, 1) / 255
        assert torch.equal(seen.images[i], file) and not torch.equal(file, image)
        assert noted[i][1]["hpsv2"] == pytest.approx(float(file.mean()))
    broken = torch.stack([drawn[0], drawn[1]])
    broken[0, 0, 0, 0] = float("nan")
    assert as_jpeg(broken)[0].isnan().all() and torch.equal(as_jpeg(broken)[1], seen.images[1])


def test_hpsv2_reports_styles_by_hand():
    """The mean and the population std of the means of groups of 80, times 100; no line for all pictures."""
    chosen = protocol("textcraftor", "hpsv2")
    scores = [0.2] * 80 + [0.3] * 40 + [0.25] * 3
    groups = [{"Style": "anime"}] * 120 + [{"Style": "photo"}] * 3
    found = averages(chosen, [(1, {"hpsv2": x}) for x in scores], groups)
    assert list(found) == ["hpsv2 anime", "hpsv2 anime std", "hpsv2 photo", "hpsv2 photo std"]
    assert list(found.values()) == pytest.approx([25.0, 5.0, 25.0, 0.0])
    with pytest.raises(ValueError, match="batches of one picture, got 4"):
        replace(chosen, sample=replace(chosen.sample, batch_size=4))


def test_the_command_runs_hpsv2_as_textcraftor_does(tiny_sd15_folder, tmp_path, monkeypatch):
    """Two prompts of each style, in two steps: the numbers are those of JPEG files of the pictures."""
    chosen = protocol("textcraftor", "hpsv2")
    monkeypatch.setattr(protocols, "PROTOCOLS", (replace(chosen, sample=replace(chosen.sample, steps=2)),))
    monkeypatch.chdir(tmp_path)
    for style in HPSV2_STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"a {style} circle", f"a {style} square"]))
    save_hps(tmp_path / "hps", tiny_clip())
    result = CliRunner().invoke(app, [
        "eval", "hpsv2", "--prompts", ".", "--protocol", "textcraftor", "--model", str(tiny_sd15_folder),
        "--weights", "hpsv2=hps", "--device", "cpu", "--out", "e",
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    raw = json.loads((tmp_path / "e" / "results.json").read_text())
    assert raw["sample"]["batch_size"] == 1 and raw["sample"]["spacing"] == "trailing"
    found = raw["protocol"]["averages"]["base"]
    assert list(found)[::2] == [f"hpsv2 {style}" for style in HPSV2_STYLES]
    assert all(found[f"hpsv2 {style} std"] == 0 for style in HPSV2_STYLES)  # one group each
    reward = load_reward("hpsv2", source="hps")
    files = sorted((tmp_path / "e" / "images" / "base").glob("*.png"))
    pictures = [np.array(Image.open(file)) for file in files[:2]]
    images = as_jpeg(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255)
    wanted = 100 * float(reward.score(images, ["a anime circle", "a anime square"]).mean())
    assert found["hpsv2 anime"] == pytest.approx(wanted, abs=1e-4)
    assert f"protocol textcraftor: hpsv2 anime {found['hpsv2 anime']:.4f}" in " ".join(result.stdout.split())


def test_unknown_and_misplaced_protocols():
    with pytest.raises(UserError, match="unknown protocol 'textcrafter'; did you mean 'textcraftor'"):
        protocol("textcrafter", "parti")
    with pytest.raises(
        UserError, match="protocol textcraftor is of the benchmark parti or hpsv2, not of coco"
    ):
        protocol("textcraftor", "coco")
