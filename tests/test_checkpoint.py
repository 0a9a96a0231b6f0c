"""Checkpoints are whole or not there; damage is found; the disk may be full."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from training_helpers import FullDisk

from align_cli.errors import UserError
from align_cli.files import write_text
from align_cli.training import checkpoint
from align_cli.training.checkpoint import load_newest, names, save_checkpoint

STATE = {"a": [torch.arange(5.0), torch.tensor(3)], "b": {"c": 0.1, "d": None, "e": "text"}, "f": {0: True}}


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        save_checkpoint(folder, step, STATE | {"step": step}, keep=keep)


def test_round_trip_is_exact(tmp_path):
    save(tmp_path, 7)
    found, damaged = load_newest(tmp_path)
    assert found is not None and damaged == []
    assert found.step == 7 and found.path == tmp_path / "step-00000007"
    assert torch.equal(found.state["a"][0], STATE["a"][0]) and found.state["b"] == STATE["b"]
    assert sorted(p.name for p in found.path.iterdir()) == ["meta.json", "state.pt"]


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 2, 10, 100, 1000, keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00001000"]
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_to_load(tmp_path):
    assert load_newest(tmp_path / "none") == (None, [])
    assert load_newest(tmp_path) == (None, [])


def _cut(path: Path) -> None:
    data = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(data[: len(data) // 2])


def _flip(path: Path) -> None:
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, "bytes, not"),
        (_flip, "another sha256"),
        (lambda p: (p / "state.pt").unlink(), "cannot be read"),
        (lambda p: (p / "meta.json").unlink(), "no readable meta.json"),
        (lambda p: (p / "meta.json").write_text("{"), "no readable meta.json"),
        (lambda p: (p / "meta.json").write_text("[]"), "no readable meta.json"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_word(tmp_path, damage, words):
    save(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002")
    found, damaged = load_newest(tmp_path)
    assert found is not None and found.step == 1
    assert len(damaged) == 1 and "step-00000002" in damaged[0] and words in damaged[0]
    save(tmp_path, 2)  # and it can be written anew
    found, damaged = load_newest(tmp_path)
    assert found is not None and found.step == 2 and damaged == []


def test_a_later_format_is_no_damage(tmp_path):
    save(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="format 99.*update t2ialign"):
        load_newest(tmp_path)


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_a_full_disk_keeps_the_last_good_one(tmp_path, monkeypatch, room):
    save(tmp_path, 4)
    real = checkpoint._HashingFile
    monkeypatch.setattr(checkpoint, "_HashingFile", lambda file: real(FullDisk(file, room)))
    with pytest.raises(UserError) as caught:
        save(tmp_path, 8)
    text = str(caught.value)
    assert "the disk is full" in text and str(tmp_path / "step-00000004") in text and "--resume" in text
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    found, damaged = load_newest(tmp_path)
    assert found is not None and found.step == 4 and damaged == []


def test_no_permission_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoint"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_what_a_crash_left_is_removed_and_never_loaded(tmp_path):
    save(tmp_path, 4)
    (tmp_path / ".step-00000008.part").mkdir()
    (tmp_path / ".step-00000008.part" / "state.pt").write_bytes(b"half")
    (tmp_path / ".step-00000002.old").mkdir()
    (tmp_path / "notes").mkdir()
    found, _ = load_newest(tmp_path)
    assert found is not None and found.step == 4
    checkpoint.clean(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000004"]


def test_write_text_replaces_or_leaves(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "one")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError):
        write_text(path, "two")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
