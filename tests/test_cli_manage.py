"""The frame of the command line, `presets`, `adapters` and `doctor`; packaging agrees with the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import align_cli
from align_cli import config, packaged, registry
from align_cli.adapters import AdapterInfo, load_adapter, write_adapter
from align_cli.cli import doctor
from align_cli.cli.main import app
from align_cli.cli.text import columns

ROOT = Path(__file__).resolve().parent.parent


def call(*args: str):
    return CliRunner().invoke(app, [str(a) for a in args])


def assert_one_line(result, *parts: str) -> None:
    """The result of a user error: exit code 2, one line `error: ...` on stderr, nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


# ------------------------------------------------------------------ the frame


def test_version_from_the_real_command():
    done = subprocess.run(
        [sys.executable, "-m", "align_cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"t2ialign {align_cli.__version__}\n"


def test_help_lists_what_works_and_nothing_else():
    result = call("--help")
    assert result.exit_code == 0
    listed = re.findall(r"^  (\w+)  ", result.stdout.partition("Commands:")[2], re.MULTILINE)
    assert listed == ["train", "sample", "edit", "encode", "eval", "doctor", "presets", "adapters"]
    assert call().stdout == result.stdout


@pytest.mark.parametrize("command", ["train", "sample", "eval"])
def test_help_names_what_an_option_wants(command):
    options = [line for line in call(command, "--help").stdout.splitlines() if line.startswith("  --")]
    assert not any("<" in line for line in options), options


MISTAKES = [
    ["sample"],
    ["sample", "--prompt", "x", "--model", "tiny-sd51"],
    ["sample", "--prompt", "x", "--device", "foo"],
    ["sample", "--prompt", "x", "--dtype", "foo"],
    ["sample", "--prompt", "x", "--sampler", "foo"],
    ["sample", "--prompt", "x", "--steps", "0"],
    ["sample", "--prompt", "x", "--steps", "1001"],
    ["sample", "--prompt", "x", "--image-size", "33"],
    ["sample", "--prompt", "x", "--adapter", "nowhere"],
    ["sample", "--prompt", "x", "--out", "full"],
    ["eval", "shapes", "--n", "0"],
    ["eval", "shapes", "--split", "foo"],
    ["eval", "shapes", "--interval", "foo"],
    ["eval", "shapes", "--steps", "1001"],
    ["eval", "shapes", "--adapter", "nowhere"],
    ["eval", "shapes", "--arm", "half"],
    ["eval", "shapes", "--vs", "half"],
    ["eval", "shapes", "--scorers", "clap"],
    ["eval", "shapes", "--weights", "clip"],
    ["eval", "shapes", "--images", "nowhere"],
    ["eval", "nowhere.csv"],
    ["eval", "dpt-probe"],
    ["eval", "dpt-probe", "--adapter", "nowhere"],
    ["eval", "parti", "--prompts", "nowhere.tsv"],
    ["train", "softrepa", "--device", "foo"],
    ["train", "softrepa", "--set", "train.lr=foo"],
    ["adapters", "info", "nowhere"],
    ["adapters", "import", "softrepa", "nowhere", "--out", "out"],
    ["adapters", "import", "dpt", "nowhere", "--out", "out"],
    ["adapters", "import", "softrepa", "full", "--model", "sd51", "--out", "out"],
]
EARLY = """
import sys
from align_cli.cli.main import app
for line in sys.stdin:
    try:
        app(line.split(), prog_name="t2ialign")
    except SystemExit as error:
        print(error.code, "torch" in sys.modules, line)
"""


@pytest.mark.slow
def test_mistakes_are_found_before_torch_is_imported(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").touch()
    done = subprocess.run(
        [sys.executable, "-c", EARLY], input="\n".join(map(" ".join, MISTAKES)), cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if line and not line.startswith("2 False ")] == []
    assert len(done.stderr.splitlines()) == len(MISTAKES)
    assert all(line.startswith("error: ") for line in done.stderr.splitlines()), done.stderr


HELP = """
import sys
from align_cli.cli.main import main
sys.argv = ["t2ialign", *sys.argv[1:]]
try:
    main()
finally:
    print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""


@pytest.mark.parametrize("command", ["", "train", "train comat", "sample", "edit", "encode", "eval"])
def test_help_loads_no_heavy_package(command):
    """What keeps it quick."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, *command.split(), "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: t2ialign" in done.stdout
    loaded = set(done.stderr.split())
    assert {"align_cli", "typer"} <= loaded
    assert not loaded & {"accelerate", "diffusers", "numpy", "peft", "PIL", "rich", "torch", "transformers"}


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? (see t2ialign --help)"),
        (["presets", "shwo", "x"], "see t2ialign presets --help"),
        (["doctor", "--jsno"], "No such option"),
        (["presets", "show"], "Missing argument 'NAME'"),
        (["--nothing"], "No such option"),
        (["sample", "--n"], "Option '--n' requires an argument (see t2ialign sample --help)"),
        (["train", "softrepa", "--set"], "Option '--set' requires an argument (see t2ialign train --help)"),
        (["presets"], "Missing command (see t2ialign presets --help)"),
    ],
)
def test_usage_errors_are_one_line(args, part):
    assert_one_line(call(*args), part)


def test_user_error_from_the_real_command():
    done = subprocess.run(
        [sys.executable, "-m", "align_cli", "presets", "show", "softrepa/sd51"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown preset 'softrepa/sd51'; did you mean 'softrepa/sd15'?")
    assert done.stderr.count("\n") == 1


def test_own_warnings_are_one_line():
    code = (
        "from align_cli import config; from align_cli.cli import main; import warnings;"
        "warnings.showwarning = main._show_warning;"
        "warnings.warn_explicit('mine', UserWarning, config.__file__, 1); warnings.warn('theirs')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[0] == "warning: mine"
    assert "UserWarning: theirs" in done.stderr


# ------------------------------------------------------------------ presets


def test_presets_list_and_show():
    lines = call("presets", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == packaged.list_presets()
    assert all(len(line.split()) > 3 for line in lines)
    text = call("presets", "show", "softrepa/sd15").stdout
    assert text == (packaged.preset_dir() / "softrepa" / "sd15.toml").read_text()


# ------------------------------------------------------------------ adapters


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter folder as a SoftREPA run leaves it, with the run's whole configuration."""
    resolved = config.resolve("softrepa", sets=["train.lr=0.002"])
    info = AdapterInfo(
        method="softrepa",
        model_id="tiny-sd15",
        family="sd15",
        step=17,
        seed=3,
        config=resolved.to_dict(),
        origin=dict(resolved.origin),
    )
    write_adapter(tmp_path / "a", info, {"dc_tokens": torch.zeros(4, 128)})
    return tmp_path / "a"


def test_adapters_info(adapter):
    result = call("adapters", "info", adapter)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["method", "softrepa"] in lines and ["family", "sd15"] in lines and ["step", "17"] in lines
    assert ["trained", "values", "512"] in lines
    assert ["tensor", "dc_tokens", "[4,", "128]", "float32"] in lines
    assert ["config", "train.lr", "0.002", "--set"] in lines
    assert ["config", "train.seed", "42", "preset", "softrepa/tiny-sd15"] in lines


def test_adapters_info_of_what_is_no_adapter(adapter, tmp_path):
    assert_one_line(call("adapters", "info", tmp_path / "none"), "does not exist")
    assert_one_line(call("adapters", "info", tmp_path), "is no adapter folder")
    tensors = adapter / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    assert_one_line(call("adapters", "info", adapter), "damaged")


def test_adapters_import(tmp_path):
    tokens = torch.nn.Parameter(torch.randn(4, 768, generator=torch.Generator().manual_seed(0)))
    torch.save(tokens, tmp_path / "dc_tokens.pth")
    out = tmp_path / "out"
    args = ("adapters", "import", "softrepa", tmp_path / "dc_tokens.pth", "--model", "sd15", "--out", out)
    result = call(*args)
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(load_adapter(out).state["dc_tokens"], tokens.detach(), rtol=0, atol=0)
    assert call("adapters", "info", out).exit_code == 0
    assert_one_line(call(*args), "exists already")


@pytest.mark.parametrize(
    ("method", "name", "part"),
    [
        ("softreap", "x.pth", "unknown method 'softreap'; did you mean 'softrepa'"),
        ("softrepa", "x.pth", "x.pth"),
    ],
)
def test_adapters_import_of_nothing(tmp_path, method, name, part):
    assert_one_line(call("adapters", "import", method, tmp_path / name, "--out", tmp_path / "out"), part)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ doctor


@pytest.fixture
def offline(monkeypatch):
    """No hub: `doctor` must not look for one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_doctor_json_and_text_agree():
    result = call("doctor", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == (1 if facts["problems"] else 0)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"][-1]["device"] == "cpu"
    assert facts["hub"].startswith("offline")
    assert set(facts["models"]) == {a for a, s in registry.MODELS.items() if not s.startswith("embedded:")}
    text = call("doctor").stdout
    headings = [line for line in text.splitlines() if line and line[0] != " "]
    assert headings[1] == "packages" and "optional extras" in headings and headings[-1] == "problems"
    assert f"torch            {torch.__version__}" in re.sub(r" {2,}", " " * 12, text)
    assert text.count("\n") >= len(facts["versions"]) + len(facts["models"])


@pytest.mark.usefixtures("offline")
def test_embedded_models_are_in_order():
    facts = doctor.examine()
    assert "tiny-sd15" in facts["embedded"]
    assert facts["problems"] == []


@pytest.mark.usefixtures("offline")
def test_an_extra_that_is_not_installed_is_no_problem(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"x": ("no-such-package-here",), "y": ("torch", "nor-this")})
    result = call("doctor")
    assert result.exit_code == 0 and "missing" not in result.stdout
    assert "x  not installed (pip install 't2ialign[x]')" in result.stdout
    assert f"y  torch {torch.__version__}, nor-this not installed (pip" in result.stdout


def test_doctor_sees_damaged_and_missing_weights(tmp_path):
    assert doctor.examine_weights(tmp_path / "none")["state"] == "missing"
    save_file({"x": torch.zeros(1000)}, tmp_path / "a.safetensors")
    assert doctor.examine_weights(tmp_path) == {"state": "ok", "mb": 0.0, "path": str(tmp_path)}
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    assert doctor.examine_weights(tmp_path)["state"].startswith("a.safetensors is damaged")


@pytest.mark.usefixtures("offline")
def test_a_problem_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(doctor, "CORE", ("torch", "no-such-package-here"))
    result = call("doctor")
    assert result.exit_code == 1
    assert "package no-such-package-here is not installed" in result.stdout


def test_cache_states(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert doctor.cache_state("owner/name") == "not cached"
    repo = tmp_path / "models--owner--name"
    snapshot = repo / "snapshots" / "abc"
    for part in ("unet", "vae"):
        (snapshot / part).mkdir(parents=True)
        (snapshot / part / "x.safetensors").touch()
    names = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    names |= {"text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_3": [None, None]}
    (snapshot / "model_index.json").write_text(json.dumps(names))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert doctor.cache_state("owner/name") == "incomplete (no text_encoder)"
    (snapshot / "text_encoder").mkdir()
    (snapshot / "text_encoder" / "pytorch_model.bin").touch()
    assert doctor.cache_state("owner/name") == "cached"
    names["text_encoder_3"] = ["transformers", "T5EncoderModel"]
    (snapshot / "model_index.json").write_text(json.dumps(names))
    assert doctor.cache_state("owner/name") == "incomplete (no text_encoder_3)"
    (snapshot / "model_index.json").write_text("[1]")
    assert doctor.cache_state("owner/name") == "damaged (model_index.json cannot be read)"


def test_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert doctor.hub_state().startswith("unreachable (http://127.0.0.1:9: ")


def test_columns():
    assert columns([("a", "bb", "c"), ("aaa", "b"), ()]) == "a    bb  c\naaa  b"


# ------------------------------------------------------------------ packaging


def test_doctor_knows_the_dependencies_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bare = lambda names: {re.match(r"[\w-]+", name)[0] for name in names}  # noqa: E731
    assert bare(project["dependencies"]) == set(doctor.CORE)
    extras = {extra: bare(names) for extra, names in project["optional-dependencies"].items()}
    assert extras == {extra: set(names) for extra, names in doctor.EXTRAS.items()}


def test_packaged_folders_exist():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, target in wheel["force-include"].items():
        assert any((ROOT / source).iterdir())
        assert target == f"align_cli/_data/{source}"
        assert packaged.data_dir(source).is_dir()


def test_the_changelog_has_this_version():
    assert f"## {align_cli.__version__}" in (ROOT / "CHANGELOG.md").read_text()
