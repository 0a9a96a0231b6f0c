"""Filling a folder with encodings: stopped, on a full disk, by several processes."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cache_helpers import encode, full_disk, prepare, request_for, silent

from align_cli.data import filling
from align_cli.data.cache import Cache
from align_cli.data.claims import Claims
from align_cli.data.filling import Filling, changed_shards
from align_cli.data.shards import write_shard
from align_cli.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_numbers_that_are_not_finite(tmp_path, tiny_models, tiny_coco):
    broken = copy.copy(tiny_models["sd15"])
    broken.posterior = lambda pixels: replace(p := tiny_models["sd15"].posterior(pixels), std=p.std / 0)
    with pytest.raises(UserError, match=r"encodings of pictures \[0, 1, 2, 3\] are not finite"):
        encode(tmp_path / "c", broken, tiny_coco)
    assert not (tmp_path / "c" / "images-00000.safetensors").exists()


def test_a_full_disk_in_the_middle(tmp_path, tiny_models, tiny_coco, monkeypatch):
    model, folder = tiny_models["sd15"], tmp_path / "c"
    with monkeypatch.context() as patch:
        full_disk(patch, 1000, "captions-00001")
        with pytest.raises(UserError) as caught:
            encode(folder, model, tiny_coco)
    assert "captions-00001.safetensors: the disk is full; 2 of 4 shards are finished and kept" in str(
        caught.value
    )
    assert f"t2ialign encode --resume --out {folder}" in str(caught.value)
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", "captions-00000.safetensors", "images-00000.safetensors", "items.json", "manifest.json",
    ]  # fmt: skip
    encoder, about = prepare(model, request_for(model, tiny_coco))
    with pytest.raises(UserError, match=r"unfinished encodings \(2 of 4 shards\); go on with --resume"):
        Filling(folder, about, encoder.index).__enter__()
    written = []
    monkeypatch.setattr(
        filling, "write_shard", lambda path, *r: written.append(path.name) or write_shard(path, *r)
    )
    with Filling(folder, about, encoder.index, resume=True) as work:
        work.run(encoder, silent, silent)
    assert written == ["captions-00001.safetensors", "captions-00002.safetensors"]
    assert not changed_shards(Cache.read(folder)) and Cache.read(folder).complete


def test_no_room_is_refused_before_anything_is_written(tmp_path, tiny_models, tiny_coco, monkeypatch):
    """Room for all shards (90,624 bytes) is not enough: items.json and the manifest are written, too."""
    usage = filling.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda _: usage._replace(free=91_000))
    with pytest.raises(UserError, match=r"9[2-5]\.\d kB are to be written to .* its disk has 91.0 kB free"):
        encode(tmp_path / "c", tiny_models["sd15"], tiny_coco)
    assert not (tmp_path / "c").exists()


HOLD = """
import sys, time
from pathlib import Path
from align_cli.data.claims import Claims
with Claims(Path(sys.argv[1])) as claims:
    with claims.order():
        alone = claims.come()
    print(alone, claims.take(2), flush=True)
    time.sleep(600)
"""


def test_claims_hold_until_their_process_ends(tmp_path):
    path = tmp_path / ".lock"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert other.stdout.readline() == "True True\n"
        with Claims(path) as claims, claims.order():
            assert not claims.come() and not claims.take(2) and claims.take(3)
        other.kill()
        other.wait()
        with Claims(path) as claims, claims.order():
            assert claims.come() and claims.take(2)
            claims.release(2)
    finally:
        other.kill()
