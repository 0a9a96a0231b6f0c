"""The folder of an evaluation: complete pictures only, and only this run's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from eval_helpers import flat, prompt_set

from align_cli.errors import UserError
from align_cli.evaluation.store import ABOUT, Store, check_folder, differences, make_items
from align_cli.pictures import read_metadata

ABOUT_RUN = {"seed": 0, "sample": {"steps": 3}, "arms": {"base": {"adapters": []}}}


def begin(store: Store, **how: bool) -> None:
    store.begin(["t2ialign", "eval"], "now", **{"resume": False, "overwrite": False} | how)


def test_items_have_seeds_and_names():
    one, two = make_items(prompt_set(3), 1, 5), make_items(prompt_set(3), 2, 5)
    assert [item.stem for item in one] == ["00000", "00001", "00002"]
    assert [item.stem for item in two] == ["00000-0", "00000-1", "00001-0", "00001-1", "00002-0", "00002-1"]
    assert len({item.seed for item in two}) == 6
    assert [item.seed for item in one] == [item.seed for item in two][:3]
    assert make_items(prompt_set(3), 1, 6)[0].seed != one[0].seed


def test_pictures_that_are_there_are_not_missing(tmp_path):
    store, items = Store(tmp_path / "e", ABOUT_RUN), make_items(prompt_set(4), 1, 0)
    begin(store)
    assert store.missing("base", items) == [0, 1, 2, 3]
    for item in items[:3]:
        store.save("base", item, flat(0.2), {"adapter": "none"})
    assert store.missing("base", items) == [3]
    facts = read_metadata(store.path("base", items[1]))
    assert facts["prompt"] == items[1].row.text and facts["arm"] == "base" and facts["adapter"] == "none"
    cut = store.path("base", items[1])
    cut.write_bytes(cut.read_bytes()[:-40])
    assert store.missing("base", items) == [1, 3]
    store.path("base", items[0]).write_bytes(store.path("base", items[2]).read_bytes())
    with pytest.raises(UserError, match="no picture of this run: its seed"):
        store.missing("base", items)


def test_a_picture_of_another_run_is_refused(tmp_path):
    items = make_items(prompt_set(2), 1, 0)
    other, store = Store(tmp_path / "a", {"seed": 1}), Store(tmp_path / "a", ABOUT_RUN)
    other.save("base", items[0], flat(0.2), {})
    with pytest.raises(UserError, match="its run is"):
        store.missing("base", items)


def test_a_changed_run_is_refused_with_the_reason(tmp_path):
    begin(Store(tmp_path / "e", ABOUT_RUN))
    saved = json.loads((tmp_path / "e" / ABOUT).read_text())
    assert saved["identity"] == ABOUT_RUN and saved["command"] == ["t2ialign", "eval"]
    torn = tmp_path / "e" / "images" / "base" / ".00003.png.abc.part"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"half")
    begin(Store(tmp_path / "e", ABOUT_RUN), resume=True)
    assert not torn.exists()
    changed = Store(tmp_path / "e", ABOUT_RUN | {"sample": {"steps": 4}})
    with pytest.raises(UserError, match="sample.steps: 3 -> 4"):
        begin(changed, resume=True)
    with pytest.raises(UserError, match="go on with --resume"):
        begin(changed)
    begin(changed, overwrite=True)
    assert json.loads((tmp_path / "e" / ABOUT).read_text())["run"] == changed.run


def test_overwrite_leaves_other_files_alone(tmp_path):
    store, items = Store(tmp_path, ABOUT_RUN), make_items(prompt_set(1), 1, 0)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no evaluation"):
        begin(store)
    begin(store, overwrite=True)
    store.save("base", items[0], flat(0.2), {})
    begin(store, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [ABOUT, "thesis.tex"]


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="give one of them"):
        check_folder(tmp_path, resume=True, overwrite=True)
    with pytest.raises(UserError, match="no evaluation to resume"):
        check_folder(tmp_path / "none", resume=True, overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_folder(tmp_path / "file" / "x", resume=False, overwrite=False)
    for content, part in (("{", "damaged"), ('{"format": 99}', "format 99"), ('{"format": 1}', "damaged")):
        (tmp_path / ABOUT).write_text(content)
        with pytest.raises(UserError, match=part):
            check_folder(tmp_path, resume=True, overwrite=False)


def test_differences_in_words():
    assert differences({"a": 1}, {"a": 1}) == []
    assert differences({"a": {"b": [1]}}, {"a": {"b": [2]}}) == ["a.b: [1] -> [2]"]
    assert differences({"a": 1}, {"a": 1, "c": 2}) == ["c: 'not set' -> 2"]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    store, items = Store(tmp_path / "e", ABOUT_RUN), make_items(prompt_set(1), 1, 0)
    begin(store)
    monkeypatch.setattr("align_cli.pictures.Path.replace", full)
    with pytest.raises(UserError, match="00000.png: the disk is full"):
        store.save("base", items[0], np.zeros((8, 8, 3), np.uint8), {})
    assert store.missing("base", items) == [0]
