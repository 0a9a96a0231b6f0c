"""The token audit: which prompts a text encoder or a scorer does not read to the end, and the words lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align_cli.cuts import Cut
from align_cli.evaluation.prompts import PromptSet

EXAMPLES = 5
"""Prompts that are shown of each reader: the ones that lose the most tokens."""
NOT_USED = "plain text encoder (not used)"
"""What the pipeline's own way of reading is called where prompts are read in another way."""
BY_SENTENCE = "text encoder, by sentence"


def audit(prompts: PromptSet, readers: Mapping[str, Sequence[Cut]], what: str) -> list[dict[str, object]]:
    """Plain numbers and texts for results.json: one entry per reader.

    Args:
        readers: name -> what it reads of each prompt (`BaseModel.audit_text`, `Reward.audit`).
        what: "text encoder", "scorer", or one of the names above.
    Returns:
        what, name, arms (those that it reads for; empty: all), limit (tokens; 0: none), of (prompts), cut
        (how many of them are not read to the end), share (cut / of), examples (id and lost words of those
        that lose most).
    """
    entries: list[dict[str, object]] = []
    for name, cuts in readers.items():
        if len(cuts) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(cuts)} cuts of {name}")
        hit = [i for i, cut in enumerate(cuts) if cut.lost]
        worst = sorted(hit, key=lambda i: (-cuts[i].tokens, i))[:EXAMPLES]
        entries.append(
            {
                "what": what,
                "name": name,
                "arms": [],
                "limit": min((cut.limit for cut in cuts), default=0),
                "cut": len(hit),
                "of": len(cuts),
                "share": len(hit) / len(cuts),
                "examples": [{"id": prompts.rows[i].id, "lost": cuts[i].lost} for i in worst],
            }
        )
    return entries


def by_arm(found: Mapping[str, Sequence[dict[str, object]]]) -> list[dict[str, object]]:
    """Arm -> entries of its text encoders, as one list: those that are the same for some arms stand once,
    with the names of these arms, or without names where they are the same for all.
    """
    kinds: list[tuple[list[str], Sequence[dict[str, object]]]] = []
    for arm, entries in found.items():
        same = next((arms for arms, known in kinds if known == entries), None)
        if same is None:
            kinds.append(([arm], entries))
        else:
            same.append(arm)
    told = len(kinds) > 1
    return [entry | {"arms": arms if told else []} for arms, entries in kinds for entry in entries]


def audit_words(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per reader that cuts anything."""
    lines = []
    for e in entries:
        arms = f"{', '.join(e['arms'])}: " if e["arms"] else ""
        if e["cut"] and e["what"] == NOT_USED:
            lines.append(
                f"{arms}text encoder {e['name']} alone would read {e['limit']} tokens and cut {e['cut']} of "
                f"{e['of']} prompts; they are read sentence by sentence"
            )
        elif e["cut"]:
            lines.append(
                f"{arms}{e['what']} {e['name']} reads {e['limit']} tokens and cuts {e['cut']} of {e['of']} "
                "prompts"
            )
    return lines
