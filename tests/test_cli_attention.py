"""`sample --attention` and `eval --attention`: what is written, what a mistake is answered with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import call, ok, refused
from PIL import Image
from softrepa_helpers import save_random_adapter

from align_cli.evaluation.maps import read_maps
from align_cli.pictures import MARGIN, SHOWN

QUICK = ("--steps", "2", "--device", "cpu", "--guidance", "2")
TEXT = "a red circle above a blue square"
SHEET = "001-a-red-circle-above-a-blue-square-attention.png"


@pytest.fixture(scope="module")
def adapter(tiny_sd15_folder, tmp_path_factory) -> Path:
    return save_random_adapter(tmp_path_factory.mktemp("run") / "adapter", tiny_sd15_folder)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_sample_shows_attention(family, tiny_sd15_folder, tiny_sdxl_folder, tmp_path):
    folder = {"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder}[family]
    same = ("sample", "--model", folder, *QUICK, "--prompt", TEXT, "--prompt", "a red circle", "--n", 2)
    shown = ok(*same, "--attention", "--parser", "shapes", "--out", "a")
    ok(*same, "--out", "b")
    assert shown.stdout.count("attention: ") == 2
    names = {path.name for path in Path("a").iterdir()}
    assert names - {path.name for path in Path("b").iterdir()} == {SHEET, "002-a-red-circle-attention.png"}
    for path in Path("b").glob("*seed*.png"):
        assert np.abs(pixels(path) - pixels(Path("a") / path.name)).max() <= 1
    sheet = pixels(Path("a") / SHEET)
    two = pixels(Path("a") / "002-a-red-circle-attention.png")
    assert sheet.shape[1] - two.shape[1] == SHOWN + MARGIN  # one entity more
    assert np.ptp(sheet, -1).max() > 60


@pytest.mark.slow
def test_sample_compares_base_above_aligned(adapter, tmp_path):
    one = ("sample", "--adapter", adapter, *QUICK, "--prompt", TEXT, "--attention", "--parser", "shapes")
    ok(*one, "--out", "one")
    ok(*one, "--compare", "--out", "two")
    alone, both = (Image.open(Path(name) / SHEET).size for name in ("one", "two"))
    assert both[0] == alone[0] and both[1] > alone[1] + SHOWN
    assert "already holds" in refused(*one, "--out", "one")


def test_a_prompt_without_attributes_is_shown_word_by_word(tiny_sd15_folder, tmp_path, monkeypatch):
    from align_cli.grounding.parsing import Word
    from align_cli.shapes.parsing import ShapesParser

    said = {
        "a circle": [Word("a", "DET", "det", 1), Word("circle", "NOUN", "ROOT", 1)],
        "the": [Word("the", "DET", "ROOT", 0)],
    }
    monkeypatch.setattr(ShapesParser, "parse", lambda _, prompt: said[prompt])
    args = ("sample", "--model", tiny_sd15_folder, *QUICK, "--attention", "--parser", "shapes")
    result = ok(*args, "--prompt", "a circle", "--prompt", "the", "--out", "a")
    assert (
        "'a circle' has no noun with attributes that is read: its words are shown one by one" in result.stderr
    )
    assert "'the' has no noun with attributes that is read, and no other word" in result.stderr
    assert (tmp_path / "a" / "001-a-circle-attention.png").exists()
    assert (tmp_path / "a" / "002-the-attention.png").exists()


@pytest.mark.slow
def test_sample_refuses_what_cannot_be_shown(tiny_sd15_folder, tmp_path):
    asked = ("sample", *QUICK, "--prompt", TEXT, "--attention", "--out", "x")
    said = refused(*asked, "--model", tiny_sd15_folder, "--parser", "shapes", "--text", "segments")
    assert "read by segments" in said
    said = refused(*asked[:-3], "--prompt", "a dog", "--attention", "--parser", "shapes", "--out", "x")
    assert "cannot read 'a dog'" in said
    assert "unknown parser" in refused(*asked, "--model", tiny_sd15_folder, "--parser", "nltk")
    assert "give --attention" in refused("sample", "--prompt", TEXT, "--parser", "shapes")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_eval_shows_attention_and_goes_on(adapter, tmp_path):
    plain = ("eval", "shapes", "--adapter", adapter, "--n", 12, *QUICK, "--out", "e")
    asked = (*plain, "--attention", 5, "--parser", "shapes")
    ok(*plain)
    assert "attention" not in json.loads(Path("e/results.json").read_text())
    pictures = {path: path.stat().st_mtime_ns for path in Path("e/images").rglob("*.png")}
    # asked for later: the pictures stay
    assert "attention base 5/5" in ok(*asked, "--resume").stderr
    assert pictures == {path: path.stat().st_mtime_ns for path in Path("e/images").rglob("*.png")}
    first = json.loads(Path("e/results.json").read_text())
    seen = first["attention"]
    assert [row["prompt"] for row in seen["items"]] == [row["prompt"] for row in first["items"][:5]]
    for row in seen["items"]:
        for arm in ("base", "aligned"):
            facts, maps = read_maps(Path("e") / row["files"][arm])
            assert facts["prompt"] == row["prompt"] and facts["arm"] == arm
            assert len(maps) == len(row["words"]) == len(row["shares"][arm])
            assert [share["peak"] for share in row["shares"][arm]] == pytest.approx(maps.max((1, 2)).tolist())
    assert {row["arm"] for row in seen["means"]} == {"base", "aligned"}
    assert [row["metric"] for row in seen["comparisons"]] == ["attention/inside", "attention/area"]
    assert set(seen["words"]) <= set(first["words"])
    page = Path("e/report.html").read_text()
    assert 'id="attention"' in page and page.count("attention to ") >= 2 * len(seen["items"][0]["words"])
    assert not re.search(r'src="(?!data:)', page)
    # one that is gone and one that is cut off are drawn again, to the last bit; the others are not
    gone, cut = (
        Path("e") / seen["items"][0]["files"]["base"],
        Path("e") / seen["items"][1]["files"]["aligned"],
    )
    before = read_maps(gone), read_maps(cut)
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:60])
    said = ok(*asked, "--resume").stderr
    assert "attention base 1/1" in said and "attention aligned 1/1" in said
    for path, (facts, maps) in zip((gone, cut), before, strict=True):
        again = read_maps(path)
        assert again[0] == facts and np.array_equal(again[1], maps)
    assert json.loads(Path("e/results.json").read_text())["attention"] == seen
    assert "attention base" not in ok(*asked, "--resume").stderr
    ok(*plain, "--resume")
    assert 'id="attention"' not in Path("e/report.html").read_text()


def test_eval_with_one_arm_has_means(tiny_sdxl_folder, tmp_path):
    ok("eval", "shapes", "--model", tiny_sdxl_folder, "--n", 4, *QUICK, "--attention", 2, "--out", "e")
    seen = json.loads(Path("e/results.json").read_text())["attention"]
    assert seen["comparisons"] == [] and seen["words"] == [] and len(seen["means"]) == 2
    assert seen["prompts"] == 2 and seen["parser"] == "shapes"


def test_sd3_shows_its_attention(tiny_sd3_folder, tmp_path):
    ok("sample", *QUICK, "--model", tiny_sd3_folder, "--prompt", TEXT, "--attention", "--parser", "shapes",
       "--out", tmp_path / "a")  # fmt: skip
    assert len(list((tmp_path / "a").glob("*-attention.png"))) == 1
    ok("eval", "shapes", "--model", tiny_sd3_folder, "--n", 4, *QUICK, "--attention", 2, "--out", "e")
    seen = json.loads(Path("e/results.json").read_text())["attention"]
    assert seen["prompts"] == 2 and len(seen["means"]) == 2 and "SD3" in seen["layers"]


def test_eval_refuses_what_cannot_be_shown(adapter, tiny_sd15_folder, tmp_path):
    asked = ("eval", "shapes", "--n", 2, *QUICK, "--out", "x")
    assert "--attention N" in refused(*asked, "--model", tiny_sd15_folder, "--parser", "shapes")
    Path("p").mkdir()
    said = refused("eval", "shapes", "--n", 2, "--images", "p", "--attention", 2)
    assert "--attention is for drawing" in said
    said = refused("eval", "parti", "--protocol", "textcraftor", "--attention", 2, "--out", "x")
    assert "--attention does not go with --protocol" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_maps_of_another_run_are_refused(adapter, tmp_path):
    asked = ("eval", "shapes", "--adapter", adapter, "--n", 3, *QUICK, "--attention", 2)
    ok(*asked, "--out", "a")
    ok(*asked, "--seed", 1, "--out", "b")
    name = "attention/base/00000.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    result = call(*asked, "--out", "a", "--resume")
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and last.startswith("error: ") and "is not of this run" in last
