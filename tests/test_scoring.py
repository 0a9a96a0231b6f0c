"""Scores: made once, of the pictures as they are, and a number that is none stops the run."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from eval_helpers import CPU, MeanRed, flat, prompt_set, quiet, write_pictures

from align_cli.errors import UserError
from align_cli.evaluation.scoring import BATCH, RewardScorer, Scores, SetJudge, score
from align_cli.evaluation.store import make_items
from align_cli.training.distributed import Ranks

N = 2 * BATCH + 3
REDS = [i / 255 for i in range(1, N + 1)]


@pytest.fixture
def items():
    return make_items(prompt_set(N), 1, 0)


@pytest.fixture
def pictures(items, tmp_path):
    return {"base": write_pictures(tmp_path / "images", items, [flat(x) for x in REDS])}


def scored(reward, folder, pictures, items):
    return score(folder, RewardScorer(reward), pictures, items, Ranks.alone(CPU), quiet)


def test_numbers_by_hand(tmp_path, pictures, items):
    found = scored(MeanRed(), tmp_path, pictures, items)
    np.testing.assert_allclose(found["red"]["base"], REDS, atol=1e-7)
    assert [not np.isnan(x) for x in found["red/side"]["base"]] == [i % 3 == 0 for i in range(N)]
    lines = (tmp_path / "scores" / "base" / "red.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["scorer"]["version"] == "1" and len(lines) == N + 1
    assert json.loads(lines[2])["values"]["red/side"] is None
    assert [p.name for p in (tmp_path / "scores" / "base").iterdir()] == ["red.jsonl"]


def test_no_picture_is_scored_twice(tmp_path, pictures, items):
    first, again = MeanRed(), MeanRed()
    whole = scored(first, tmp_path, pictures, items)
    assert first.seen == N
    same = scored(again, tmp_path, pictures, items)
    assert again.seen == 0
    np.testing.assert_array_equal(whole["red"]["base"], same["red"]["base"])


def test_what_a_killed_process_left(tmp_path, pictures, items):
    whole = scored(MeanRed(), tmp_path / "a", pictures, items)
    text = (tmp_path / "a" / "scores" / "base" / "red.jsonl").read_text().splitlines()
    left = tmp_path / "b" / "scores" / "base"
    left.mkdir(parents=True)
    # batch 1 whole, batch 0 in part with a line that is cut off; the file of a process of a larger run
    kept = [text[0], *text[1 + BATCH : 1 + 2 * BATCH], text[1], text[2][:30]]
    (left / "red.part-7.jsonl").write_text("\n".join(kept))
    reward = MeanRed()
    found = scored(reward, tmp_path / "b", pictures, items)
    assert reward.seen == N - BATCH
    np.testing.assert_array_equal(found["red"]["base"], whole["red"]["base"])
    assert (left / "red.jsonl").read_text().splitlines() == text
    assert [p.name for p in left.iterdir()] == ["red.jsonl"]


def test_a_changed_picture_and_another_version_are_scored_again(tmp_path, pictures, items):
    scored(MeanRed(), tmp_path, pictures, items)
    pictures["base"] = [*pictures["base"][:-1], *write_pictures(tmp_path / "images", items[-1:], [flat(0.9)])]
    reward = MeanRed()
    found = scored(reward, tmp_path, pictures, items)
    assert reward.seen == 3  # the last batch
    assert found["red"]["base"][-1] == pytest.approx(230 / 255)
    other = MeanRed(version="2")
    scored(other, tmp_path, pictures, items)
    assert other.seen == N


def test_other_weights_under_the_same_name_are_scored_again(tmp_path, pictures, items):
    first = MeanRed()
    first.net = torch.nn.Linear(2, 2)
    scored(first, tmp_path, pictures, items)
    same, other = MeanRed(), MeanRed()
    same.net, other.net = copy.deepcopy(first.net), copy.deepcopy(first.net)
    with torch.no_grad():
        other.net.bias[0] += 1
    assert len(RewardScorer(same).facts()["weights"]) == 64
    for reward, seen in ((same, 0), (other, N)):
        scored(reward, tmp_path, pictures, items)
        assert reward.seen == seen


def test_numbers_that_another_process_took_away_are_missed(tmp_path, pictures, items, monkeypatch):
    """Never a mean over what happens to be left."""
    join = Scores.join

    def lose(scores):
        join(scores)
        scores.path.write_text("".join(scores.path.read_text().splitlines(True)[:-1]))

    monkeypatch.setattr(Scores, "join", lose)
    with pytest.raises(UserError, match=f"the numbers of red for .*{N - 1:05d}.png are gone from"):
        scored(MeanRed(), tmp_path, pictures, items)


def test_names_that_begin_alike_do_not_mix(tmp_path, pictures, items):
    scored(MeanRed("red"), tmp_path, pictures, items)
    scored(MeanRed("red.1"), tmp_path, pictures, items)
    for name in ("red", "red.1"):  # as hpsv2 and hpsv2.1: the 1 is no number of a process
        reward = MeanRed(name)
        scored(reward, tmp_path, pictures, items)
        assert reward.seen == 0


def test_missing_pictures_have_no_number(tmp_path, pictures, items):
    pictures["base"][4] = None
    reward = MeanRed()
    found = scored(reward, tmp_path, pictures, items)
    assert reward.seen == N - 1 and np.isnan(found["red"]["base"][4])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_names_the_picture(tmp_path, pictures, items, value):
    write_pictures(tmp_path / "images", items[20:21], [np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(
        UserError, match=r"scorer red gave (nan|inf) for .*00020.png \(prompt 'plain prompt 20'\)"
    ):
        scored(MeanRed(black=value), tmp_path, pictures, items)
    kept = Scores(tmp_path, "base", RewardScorer(MeanRed())).read()
    assert sorted(kept) == list(range(BATCH))  # the batch before it
    reward = MeanRed()
    scored(reward, tmp_path, pictures, items)
    assert reward.seen == N - BATCH


def test_pictures_of_several_sizes(tmp_path, items):
    made = [flat(0.2, side=8 if i % 2 else 6) for i in range(N)]
    found = scored(MeanRed(), tmp_path, {"base": write_pictures(tmp_path / "i", items, made)}, items)
    np.testing.assert_allclose(found["red"]["base"], 0.2, atol=1e-6)


def test_the_judge_of_a_set(tmp_path, items, pictures):
    def judge(shown, rows):
        assert rows[0].id.startswith("p")
        return {"made/lit": (shown[..., 0].mean((1, 2)) > 10).astype(float)}

    prompts = prompt_set(N, judge=judge, headline="made/lit")
    found = score(tmp_path, SetJudge(prompts), pictures, items, Ranks.alone(CPU), quiet)
    assert found["made/lit"]["base"].sum() == N - 10
    small = SetJudge(prompt_set(N, judge=judge, headline="made/lit", image_size=9))
    with pytest.raises(UserError, match="judges 9 x 9 pictures .*00000.png is 8 x 8"):
        score(tmp_path / "small", small, pictures, items, Ranks.alone(CPU), quiet)
    with pytest.raises(ValueError):
        SetJudge(prompt_set())


def test_a_broken_picture_stops_by_name(tmp_path, pictures, items):
    pictures["base"][3].write_bytes(b"no picture")
    with pytest.raises(UserError, match="00003.png is no whole picture"):
        scored(MeanRed(), tmp_path, pictures, items)
