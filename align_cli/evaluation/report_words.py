"""What an evaluation says in words, and which comparisons count. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align_cli.evaluation.stats import GAIN, LOSS, TOO_FEW

KIND = {GAIN: "gain", LOSS: "loss"}
"""Verdict -> CSS class; all others are "none"."""
SIGN = {GAIN: "\u25b2", LOSS: "\u25bc"}
"""Verdict -> a sign, so that colour is not all that tells."""


def compared_arms(results: Mapping[str, Any]) -> list[str]:
    """Names of the arms that are compared with the baseline, in order."""
    compared = {row["arm"] for row in results["comparisons"]}
    return [arm["name"] for arm in results["arms"] if arm["name"] in compared]


def headline_metrics(results: Mapping[str, Any]) -> list[str]:
    """The metric of every scorer that decides, in order."""
    return [scorer["headline"] for scorer in results["scorers"]]


def overall(results: Mapping[str, Any], metrics: Iterable[str]) -> list[Mapping[str, Any]]:
    """Comparisons over all prompts, of these metrics in their order, arm by arm."""
    rows = {(r["metric"], r["arm"]): r for r in results["comparisons"] if r["group"] is None}
    arms = compared_arms(results)
    return [rows[metric, arm] for metric in metrics for arm in arms if (metric, arm) in rows]


def headlines(results: Mapping[str, Any]) -> list[str]:
    """One sentence per compared arm; held-out scorers alone decide."""
    if not results["scorers"]:
        return [f"{', '.join(arm['name'] for arm in results['arms'])}: drawn, not scored."]
    rows = overall(results, headline_metrics(results))
    baseline = results["baseline"]
    return [
        _sentence(arm, baseline, [r for r in rows if r["arm"] == arm]) for arm in compared_arms(results)
    ] or [f"{', '.join(arm['name'] for arm in results['arms'])}: measured alone, compared with nothing."]


def _sentence(arm: str, baseline: str, rows: Sequence[Mapping[str, Any]]) -> str:
    held = [row["verdict"] for row in rows if row["held_out"]]
    if not held:
        return f"{arm}: every scorer was trained on, so no gain can be claimed."
    if set(held) == {TOO_FEW}:
        return f"{arm}: too few prompts to tell."
    n = len(held)
    all_of = "the held-out scorer" if n == 1 else f"all {n} held-out scorers"
    gains, losses = held.count(GAIN), held.count(LOSS)
    if not gains and not losses:
        any_of = "the held-out scorer" if n == 1 else f"any of {n} held-out scorers"
        return f"{arm}: no significant change on {any_of}."
    if n in (gains, losses):
        return f"{arm}: {'better' if gains else 'worse'} than {baseline} on {all_of}."
    parts = [f"{word} on {k}" for word, k in (("better", gains), ("worse", losses)) if k]
    rest = n - gains - losses
    tail = f", no significant change on {rest}" if rest else ""
    return f"{arm}: {' and '.join(parts)} of {n} held-out scorers{tail} (against {baseline})."


def verdict_text(verdict: str) -> str:
    """The verdict with its sign."""
    return f"{SIGN[verdict]} {verdict}" if verdict in SIGN else verdict


def verdict_kind(verdict: str) -> str:
    """CSS class of a verdict."""
    return KIND.get(verdict, "none")
