"""Layers, types, provenance and errors of the run configuration; the registry; what an import costs."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Literal

import pytest

from align_cli import config, registry
from align_cli.errors import UserError
from align_cli.settings import EvalSettings, MethodConfig


@dataclass(frozen=True, kw_only=True)
class ToyConfig(MethodConfig):
    """A method's config with every supported type."""

    weights: tuple[float, ...] = (1.0,)
    size: tuple[int, int] = (1, 2)
    mode: Literal["a", "b"] = "a"
    limit: int | None = None
    on: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        if self.weights and min(self.weights) < 0:
            raise UserError("toy.weights must be >= 0")


@pytest.fixture
def toy(monkeypatch):
    """A registered method `toy` without presets; `toy(...)` resolves it."""
    monkeypatch.setitem(registry.METHOD_CONFIGS, "toy", f"{__name__}:ToyConfig")
    return lambda *sets, **kwargs: config.resolve("toy", **{"preset": "none", "sets": list(sets), **kwargs})


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


# ------------------------------------------------------------------ layers


def test_each_layer_wins_over_the_one_below(tmp_path):
    file = write(tmp_path, "[train]\nlr = 0.1\nsteps = 11\nbatch_size = 12\n")
    r = config.resolve(
        "softrepa",
        preset="softrepa/sd15",
        config_file=file,
        sets=["train.steps=21", "train.batch_size=22"],
        flags={"train.batch_size": 32, "train.seed": None},
    )
    assert (r.train.lr, r.train.steps, r.train.batch_size, r.train.seed) == (0.1, 21, 32, 42)
    assert r.origin["train.tracker"] == "default"
    assert r.origin["train.seed"] == "preset softrepa/sd15"
    assert r.origin["train.lr"] == f"file {file}"
    assert r.origin["train.steps"] == "--set"
    assert r.origin["train.batch_size"] == "--batch-size"


@pytest.mark.parametrize(
    ("kwargs", "preset"),
    [
        ({}, "softrepa/tiny-sd15"),
        ({"flags": {"model.name": "sd15"}}, "softrepa/sd15"),
        ({"flags": {"model.name": "stable-diffusion-v1-5/stable-diffusion-v1-5"}}, "softrepa/sd15"),
        ({"sets": ["model.name=sd15"]}, "softrepa/sd15"),
        ({"sets": ["model.name=sd15"], "flags": {"model.name": "tiny-sd15"}}, "softrepa/tiny-sd15"),
        ({"preset": "sd15-dist"}, "softrepa/sd15-dist"),
    ],
)
def test_default_preset_follows_the_model(kwargs, preset):
    assert config.resolve("softrepa", **kwargs).origin["train.lr"] == f"preset {preset}"


def test_model_of_the_config_file_chooses_the_preset(tmp_path):
    file = write(tmp_path, 'method = "softrepa"\n[model]\nname = "sd15"\n')
    assert config.resolve("softrepa", config_file=file).origin["train.lr"] == "preset softrepa/sd15"


def test_model_without_preset_lists_presets(tmp_path):
    with pytest.raises(UserError, match=r"no preset for the model .*--preset \(softrepa/sd15, .*none"):
        config.resolve("softrepa", flags={"model.name": str(tmp_path)})
    r = config.resolve("softrepa", preset="sd15", flags={"model.name": tmp_path})
    assert r.model.name == str(tmp_path) and r.origin["model.name"] == "--model"


def test_preset_of_another_method(toy):
    with pytest.raises(UserError, match="preset softrepa/sd15: is for the method 'softrepa', but .* 'toy'"):
        toy(preset="softrepa/sd15")


# ------------------------------------------------------------------ types


def test_types_of_set_values(toy):
    c = toy(
        "toy.weights=[1, 2.5]", "toy.size=[3, 4]", "toy.mode=b", "toy.limit=5", "toy.on=true", "toy.label=7"
    ).method_config
    assert c == ToyConfig(weights=(1.0, 2.5), size=(3, 4), mode="b", limit=5, on=True, label="7")
    assert all(type(w) is float for w in c.weights)
    assert toy('toy.label="a = b"').method_config.label == "a = b"
    assert toy("toy.label=a=b").method_config.label == "a=b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr=fast", "--set train.lr=fast: train.lr must be a number, got 'fast'"),
        ("train.lr=true", "train.lr must be a number, got True"),
        ("train.lr=inf", "train.lr must be a finite number"),
        ("train.steps=true", "train.steps must be a whole number, got True"),
        ("train.steps=1.5", "train.steps must be a whole number, got 1.5"),
        ("toy.on=1", "toy.on must be true or false, got 1"),
        ("toy.on=True", "toy.on must be true or false, got 'True'"),
        ("toy.weights=1", "toy.weights must be a list, got 1"),
        ("toy.weights=[1, 'x']", r"toy.weights\[1\] must be a number, got 'x'"),
        ("toy.size=[1]", "toy.size must be a list of 2 values, got 1"),
        ("toy.mode=c", "toy.mode must be one of a, b, got 'c'"),
        ("toy.limit=x", "toy.limit must be a whole number, got 'x'"),
        ("train.lrr=1", "unknown key 'train.lrr'; did you mean 'train.lr'"),
        ("lr=1", "unknown key 'lr'; did you mean 'train.lr'"),
        ("trian.lr=1", "unknown section 'trian'; did you mean 'train'"),
        ("softrepa.dweight=1", "unknown section 'softrepa'"),
        ("train.lr", "write it as section.key=value"),
        ("train.steps=0", "--set: train.steps must be >= 1, got 0"),
        ("toy.weights=[-1]", "--set: toy.weights must be >= 0"),
    ],
)
def test_bad_set(toy, text, message):
    with pytest.raises(UserError, match=message):
        toy(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlr = 'x'\n", "run.toml: train.lr must be a number, got 'x'"),
        ("[train]\nlr = -1\n", "run.toml: train.lr must be > 0"),
        ("[train]\nlearning_rate = 1\n", "run.toml: unknown key 'train.learning_rate'"),
        ("[sampel]\nsteps = 1\n", "run.toml: unknown section 'sampel'; did you mean 'sample'"),
        ("steps = 1\n", "run.toml: unknown key 'steps'; did you mean 'train.steps' or 'sample.steps'"),
        ("train = 1\n", "run.toml: unknown section 'train'"),
        ("method = 'comat'\n", "run.toml: is for the method 'comat', but the method here is 'toy'"),
        ("[train\n", "run.toml: is not valid TOML"),
    ],
)
def test_bad_file(toy, tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        toy(config_file=write(tmp_path, text))


def test_unreadable_files(toy, tmp_path):
    with pytest.raises(UserError, match=r"none\.toml: cannot be read: No such file"):
        toy(config_file=tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        toy(config_file=tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        toy(config_file=tmp_path / "latin.toml")


def test_bad_flag_names_the_flag(toy):
    with pytest.raises(UserError, match=r"^--lr: train.lr must be > 0, got -1"):
        toy(flags={"train.lr": -1.0})


def test_an_impossible_value_is_blamed_on_its_own_layer(toy, tmp_path):
    file = write(tmp_path, "[train]\nsteps = 5\n")
    with pytest.raises(UserError, match=r"^--set: train.batch_size must be >= 1"):
        toy("train.batch_size=0", config_file=file)


def test_required_setting(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Needy(MethodConfig):
        path: str

    monkeypatch.setattr(sys.modules[__name__], "Needy", Needy, raising=False)
    monkeypatch.setitem(registry.METHOD_CONFIGS, "needy", f"{__name__}:Needy")
    with pytest.raises(UserError, match=r"needy\.path has no default and must be set"):
        config.resolve("needy", preset="none")
    assert config.resolve("needy", preset="none", sets=["needy.path=x"]).method_config == Needy(path="x")


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ((), "eval.kinds must name at least one kind"),
        (("long", "long"), "eval.kinds names long twice"),
        (("quad",), "eval.kinds must be one of single, pair, count, triple, long, got 'quad'"),
    ],
)
def test_kinds_of_prompts(kinds, message):
    with pytest.raises(UserError, match=message):
        EvalSettings(kinds=kinds)
    assert EvalSettings(kinds=("long", "single")).kinds == ("long", "single")


def test_unsupported_type_is_a_bug_not_a_user_error():
    with pytest.raises(TypeError, match="not supported"):
        config.convert({}, dict, "x")


# ------------------------------------------------------------------ the result


def test_dict_round_trip(toy):
    r = toy("toy.weights=[1, 2]", "train.lr=0.5")
    raw = json.loads(json.dumps(r.to_dict()))
    again = config.Resolved.from_dict(raw, r.origin)
    assert again == r and again.origin == r.origin
    assert raw["toy"]["weights"] == [1.0, 2.0]


def test_toml_round_trip(toy, tmp_path):
    r = toy('toy.label="tab\\t quote\\" \\u00e9"', "toy.on=true", "train.lr=1e-7", "toy.size=[5, 6]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = toy(config_file=write(tmp_path, r.to_toml()))
    assert again == r
    assert "# --set" in r.to_toml()


def test_saved_config_without_a_key_takes_the_default_and_rejects_unknown_ones(toy):
    raw = toy("train.lr=0.5").to_dict()
    del raw["train"]["tracker"]
    again = config.Resolved.from_dict(raw)
    assert again.train.tracker == "none" and again.origin["train.tracker"] == "default"
    assert again.origin["train.lr"] == "saved config"
    raw["train"]["warp"] = 9
    with pytest.raises(UserError, match="saved config: unknown key 'train.warp'"):
        config.Resolved.from_dict(raw)
    with pytest.raises(UserError, match="old: no method named"):
        config.Resolved.from_dict({}, where="old")


def test_values_covers_every_setting_once(toy):
    keys = [key for key, _, _ in toy().values()]
    assert len(keys) == len(set(keys)) == len(toy().origin)
    assert keys[0] == "model.name" and keys[-1] == "toy.label"
    assert {k: v for k, v, _ in toy("toy.limit=3").values()}["toy.limit"] == 3


# ------------------------------------------------------------------ settings without effect


def test_a_setting_without_effect_is_a_warning(toy):
    with pytest.warns(
        UserWarning, match=r"train.lr_every \(from --set\) has no effect: train.lr_schedule is not"
    ):
        toy("train.lr_every=5")
    with pytest.warns(UserWarning, match=r"data.path \(from --data-path\) has no effect"):
        toy(flags={"data.path": Path("x")})


def test_no_warning_for_presets_and_for_settings_that_work(toy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.resolve("softrepa")
        toy("train.lr_every=5", "train.lr_schedule=cosine-restarts", "sample.eta=1")


# ------------------------------------------------------------------ registry and imports


def test_registry_errors_offer_the_nearest():
    with pytest.raises(UserError, match=r"unknown method 'softreap'; did you mean 'softrepa'\?"):
        registry.load(registry.METHODS, "softreap")
    with pytest.raises(UserError, match=r"unknown method 'softreap'; did you mean 'softrepa'\?"):
        config.resolve("softreap")
    with pytest.raises(UserError, match="unknown model 'sd51'; did you mean 'sd15'"):
        config.resolve("softrepa", flags={"model.name": "sd51"})


def test_model_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert registry.model_source("sd14") == "CompVis/stable-diffusion-v1-4"
    assert registry.model_source("tiny-sd15") == "embedded:tiny-sd15"
    assert registry.model_source("owner/name") == "owner/name"
    assert registry.model_source("mine") == "mine"
    with pytest.raises(UserError, match=r"model folder '\./yours' does not exist"):
        registry.model_source("./yours")


@pytest.mark.parametrize(
    "table",
    [
        registry.METHODS,
        registry.METHOD_CONFIGS,
        registry.DATASETS,
        registry.GROUNDED,
        registry.BENCHMARKS,
        registry.REWARDS,
    ],
    ids=lambda t: t.kind,
)
def test_every_registered_name_can_be_imported(table):
    wanted = FunctionType if table in (registry.BENCHMARKS, registry.REWARDS) else type
    for name in table:
        assert isinstance(registry.load(table, name), wanted)


def test_every_method_has_a_config_and_knows_it():
    assert set(registry.METHODS) == set(registry.METHOD_CONFIGS)
    for name in registry.METHODS:
        method = registry.load(registry.METHODS, name)
        assert method.name == name
        assert method.config_class is registry.load(registry.METHOD_CONFIGS, name)


def test_the_command_line_and_the_configuration_import_no_torch():
    code = (
        "import sys, align_cli.cli.main, align_cli.config as c; c.resolve('softrepa');"
        "print(*({'torch', 'diffusers', 'transformers', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
