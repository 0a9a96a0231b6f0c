"""What an evaluation prints, and its picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from eval_helpers import measured
from PIL import Image
from rich.console import Console

from align_cli.evaluation.benchmarks import ShapesBenchmark
from align_cli.evaluation.sheet import save_sheet
from align_cli.evaluation.tables import print_results, results_table
from align_cli.shapes.captions import recaption
from align_cli.shapes.world import render, sample_scenes

N = 24
LOW = list(np.linspace(0.2, 0.4, N))
HIGH = [x + 0.1 + 0.02 * (-1) ** i for i, x in enumerate(LOW)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    return measured(tmp_path_factory.mktemp("r"), {"base": LOW, "aligned": HIGH})


def printed(results: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(results_table(results, width))
    return captured.get()


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(name))


def with_gain(results: dict[str, Any], verdict: str) -> dict[str, Any]:
    return results | {"comparisons": [r | {"verdict": verdict} for r in results["comparisons"]]}


def test_gain_is_called_a_gain(results):
    text = printed(results)
    assert text.startswith("aligned against base, red: gain")
    assert row(text, "* red").rstrip().endswith("gain")
    assert row(text, "side").rstrip().endswith("too few prompts")
    assert row(text, "Kind: a") and row(text, "Kind: b")
    assert "0.300" in row(text, "* red") and "+0.1" in row(text, "* red")
    flat = " ".join(text.split())
    assert "drift of aligned: saturation" in flat and "it needs --per-prompt 2" in flat
    assert "corrected for 1 headline and 2 other comparisons (Holm)" in flat
    assert "peak memory" in flat
    assert "no significant change" in row(printed(with_gain(results, "no significant change")), "* red")


def test_a_protocol_reports_its_numbers(results):
    """Beside the benchmark's own table, not in its place."""
    row = {"arm": "base", "metric": "hpsv2", "label": "anime", "value": 27.21, "std": 0.1}
    averages = {"base": {"pickscore": 18.834, "hpsv2": 0.2703}, "aligned": {"pickscore": 19.157}}
    held = {"name": "textcraftor", "source": "there", "averages": averages}
    flat = " ".join(printed(results | {"protocol": held, "official": [row]}, 200).split())
    assert "base, protocol textcraftor: pickscore 18.8340, hpsv2 0.2703" in flat
    assert "aligned, protocol textcraftor: pickscore 19.1570" in flat
    assert "base, hpsv2 as officially reported: anime" in flat


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_fits_its_width(results, width):
    wide = with_gain(results, "no significant change")
    wide = wide | {"floor": {"red": 0.05}}
    text = printed(wide, width)
    assert max(map(len, text.splitlines())) <= width
    assert row(text, "* red").rstrip().endswith("no significant change")
    assert "\u2026" not in text
    assert "0.050" in text


def test_several_arms_and_trained_scorers(tmp_path):
    arms = {"base": LOW, "aligned": HIGH, "half": [x + 0.05 for x in LOW]}
    text = printed(measured(tmp_path, arms, trained_on=["red"]), 140)
    assert "aligned" in row(text, "* red") and "gain (trained on)" in row(text, "* red")
    assert sum("half" in line for line in text.splitlines()) > 2


def test_a_model_alone(tmp_path):
    text = printed(measured(tmp_path, {"base": LOW}))
    assert "0.300" in row(text, "* red") and "score" in text and "difference" not in text
    assert "too few prompts" in row(text, "side")
    assert "95 % intervals clustered" in " ".join(text.split())  # the bootstrap is of differences


@pytest.mark.parametrize("name", ["[/x]", "[red]b"])
def test_names_of_groups_are_no_markup(results, name):
    rows = [r | {"group": r["group"] and ["Kind", name]} for r in results["comparisons"]]
    assert row(printed(results | {"comparisons": rows}), f"Kind: {name}")


def test_a_table_in_a_pipe_has_no_blank_lines(results, capsys):
    print_results(results)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [line.rstrip() for line in lines if line.strip()]
    shown = [cells for line in printed(results).splitlines() if (cells := line.split())]
    assert [line.split() for line in lines] == shown


def test_before_after_picture(results, tmp_path, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "r0" / "out"
    save_sheet(results, folder, tmp_path / "b.png")
    sheet = Image.open(tmp_path / "b.png")
    assert sheet.width > 300 + 2 * 100
    assert sheet.height > 9 * 100


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
