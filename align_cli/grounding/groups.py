"""Which words of a parsed prompt belong to one noun: three extractors, joined.

Source: CoMat attribute_concen_utils.py (after SynGen). A group is a list of indices of words.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from align_cli.grounding.parsing import Word

MODIFIERS = frozenset({"amod", "nmod", "compound", "npadvmod", "advmod", "acomp"})
NOUNS = frozenset({"NOUN", "PROPN"})
MAX_WORDS = 3
"""Larger groups are left out."""

Group = list[int]


def by_modifier(words: Sequence[Word]) -> list[Group]:
    """Each noun that has modifiers: they first, in the order of the official walk, the noun last."""
    below = _children(words)
    groups = []
    for noun in _heads(words, NOUNS, MODIFIERS):
        if group := _walk(words, below, noun, MODIFIERS):
            groups.append([*group, noun])
    return groups


def by_copula(words: Sequence[Word]) -> list[Group]:
    """What a form of "to be" joins, without the verb: "the dog is red" gives dog, red in this order."""
    below = _children(words)
    groups = []
    for verb in _heads(words, {"AUX"}, MODIFIERS):
        joined = [i for i in below[verb] if words[i].dep in MODIFIERS or words[i].pos in NOUNS]
        group = [i for i in joined if words[i].pos not in ("AUX", "VERB")]
        if len(group) > 1:
            groups.append(group + _deeper(words, below, joined, MODIFIERS, {"AUX"}))
    return groups


def by_relative_clause(words: Sequence[Word], *, every: bool = False) -> list[Group]:
    """As `by_modifier`, and through relative clauses: "a dog that is red" gives red, dog.

    every: look at every noun; the official code returns after the first.
    """
    below = _children(words)
    modifiers = MODIFIERS | {"relcl"}
    groups = []
    for noun in _heads(words, NOUNS, modifiers):
        if group := _walk(words, below, noun, modifiers, {"AUX", "VERB"}):
            groups.append([*group, noun])
        if not every:
            break
    return groups


def unified(groups: Iterable[Group]) -> list[Group]:
    """Groups by length, without those inside a larger one and without exact repeats."""
    ordered = sorted(groups, key=len)
    found: list[Group] = []
    for i, group in enumerate(ordered):
        if not any(set(group) < set(other) for other in ordered[i + 1 :]) and group not in found:
            found.append(group)
    return found


def kept(groups: Iterable[Group]) -> list[Group]:
    """The groups of at most MAX_WORDS words."""
    return [group for group in groups if len(group) <= MAX_WORDS]


def subject(words: Sequence[Word], group: Group) -> int | None:
    """The noun that a copula group speaks of: its subject, else its first noun; None without a noun."""
    nouns = [i for i in group if words[i].pos in NOUNS]
    return next((i for i in nouns if words[i].dep.startswith("nsubj")), nouns[0] if nouns else None)


def attributed(words: Sequence[Word]) -> list[Group]:
    """The groups of a prompt in its order, one for each noun that has any, the noun last.

    Deviations from `kept(unified(...))` of the three extractors: every noun's relative clauses are read, a
    copula group ends with its subject, groups of one noun are one, and modifiers stand in their order in the
    prompt.
    """
    members: dict[int, set[int]] = {}
    for group in by_modifier(words) + by_relative_clause(words, every=True):
        members.setdefault(group[-1], set()).update(group)
    for group in by_copula(words):
        noun = subject(words, group)
        if noun is not None:
            members.setdefault(noun, set()).update(group)
    joined = [[*sorted(members[noun] - {noun}), noun] for noun in sorted(members)]
    return sorted(kept(unified(joined)), key=lambda group: group[-1])


def _children(words: Sequence[Word]) -> list[list[int]]:
    below: list[list[int]] = [[] for _ in words]
    for i, word in enumerate(words):
        if word.head != i:
            below[word.head].append(i)
    return below


def _heads(words: Sequence[Word], parts: Collection[str], modifiers: Collection[str]) -> list[int]:
    return [i for i, word in enumerate(words) if word.pos in parts and word.dep not in modifiers]


def _walk(
    words: Sequence[Word],
    below: Sequence[Sequence[int]],
    head: int,
    modifiers: Collection[str],
    passed: Collection[str] = (),
) -> Group:
    """The modifiers of a word, and theirs. passed: parts of speech that are walked through but not taken."""
    direct = [i for i in below[head] if words[i].dep in modifiers]
    own = [i for i in direct if words[i].pos not in passed]
    return own + _deeper(words, below, direct, modifiers, passed)


def _deeper(
    words: Sequence[Word],
    below: Sequence[Sequence[int]],
    roots: Iterable[int],
    modifiers: Collection[str],
    passed: Collection[str],
) -> Group:
    """What modifies the roots or is joined to them by "and", in the order of the official stack."""
    stack = [i for root in roots for i in below[root]]
    group = []
    while stack:
        i = stack.pop()
        if words[i].dep in modifiers or words[i].dep == "conj":
            if words[i].pos not in passed:
                group.append(i)
            stack.extend(below[i])
    return group
