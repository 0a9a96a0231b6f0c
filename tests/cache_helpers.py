"""What the tests of encodings share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training_helpers import FullDisk

from align_cli.data import shards
from align_cli.data.cache import Cache
from align_cli.data.coco import CocoDataset
from align_cli.data.encoding import Encoder, Request, describe, make_index, measure
from align_cli.data.filling import Filling
from align_cli.settings import DataSettings, ModelSettings
from align_cli.shapes.dataset import ShapesDataset

SEED = 3
FAMILIES = ("sd15", "sdxl", "sd3")


def open_data(data: DataSettings):
    if data.name == "shapes":
        return ShapesDataset(data, seed=SEED)
    with pytest.warns(UserWarning, match="no caption"):
        return CocoDataset(data, seed=SEED)


def request_for(model, data: DataSettings, **changes) -> Request:
    base = {"seed": SEED, "batch_size": 4, "shard_items": 8, "captions": "all"}
    return Request(model=ModelSettings(name=model.model_id, device="cpu"), data=data, **{**base, **changes})


def prepare(model, request: Request):
    dataset = open_data(request.data)
    index = make_index(dataset, request)
    pixels = dataset.get(0, np.random.default_rng(0)).pixels
    measured = measure(model, pixels)
    about = describe(request, dataset, index, model, measured)
    return Encoder(model, dataset, index, measured.shapes, request), about


def encode(folder: Path, model, data: DataSettings, **changes) -> Cache:
    """Encode `data` with `model` in this process."""
    encoder, about = prepare(model, request_for(model, data, **changes))
    with Filling(folder, about, encoder.index) as work:
        work.run(encoder, silent, silent)
    return Cache.read(folder)


def silent(*_args: object) -> None:
    """No progress."""


class FullFile(FullDisk):
    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def full_disk(monkeypatch, room: int, name: str = "") -> None:
    """A disk with room for so many bytes of a shard whose name holds `name`."""
    real = shards.open_part

    def open_part(path):
        return FullFile(real(path), room) if name in path.name else real(path)

    monkeypatch.setattr(shards, "open_part", open_part)
