"""The golden numbers kept in the repository, and that check_golden.py notices when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import check_golden
import pytest
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"


def run(capsys, *args: object) -> tuple[int, list[str]]:
    code = check_golden.main([str(a) for a in args])
    return code, capsys.readouterr().out.splitlines()


@pytest.fixture
def one_case(tmp_path) -> Path:
    """A copy that holds a single quick case."""
    folder = tmp_path / "golden" / "softrepa" / "sd15"
    folder.mkdir(parents=True)
    source = GOLDEN / "softrepa" / "sd15"
    case = json.loads((source / "case.json").read_text())
    case["cases"] = {"predict_dct_TFF": case["cases"]["predict_dct_TFF"]}
    (folder / "case.json").write_text(json.dumps(case))
    for name in ("model.config.json", "model.safetensors", "predict_dct_TFF.safetensors"):
        shutil.copy(source / name, folder / name)
    return tmp_path / "golden"


def test_all(capsys):
    code, lines = run(capsys, GOLDEN)
    assert code == 0
    assert lines[-1] == f"{len(lines) - 1} passed, 0 failed"
    assert all(line.endswith("  ok") for line in lines[:-1])
    text = "\n".join(lines)
    for case in json.loads((GOLDEN / "softrepa" / "sd15" / "case.json").read_text())["cases"]:
        assert f"softrepa/sd15/{case}/" in text
    for quantity in (
        "loss_dw0",
        "loss_dw10",
        "grad_dc_tokens_dw10",
        "grad_dc_t_tokens_dw0",
        "latent_out",
        "timesteps",
    ):
        assert f"/{quantity}  " in text


def test_line_format(capsys, one_case):
    code, lines = run(capsys, one_case)
    assert code == 0
    name, error, tol, verdict = lines[0].split("  ")
    assert (name, verdict) == ("softrepa/sd15/predict_dct_TFF/output", "ok")
    assert float(error) <= float(tol)
    code, lines = run(capsys, one_case / "softrepa" / "sd15")
    assert lines[0].startswith("softrepa/sd15/predict_dct_TFF/output  ")


@pytest.mark.parametrize("factor", [1.0001, float("nan"), 0.0])
def test_wrong_numbers_fail(capsys, one_case, factor):
    file = one_case / "softrepa" / "sd15" / "predict_dct_TFF.safetensors"
    tensors = load_file(file)
    tensors["output"] = tensors["output"] * factor
    save_file(tensors, file)
    code, lines = run(capsys, one_case)
    assert code == 1
    assert lines[0].endswith("FAIL")
    assert lines[-1] == "2 passed, 1 failed"


def test_unknown_nothing_and_damaged(capsys, one_case, tmp_path):
    (tmp_path / "none").mkdir()
    assert run(capsys, tmp_path / "none") == (1, ["0 passed, 0 failed"])
    other = one_case / "other" / "kind"
    other.mkdir(parents=True)
    (other / "case.json").write_text('{"what": "of tomorrow"}')
    code, lines = run(capsys, one_case)
    assert code == 1
    assert any("unknown kind of case" in line and line.endswith("FAIL") for line in lines)
    code, lines = run(capsys, one_case, "--only", "softrepa")
    assert code == 0
    code, lines = run(capsys, one_case, "--only", "softrepa/sd15,softrepa/sd16")
    assert code == 1 and any("no case there" in line for line in lines)
    (one_case / "softrepa" / "sd15" / "model.safetensors").unlink()
    code, lines = run(capsys, one_case, "--only", "softrepa")
    assert code == 1 and "stopped by FileNotFoundError" in lines[0]


def test_size():
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) < 8e6
