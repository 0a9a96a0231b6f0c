"""What an evaluation says: verdicts, the guard against reward hacking, drift, results.json and CSV."""

from __future__ import annotations

import csv
import io
import json

import eval_helpers
import numpy as np
import pytest
from eval_helpers import MeanRed, measured

from align_cli.evaluation.drift import summary
from align_cli.evaluation.guard import held_out
from align_cli.evaluation.outcome import table, write
from align_cli.evaluation.prompts import PromptRow, PromptSet
from align_cli.rewards.preprocess import TEXTCRAFTOR

N = 24
LOW = list(np.linspace(0.2, 0.4, N))
HIGH = [x + 0.1 + 0.02 * (-1) ** i for i, x in enumerate(LOW)]
"""A clear gain that is not the same everywhere."""


class Green(MeanRed):
    """The mean of the other channels, so that it stands still while red rises."""

    def score(self, images, prompts):
        return images[:, 1].flatten(1).mean(1)


def test_a_gain_is_said_in_words_and_numbers(tmp_path):
    results = measured(tmp_path, {"base": LOW, "aligned": HIGH})
    row = next(r for r in results["comparisons"] if r["metric"] == "red" and r["group"] is None)
    assert row["verdict"] == "gain" and row["held_out"] is True and row["headline"] is True
    assert row["difference"] == pytest.approx(0.1, abs=0.004) and row["low"] > 0.09
    assert (row["up"], row["down"], row["win_rate"], row["n"]) == (N, 0, 1.0, N)
    assert row["p_adjusted"] == row["p"]  # one headline
    assert results["words"][0].startswith("aligned against base, red: gain, 0.300 -> 0.4")
    same = measured(tmp_path / "same", {"base": LOW, "aligned": LOW})
    assert "no significant change" in same["words"][0]
    lost = measured(tmp_path / "lost", {"base": HIGH, "aligned": LOW})
    assert ": loss, " in lost["words"][0]
    few = measured(tmp_path / "few", {"base": LOW[:6], "aligned": HIGH[:6]})
    assert "too few prompts" in few["words"][0] and "(6 prompts" in few["words"][0]
    alone = measured(tmp_path / "alone", {"base": LOW})
    assert alone["comparisons"] == [] and alone["words"] == [] and alone["drift"] == []
    assert alone["means"][0]["n"] in (N, N // 3)


def test_groups_are_compared_for_headlines(tmp_path):
    results = measured(tmp_path, {"base": LOW, "aligned": HIGH})
    grouped = [r for r in results["comparisons"] if r["group"] is not None]
    assert [(r["metric"], r["group"], r["n"]) for r in grouped] == [
        ("red", ["Kind", "a"], 12),
        ("red", ["Kind", "b"], 12),
    ]
    # the family of groups and side metrics: two groups count, red/side is of 8 prompts and called nothing
    assert [r["p_adjusted"] for r in grouped] == pytest.approx(
        sorted([2 * min(r["p"] for r in grouped), max(r["p"] for r in grouped)])
    )
    side = next(r for r in results["comparisons"] if r["metric"] == "red/side")
    assert (side["n"], side["verdict"], side["p_adjusted"]) == (8, "too few prompts", 1.0)


def test_the_guard_sets_trained_scorers_apart(tmp_path):
    scorers = [MeanRed("hpsv2"), Green("clip")]
    arms = {"base": LOW, "aligned": HIGH}
    results = measured(tmp_path / "a", arms, trained_on=["hpsv2"], rewards=scorers)
    words = results["words"]
    assert words[0].startswith("aligned against base, clip (held out): no significant change")
    assert words[1].startswith("aligned against base, hpsv2 (trained on it): gain")
    assert "no held-out scorer sees a gain: not shown to be real" in words[2]
    held = {r["metric"]: r["held_out"] for r in results["comparisons"]}
    assert held["clip"] is True and held["hpsv2"] is False
    assert results["arms"][1]["trained_on"] == ["hpsv2"]
    only = measured(tmp_path / "b", arms, trained_on=["hpsv2"], rewards=[MeanRed("hpsv2.1")])
    assert "was trained on every scorer here" in only["words"][1]
    both = measured(tmp_path / "c", arms, trained_on=["hpsv2"], rewards=[MeanRed("hpsv2"), MeanRed("clip")])
    assert "on held-out clip: the gain is real" in both["words"][2]

    class Fall(MeanRed):
        def score(self, images, prompts):
            return -super().score(images, prompts)

    hacked = measured(tmp_path / "d", arms, trained_on=["hpsv2"], rewards=[MeanRed("hpsv2"), Fall("clip")])
    assert hacked["words"][2].startswith("reward hacking: aligned gains where it was trained (hpsv2)")


def test_a_scorer_that_the_baseline_was_trained_on_is_not_held_out(tmp_path):
    arms = {"tuned": LOW, "other": HIGH}
    results = measured(
        tmp_path, arms, baseline_trained_on=["clip"], rewards=[MeanRed("clip"), MeanRed("hpsv2")]
    )
    assert {r["metric"]: r["held_out"] for r in results["comparisons"]} == {
        "clip": False, "clip/side": False, "hpsv2": True, "hpsv2/side": True,
    }  # fmt: skip
    assert results["words"][0].startswith("other against tuned, hpsv2 (held out): gain")
    assert results["words"][1].startswith("other against tuned, clip (tuned was trained on it): gain")
    assert not any("gains where it was trained" in line for line in results["words"])


def test_only_the_scorers_that_rose_are_named(tmp_path):
    scorers = [MeanRed("hpsv2"), Green("pickscore"), MeanRed("clip")]
    results = measured(
        tmp_path, {"base": LOW, "aligned": HIGH}, trained_on=["hpsv2", "pickscore"], rewards=scorers
    )
    (said,) = [line for line in results["words"] if "the gain is real" in line]
    assert said.startswith("aligned gains where it was trained (hpsv2) and")


def test_kin_are_not_held_out():
    assert not held_out("hpsv2.1", ["hpsv2"])
    assert not held_out("clip-b32", ["clip"])
    assert held_out("pickscore", ["hpsv2", "clip"])
    assert held_out("clip", [])


def test_drift_by_hand(tmp_path):
    # red 0.8 against red 0.5, the others 0.5: saturation 0.3 against 0
    results = measured(tmp_path, {"base": [128 / 255] * 24, "aligned": [204 / 255] * 24}, per_prompt=2)
    (drift,) = results["drift"]
    base, own = np.array([128, 128, 128.0]), np.array([204, 128, 128.0])
    cosine = base @ own / np.linalg.norm(base) / np.linalg.norm(own)
    assert drift["feature_distance"] == pytest.approx(1 - cosine, abs=1e-6)
    assert drift["feature_of"] == "red" and drift["of"] == 24
    assert drift["saturation"] == pytest.approx(76 / 255) and drift["saturation_base"] == 0
    assert drift["clipped"] == drift["clipped_base"] == 0
    assert drift["diversity"] == pytest.approx(0, abs=1e-6)  # the two pictures of a prompt are alike
    assert any("pictures have moved: saturation 0.000 -> 0.298" in line for line in results["words"])
    different = [128 / 255, 204 / 255] * 12
    results = measured(tmp_path / "d", {"base": different, "aligned": [0.5] * 24}, per_prompt=2)
    (drift,) = results["drift"]
    assert drift["diversity_base"] == pytest.approx(1 - cosine, abs=1e-6)
    assert any("diversity" in line for line in results["words"])
    white = measured(tmp_path / "w", {"base": [0.5] * 12, "aligned": [1.0] * 12})
    assert white["drift"][0]["clipped"] == pytest.approx(1 / 3)
    assert white["drift"][0]["diversity"] is None


def test_drift_is_of_the_pictures_that_both_arms_have():
    nan = np.nan
    values = {key: {"base": np.array([0.1, 0.3, nan, 0.9]), "a": np.array([0.2, 0.4, 0.8, nan])}
              for key in ("saturation", "clipped", "feature_distance", "diversity")}  # fmt: skip
    found = summary(values, "a", "base", None)
    assert (found["saturation"], found["saturation_base"]) == pytest.approx((0.3, 0.2))
    assert (found["diversity"], found["clipped_base"], found["of"]) == (
        pytest.approx(0.3),
        pytest.approx(0.2),
        2,
    )


def test_several_pictures_of_a_prompt_are_one_piece_of_evidence(tmp_path):
    results = measured(tmp_path, {"base": LOW, "aligned": HIGH}, per_prompt=2)
    row = next(r for r in results["comparisons"] if r["metric"] == "red" and r["group"] is None)
    assert (row["n"], row["clusters"], row["up"]) == (24, 12, 12)


def test_results_are_plain_json_and_csv(tmp_path):
    results = measured(tmp_path, {"base": LOW, "aligned": HIGH})
    write(tmp_path, results)
    raw = json.loads((tmp_path / "results.json").read_text())
    assert raw == json.loads(json.dumps(results, allow_nan=False))
    assert raw["format"] == 1 and raw["baseline"] == "base" and raw["command"] == ["t2ialign", "eval", "made"]
    assert raw["scorers"][0]["metrics"] == ["red/side", "red"]
    assert raw["audit"][0] | {"share": 0} == {
        "what": "scorer", "name": "red", "arms": [], "limit": 0, "cut": 0, "of": N, "share": 0,
        "examples": [],
    }  # fmt: skip
    item = raw["items"][1]
    assert item["scores"]["red/side"] == {"base": None, "aligned": None}
    assert (tmp_path / "out" / item["images"]["aligned"]).exists()
    rows = list(csv.DictReader(io.StringIO(table(results))))
    assert len(rows) == 2 * N and rows[0]["arm"] == "base" and rows[1]["arm"] == "aligned"
    assert float(rows[1]["red"]) == pytest.approx(HIGH[0], abs=0.002)
    assert rows[2]["red/side"] == "" and rows[2]["Kind"] == "b"


def test_the_same_pictures_give_the_same_numbers(tmp_path):
    one = measured(tmp_path / "a", {"base": LOW, "aligned": HIGH})
    two = measured(tmp_path / "b", {"base": LOW, "aligned": HIGH})
    changing = ("seconds", "memory", "items")
    assert {k: v for k, v in one.items() if k not in changing} == {
        k: v for k, v in two.items() if k not in changing
    }


def test_an_official_package_beside_our_scorer(tmp_path):
    class Off(MeanRed):
        def score(self, images, prompts):
            return super().score(images, prompts) + 0.25

    results = measured(tmp_path, {"base": LOW}, rewards=[MeanRed("hpsv2"), Off("hpsv2-reference")])
    said = f"hpsv2 differs from the official package by 0.25 at most and 0.25 on average, over {N} pictures"
    assert results["words"] == [said]


def test_the_official_table_is_of_the_official_preprocessing(tmp_path, monkeypatch):
    rows = tuple(PromptRow(f"p{i}", f"prompt {i}", {"Style": "anime"}) for i in range(N))
    monkeypatch.setattr(eval_helpers, "prompt_set", lambda _: PromptSet("hpsv2", "tests", rows))
    results = measured(tmp_path / "a", {"base": LOW}, rewards=[MeanRed("hpsv2")])
    assert [line["label"] for line in results["official"]] == ["anime", "Average"]
    pooled = MeanRed("hpsv2")
    pooled.preprocessing = TEXTCRAFTOR.words
    assert measured(tmp_path / "b", {"base": LOW}, rewards=[pooled])["official"] == []
