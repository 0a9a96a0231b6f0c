"""The golden numbers kept in the repository, and that check_golden.py notices when something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import check_golden
import pytest
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
TRAINED = {"loss_dw0", "loss_dw10", "grad_dc_tokens_dw10", "grad_dc_t_tokens_dw0", "errors_by_image_loss_dw0"}
DRAWN = {"output", "latent_out", "timesteps"}
QUANTITIES = {
    "sd15": TRAINED | DRAWN | {"output_tokens_off", "output_tokens_scale_0"},
    "sdxl": TRAINED | DRAWN | {"output_tokens_off", "output_tokens_scale_0"},
    "sd3": TRAINED | DRAWN | {"output_plain_base_model", "aggregated_loss", "loss_chunk1", "unused_noises"},
}
"""Some of what each folder must compare."""
REWARD_QUANTITIES = {
    "longalign/reward_clip/grad_images",
    "longalign/preference/dense_w0.3_multi/grad_image_embeds",
    "textcraftor/eval_preprocess/clip_pil_0",
    "textcraftor/eval_preprocess/hps_score_aa_1",
}


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


@pytest.mark.slow
def test_all():
    """In a process of its own: MKL must be told before its first use to compute alike on every processor."""
    command = [sys.executable, check_golden.__file__, str(GOLDEN)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    failed = [line for line in lines[:-1] if not line.endswith("  ok")]
    assert (done.returncode, failed) == (0, []), done.stderr
    assert lines[-1] == f"{len(lines) - 1} passed, 0 failed"
    for family, wanted in QUANTITIES.items():
        names = [line.split("  ")[0] for line in lines if line.startswith(f"softrepa/{family}/")]
        cases = json.loads((GOLDEN / "softrepa" / family / "case.json").read_text())["cases"]
        assert {name.split("/")[2] for name in names} == set(cases)
        assert wanted <= {name.split("/")[3] for name in names}
    quantities = {line.split("  ")[0] for line in lines}
    assert quantities >= REWARD_QUANTITIES


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
