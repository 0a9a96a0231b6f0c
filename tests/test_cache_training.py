"""Training from encodings: the bits of encoding on the fly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cache_helpers import FAMILIES, SEED, encode, open_data
from training_helpers import settings, trace

from align_cli.data.cached import CachedDataset
from align_cli.errors import UserError
from align_cli.methods.softrepa.config import SoftREPAConfig
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.models.loading import load_model
from align_cli.settings import DataSettings, ModelSettings
from align_cli.shapes.dataset import ShapesDataset
from align_cli.training.loop import train


def run(model, dataset, out: Path, *, config: SoftREPAConfig | None = None, **changes) -> list[str]:
    """The trace of a few real steps."""
    config = config or SoftREPAConfig(temperature=0.3, init="normal", num_layers=1, stages="TTT")
    method = SoftREPA(model, config, seed=SEED)
    train(
        method, dataset, settings(**{"steps": 6, "lr": 1e-3, **changes}), out, config={"method": "softrepa"}
    )
    return trace(out)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_from_the_cache_is_bit_identical(tmp_path, tiny_models, tiny_coco, name):
    """Three epochs of two batches; captions and posterior are drawn afresh in each."""
    model = tiny_models[name]
    expected = run(model, open_data(tiny_coco), tmp_path / "plain", batch_size=2)
    encode(tmp_path / "c", model, tiny_coco, batch_size=2)
    stored = CachedDataset(replace(tiny_coco, path="", cache=str(tmp_path / "c")), seed=SEED)
    assert run(model, stored, tmp_path / "cached", batch_size=2) == expected
    assert len(expected) == 6 and len(set(expected)) == 6


def test_half_precision_under_autocast_is_bit_identical(tmp_path, tiny_sd3_folder, tiny_coco):
    """Encoders run outside autocast, in the loop as beforehand."""
    model = load_model(ModelSettings(name=str(tiny_sd3_folder), device="cpu", dtype="bfloat16"))
    options = {"batch_size": 2, "precision": "bf16", "steps": 2}
    expected = run(model, open_data(tiny_coco), tmp_path / "plain", **options)
    cache = encode(tmp_path / "c", model, tiny_coco, batch_size=2)
    assert cache.shapes.text_dtype == cache.shapes.latent_dtype == "bfloat16"
    stored = CachedDataset(replace(tiny_coco, cache=str(tmp_path / "c")), seed=SEED)
    assert run(model, stored, tmp_path / "cached", **options) == expected


def test_shapes_with_one_caption_each(tmp_path, tiny_models):
    """The stored caption is that of the first epoch; loader processes read the shards, too."""
    model, data = tiny_models["sd15"], DataSettings(num_examples=16)
    expected = run(model, ShapesDataset(data, seed=SEED), tmp_path / "plain", steps=4)
    encode(tmp_path / "c", model, data, captions="random")
    stored = CachedDataset(replace(data, cache=str(tmp_path / "c")), seed=SEED)
    method = SoftREPA(model, SoftREPAConfig(temperature=0.3, init="normal", stages="TTT"), seed=SEED)
    options = settings(steps=4, lr=1e-3)
    train(method, stored, options, tmp_path / "cached", config={"method": "softrepa"}, num_workers=1)
    assert trace(tmp_path / "cached") == expected
    hard = SoftREPAConfig(hard_negatives=1)
    with pytest.raises(UserError, match="gives 0 false captions"):
        run(model, stored, tmp_path / "hard", config=hard)


def test_the_small_layout_keeps_captions_and_negatives_fresh(tmp_path, tiny_models):
    model, data = tiny_models["sd15"], DataSettings(num_examples=8, mixture="pairs")
    config = SoftREPAConfig(temperature=0.3, hard_negatives=2)
    expected = run(model, ShapesDataset(data, seed=SEED), tmp_path / "plain", config=config)
    cache = encode(tmp_path / "c", model, data, layout="captions")
    assert {s.kind for s in cache.plan} == {"images"}
    assert "text_encoder" not in cache.about["encoders"]
    stored = CachedDataset(replace(data, cache=str(tmp_path / "c")), seed=SEED)
    stored.check_model(model)
    assert run(model, stored, tmp_path / "cached", config=config) == expected
