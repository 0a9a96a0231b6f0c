"""Latents that a model draws: their noise, their folder, and training data made of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_helpers import silent

from align_cli import sampling
from align_cli.data.base import collate
from align_cli.data.cache import DRAWN, Cache
from align_cli.data.cached import CachedDataset
from align_cli.data.drawn import PURPOSES, Drawer, DrawRequest, describe_drawn, item_seed, saved_request
from align_cli.data.encoding import make_index
from align_cli.data.filling import Filling, compare
from align_cli.data.prompt_lists import PromptDataset
from align_cli.errors import UserError
from align_cli.models.loading import load_model
from align_cli.settings import DataSettings, ModelSettings, SampleSettings
from align_cli.shapes.dataset import ShapesDataset

TEXTS = ["a red circle", "a blue square", "a red circle", "two green triangles", "a dog"]
FEW = SampleSettings(sampler="ddpm", steps=3, guidance=7.5)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "list.txt"
    path.write_text("\n\n".join(f"  {text} " for text in TEXTS) + "\n\n")
    return path


def request_for(model, data: DataSettings, **changes) -> DrawRequest:
    base = {"seed": 3, "batch_size": 2, "shard_items": 2, "purpose": "comat", "sample": FEW}
    held = ModelSettings(name=model.model_id, device="cpu")
    return DrawRequest(model=held, data=data, **{**base, **changes})


def drawer(model, data: DataSettings, **changes):
    request = request_for(model, data, **changes)
    cls = ShapesDataset if data.name == "shapes" else PromptDataset
    dataset = cls(data, seed=request.seed, split="train", pictures=False)
    index, settings = make_index(dataset, request), request.drawing(model)
    return Drawer(model, index, request, settings), describe_drawn(request, dataset, index, model, settings)


def fill(folder: Path, model, data: DataSettings, **changes) -> Cache:
    rows, about = drawer(model, data, **changes)
    with Filling(folder, about, rows.index) as work:
        work.run(rows, silent, silent)
    return Cache.read(folder)


def listed(prompts: Path) -> DataSettings:
    return DataSettings(name="prompts", path=str(prompts))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, tiny_models, prompts) -> Path:
    """Do not write into it."""
    folder = tmp_path_factory.mktemp("drawn") / "c"
    fill(folder, tiny_models["sd15"], listed(prompts))
    return folder


# ------------------------------------------------------------------ drawing


def test_official_settings():
    purpose = PURPOSES["comat"]
    s = purpose.settings()
    assert (s.sampler, s.steps, s.guidance) == ("ddpm", 50, 7.5)
    assert (purpose.image_size, purpose.batch_size) == (512, 8)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_what_is_stored_decodes_to_what_is_sampled(tiny_models, prompts, name):
    model = tiny_models[name]
    rows, _ = drawer(model, listed(prompts))
    found = rows.rows("images", range(2))["sample"]
    assert found.shape == (2, 4, 8, 8) and found.dtype == torch.float32
    settings = replace(FEW, batch_size=2, spacing=model.process.timestep_spacing)
    pictures = sampling.sample(model, TEXTS[:2], settings, [item_seed(3, 0), item_seed(3, 1)])
    assert torch.equal(model.decode(found).float(), pictures)


def test_the_noise_of_an_item_depends_on_seed_and_place_alone(tiny_models, prompts):
    model, data = tiny_models["sd15"], listed(prompts)

    def rows(numbers, **changes) -> torch.Tensor:
        return drawer(model, data, **changes)[0].rows("images", numbers)["sample"]

    whole = rows(range(5))
    assert torch.equal(rows([3, 1]), whole[[3, 1]])  # bit for bit in batches of one size
    assert torch.equal(rows([4]), whole[4:])
    torch.testing.assert_close(rows(range(5), batch_size=5), whole, rtol=1e-4, atol=1e-4)
    assert not torch.equal(rows(range(5), seed=4), whole)
    assert not torch.equal(whole[0], whole[2]), "the same prompt twice has two pictures"


def test_the_size_is_the_official_one_or_the_models_own(tiny_models, prompts):
    model, data = tiny_models["sd15"], listed(prompts)
    assert request_for(model, data).drawing(model).image_size == 32
    given = request_for(model, data, sample=replace(FEW, image_size=64))
    assert given.drawing(model).image_size == 64
    assert drawer(model, data, sample=replace(FEW, image_size=64))[0].shapes.latent == (4, 16, 16)
    published = replace(request_for(model, data), model=ModelSettings(name="sdxl"))
    assert published.known_latent() == (4, 64, 64)


def test_the_spacing_is_the_models_own_unless_chosen(tiny_v_folder, prompts):
    model = load_model(ModelSettings(name=str(tiny_v_folder), device="cpu"))
    data = listed(prompts)
    assert request_for(model, data).drawing(model).spacing == "trailing"
    assert request_for(model, data, own_spacing=False).drawing(model).spacing == "leading"


def test_latents_that_are_not_finite_are_refused(tiny_models, prompts, monkeypatch):
    rows, _ = drawer(tiny_models["sd15"], listed(prompts))
    monkeypatch.setattr(
        "align_cli.data.drawn.draw_latents", lambda *_: iter([torch.full((2, 4, 8, 8), torch.inf)])
    )
    with pytest.raises(UserError, match=r"latents of prompts \[0, 1\] are not finite.*--dtype bfloat16"):
        rows.rows("images", [0, 1])


def test_one_caption_for_one_picture(tiny_models, prompts):
    with pytest.raises(UserError, match="drawn for one caption"):
        request_for(tiny_models["sd15"], listed(prompts), captions="all")


# ------------------------------------------------------------------ the folder


def test_the_manifest_says_what_drew_them(drawn):
    about = Cache.read(drawn).about
    assert about["pictures"] == DRAWN and about["for"] == "comat"
    assert {key: about[key] for key in ("sampler", "spacing", "steps", "guidance", "image_size")} == {
        "sampler": "ddpm", "spacing": "leading", "steps": 3, "guidance": 7.5, "image_size": 32,
    }  # fmt: skip
    assert about["num_examples"] == 5 and about["scale"] == 1.0
    assert {"denoiser", "vae", "text_encoder", "tokenizer"} <= about["encoders"].keys()
    request = saved_request(about["settings"], "here")
    assert isinstance(request, DrawRequest) and request.sample.steps == 3
    with pytest.raises(UserError, match="here: settings that cannot be read"):
        saved_request({**about["settings"], "sample": {"stepps": 3}}, "here")


def test_drawn_again_they_have_the_same_bits(drawn, tiny_models, prompts):
    rows, _ = drawer(tiny_models["sd15"], listed(prompts))
    found = compare(Cache.read(drawn), rows, 3)
    assert (found.rows, found.identical) == (3, 3)


def test_all_prompts_in_order_with_duplicates(drawn):
    dataset = CachedDataset(DataSettings(name="prompts", cache=str(drawn)), seed=99)
    assert dataset.drawn and not dataset.exact and len(dataset) == 5
    examples = [dataset.get(i, np.random.default_rng(0)) for i in range(5)]
    assert [e.prompt for e in examples] == TEXTS
    assert all(e.pixels is None and e.text is None for e in examples)
    batch = collate(examples)
    assert batch.latents is not None and batch.latents.std is None
    assert torch.equal(batch.latents.draw(torch.ones(5, 4, 8, 8)), batch.latents.mean)


def test_fewer_and_none(drawn):
    few = CachedDataset(DataSettings(name="prompts", cache=str(drawn), num_examples=2))
    assert len(few) == 2
    assert len(CachedDataset(DataSettings(name="prompts", cache=str(drawn), num_examples=50))) == 5
    alone = CachedDataset(DataSettings(name="prompts", cache=str(drawn)), pictures=False)
    assert alone.get(0, np.random.default_rng(0)).latents is None
    with pytest.raises(UserError, match="the dataset 'prompts', now it is 'coco'"):
        CachedDataset(DataSettings(name="coco", cache=str(drawn)))


def test_shapes_hold_their_captions_whatever_the_seed(tmp_path, tiny_models):
    data = DataSettings(num_examples=3, mixture="pairs")
    fill(tmp_path / "c", tiny_models["sd15"], data)
    dataset = CachedDataset(replace(data, cache=str(tmp_path / "c")), seed=17)
    saved = json.loads((tmp_path / "c" / "items.json").read_text())["captions"]
    assert {dataset.get(i, np.random.default_rng(i)).prompt for i in range(3)} == set(saved)
    with pytest.raises(UserError, match=r"data.mixture 'pairs', now it is 'all'"):
        CachedDataset(replace(data, mixture="all", cache=str(tmp_path / "c")))


def test_whose_latents_they_are(drawn, tiny_models, make_tiny_sd15, tmp_path, recwarn):
    dataset = CachedDataset(DataSettings(name="prompts", cache=str(drawn)))
    dataset.check_model(tiny_models["sd15"])
    assert not recwarn.list
    with pytest.raises(UserError, match="family of the model 'sd15', now it is 'sdxl'"):
        dataset.check_model(tiny_models["sdxl"])
    other = make_tiny_sd15(tmp_path / "other", seed=5)
    with pytest.warns(UserWarning, match="drawn by another model than is trained: other weights of the den"):
        dataset.check_model(load_model(ModelSettings(name=str(other), device="cpu")))
    half = load_model(ModelSettings(name=str(other), device="cpu", dtype="bfloat16"))
    with pytest.warns(UserWarning, match="drawn by another model than is trained: the model '"):
        dataset.check_model(half)


def test_a_flow_draws_with_its_own_sampler_unless_another_was_asked_for(tiny_models, tmp_path):
    model = tiny_models["sd3"]
    prompts = tmp_path / "list.txt"
    prompts.write_text("a red circle\na blue square\n")
    data = DataSettings(name="prompts", path=str(prompts))
    assert FEW.sampler == "ddpm"
    assert request_for(model, data).drawing(model).sampler == "euler"
    with pytest.raises(UserError, match="ddpm is not for flow-matching models"):
        request_for(model, data, own_sampler=False).drawing(model)
    assert request_for(tiny_models["sd15"], data).drawing(tiny_models["sd15"]).sampler == "ddpm"
