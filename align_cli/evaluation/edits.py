"""Edit success on the shapes world, read by the oracle: was the asked attribute changed, was the rest kept?

The source picture is rendered from its scene, so what must change and what must stay is known exactly.

Letters: N edits, H = W = 32 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from align_cli.editing import edit
from align_cli.errors import UserError
from align_cli.models.base import BaseModel
from align_cli.sampling import picture_seeds
from align_cli.settings import EditSettings
from align_cli.shapes.captions import Prompt, counterfactual, recaption
from align_cli.shapes.oracle import Blobs, find, judge
from align_cli.shapes.world import COLORS, SHAPES, SIZE, Scene, Thing, masks, render, sample_scenes

PLACE = 4.0
"""Pixels that an object's centre may be off its place; less than the smallest radius."""
SCENE_KINDS = ("pair", "triple")
"""Kinds of scenes that have held-out compositions."""
EDIT_METRICS = ("changed", "kept", "both", "caption", "untouched", "outside")
"""What `judge_edits` reports; `both` is the edit success."""


@dataclass(frozen=True)
class EditCase:
    """One edit: the scene as it is and as it should be, true captions of both.

    place: index of the edited object in the things of both scenes. attribute: color or shape.
    """

    before: Scene
    after: Scene
    src: Prompt
    tgt: Prompt
    place: int
    attribute: str

    @property
    def composition(self) -> Hashable:
        """What is asked for, whatever the words: edits of one composition are no independent evidence."""
        return tuple(sorted(self.tgt.spec.objects)), self.after.things[self.place].kind


def edit_cases(n: int, seed: int = 0, *, split: str = "test") -> list[EditCase]:
    """`n` edits of one colour or one shape of one object, the same for the same arguments; the composition
    before and after is of `split`.
    """
    if n < 1:
        raise UserError(f"an evaluation needs at least one edit, got {n}")
    rng = np.random.default_rng([seed, 60])
    cases: list[EditCase] = []
    while len(cases) < n:
        for scene in sample_scenes(64, rng, kinds=SCENE_KINDS, split=split):
            src = recaption(scene, rng, long_rate=0.0)
            after, tgt = counterfactual(scene, src, rng, split=split)
            case = _single_edit(scene, after, src, tgt)
            if case is not None and len(cases) < n:
                cases.append(case)
    return cases


def _single_edit(before: Scene, after: Scene, src: Prompt, tgt: Prompt) -> EditCase | None:
    """The edit, if exactly one attribute of one object differs and nothing else."""
    there = {(t.x, t.y, t.r): t for t in before.things}
    if {(t.x, t.y, t.r) for t in after.things} != there.keys() or src.spec.relations != tgt.spec.relations:
        return None
    things = tuple(there[t.x, t.y, t.r] for t in after.things)  # in the order of the other scene
    changes = [
        (k, name)
        for k, (old, new) in enumerate(zip(things, after.things, strict=True))
        for name in ("color", "shape")
        if getattr(old, name) != getattr(new, name)
    ]
    if len(changes) != 1:
        return None
    return EditCase(Scene(before.kind, things, before.background), after, src, tgt, *changes[0])


def judge_edits(pictures: np.ndarray, cases: Sequence[EditCase]) -> dict[str, np.ndarray]:
    """How each edit came out.

    Args:
        pictures: (N, 32, 32, 3) uint8, the edited ones. An object is at a place if its centre is within PLACE
            pixels of it.
    Returns:
        metric -> (N,) float. changed: at the place of the edited object there is one object, and it is the
        one asked for. kept: every other object is at its place, alone and of its kind; there is no object
        anywhere else; the background is the same. both: changed and kept. caption: the target caption is true
        of the picture, wherever things are. untouched: the edited object is still what it was. outside: mean
        difference to the source picture outside the edited object (its outlines before and after, and 2
        pixels around), in levels of 0 to 255.
    """
    if len(pictures) != len(cases):
        raise ValueError(f"{len(pictures)} pictures but {len(cases)} edits")
    blobs = find(pictures)
    found = [_named(blobs, i) for i in range(len(cases))]
    out = {name: np.zeros(len(cases)) for name in EDIT_METRICS}
    out["caption"] = judge(pictures, [case.tgt.spec for case in cases])["all"]
    sources = render([case.before for case in cases])
    for i, case in enumerate(cases):
        at = [_at(thing, found[i]) for thing in case.after.things]
        others = [k for k in range(len(at)) if k != case.place]
        out["changed"][i] = at[case.place] == [case.after.things[case.place].kind]
        out["untouched"][i] = at[case.place] == [case.before.things[case.place].kind]
        out["kept"][i] = (
            all(at[k] == [case.after.things[k].kind] for k in others)
            and sum(map(len, at)) == len(found[i])
            and blobs.background[i] == case.before.background
        )
        free = ~_around(case)
        out["outside"][i] = np.abs(pictures[i].astype(float) - sources[i])[free].mean()
    out["both"] = out["changed"] * out["kept"]
    return out


def _named(blobs: Blobs, image: int) -> list[tuple[tuple[str, str], float, float]]:
    """((colour, shape), x, y) of the objects of one picture; shape "" if unknown."""
    rows = np.nonzero(blobs.image == image)[0]
    names = [
        (list(COLORS)[blobs.color[m]], SHAPES[blobs.shape[m]] if blobs.shape[m] >= 0 else "") for m in rows
    ]
    return [(name, float(blobs.x[m]), float(blobs.y[m])) for name, m in zip(names, rows, strict=True)]


def _at(thing: Thing, found: list[tuple[tuple[str, str], float, float]]) -> list[tuple[str, str]]:
    """Kinds of the objects at the place of `thing`."""
    return [kind for kind, x, y in found if np.hypot(x - thing.x, y - thing.y) <= PLACE]


def _around(case: EditCase) -> np.ndarray:
    """(H, W) bool: the edited object before and after, and 2 pixels around it."""
    from scipy.ndimage import binary_dilation

    either = (masks(case.before)[case.place] > 0) | (masks(case.after)[case.place] > 0)
    return np.asarray(binary_dilation(either, iterations=2))


def edit_pictures(
    model: BaseModel,
    cases: Sequence[EditCase],
    settings: EditSettings,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(N, 32, 32, 3) uint8: the rendered source pictures, edited with the model as it is now.

    Raises:
        UserError: the model's pictures are not those of the shapes world.
    """
    if model.image_size != SIZE:
        raise UserError(
            f"edits are judged on {SIZE} px pictures of the shapes world, {model.model_id} draws "
            f"{model.image_size} px pictures; use --model tiny-sd15"
        )
    return edit(
        model,
        render([case.before for case in cases]),
        [case.src.text for case in cases],
        [case.tgt.text for case in cases],
        settings,
        picture_seeds(seed, len(cases)),
        progress,
    )
