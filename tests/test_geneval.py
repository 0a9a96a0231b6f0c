"""GenEval: official files out and in, and the twin on the shapes world against what was rendered."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from align_cli.errors import UserError
from align_cli.evaluation.geneval import TASKS, geneval, read_results, write_folder
from align_cli.evaluation.geneval_shapes import METRIC, correct, geneval_shapes, judge
from align_cli.evaluation.official import official_results
from align_cli.evaluation.prompts import PromptSet
from align_cli.evaluation.sets import SetOptions
from align_cli.shapes.captions import parse
from align_cli.shapes.world import Scene, place, render, scene_split
from align_cli.shapes.world import Thing as WorldThing

RECORDS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
        "prompt": "a photo of two cats",
    },
]


@pytest.fixture
def official(tmp_path: Path) -> PromptSet:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)) + "\n")
    return geneval(SetOptions(prompts=path))


def result(row: str, k: int, record: dict, ok: bool) -> dict:
    """A line as the official evaluator writes it."""
    return {
        "filename": f"/pictures/{row}/samples/{k:04d}.png", "tag": record["tag"], "prompt": record["prompt"],
        "correct": ok, "reason": "", "metadata": json.dumps(record), "details": "{}",
    }  # fmt: skip


def test_folder_has_the_official_layout(official: PromptSet, tmp_path: Path):
    pictures = {}
    for i in range(2):
        for k in range(2):
            pictures[i, k] = tmp_path / f"{i}-{k}.png"
            pictures[i, k].write_bytes(b"%d%d" % (i, k))
    out = tmp_path / "out"
    write_folder(official, pictures, out)
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert files == [
        f"0000{i}/{name}"
        for i in range(2)
        for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert [json.loads((out / f"0000{i}" / "metadata.jsonl").read_text()) for i in range(2)] == RECORDS
    assert (out / "00001" / "samples" / "0000.png").read_bytes() == b"10"
    with pytest.raises(UserError, match=r"no picture .*gone\.png \(prompt 00000"):
        write_folder(official, {(0, 0): tmp_path / "gone.png"}, out)


def test_results_come_back(official: PromptSet, tmp_path: Path):
    path = tmp_path / "results.jsonl"
    lines = [result("00000", k, RECORDS[0], k == 0) for k in range(4)]
    lines += [result("00001", k, RECORDS[1], True) for k in range(2)]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_results(path, official)
    assert found == {(0, 0): True, (0, 1): False, (0, 2): False, (0, 3): False, (1, 0): True, (1, 1): True}
    rows, values = [i for i, _ in found], np.array(list(found.values()), float)
    table = official_results(official, "geneval/correct", rows, values)
    assert [(r.label, r.value, r.n) for r in table] == [
        ("single_object", 0.25, 4), ("counting", 1.0, 2), ("Overall", 0.625, 6), ("pictures", 0.5, 6),
        ("prompts", 1.0, 6),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"lacks 2 of 8 pictures, the first is 00001/samples/0002\.png"):
        read_results(path, official, per_prompt=4)


def test_a_record_that_stands_twice_is_one_prompt(tmp_path: Path):
    """As summary_scores.py groups by the record."""
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, [RECORDS[0], RECORDS[0], RECORDS[1]])))
    table = official_results(geneval(SetOptions(prompts=path)), "geneval/correct", [0, 1, 2], np.eye(3)[1])
    assert table[-1].label == "prompts" and table[-1].value == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filename": "x.png"}, "'x.png' is no picture of"),
        ({"filename": "00009/samples/0000.png"}, "is no picture of"),
        ({"prompt": "a photo of a dog"}, "but prompt 00000 of"),
        ({"correct": "yes"}, "correct must be true or false, got 'yes'"),
        ({"filename": "p/00000/samples/0001.png"}, "a second result of"),
        (None, "line 2: no result of GenEval's evaluator"),
    ],
)
def test_bad_results_are_named(official: PromptSet, tmp_path: Path, change: dict | None, message: str):
    path = tmp_path / "results.jsonl"
    good = result("00000", 1, RECORDS[0], True)
    bad = "{}" if change is None else json.dumps({**result("00000", 2, RECORDS[0], True), **change})
    path.write_text(f"{json.dumps(good)}\n{bad}\n")
    with pytest.raises(UserError) as error:
        read_results(path, official)
    assert message in str(error.value) and f"{path}, line 2" in str(error.value)


def test_bad_records(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    for record, message in [
        ({"prompt": "x"}, "no record of GenEval"),
        ({"prompt": "x", "tag": "color"}, "colors"),
    ]:
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match=rf"line 1: .*{message}"):
            geneval(SetOptions(prompts=path))


def test_twin_prompts_are_distinct_captions_of_held_out_compositions():
    found = geneval_shapes(SetOptions())
    assert Counter(row.groups["Task"] for row in found.rows) == dict.fromkeys(TASKS, 36)
    for task in TASKS:
        assert len({row.text for row in found.rows if row.groups["Task"] == task}) == 36
    assert found.scenes is not None
    for row, scene in zip(found.rows, found.scenes, strict=True):
        assert scene.spec == parse(row.text) and row.extra["prompt"] == row.text
        if row.groups["Task"] in ("two_object", "position", "color_attr"):
            assert scene_split(scene.spec.objects) == "test"
    assert geneval_shapes(SetOptions()).fingerprint == found.fingerprint
    assert geneval_shapes(SetOptions(seed=1)).fingerprint != found.fingerprint
    assert len(geneval_shapes(SetOptions(num=20))) == 20


def draw(rows, change=lambda things: things) -> np.ndarray:
    """A true picture of every row, with its objects changed."""
    rng = np.random.default_rng(0)
    scenes = []
    for row in rows:
        spec = parse(row.text)
        things = change([WorldThing(c, s, 0.0, 0.0, 0.0) for c, s in spec.objects])
        while True:
            placed = place(things, rng)
            wanted = [
                {"left of": a.x - b.x, "right of": b.x - a.x, "above": a.y - b.y, "below": b.y - a.y}[name]
                < -max(0.0, (abs(a.y - b.y) if "of" in name else abs(a.x - b.x)) + 0.5)
                for i, name, j in spec.relations
                for a, b in [(placed[i], placed[j])]
            ]
            if all(wanted):
                break
        scenes.append(Scene("x", placed, spec.background or "white"))
    return render(scenes)


def recolored(things: list[WorldThing]) -> list[WorldThing]:
    """Every object in the next colour."""
    following = {"red": "yellow", "yellow": "green", "green": "blue", "blue": "red"}
    return [WorldThing(following[t.color], t.shape, 0, 0, 0) for t in things]


def reshaped(things: list[WorldThing]) -> list[WorldThing]:
    """The first object has another shape."""
    other = {"circle": "square", "square": "triangle", "triangle": "circle"}
    return [WorldThing(things[0].color, other[things[0].shape], 0, 0, 0), *things[1:]]


@pytest.mark.slow
def test_twin_judges_as_geneval_does():
    """True pictures are right in every task; wrong colours are wrong only where colours are asked, one shape
    that is wrong is wrong everywhere, and one object more only where it is counted.
    """
    rows = geneval_shapes(SetOptions(num=120)).rows

    def rates(pictures: np.ndarray) -> dict[str, float]:
        values = judge(pictures, rows)[METRIC]
        return {t: values[[row.groups["Task"] == t for row in rows]].mean() for t in TASKS}

    assert rates(draw(rows)) == dict.fromkeys(TASKS, 1.0)
    asked = {"colors": 0.0, "color_attr": 0.0}
    assert rates(draw(rows, recolored)) == {**dict.fromkeys(TASKS, 1.0), **asked}
    assert rates(draw(rows, reshaped)) == dict.fromkeys(TASKS, 0.0)
    few = [row for row in rows if len(parse(row.text).objects) < 3]
    more = judge(draw(few, lambda things: [*things, things[0]]), few)[METRIC]
    for row, value in zip(few, more, strict=True):
        assert value == (row.groups["Task"] != "counting"), row


def test_clauses_by_hand():
    record = {
        "include": [
            {"class": "square", "count": 1},
            {"class": "circle", "count": 1, "position": ["left of", 0]},
        ]
    }
    square, circle = ("blue", "square", 20.0, 16.0), ("red", "circle", 8.0, 16.0)
    assert correct(record, [square, circle])
    assert not correct(record, [("blue", "square", 2.0, 16.0), circle])
    assert correct(record, [("blue", "square", 2.0, 16.0), square, circle])  # any of the squares will do
    assert not correct(record, [circle]) and not correct(record, [])
    assert not correct(record, [("blue", "", 20.0, 16.0), circle])  # of no known shape
    two = {"include": [{"class": "circle", "count": 2}], "exclude": [{"class": "circle", "count": 3}]}
    assert [correct(two, [circle] * n) for n in range(5)] == [False, False, True, False, False]
