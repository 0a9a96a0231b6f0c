"""Pictures of other tools find their prompts, or the user is told which are not there."""

from __future__ import annotations

import shutil

import pytest
from eval_helpers import flat, prompt_set, write_pictures
from PIL import Image

from align_cli.errors import UserError
from align_cli.evaluation.folders import match, parse_folders
from align_cli.evaluation.prompts import PromptRow, PromptSet
from align_cli.evaluation.store import Item, Store, make_items, read_picture
from align_cli.pictures import save_png


def names(found) -> list[str | None]:
    return [None if path is None else path.name for path in found]


def saved(folder, *stems: str, suffix: str = ".png") -> None:
    for stem in stems:
        path = folder / f"{stem}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(flat(0.5)).save(path)


def test_names_of_folders(tmp_path):
    (tmp_path / "before").mkdir()
    (tmp_path / "after=1").mkdir()
    found = parse_folders([str(tmp_path / "before"), f"b={tmp_path / 'before'}", str(tmp_path / "after=1")])
    assert list(found) == ["before", "b", "after-1"]
    for given, part in (
        ([str(tmp_path / "none")], "does not exist"),
        (["x="], "does not exist"),
        ([f"a/b={tmp_path}"], "cannot name"),
        ([str(tmp_path / "before")] * 2, "NAME=FOLDER"),
    ):
        with pytest.raises(UserError, match=part):
            parse_folders(given)


def test_by_number_with_any_zeros(tmp_path):
    saved(tmp_path, "0", "00001", "002")
    found, notes = match(tmp_path, make_items(prompt_set(3), 1, 0), allow_missing=False)
    assert names(found) == ["0.png", "00001.png", "002.png"]
    assert notes == [f"{tmp_path}: pictures belong to prompts by their numbers from 0"]
    saved(tmp_path, "1", suffix=".jpg")
    with pytest.raises(UserError, match="of the same prompt"):
        match(tmp_path, make_items(prompt_set(3), 1, 0), allow_missing=False)


def test_several_pictures_of_a_prompt(tmp_path):
    saved(tmp_path, "00000-0", "00000_1", "00001-0", "00001-1")
    found, _ = match(tmp_path, make_items(prompt_set(2), 2, 0), allow_missing=False)
    assert names(found) == ["00000-0.png", "00000_1.png", "00001-0.png", "00001-1.png"]


def test_by_id_in_folders_and_in_a_part_of_a_set(tmp_path):
    rows = [PromptRow(f"{style}/{i:05d}", f"{style} {i}") for style in ("anime", "photo") for i in range(3)]
    for row in rows:
        saved(tmp_path, row.id, suffix=".jpg")
    part = PromptSet("styles", "tests", (rows[1], rows[5]))
    found, notes = match(tmp_path, make_items(part, 1, 0), allow_missing=False)
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ["anime/00001.jpg", "photo/00002.jpg"]
    assert "by their ids" in notes[0] and "4 pictures belong to no prompt" in notes[1]
    numbered = PromptSet("some", "tests", (PromptRow("7", "x"), PromptRow("40", "y")))
    saved(tmp_path / "n", "007", "040", "000", "001")
    assert names(match(tmp_path / "n", make_items(numbered, 1, 0), allow_missing=False)[0]) == [
        "007.png",
        "040.png",
    ]


def test_numbers_of_a_whole_set_are_not_taken_for_those_of_a_part(tmp_path):
    whole = prompt_set(6)
    saved(tmp_path, *(f"{i:05d}" for i in range(6)))
    part = make_items(whole.limited(2), 1, 0)
    with pytest.raises(UserError, match="00002.png is of a larger set of prompts than the 2 that --limit"):
        match(tmp_path, part, allow_missing=False, limited=True)
    saved(tmp_path / "part", "0", "1")
    assert names(match(tmp_path / "part", part, allow_missing=False, limited=True)[0]) == ["0.png", "1.png"]


def test_ids_that_are_numbers(tmp_path):
    """One way for all files: that which leaves none over; never a guess."""

    def rows(*ids: str) -> list[Item]:
        return make_items(PromptSet("some", "tests", tuple(PromptRow(i, f"p{i}") for i in ids)), 1, 0)

    saved(tmp_path / "a", "00000", "00001", "00002")
    found, notes = match(tmp_path / "a", rows("1", "2", "3"), allow_missing=False)
    assert names(found) == ["00000.png", "00001.png", "00002.png"] and "by their numbers" in notes[0]
    saved(tmp_path / "b", "1", "2", "3")
    found, notes = match(tmp_path / "b", rows("1", "2", "3"), allow_missing=False)
    assert names(found) == ["1.png", "2.png", "3.png"] and "by their ids" in notes[0]
    found, _ = match(tmp_path / "a", rows("0", "1", "2"), allow_missing=False)
    assert names(found) == ["00000.png", "00001.png", "00002.png"]
    for ids in (("2", "0", "1"), ("1", "2", "7")):
        with pytest.raises(UserError, match="the id of one prompt and the number .* of another"):
            match(tmp_path / ("a" if ids[0] == "2" else "c"), rows(*ids), allow_missing=True)
        saved(tmp_path / "c", "1", "2", "9")


def test_pictures_with_and_without_metadata_in_one_folder(tmp_path):
    items = make_items(prompt_set(4), 1, 0)
    store = Store(tmp_path, {})
    for item in items:
        store.save("base", item, flat(0.5), {})
    folder = tmp_path / "images" / "base"
    for name in ("00001", "00003"):  # opened and saved again by another program
        save_png(flat(0.2), folder / f"{name}.png")
    found, _ = match(folder, items, allow_missing=False)
    assert names(found) == [f"{i:05d}.png" for i in range(4)]


def test_the_folders_of_geneval(tmp_path):
    rows = (PromptRow("00000", "x"), PromptRow("00001", "y"))
    for row in rows:
        saved(tmp_path / row.id / "samples", "0000", "0001")
    found, _ = match(tmp_path, make_items(PromptSet("geneval", "tests", rows), 2, 0), allow_missing=False)
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        f"{row.id}/samples/000{k}.png" for row in rows for k in (0, 1)
    ]


def test_our_own_pictures_are_known_by_what_they_say(tmp_path):
    part = PromptSet("some", "tests", (PromptRow("1", "x"), PromptRow("0", "y")))
    items = make_items(part, 1, 0)
    store = Store(tmp_path, {})
    for item in items:
        store.save("base", item, flat(0.5), {})  # 00000.png is of the id 1
    folder = tmp_path / "images" / "base"
    assert names(match(folder, items, allow_missing=False)[0]) == ["00000.png", "00001.png"]
    turned = make_items(PromptSet("some", "tests", part.rows[::-1]), 1, 0)
    assert names(match(folder, turned, allow_missing=False)[0]) == ["00001.png", "00000.png"]
    cut = folder / "00001.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(UserError, match="broken: .*00001.png"):
        match(folder, items, allow_missing=False)
    other = make_items(PromptSet("some", "tests", (PromptRow("1", "z"),)), 1, 0)
    with pytest.raises(UserError, match="drawn for 'x', not for 'z'"):
        match(folder, other, allow_missing=False)


def test_missing_and_broken_pictures_are_named_or_counted(tmp_path):
    items = make_items(prompt_set(6), 1, 0)
    write_pictures(tmp_path, items, [flat(0.5)] * 6)
    (tmp_path / "00001.png").unlink()
    (tmp_path / "00003.png").unlink()
    cut = tmp_path / "00004.png"
    cut.write_bytes(cut.read_bytes()[:45])
    with pytest.raises(UserError, match=r"2 of 6 pictures are missing.*00001, 00003.*broken: .*00004.png"):
        match(tmp_path, items, allow_missing=False)
    found, notes = match(tmp_path, items, allow_missing=True)
    assert [path is None for path in found] == [False, True, False, True, True, False]
    assert "2 of 6 pictures are missing" in notes[1] and "left out" in notes[1]
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no picture in .* belongs to a prompt"):
        match(tmp_path, items, allow_missing=True)


def test_a_text_that_is_called_a_picture(tmp_path):
    path = tmp_path / "0.png"
    path.write_text("hello")
    with pytest.raises(UserError, match="0.png is no whole picture"):
        read_picture(path)
    with pytest.raises(UserError, match="no picture"):
        read_picture(tmp_path / "1.png")


def test_alpha_and_grey(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "a.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "b.png")
    assert read_picture(tmp_path / "a.png")[0, 0].tolist() == [10, 20, 30]
    assert read_picture(tmp_path / "b.png")[0, 0].tolist() == [7, 7, 7]
    shutil.rmtree(tmp_path)
