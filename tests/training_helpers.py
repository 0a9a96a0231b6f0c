"""For tests of training: a small real method (fits a linear map, noise from `ctx.rng` alone), data, a full
disk.
"""

from __future__ import annotations

import errno
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from align_cli.data.base import Example
from align_cli.errors import UserError
from align_cli.settings import TrainSettings
from align_cli.training.guard import Guard, Watched

SIDE, OUT = 2, 3
WIDTH = 3 * SIDE * SIDE
SCORES = {3: 0.2, 6: 0.7, 9: 0.6, 12: 0.7, 11: 0.9}
"""Step -> held-out score of a scripted guard; the base has 0.5."""


class LinearMap:
    """min over W of |(x + noise) W - x W*|^2; a second group `bias` on request."""

    name = "linear"
    config_class = object
    families = frozenset({"any"})

    def __init__(self, model=None, config=None, *, seed: int = 0, hook=None, groups: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(WIDTH, OUT, generator=g))
        self.bias = nn.Parameter(torch.zeros(OUT))
        self.truth = torch.randn(WIDTH, OUT, generator=g)
        self.hook, self.groups = hook, groups
        self.options: dict[str, dict[str, float]] = {}
        self.seen: list[list[int]] = []

    def trainables(self):
        return {"map": [self.weight]} | ({"bias": [self.bias]} if self.groups == 2 else {})

    def group_options(self):
        return self.options

    def step(self, batch, ctx):
        self.seen.append(list(batch.ids))
        x = batch.pixels.flatten(1)
        noise = ctx.rows(torch.randn(len(x) * ctx.world_size, WIDTH, generator=ctx.rng))
        wanted = x @ self.truth
        loss = (((x + 0.1 * noise) @ self.weight + self.bias - wanted) ** 2).mean()
        if self.hook is not None:
            loss = self.hook(ctx, loss)
        if self.groups == 2:
            ctx.backward(loss, "map", retain_graph=True)
            ctx.backward(2 * loss, "bias")
        else:
            ctx.backward(loss)
        return {"loss": float(loss.detach()), "noise": float(noise.mean())}

    def state(self):
        return {"weight": self.weight.detach().cpu().clone()}

    def load_state(self, state):
        with torch.no_grad():
            self.weight.copy_(state["weight"])

    @contextmanager
    def attach(self, model, scale: float = 1.0):
        yield


class Points:
    """Random pictures; the caption says which and carries a number drawn from the item's own generator."""

    def __init__(self, n: int = 20, *, broken: int = -1) -> None:
        self.n, self.broken = n, broken
        self.pixels = torch.from_numpy(np.random.default_rng(5).standard_normal((n, 3, SIDE, SIDE))).float()

    def __len__(self) -> int:
        return self.n

    def get(self, index: int, rng: np.random.Generator) -> Example:
        if index == self.broken:
            raise UserError(f"image {index}.jpg is broken")
        draw = int(rng.integers(1 << 30))
        return Example(prompt=f"{index} {draw}", pixels=self.pixels[index], id=index, extra={"draw": draw})

    def fingerprint(self) -> str:
        return f"points-{self.n}"


def scripted(scores=SCORES, *, seen=None, decides="apart", **options) -> Guard:
    """A guard that gives these scores; `seen` gets what it was asked for."""

    def watch(step):
        if seen is not None:
            seen.append(step)
        if step == 0:
            return Watched({"apart": 0.5}, "base")
        x = scores[step]
        values = {"apart": x, "apart/change": x - 0.5, "apart/low": x - 0.6, "apart/high": x - 0.4}
        return Watched(values, f"look {step}", f"ALARM {step}" if x < 0.5 else "")

    return Guard(watch, 3, decides=decides, **options)


def settings(**changes) -> TrainSettings:
    """Quick settings."""
    base = {"steps": 12, "batch_size": 4, "lr": 0.05, "log_every": 1, "save_every": 4, "seed": 3}
    return TrainSettings(**{**base, **changes})


def trace(out: Path) -> list[str]:
    """The lines of metrics.jsonl as bytes would compare them, without the wall clock."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line[: line.rindex(', "seconds"')] for line in lines]


class FullDisk:
    """A file on a disk with room for `room` bytes more."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def make_coco(root: Path) -> Path:
    """A COCO folder: five images of several shapes and modes, ids not in order; image 9 has no caption."""
    (root / "annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    shapes = {5: (24, 40), 2: (40, 24), 31: (16, 16), 7: (33, 50), 9: (20, 20)}
    for split in ("train", "val"):
        folder = root / f"{split}2017"
        folder.mkdir()
        images, notes = [], []
        for i, (height, width) in shapes.items():
            name = f"{i:012d}.jpg"
            picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            (picture.convert("L") if i == 7 else picture).save(folder / name, quality=95)
            images.append({"id": i, "file_name": name, "height": height, "width": width})
            if i != 9:
                texts = [f"image {i} text {k}" for k in range(5)]
                notes += [{"image_id": i, "id": 10 * i + k, "caption": text} for k, text in enumerate(texts)]
        raw = {"images": images, "annotations": notes[::-1] if split == "val" else notes}
        (root / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(raw))
    return root
