"""Shard files: ordinary safetensors, whole or not there."""

from __future__ import annotations

import errno

import pytest
import torch
from cache_helpers import full_disk
from safetensors.torch import load_file

from align_cli.data import shards
from align_cli.data.shards import Field, ShardReader, write_shard

FIELDS = [
    Field("half", "float16", (2, 3)),
    Field("brain", "bfloat16", (3,)),
    Field("wide", "float32", (1, 1)),
]


def some_tensors(rows: int = 5) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {f.name: torch.randn(rows, *f.shape, generator=rng).to(getattr(torch, f.dtype)) for f in FIELDS}


def test_a_shard_is_an_ordinary_safetensors_file(tmp_path):
    path, tensors = tmp_path / "a.safetensors", some_tensors()
    write_shard(path, FIELDS, tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(path).items())
    row = ShardReader().row(path, 3)
    assert row.keys() == tensors.keys() and all(torch.equal(row[k], tensors[k][3]) for k in row)
    with pytest.raises(ValueError, match="brain should be 5 rows"):
        write_shard(path, FIELDS, tensors | {"brain": tensors["brain"][:4]})


def test_the_reader_closes_what_it_has_not_used_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    reader = ShardReader()
    for k in range(4):
        write_shard(tmp_path / f"{k}", FIELDS, some_tensors(k + 1))
        assert reader.row(tmp_path / f"{k}", k).keys() == {f.name for f in FIELDS}
    assert len(reader._open) == 2


def test_a_full_disk_leaves_the_old_shard(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_shard(path, FIELDS, some_tensors(2))
    before = path.read_bytes()
    full_disk(monkeypatch, 300)
    with pytest.raises(OSError) as caught:
        write_shard(path, FIELDS, some_tensors(9))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
