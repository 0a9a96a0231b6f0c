"""The shapes world: pictures of 1 to 3 coloured shapes whose alignment with a caption can be measured
exactly.

Pictures are 32 x 32 RGB. Four saturated colours of one chroma, three shapes, two plain achromatic
backgrounds. A blend of a colour with an achromatic background keeps its hue, so anti-aliased edges never
change the colour of an object.
Rendering is by signed distance, coverage = clip(0.5 - distance): exact, vectorised, no drawing library.

Letters: N scenes, K objects of a scene, H = W = 32 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import combinations

import numpy as np

from align_cli.errors import UserError

SIZE = 32
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "yellow": (220, 204, 30),
    "green": (30, 220, 62),
    "blue": (30, 46, 220),
}
CHROMA = 190
"""max - min of the three channels, the same for every colour."""
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS: dict[str, int] = {"white": 245, "black": 12}
SCENE_KINDS = ("single", "pair", "count", "triple")
SPLITS = ("train", "val", "test")
RADIUS = (4.2, 5.4)
"""Smallest and largest radius in pixels."""
HALF_WIDTH = {"circle": 1.0, "square": 0.9, "triangle": 1.1}
"""Half width of the bounding box in radii."""
HALF_HEIGHT = {"circle": 1.0, "square": 0.9, "triangle": 1.05}
GAP = 3.0
"""Pixels kept free between bounding boxes."""
BORDER = 1.5
"""Pixels kept free at the edge of the picture."""

Kind = tuple[str, str]
"""(colour, shape)."""
KINDS: tuple[Kind, ...] = tuple((c, s) for c in COLORS for s in SHAPES)


@dataclass(frozen=True)
class Thing:
    """One object: centre of its bounding box and radius in pixels."""

    color: str
    shape: str
    x: float
    y: float
    r: float

    @property
    def kind(self) -> Kind:
        return (self.color, self.shape)

    @property
    def phrase(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box x0, y0, x1, y1 in pixels."""
        w, h = HALF_WIDTH[self.shape] * self.r, HALF_HEIGHT[self.shape] * self.r
        return (self.x - w, self.y - h, self.x + w, self.y + h)


@dataclass(frozen=True)
class Scene:
    """What is in a picture. kind: single, pair (two kinds), count (2 or 3 of one kind) or triple (three
    kinds).
    """

    kind: str
    things: tuple[Thing, ...]
    background: str

    def boxes(self) -> list[tuple[str, tuple[float, float, float, float]]]:
        """(phrase, box in pixels) of every object: the ground truth for grounding."""
        return [(thing.phrase, thing.box) for thing in self.things]


@cache
def pair_split(a: Kind, b: Kind) -> str:
    """Split of an unordered pair of different kinds: about 20 % test, 10 % val, 70 % train, by hash.

    Every colour, shape and (colour, shape) occurs in training; what is held out are pairs.
    """
    first, second = sorted((a, b))
    bucket = sha256(f"{first}|{second}".encode()).digest()[0] % 10
    return "test" if bucket < 2 else "val" if bucket == 2 else "train"


def scene_split(kinds: tuple[Kind, ...]) -> str:
    """test if any pair of different kinds is held out for test, else val if any is for val, else train."""
    found = {pair_split(a, b) for a, b in combinations(sorted(set(kinds)), 2)}
    return "test" if "test" in found else "val" if "val" in found else "train"


@cache
def kind_table(scene_kind: str, split: str) -> tuple[tuple[Kind, ...], ...]:
    """All unordered kind tuples that a scene of this kind may show in this split."""
    if scene_kind == "single":
        return tuple((k,) for k in KINDS)
    if scene_kind == "count":
        return tuple((k,) * n for k in KINDS for n in (2, 3))
    table = tuple(combinations(KINDS, 2 if scene_kind == "pair" else 3))
    return tuple(kinds for kinds in table if scene_split(kinds) == split)


def sample_scenes(
    n: int,
    rng: np.random.Generator,
    *,
    kinds: tuple[str, ...] | None = None,
    weights: tuple[float, ...] | None = None,
    split: str = "train",
) -> list[Scene]:
    """Draw `n` scenes. `kinds`: scene kinds to draw from, with `weights` (default: uniform).

    Single and count scenes have no held-out combinations: they are the same in every split.
    """
    kinds = kinds or SCENE_KINDS
    for name in kinds:
        if name not in SCENE_KINDS:
            raise UserError(f"unknown kind of scene {name!r} (known: {', '.join(SCENE_KINDS)})")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} (known: {', '.join(SPLITS)})")
    p = None if weights is None else np.asarray(weights) / np.sum(weights)
    drawn = rng.choice(len(kinds), size=n, p=p)
    rows: list[tuple[Kind, ...]] = []
    for index in drawn:
        table = kind_table(kinds[index], split)
        chosen = table[rng.integers(len(table))]
        rows.append(tuple(chosen[i] for i in rng.permutation(len(chosen))))
    backgrounds = rng.choice(list(BACKGROUNDS), size=n)
    places: dict[int, np.ndarray] = {}
    for size in sorted({len(row) for row in rows}):
        index = [i for i, row in enumerate(rows) if len(row) == size]
        for i, place in zip(index, _place(len(index), size, rng), strict=True):
            places[i] = place
    return [
        Scene(
            kinds[drawn[i]],
            tuple(Thing(c, s, *map(float, places[i][k])) for k, (c, s) in enumerate(rows[i])),
            str(backgrounds[i]),
        )
        for i in range(n)
    ]


def place(things: list[Thing], rng: np.random.Generator) -> tuple[Thing, ...]:
    """The same objects at new places and in new sizes."""
    rows = _place(1, len(things), rng)[0]
    return tuple(Thing(t.color, t.shape, *map(float, row)) for t, row in zip(things, rows, strict=True))


def _place(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(n, size, 3) float: x, y, r of objects whose boxes keep their distance, by rejection, all scenes at
    once.
    """
    out = np.empty((n, size, 3))
    todo = np.arange(n)
    first, second = np.triu_indices(size, 1)
    while len(todo):
        r = rng.uniform(*RADIUS, (len(todo), size))
        half = r * max(HALF_WIDTH.values())
        low, high = half + BORDER, SIZE - half - BORDER
        x, y = (low + rng.uniform(size=r.shape) * (high - low) for _ in range(2))
        need = half[:, first] + half[:, second] + GAP
        apart = (np.abs(x[:, first] - x[:, second]) >= need) | (np.abs(y[:, first] - y[:, second]) >= need)
        ok = apart.all(axis=1)
        out[todo[ok]] = np.stack([x, y, r], axis=-1)[ok]
        todo = todo[~ok]
    return out


def coverage(shape: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Fraction of every pixel that an object covers.

    Args:
        shape: (M,) int, index into SHAPES. x, y: (M,) box centre in pixels. r: (M,) radius in pixels.
    Returns:
        (M, H, W) float32 in [0, 1].
    """
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    dx = grid[None, None, :] - x[:, None, None].astype(np.float32)
    dy = grid[None, :, None] - y[:, None, None].astype(np.float32)
    r = r[:, None, None].astype(np.float32)
    out = np.empty((len(x), SIZE, SIZE), np.float32)
    for index, name in enumerate(SHAPES):
        m = shape == index
        if not m.any():
            continue
        u, v, q = dx[m], dy[m], r[m]
        if name == "circle":
            distance = np.sqrt(u * u + v * v) - q
        elif name == "square":
            distance = np.maximum(np.abs(u), np.abs(v)) - HALF_WIDTH["square"] * q
        else:
            w, h = HALF_WIDTH["triangle"] * q, HALF_HEIGHT["triangle"] * q
            slope = np.sqrt((2 * h) ** 2 + w**2)
            side = (2 * h * np.abs(u) - w * (v + h)) / slope
            distance = np.maximum(side, v - h)
        out[m] = np.clip(0.5 - distance, 0, 1)
    return out


def masks(scene: Scene) -> np.ndarray:
    """(K, H, W) float32 coverage of every object."""
    t = scene.things
    return coverage(
        np.array([SHAPES.index(o.shape) for o in t]),
        np.array([o.x for o in t]),
        np.array([o.y for o in t]),
        np.array([o.r for o in t]),
    )


def render(scenes: list[Scene]) -> np.ndarray:
    """(N, H, W, 3) uint8 pictures of the scenes."""
    image = np.empty((len(scenes), SIZE, SIZE, 3), np.float32)
    image[:] = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32)[:, None, None, None]
    for k in range(max((len(s.things) for s in scenes), default=0)):
        index = np.array([i for i, s in enumerate(scenes) if len(s.things) > k])
        things = [scenes[i].things[k] for i in index]
        alpha = coverage(
            np.array([SHAPES.index(o.shape) for o in things]),
            np.array([o.x for o in things]),
            np.array([o.y for o in things]),
            np.array([o.r for o in things]),
        )[..., None]
        color = np.array([COLORS[o.color] for o in things], np.float32)[:, None, None, :]
        image[index] = image[index] * (1 - alpha) + color * alpha
    return np.rint(image).astype(np.uint8)
