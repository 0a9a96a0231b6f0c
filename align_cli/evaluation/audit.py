"""The token audit: which prompts a text encoder or a scorer does not read to the end, and the words lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        what, name, limit (tokens; 0: none), of (prompts), cut (how many of them are not read to the end),
        share (cut / of), examples (id and lost words of those that lose most).
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
                "limit": min((cut.limit for cut in cuts), default=0),
                "cut": len(hit),
                "of": len(cuts),
                "share": len(hit) / len(cuts),
                "examples": [{"id": prompts.rows[i].id, "lost": cuts[i].lost} for i in worst],
            }
        )
    return entries


def audit_words(entries: Sequence[Mapping[str, object]]) -> list[str]:
    """A line per reader that cuts anything."""
    lines = []
    for e in entries:
        if e["cut"] and e["what"] == NOT_USED:
            lines.append(
                f"text encoder {e['name']} alone would read {e['limit']} tokens and cut {e['cut']} of "
                f"{e['of']} prompts; they are read sentence by sentence"
            )
        elif e["cut"]:
            lines.append(
                f"{e['what']} {e['name']} reads {e['limit']} tokens and cuts {e['cut']} of {e['of']} prompts"
            )
    return lines
