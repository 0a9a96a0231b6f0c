"""Captions of the shapes world: a small exact grammar, its parser, and hard negatives.

    single   a red circle
    pair     a red circle left of a blue square | a red circle and a blue square
    count    two red circles
    triple   a red circle , a blue square and a green triangle
    long     five sentences in any order (more tokens than the embedded models read)

Every form but `long` may end in "on a white background". Words are lower case and split by blanks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from align_cli.errors import UserError
from align_cli.shapes.world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Kind,
    Scene,
    Thing,
    kind_table,
    place,
    scene_split,
)

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {2: "two", 3: "three"}
RELATION_MARGIN = 1.0
"""Pixels by which a relation must dominate before a caption states it."""
BACKGROUND_RATE, RELATION_RATE = 0.4, 0.75
LONG_SENTENCES = 5
LONG_RATE = 0.15
"""Share of long captions, of scenes that can have one, in training."""


@dataclass(frozen=True)
class Spec:
    """What a caption asks for.

    objects: wanted (colour, shape), all of them: one object more or less is wrong.
    relations: (index, relation, index) into objects. background: name or "" if not stated.
    """

    objects: tuple[Kind, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str = ""


@dataclass(frozen=True)
class Prompt:
    """A caption with its machine-readable meaning. order: sentence order of a long caption."""

    text: str
    spec: Spec
    kind: str
    order: tuple[int, ...] = ()


def word_list() -> list[str]:
    """Every word of the grammar, for the tokenizer."""
    words = {"a", "and", "on", "background", ",", ".", "the", "in", "this", "picture", "there", "is", "are"}
    words |= {"exactly", "objects", "total", "whole", "plainly"}
    words |= set(COLORS) | set(BACKGROUNDS) | set(NUMBERS.values())
    words |= {w for r in RELATIONS for w in r.split()} | set(SHAPES) | {f"{s}s" for s in SHAPES}
    return sorted(words)


def true_relation(a: Thing, b: Thing) -> str:
    """The relation of a to b that dominates by the margin, or "" if none does."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy) + RELATION_MARGIN:
        return "left of" if dx < 0 else "right of"
    if abs(dy) > abs(dx) + RELATION_MARGIN:
        return "above" if dy < 0 else "below"
    return ""


def has_long_caption(scene: Scene) -> bool:
    """Can the scene be told in five sentences? Triples can, pairs if one relation dominates."""
    return scene.kind == "triple" or (scene.kind == "pair" and bool(true_relation(*scene.things)))


def recaption(scene: Scene, rng: np.random.Generator, *, long_rate: float = LONG_RATE) -> Prompt:
    """Draw any true caption of a scene. Pairs and triples get a long one with probability `long_rate`."""
    index = rng.permutation(len(scene.things))
    things = [scene.things[i] for i in index]
    objects = tuple(t.kind for t in things)
    relation = true_relation(things[0], things[1]) if scene.kind in ("pair", "triple") else ""
    relations = ((0, relation, 1),) if relation else ()
    if has_long_caption(scene) and rng.random() < long_rate:
        order = tuple(int(i) for i in rng.permutation(LONG_SENTENCES))
        return _prompt(Spec(objects, relations, scene.background), "long", order)
    background = scene.background if rng.random() < BACKGROUND_RATE else ""
    if scene.kind == "triple" or rng.random() > RELATION_RATE:
        relations = ()
    return _prompt(Spec(objects, relations, background), scene.kind)


def _prompt(spec: Spec, kind: str, order: tuple[int, ...] = ()) -> Prompt:
    if kind != "long":
        return Prompt(_short_text(spec, kind), spec, kind)
    sentences = _facts(spec)
    return Prompt(" ".join(sentences[i] for i in order), spec, kind, order)


def phrase(kind: Kind, number: int = 1) -> str:
    """What so many objects of one kind are called: "a red circle", "two red circles"."""
    color, shape = kind
    return f"a {color} {shape}" if number == 1 else f"{NUMBERS[number]} {color} {shape}s"


def _short_text(spec: Spec, kind: str) -> str:
    names = [phrase(k) for k in spec.objects]
    if kind == "count":
        text = phrase(spec.objects[0], len(spec.objects))
    elif kind == "triple":
        text = f"{names[0]} , {names[1]} and {names[2]}"
    elif kind == "pair":
        text = f"{names[0]} {spec.relations[0][1] if spec.relations else 'and'} {names[1]}"
    else:
        text = names[0]
    return f"{text} on a {spec.background} background" if spec.background else text


def _facts(spec: Spec) -> list[str]:
    """The five sentences of a long caption: three objects with a relation need no sentence on their
    number.
    """
    out = [f"in this picture there is a {c} {s} ." for c, s in spec.objects]
    out.append(f"the whole background is plainly {spec.background} .")
    if len(spec.objects) == 2 or not spec.relations:
        out.append(f"there are exactly {NUMBERS[len(spec.objects)]} objects in total .")
    for a, relation, b in spec.relations:
        first, second = " ".join(spec.objects[a]), " ".join(spec.objects[b])
        out.append(f"the {first} is {relation} the {second} .")
    return out


def hard_negative(prompt: Prompt, rng: np.random.Generator, *, split: str | None = None) -> Prompt:
    """A false caption of the same form: colours or shapes swapped between objects, the relation turned round,
    the number changed, or one attribute replaced.

    split: "train" keeps to compositions of the training split, so that training never meets a held-out one.
    """
    options = _mutations(prompt.spec, rng, split)
    if not options:
        return _prompt(_other_objects(prompt, rng, split), prompt.kind, prompt.order)
    return _prompt(options[rng.integers(len(options))], prompt.kind, prompt.order)


def counterfactual(
    scene: Scene, prompt: Prompt, rng: np.random.Generator, *, split: str | None = None
) -> tuple[Scene, Prompt]:
    """A hard negative that is true of another picture: the scene changed as little as its false caption says.

    split: as in `hard_negative`. Returns the changed scene and its caption; the caption is false of `scene`,
    and `prompt` of the new one.
    """
    false = hard_negative(prompt, rng, split=split)
    old, new = prompt.spec, false.spec
    if len(new.objects) != len(old.objects):
        kinds = [Thing(c, s, 0.0, 0.0, 0.0) for c, s in new.objects]
        return Scene(scene.kind, place(kinds, rng), scene.background), false
    left = list(scene.things)
    things = [left.pop(next(i for i, t in enumerate(left) if t.kind == kind)) for kind in old.objects]
    if old.relations != new.relations:
        a, _, b = old.relations[0]
        at, bt = things[a], things[b]
        things[a], things[b] = replace(at, x=bt.x, y=bt.y), replace(bt, x=at.x, y=at.y)
    things = [replace(t, color=c, shape=s) for t, (c, s) in zip(things, new.objects, strict=True)]
    return Scene(scene.kind, tuple(things), scene.background), false


def _mutations(spec: Spec, rng: np.random.Generator, split: str | None) -> list[Spec]:
    """Changed specs to draw from; a swap counts twice. Empty if none keeps to the split."""
    objects = list(spec.objects)
    out: list[Spec] = []
    if len(set(objects)) > 1:
        i, j = rng.permutation(len(objects))[:2]
        (ci, si), (cj, sj) = objects[i], objects[j]
        swapped = list(objects)
        swapped[i], swapped[j] = (cj, si), (ci, sj)
        if ci != cj and si != sj and _in_split(swapped, split):
            out += [replace(spec, objects=tuple(swapped))] * 2
    if spec.relations:
        a, relation, b = spec.relations[0]
        out.append(replace(spec, relations=((a, OPPOSITE[relation], b),)))
    if len(objects) > 1 and len(set(objects)) == 1:
        out.append(replace(spec, objects=(objects[0],) * (5 - len(objects))))
    replaced = [new for new in _one_attribute_replaced(objects) if _in_split(new, split)]
    if replaced:
        out.append(replace(spec, objects=tuple(replaced[rng.integers(len(replaced))])))
    return out


def _in_split(objects: list[Kind], split: str | None) -> bool:
    return split is None or scene_split(tuple(objects)) == split


def _one_attribute_replaced(objects: list[Kind]) -> list[list[Kind]]:
    """Every way to replace one colour or shape; objects of one kind change together."""
    out = []
    for color, shape in dict.fromkeys(objects):
        options: list[Kind] = [(c, shape) for c in COLORS] + [(color, s) for s in SHAPES]
        for new in options:
            if new not in objects:
                out.append([new if o == (color, shape) else o for o in objects])
    return out


def _other_objects(prompt: Prompt, rng: np.random.Generator, split: str | None) -> Spec:
    """The same form with other objects altogether, for the rare composition without a near neighbour."""
    form = "triple" if len(prompt.spec.objects) == 3 else "pair"
    table = [k for k in kind_table(form, split or "train") if set(k) != set(prompt.spec.objects)]
    return replace(prompt.spec, objects=table[rng.integers(len(table))])


_KIND = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_BACKGROUND = rf"({'|'.join(BACKGROUNDS)})"
_REL = rf"({'|'.join(RELATIONS)})"


def parse(text: str) -> Spec:
    """Meaning of a caption of the grammar. Raises UserError for any other text."""
    text = " ".join(text.lower().replace(",", " , ").replace(".", " . ").split())
    if text.endswith("."):
        return _parse_long(text)
    background = ""
    if match := re.fullmatch(rf"(.*) on a {_BACKGROUND} background", text):
        text, background = match.groups()
    if match := re.fullmatch(rf"a {_KIND}", text):
        return Spec(((match[1], match[2]),), (), background)
    if match := re.fullmatch(rf"a {_KIND} (and|{_REL[1:-1]}) a {_KIND}", text):
        relations = () if match[3] == "and" else ((0, match[3], 1),)
        return Spec(((match[1], match[2]), (match[4], match[5])), relations, background)
    if match := re.fullmatch(rf"(two|three) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})s", text):
        return Spec(((match[2], match[3]),) * (2 if match[1] == "two" else 3), (), background)
    if match := re.fullmatch(rf"a {_KIND} , a {_KIND} and a {_KIND}", text):
        return Spec(((match[1], match[2]), (match[3], match[4]), (match[5], match[6])), (), background)
    raise UserError(
        f"not a caption of the shapes world: {text!r}; for example 'a red circle left of a blue square', "
        f"'two green triangles' or 'a red circle , a blue square and a yellow triangle on a black background'"
    )


def _parse_long(text: str) -> Spec:
    objects: list[Kind] = []
    relations: list[tuple[Kind, str, Kind]] = []
    background, total = "", 0
    for sentence in filter(None, (part.strip() for part in text.split("."))):
        if match := re.fullmatch(rf"in this picture there is a {_KIND}", sentence):
            objects.append((match[1], match[2]))
        elif match := re.fullmatch(rf"the whole background is plainly {_BACKGROUND}", sentence):
            background = match[1]
        elif match := re.fullmatch(r"there are exactly (two|three) objects in total", sentence):
            total = 2 if match[1] == "two" else 3
        elif match := re.fullmatch(rf"the {_KIND} is {_REL} the {_KIND}", sentence):
            relations.append(((match[1], match[2]), match[3], (match[4], match[5])))
        else:
            raise UserError(f"not a sentence of the shapes world: {sentence!r}")
    for a, _, b in relations:
        objects += [kind for kind in (a, b) if kind not in objects]
    if not objects:
        raise UserError(f"a caption of the shapes world that names no object: {text!r}")
    if total and total != len(objects):
        raise UserError(f"the caption counts {total} objects but names {len(objects)}")
    found = tuple((objects.index(a), relation, objects.index(b)) for a, relation, b in relations)
    return Spec(tuple(objects), found, background)
