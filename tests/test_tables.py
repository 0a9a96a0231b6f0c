"""The printed tables, the JSON and the before/after picture, from results that need no model."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from align_cli.cli.text import print_table
from align_cli.evaluation.benchmarks import ShapesBenchmark, spread
from align_cli.evaluation.results import BaseResult, Example, PairedResult, RunFacts
from align_cli.evaluation.stats import paired, rate
from align_cli.shapes.captions import recaption
from align_cli.shapes.world import render, sample_scenes

METRICS = ShapesBenchmark.metrics


def facts(n: int, seconds: dict[str, float]) -> RunFacts:
    return RunFacts(
        benchmark="shapes",
        model="tiny-sd15",
        adapters=("runs/a/adapter",),
        prompts=n,
        distinct_prompts=n,
        kinds={"pair": n // 2, "long": n - n // 2},
        split="test",
        seed=0,
        sample={"sampler": "ddim", "steps": 20, "guidance": 4.0},
        device="cpu",
        dtype="float32",
        seconds=seconds,
        peak_memory_bytes=700 * 2**20,
        peak_gpu_memory_bytes=0,
    )


def paired_result(gain: float, n: int = 400) -> PairedResult:
    """`all` (and every other metric) goes from 0.4 to about 0.4 + gain; `relation` is asked of nobody."""
    rng = np.random.default_rng(0)
    base = (rng.random(n) < 0.4).astype(float)
    moved = rng.random(n) < abs(gain) / (0.6 if gain > 0 else 0.4)
    aligned = np.where(moved, float(gain > 0), base)
    rows = {m: paired(base, aligned) for m in METRICS}
    nothing = np.full(n, np.nan)
    rows["relation"] = paired(nothing, nothing)
    half = {k: {m: paired(base[s], aligned[s]) for m in METRICS} for k, s in _halves(n).items()}
    return PairedResult(
        facts=facts(n, {"base": 12.0, "aligned": 13.5}),
        headline="all",
        rows=rows,
        kinds=half,
        floor=dict.fromkeys(METRICS, 0.05),
        examples=examples(4),
    )


def _halves(n: int) -> dict[str, slice]:
    return {"pair": slice(0, n // 2), "long": slice(n // 2, n)}


def examples(n: int) -> list[Example]:
    rng = np.random.default_rng(1)
    scenes = sample_scenes(2 * n, rng, kinds=("pair", "triple"))
    pictures = render(scenes)
    return [
        Example(recaption(scenes[i], rng).text, pictures[n + i], pictures[i], ("object", "relation"), ())
        for i in range(n)
    ]


def printed(result: PairedResult | BaseResult, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(result.to_table(width))
    return out.getvalue()


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(name))


def test_gain_is_called_a_gain():
    text = printed(paired_result(0.1))
    assert "all: gain" in text.splitlines()[1]
    assert row(text, "* all").rstrip().endswith("gain")
    assert "no significant change" not in row(text, "object")
    assert "not asked" in row(text, "relation")
    for name in ("object", "color", "shape", "count", "background", "pair", "long"):
        assert row(text, name)
    assert "floor" in text
    assert "12.0 s base + 13.5 s aligned, peak memory 700 MiB" in " ".join(text.split())


def test_no_gain_is_not_called_one():
    text = printed(paired_result(0.005))
    assert "no significant change" in row(text, "* all")
    assert "gain" not in text.replace("against", "")
    assert "loss" in row(printed(paired_result(-0.1)), "* all")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_table_fits_its_width(width):
    text = printed(paired_result(0.005), width)
    assert max(map(len, text.splitlines())) <= width
    assert row(text, "* all").rstrip().endswith("no significant change")
    assert "\u2026" not in text
    assert "0.050" in text


def base_result(x: np.ndarray) -> BaseResult:
    """A model alone whose every metric is x."""
    return BaseResult(
        facts=facts(len(x), {"base": 3.0}),
        headline="all",
        rows={m: rate(x) for m in METRICS},
        kinds={k: {m: rate(x[s]) for m in METRICS} for k, s in _halves(len(x)).items()},
        floor=dict.fromkeys(METRICS, 0.05),
        examples=examples(2),
    )


def test_both_tables_say_where_prompts_are_too_few():
    for text in (printed(base_result(np.ones(12))), printed(paired_result(0.1, n=12))):
        assert "too few prompts" not in row(text, "* all")
        assert row(text, "pair").rstrip().endswith("too few prompts")
    assert "too few prompts" in row(printed(base_result(np.ones(8))), "* all")


def test_a_table_in_a_pipe_has_no_blank_lines(capsys):
    for result in (paired_result(0.1), base_result(np.ones(100))):
        print_table(result)
        lines = capsys.readouterr().out.splitlines()
        assert lines == [line.rstrip() for line in lines if line.strip()]
        assert [line.split() for line in lines] == [
            s for line in printed(result).splitlines() if (s := line.split())
        ]


def test_base_table_and_json():
    one = base_result(np.r_[np.ones(30), np.zeros(70)])
    text = printed(one)
    assert "0.300" in row(text, "* all")
    assert "0.050" in row(text, "* all")
    raw = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert raw["kind"] == "single"
    assert raw["metrics"]["all"]["mean"] == 0.3


def test_json_has_every_number_and_no_nan():
    raw = json.loads(json.dumps(paired_result(0.1).to_json(), allow_nan=False))
    assert raw["headline"] == "all"
    assert raw["verdict"] == raw["metrics"]["all"]["verdict"] == "gain"
    assert set(raw["metrics"]) == set(METRICS)
    assert raw["metrics"]["relation"]["difference"] is None
    assert raw["by_kind"]["long"]["object"]["n"] == 200
    assert raw["floor"]["all"] == 0.05
    assert raw["sample"]["steps"] == 20


def test_before_after_picture(tmp_path):
    paired_result(0.1).save_picture(tmp_path / "b.png")
    sheet = Image.open(tmp_path / "b.png")
    assert sheet.width == 300 + 2 * 14 + 2 * (160 + 14)
    assert sheet.height > 4 * 160


def test_floor_of_perfect_pictures_is_low_and_the_truth_is_one():
    rng = np.random.default_rng(0)
    scenes = sample_scenes(200, rng, kinds=("pair", "triple"), split="test")
    prompts = [recaption(s, rng, long_rate=0.0) for s in scenes]
    pictures = render(scenes)
    bench = ShapesBenchmark()
    assert np.nanmean(bench.judge(pictures, prompts)["all"]) > 0.97
    floor = bench.floor(pictures, prompts)
    assert floor == bench.floor(pictures, prompts)
    assert floor["all"] < 0.02
    assert floor["object"] < floor["color"] < 1
    assert floor["count"] > 0.97  # shuffled within the kind: the kind alone tells the number
    assert np.isnan(bench.floor(pictures[:1], prompts[:1])["all"])


def test_spread_takes_kinds_in_turn():
    prompts = ShapesBenchmark().prompts(20, 0)
    kinds = [prompts[i].kind for i in spread(prompts, 6)]
    assert kinds == ["pair", "triple", "long"] * 2
    assert len(spread(prompts, 100)) == 20
