"""The method of docs/adding-a-method.md, as it stands there: trained, resumed, at work on every family."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import ok, refused

from align_cli import registry
from align_cli.evaluation.store import read_picture

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adding-a-method.md"


@pytest.fixture
def textshift(tmp_path, monkeypatch) -> None:
    """The page's code as a module, in both tables."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line.strip()]
    assert len(lines) <= 60, "a method in 60 lines"
    (tmp_path / "textshift_of_the_page.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "textshift_of_the_page", raising=False)
    monkeypatch.setitem(registry.METHODS, "textshift", "textshift_of_the_page:TextShift")
    monkeypatch.setitem(registry.METHOD_CONFIGS, "textshift", "textshift_of_the_page:TextShiftConfig")


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["textshift/loss"] for row in rows]


OPTIONS = (
    "--preset",
    "none",
    "--no-eval",
    "--device",
    "cpu",
    "--set",
    "train.lr=0.01",
    "--set",
    "train.log_every=1",
    "--set",
    "data.num_workers=0",
    "--batch-size",
    "4",
)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-sd15", "tiny-sdxl", "tiny-sd3"])
def test_it_trains_and_works(textshift, tmp_path, model):
    run = tmp_path / "run"
    ok("train", "textshift", "--model", model, "--steps", "3", "--out", run, *OPTIONS)
    assert len(losses(run)) == 3 and all(0 < loss < 3 for loss in losses(run))
    for scale, same in ((0, True), (20, False)):
        out = tmp_path / str(scale)
        prompt = ("--prompt", "a red circle", "--steps", "2", "--device", "cpu", "--seed", "1")
        ok("sample", *prompt, "--adapter", f"{run}@{scale}", "--compare", "--out", out)
        base, aligned = (read_picture(next(out.glob(f"*-{arm}.png"))) for arm in ("base", "aligned"))
        assert np.array_equal(base, aligned) == same


@pytest.mark.slow
def test_it_resumes(textshift, tmp_path):
    common = ("train", "textshift", *OPTIONS)
    ok(*common, "--steps", "4", "--out", tmp_path / "whole")
    ok(*common, "--steps", "2", "--out", tmp_path / "cut")
    ok("train", "textshift", "--steps", "4", "--out", tmp_path / "cut", "--resume", "--no-eval")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    tensors = [
        (tmp_path / name / "adapter" / "adapter.safetensors").read_bytes() for name in ("cut", "whole")
    ]
    assert tensors[0] == tensors[1]


def test_its_settings_are_checked(textshift):
    assert "textshift.weight must be > 0" in refused(
        "train", "textshift", "--preset", "none", "--set", "textshift.weight=0"
    )
