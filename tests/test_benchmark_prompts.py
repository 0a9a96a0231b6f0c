"""The prompts of the benchmarks, and the official tables made of their scores."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hub import serve
from huggingface_hub import constants

from align_cli.errors import UserError
from align_cli.evaluation.official import hpsv2_table, official_results
from align_cli.evaluation.sets import HPSV2_STYLES, SetOptions, load_set
from align_cli.settings import DataSettings, EvalSettings
from align_cli.shapes.captions import parse

PARTI = Path(os.environ.get("T2IALIGN_PARTI") or "../shared/data/PartiPrompts.tsv")
"""The whole PartiPrompts.tsv of google-research/parti, which is not part of this repository."""

UNREACHABLE = "it is not in the local cache, and the hub cannot be reached; pass --prompts"
PARTI_TEXT = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology\n"
    '"G I G" on a wall\tIllustrations\tWriting & Symbols\t\n'
    " a robot cooking\tArts\tImagination\tblank in front\n"
)


def write_hpsv2(folder: Path, num: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for style in HPSV2_STYLES:
        (folder / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(num)]))
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("HPS_ROOT", str(tmp_path / "none"))


def test_parti_reads_all_columns(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(PARTI_TEXT)
    found = load_set("parti", SetOptions(prompts=path))
    assert found.texts == ["bond", '"G I G" on a wall', " a robot cooking"]
    assert found.group_names == ["Category", "Challenge"]
    assert found.rows[0].groups == {"Category": "Abstract", "Challenge": "Basic"}
    assert found.rows[2].extra == {"Note": "blank in front"}
    assert found.notes == (f"{path} holds 3 prompts, the official file 1632",)


@pytest.mark.skipif(not PARTI.is_file(), reason="no PartiPrompts.tsv; name it with T2IALIGN_PARTI")
def test_the_whole_parti():
    found = load_set("parti", SetOptions(prompts=PARTI))
    assert len(found) == len(set(found.texts)) == 1632 and not found.notes
    assert found.texts[0] == "bond" and found.texts[1560].startswith('"G I G G L E" ')
    assert sum(text != text.strip() for text in found.texts) > 0
    counts = {g: Counter(row.groups[g] for row in found.rows) for g in found.group_names}
    assert counts == {
        "Category": {
            "Animals": 314, "Artifacts": 287, "World Knowledge": 214, "People": 177, "Outdoor Scenes": 131,
            "Illustrations": 124, "Vehicles": 104, "Food & Beverage": 74, "Arts": 66, "Abstract": 51,
            "Produce & Plants": 50, "Indoor Scenes": 40,
        },
        "Challenge": {
            "Fine-grained Detail": 312, "Basic": 272, "Simple Detail": 232, "Style & Format": 206,
            "Imagination": 150, "Complex": 113, "Writing & Symbols": 91, "Quantity": 90, "Perspective": 70,
            "Linguistic Structures": 61, "Properties & Positioning": 35,
        },
    }  # fmt: skip
    few = found.limited(64)
    assert set(Counter(row.groups["Category"] for row in few.rows).values()) == {5, 6}


def test_parti_and_hpsv2_come_from_the_hub_and_its_cache(tmp_path, monkeypatch):
    root = tmp_path / "hub"
    (root / "nateraw" / "parti-prompts").mkdir(parents=True)
    (root / "nateraw" / "parti-prompts" / "PartiPrompts.tsv").write_text(PARTI_TEXT)
    write_hpsv2(root / "zhwang" / "HPDv2" / "benchmark")
    monkeypatch.setenv("HPS_ROOT", str(tmp_path / "none"))
    with serve(root, tmp_path / "cache", monkeypatch) as log:
        assert load_set("parti", SetOptions()).texts[0] == "bond"
        found = load_set("hpsv2", SetOptions())
        assert log.count("PartiPrompts.tsv") == 1 and log.count("benchmark/anime.json") == 1
    assert [row.id for row in found.rows[:4]] == [
        "anime/00000",
        "anime/00001",
        "anime/00002",
        "concept-art/00000",
    ]
    assert found.group_names == ["Style"] and found.notes[0].endswith(
        "holds 3 prompts, the official file 800"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(load_set("parti", SetOptions())) == 3  # from the cache
    with (
        serve(tmp_path / "nothing", tmp_path / "other", monkeypatch),
        pytest.raises(
            UserError,
            match=r"cannot get PartiPrompts\.tsv of nateraw/parti-prompts for parti: .*; pass --prompts",
        ),
    ):
        load_set("parti", SetOptions())


def test_hpsv2_folders(tmp_path, monkeypatch, offline):
    given = load_set("hpsv2", SetOptions(prompts=write_hpsv2(tmp_path / "own", 2)))
    assert len(given) == 8 and given.rows[7].groups == {"Style": "photo"}
    assert given.source == str(tmp_path / "own")
    monkeypatch.setenv("HPS_ROOT", str(tmp_path / "root"))
    write_hpsv2(tmp_path / "root" / "datasets" / "benchmark", 1)
    assert len(load_set("hpsv2", SetOptions())) == 4
    (tmp_path / "own" / "photo.json").unlink()
    with pytest.raises(
        UserError, match=r"no photo\.json in .*own; --prompts of hpsv2 wants a folder with anime"
    ):
        load_set("hpsv2", SetOptions(prompts=tmp_path / "own"))


def test_coco_takes_the_first_caption_of_every_image(tiny_coco: DataSettings):
    found = load_set("coco", SetOptions(data_path=Path(tiny_coco.path)))
    assert [row.id for row in found.rows] == ["2", "5", "7", "31"]
    assert found.texts[0] == "image 2 text 4"  # the file has the captions in this order
    assert len(found.notes) == 1 and found.notes[0].startswith("FID and LPIPS are left out")
    assert found.rows[0].extra == {"file": "000000000002.jpg"}
    path = Path(tiny_coco.path) / "annotations" / "captions_val2017.json"
    assert load_set("coco", SetOptions(prompts=path)).fingerprint == found.fingerprint


@pytest.mark.slow
def test_shapes_are_the_prompts_of_before():
    from align_cli.evaluation.benchmarks import ShapesBenchmark

    found = load_set("shapes", SetOptions(num=20, seed=3, split="val"))
    assert found.scenes == tuple(ShapesBenchmark().prompts(20, 3, split="val"))
    assert {row.groups["Kind"] for row in found.rows} == {"pair", "triple", "long"}
    few = found.limited(7)
    assert few.scenes is not None and [p.text for p in few.scenes] == few.texts
    assert len(load_set("shapes", SetOptions())) == 512
    named = load_set("shapes", SetOptions(num=20, seed=3, split="val", kinds=EvalSettings().kinds))
    assert named.fingerprint == found.fingerprint
    long = load_set("shapes", SetOptions(num=20, kinds=("long",)))
    assert {row.groups["Kind"] for row in long.rows} == {"long"} and len(long) == 20
    assert named.source == found.source and long.source.endswith("seed 0, long prompts")
    assert all(row.text.count(" .") == 5 for row in long.rows)


def test_files_are_benchmarks_too(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a red circle\na blue square\n")
    found = load_set(str(path), SetOptions())
    assert (found.name, found.source, len(found)) == ("mine", str(path), 2)
    assert parse(found.texts[0]).objects == (("red", "circle"),)


def test_refusals(tmp_path, offline):
    for name, options, message in [
        ("partii", SetOptions(), "unknown benchmark 'partii'; did you mean 'parti'?"),
        ("none.txt", SetOptions(), "no prompt file none.txt"),
        ("parti", SetOptions(), f"{UNREACHABLE} PartiPrompts.tsv"),
        ("hpsv2", SetOptions(), f"{UNREACHABLE} FOLDER"),
        ("geneval", SetOptions(), "geneval needs --prompts evaluation_metadata.jsonl"),
        ("coco", SetOptions(), "coco needs the captions of val2017: --data-path"),
        ("coco", SetOptions(data_path=tmp_path / "no"), "does not exist"),
        ("shapes", SetOptions(prompts=tmp_path), "--prompts means nothing to shapes; it takes --n, --split"),
        ("parti", SetOptions(kinds=("long",)), "--kind means nothing to parti; it takes --prompts"),
        ("parti", SetOptions(num=3), "--n means nothing to parti; it takes --prompts, --column"),
        ("parti", SetOptions(prompts=tmp_path), "ends in .txt"),
        ("geneval-shapes", SetOptions(num=5), "6 tasks and needs at least as many prompts, got 5"),
        ("geneval-shapes", SetOptions(split="tset"), "unknown split 'tset'"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as error:
            load_set(name, options)
        assert message in str(error.value) and "\n" not in str(error.value)
    path = tmp_path / "plain.tsv"
    path.write_text("Prompt\tNote\nbond\t1\n")
    with pytest.raises(UserError, match="has no column Category; .* t2ialign eval"):
        load_set("parti", SetOptions(prompts=path))


def test_hpsv2_table_by_hand():
    scores = np.concatenate([np.full(80, 0.2), np.full(80, 0.3), np.full(40, 0.4), np.full(80, 0.1)])
    table = hpsv2_table(scores, ["anime"] * 200 + ["photo"] * 80)
    assert [(r.label, r.n) for r in table] == [("anime", 200), ("photo", 80), ("Average", 280)]
    np.testing.assert_allclose([r.value for r in table], [30.0, 10.0, 100 * (16 + 24 + 16 + 8) / 280])
    assert table[0].std == pytest.approx(
        10 * np.sqrt(2 / 3)
    )  # of 20, 30 and 40: the short group counts whole
    assert table[1].std == pytest.approx(0, abs=1e-12) and table[2].std is None


def test_official_results_sort_by_prompt_and_leave_out_missing_pictures(tmp_path):
    found = load_set("hpsv2", SetOptions(prompts=write_hpsv2(tmp_path / "own", 100)))
    values = np.arange(400) / 1000
    rows = list(range(400))
    table = official_results(found, "hpsv2.1", rows, values)
    assert official_results(found, "hpsv2.1", rows[::-1], values[::-1]) == table
    assert [r.label for r in table] == [*HPSV2_STYLES, "Average"]
    assert table[0].value == pytest.approx(100 * (39.5 + 89.5) / 2 / 1000)
    values[3] = np.nan
    assert official_results(found, "hpsv2.1", rows, values)[0].n == 99
    assert official_results(found, "pickscore", rows, values) == []
