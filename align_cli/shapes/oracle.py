"""The oracle: reads a picture of the shapes world and says exactly what it shows. No learned part.

1. Foreground: chroma (max - min of RGB) as a soft coverage, hue to the nearest of the four colours.
2. Connected components per colour (4-neighbourhood), one C call for a whole batch of pictures.
3. Shape by analysis and synthesis: each of the three shapes is rendered with the blob's own area and
centroid; the best soft intersection over union wins, and below MIN_IOU the blob is of unknown shape.
4. Background: median grey of the border pixels.

Letters: N pictures, M blobs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from torch import Tensor

from align_cli.shapes.captions import Spec
from align_cli.shapes.world import BACKGROUNDS, CHROMA, COLORS, HALF_HEIGHT, SHAPES, SIZE, coverage

MIN_AREA = 12.0
"""Blobs of less coverage (in pixels) are dirt, not objects; the smallest true object covers 40."""
MIN_IOU = 0.75
"""Below this similarity with the best template a blob has no known shape."""
MIN_COVER = 0.45
"""A pixel belongs to a blob from this coverage on."""
METRICS = ("object", "color", "shape", "count", "relation", "background", "facts", "all")
"""What `judge` reports; `object` (colour and shape on one blob) is attribute binding."""

_HUES = np.array([0.0, 54.9474, 130.1053, 234.9474])


@dataclass(frozen=True)
class Blobs:
    """All objects found in N pictures, one row per blob.

    image: (M,) picture index. color: (M,) index into COLORS. shape: (M,) index into SHAPES, -1 for unknown.
    x, y: (M,) centre of the bounding box in pixels. area: (M,) pixels. background: (N,) name or "" if
    neither. soft: (M, 32, 32) coverage of its pixels; above MIN_COVER they are its own.
    """

    image: np.ndarray
    color: np.ndarray
    shape: np.ndarray
    x: np.ndarray
    y: np.ndarray
    area: np.ndarray
    background: list[str]
    soft: np.ndarray

    @property
    def masks(self) -> np.ndarray:
        """(M, 32, 32) bool."""
        own: np.ndarray = self.soft > MIN_COVER
        return own


def as_uint8(images: np.ndarray | Tensor) -> np.ndarray:
    """(N, H, W, 3) uint8 of (N, H, W, 3) uint8 or (N, 3, H, W) float in [0, 1]."""
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.dtype != np.uint8:
        array = np.rint(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    if array.ndim == 4 and array.shape[1:] == (3, SIZE, SIZE):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"the oracle reads {SIZE}x{SIZE} RGB pictures, got shape {array.shape}")
    return array


def find(images: np.ndarray | Tensor) -> Blobs:
    """Find every object of a batch of pictures."""
    rgb = as_uint8(images).astype(np.float32)
    high, low = rgb.max(-1), rgb.min(-1)
    chroma = high - low
    alpha = np.clip(chroma / CHROMA, 0, 1)
    color = _nearest_color(rgb, high, chroma)
    solid = (alpha[:, None] > MIN_COVER) & (color[:, None] == np.arange(len(COLORS))[None, :, None, None])
    structure = np.zeros((3, 3, 3, 3), bool)
    structure[1, 1] = ndimage.generate_binary_structure(2, 1)
    labels, total = ndimage.label(solid, structure)
    background = _backgrounds(rgb)
    if total == 0:
        none, index = np.zeros(0), np.zeros(0, int)
        return Blobs(index, index, index, none, none, none, background, np.zeros((0, SIZE, SIZE), np.float32))
    image, hue, row, col = np.nonzero(labels)
    label = labels[image, hue, row, col] - 1
    weight = alpha[image, row, col]
    size = np.bincount(label, weight, total)
    keep = np.nonzero(size >= MIN_AREA)[0]
    owner, tint = np.zeros(total, int), np.zeros(total, int)
    owner[label], tint[label] = image, hue
    soft = _soft_masks(labels, keep, owner[keep], tint[keep], alpha)
    area = soft.sum((1, 2))
    grid = np.arange(SIZE) + 0.5
    cx = (soft.sum(1) * grid).sum(1) / area
    cy = (soft.sum(2) * grid).sum(1) / area
    shape, y = _classify(soft, area, cx, cy)
    return Blobs(owner[keep], tint[keep], shape, cx, y, area, background, soft)


def _nearest_color(rgb: np.ndarray, high: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """(N, H, W) int: index of the colour of nearest hue."""
    c = np.maximum(chroma, 1e-6)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(high == r, (g - b) / c % 6, np.where(high == g, (b - r) / c + 2, (r - g) / c + 4)) * 60
    away = np.abs(hue[..., None] - _HUES)
    return np.minimum(away, 360 - away).argmin(-1)


def _soft_masks(
    labels: np.ndarray, keep: np.ndarray, owner: np.ndarray, tint: np.ndarray, alpha: np.ndarray
) -> np.ndarray:
    """(M, H, W) coverage of each kept blob: its own pixels plus the faint anti-aliased ring around them."""
    own = labels[owner, tint] == (keep + 1)[:, None, None]
    ring = ndimage.binary_dilation(own, ndimage.generate_binary_structure(2, 2)[None])
    taken = labels[owner].max(1) > 0
    return np.where(own | (ring & ~taken), alpha[owner], 0).astype(np.float32)


def _classify(
    soft: np.ndarray, area: np.ndarray, cx: np.ndarray, cy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Shape index (-1 unknown) and box centre y of every blob."""
    score, centre = np.empty((len(area), len(SHAPES)), np.float32), np.empty((len(area), len(SHAPES)))
    unit_area = {"circle": np.pi, "square": 3.24, "triangle": 2.31}
    for index, name in enumerate(SHAPES):
        r = np.sqrt(area / unit_area[name])
        y = cy - r * HALF_HEIGHT["triangle"] / 3 if name == "triangle" else cy
        template = coverage(np.full(len(area), index), cx, y, r)
        score[:, index] = np.minimum(template, soft).sum((1, 2)) / np.maximum(template, soft).sum((1, 2))
        centre[:, index] = y
    best = score.argmax(1)
    rows = np.arange(len(area))
    known = score[rows, best] >= MIN_IOU
    return np.where(known, best, -1), np.where(known, centre[rows, best], cy)


def _backgrounds(rgb: np.ndarray) -> list[str]:
    """Name of the background of every picture: the grey nearest to the median border pixel, "" if none is
    within 60.
    """
    border = np.concatenate([rgb[:, 0], rgb[:, -1], rgb[:, :, 0], rgb[:, :, -1]], axis=1)
    level = np.median(border, axis=1)
    names = list(BACKGROUNDS)
    away = np.abs(level[:, None, :] - np.array([BACKGROUNDS[n] for n in names])[None, :, None]).max(-1)
    return [names[i] if row[i] < 60 else "" for row, i in zip(away, away.argmin(1), strict=True)]


def relation_holds(relation: str, dx: float, dy: float) -> bool:
    """Does `relation` hold for an object at offset (dx, dy) from the other, y downwards? It must dominate."""
    return {
        "left of": -dx > abs(dy),
        "right of": dx > abs(dy),
        "above": -dy > abs(dx),
        "below": dy > abs(dx),
    }[relation]


def judge(images: np.ndarray | Tensor, specs: list[Spec]) -> dict[str, np.ndarray]:
    """Exact alignment of pictures with what was asked for.

    Args:
        images: (N, 32, 32, 3) uint8 or (N, 3, 32, 32) float in [0, 1].
        specs: N specifications.
    Returns:
        metric -> (N,) float in [0, 1], NaN where the specification does not ask for it:
        object: share of the wanted (colour, shape) objects that are there; color, shape: the same for colours
        and shapes anywhere; count: 1 if the number of blobs is exact; relation: share of true relations;
        background;
        facts: share of all single facts; all: 1 if every fact is true.
    """
    if len(images) != len(specs):
        raise ValueError(f"{len(images)} images but {len(specs)} specs")
    blobs = find(images)
    colors = list(COLORS)
    rows: list[list[tuple[str, str, float, float]]] = [[] for _ in specs]
    for i, c, s, x, y in zip(blobs.image, blobs.color, blobs.shape, blobs.x, blobs.y, strict=True):
        rows[i].append((colors[c], SHAPES[s] if s >= 0 else "", float(x), float(y)))
    out = {name: np.full(len(specs), np.nan) for name in METRICS}
    for i, (spec, found) in enumerate(zip(specs, rows, strict=True)):
        for name, value in _judge_one(spec, found, blobs.background[i]).items():
            out[name][i] = value
    return out


def _judge_one(spec: Spec, found: list[tuple[str, str, float, float]], background: str) -> dict[str, float]:
    objects = _matched([f[:2] for f in found], list(spec.objects))
    values = {
        "object": objects / len(spec.objects),
        "color": _matched([f[0] for f in found], [o[0] for o in spec.objects]) / len(spec.objects),
        "shape": _matched([f[1] for f in found], [o[1] for o in spec.objects]) / len(spec.objects),
        "count": float(len(found) == len(spec.objects)),
    }
    facts = [float(objects > k) for k in range(len(spec.objects))] + [values["count"]]
    if spec.relations:
        true = [
            _relation_true(spec.objects[a], name, spec.objects[b], found) for a, name, b in spec.relations
        ]
        values["relation"] = sum(true) / len(true)
        facts += [float(v) for v in true]
    if spec.background:
        values["background"] = float(background == spec.background)
        facts.append(values["background"])
    values["facts"] = sum(facts) / len(facts)
    values["all"] = float(all(facts))
    return values


def _matched(found: list, wanted: list) -> int:
    """How many of `wanted` are in `found`, each found item used once."""
    return sum(min(found.count(item), wanted.count(item)) for item in set(wanted))


def _relation_true(a: tuple[str, str], name: str, b: tuple[str, str], found: list) -> bool:
    return any(
        relation_holds(name, p[2] - q[2], p[3] - q[3])
        for p in found
        if p[:2] == a
        for q in found
        if q[:2] == b and q is not p
    )
