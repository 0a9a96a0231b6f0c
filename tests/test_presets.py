"""Every packaged preset loads, names the source of every value, and belongs to its folder."""

from __future__ import annotations

import re
import tomllib

import pytest

from align_cli import config, packaged, registry
from align_cli.drawing import preset_of
from align_cli.errors import UserError

PRESETS = packaged.list_presets()


def test_the_presets_of_this_version_are_there():
    wanted = {f"softrepa/{name}" for m in ("sd15", "sdxl", "sd3") for name in (m, f"{m}-dist")}
    wanted |= {f"softrepa/tiny-{m}" for m in ("sd15", "sdxl", "sd3")}
    own = ("sd15-paper", "sd15-script", "sdxl", "sd3", "tiny-sd15", "tiny-sdxl", "tiny-sd3")
    wanted |= {f"textcraftor/{name}" for name in own}
    assert wanted <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_resolves(name):
    method = name.partition("/")[0]
    resolved = config.resolve(method, preset=name)
    raw, _ = packaged.read_preset(name)
    assert raw["method"] == method
    for section, content in raw.items():
        if section == "method":
            continue
        for key in content:
            assert resolved.origin[f"{section}.{key}"] == f"preset {name}"
    assert resolved.model.name in registry.MODELS


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_names_its_source(name):
    lines = packaged.read_preset(name)[1].splitlines()
    assert lines[0].startswith("# "), "the first line says what the preset is"
    for line in lines:
        if line.strip() and not line.startswith(("#", "[")):
            assert re.fullmatch(r"\w+ = .+  # source: \S.*", line), line


@pytest.mark.parametrize("name", PRESETS)
def test_config_file_written_from_a_preset_reads_back(name, tmp_path):
    method = name.partition("/")[0]
    resolved = config.resolve(method, preset=name)
    path = tmp_path / "config.toml"
    path.write_text(resolved.to_toml())
    assert config.resolve(method, preset="none", config_file=path) == resolved
    tomllib.loads(resolved.to_toml())


def test_official_values_of_sd15():
    r = config.resolve("softrepa", flags={"model.name": "sd15"})
    assert r.origin["train.lr"] == "preset softrepa/sd15"
    assert (r.train.batch_size, r.train.steps, r.train.lr, r.train.weight_decay) == (4, 2 * 29571, 1e-3, 1e-4)
    assert (r.train.lr_schedule, r.train.lr_every, r.train.lr_period) == ("cosine-restarts", 500, 10)
    assert (r.sample.steps, r.sample.guidance, r.sample.spacing) == (30, 7.0, "leading")
    assert r.method_config.dweight == 10.0 and r.method_config.num_tokens == 4


def test_official_values_of_sdxl_and_sd3():
    """run_train.sh; --model alone must lead to it."""
    xl = config.resolve("softrepa", flags={"model.name": "sdxl"})
    assert (xl.train.batch_size, xl.train.steps, xl.data.image_size) == (4, 29571, 512)
    assert (xl.sample.sampler, xl.sample.steps, xl.sample.guidance) == ("ddim", 30, 7.0)
    m = xl.method_config
    assert (m.num_tokens, m.stages, m.use_t_table, m.dweight, m.init) == (4, "TTF", False, 10.0, "normal")
    sd3 = config.resolve("softrepa", flags={"model.name": "sd3"})
    assert (sd3.model.dtype, sd3.model.t5_length, sd3.train.precision) == ("float16", 512, "fp16")
    assert (sd3.train.batch_size, sd3.train.steps, sd3.train.lr, sd3.train.weight_decay) == (
        4,
        59142,
        1e-3,
        1e-4,
    )
    assert (sd3.train.lr_schedule, sd3.train.lr_every, sd3.train.lr_min) == ("cosine-restarts", 500, 1e-5)
    assert (sd3.sample.sampler, sd3.sample.steps, sd3.sample.guidance) == ("euler", 28, 4.0)
    assert sd3.sample.image_size == xl.sample.image_size == sd3.edit.image_size == 1024
    m = sd3.method_config
    assert (m.num_tokens, m.num_layers, m.token_space, m.use_t_table) == (4, 5, "text", True)
    assert (m.dweight, m.init, m.init_noise, m.temperature, m.logit_scale) == (0.0, "normal", 0.02, 0.07, 4.0)
    assert (m.min_t, m.max_t, m.noise_rows, m.pair_chunk, m.hard_negatives) == (0, 1000, 0, 16, 0)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_distributed_commands(name):
    """run_train_dist.sh: two processes of 8 images, noise for 4 at a time, dweight dropped, two epochs."""
    r = config.resolve("softrepa", preset=f"{name}-dist")
    m = r.method_config
    assert (r.model.name, r.train.batch_size, r.train.accumulation, r.train.steps) == (name, 8, 2, 14786)
    assert (m.noise_rows, m.pair_chunk, m.dweight, m.use_t_table) == (4, 16, 0.0, name != "sdxl")
    assert m.num_layers == 5 if name == "sd3" else m.stages == "TFF"


@pytest.mark.parametrize("name", ["sd3", "sd3-dist"])
def test_official_values_of_editing(name):
    """edit_sd3.py and the README, with tokens."""
    e = config.resolve("softrepa", preset=name).edit
    assert (e.steps, e.n_start, e.src_guidance, e.tgt_guidance, e.convention) == (
        50,
        30,
        3.5,
        9.0,
        "softrepa",
    )
    assert (e.n_min, e.n_avg, e.image_size, e.keep_aspect) == (0, 1, 1024, False)


def test_unknown_preset_offers_the_nearest():
    with pytest.raises(UserError, match=r"unknown preset 'softrepa/sd51'; did you mean 'softrepa/sd15'\?"):
        packaged.read_preset("softrepa/sd51")


def test_what_a_model_draws_with_stays_when_methods_come():
    """The preset of a method that draws as the model is drawn elsewhere, SDXL at its own size."""
    for name in ("sd15", "sdxl", "sd3", "tiny-sd15", "tiny-sdxl", "tiny-sd3"):
        assert preset_of(name) == f"softrepa/{name}"


def test_preset_name_is_no_path():
    with pytest.raises(UserError, match="unknown preset"):
        packaged.read_preset("../pyproject")


def test_official_values_of_textcraftor():
    """PickScore of the released script is of 4 x 4 pairs, 8 such batches in a step."""
    r = config.resolve("textcraftor", preset="textcraftor/sd15-script")
    assert (r.train.batch_size, r.train.accumulation, r.method_config.pickscore_pairing) == (4, 8, "batch")
    assert r.method_config.rewards == {"clip-g14": 50, "aesthetic": 3, "pickscore": 1, "hpsv2": 100}
    assert r.method_config.literal_split
    paper = config.resolve("textcraftor", preset="textcraftor/sd15-paper")
    assert paper.train.batch_size * paper.train.accumulation == 256  # prompts of a step
    assert paper.method_config.rewards == {"clip-g14": 100, "aesthetic": 1, "pickscore": 1, "hpsv2": 100}
    for c in (r, paper):
        m = c.method_config
        assert (m.steps, m.guidance, m.spacing, m.grad_steps, m.test_grad_steps) == (25, 7.5, "lead", 5, 15)
        assert (c.train.lr, c.train.weight_decay, c.train.precision) == (1e-6, 0.01, "fp32")
        assert (c.sample.sampler, c.sample.steps, c.sample.spacing) == ("ddim", 25, "lead")
