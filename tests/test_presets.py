"""Every packaged preset loads, names the source of every value, and belongs to its folder."""

from __future__ import annotations

import re
import tomllib

import pytest

from align_cli import config, registry
from align_cli.errors import UserError

PRESETS = config.list_presets()


def test_the_presets_of_this_version_are_there():
    assert {"softrepa/sd15", "softrepa/sd15-dist", "softrepa/tiny-sd15"} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_resolves(name):
    method = name.partition("/")[0]
    resolved = config.resolve(method, preset=name)
    raw, _ = config.read_preset(name)
    assert raw["method"] == method
    for section, content in raw.items():
        if section == "method":
            continue
        for key in content:
            assert resolved.origin[f"{section}.{key}"] == f"preset {name}"
    assert resolved.model.name in registry.MODELS


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_names_its_source(name):
    lines = config.read_preset(name)[1].splitlines()
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


def test_unknown_preset_offers_the_nearest():
    with pytest.raises(UserError, match=r"unknown preset 'softrepa/sd51'; did you mean 'softrepa/sd15'\?"):
        config.read_preset("softrepa/sd51")


def test_preset_name_is_no_path():
    with pytest.raises(UserError, match="unknown preset"):
        config.read_preset("../pyproject")
