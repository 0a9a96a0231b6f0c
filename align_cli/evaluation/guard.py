"""In words: is the gain real, or has an adapter only learned to please the scorer it was trained on?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from align_cli.evaluation.compare import Comparison
from align_cli.evaluation.stats import GAIN, LOSS, NO_CHANGE, TOO_FEW, Paired

KIN = (
    frozenset({"hpsv2", "hpsv2.1", "hpsv2-reference", "hpsv2.1-reference"}),
    frozenset({"clip", "clip-b32", "clip-g14"}),
    frozenset({"shapes", "geneval-shapes"}),
    frozenset({"tiny-clip", "tiny-denscore", "tiny-blip"}),
)
"""Scorers that are one kind of judge with other weights: trained on one, none of them is held out."""
HELD_OUT = " (held out)"
CHANGED = 0.1
"""Relative change of saturation, clipping or diversity that is spoken of."""


def held_out(scorer: str, trained_on: Sequence[str]) -> bool:
    """Does the scorer know nothing of what an arm was trained on?"""
    kin = next((group for group in KIN if scorer in group), frozenset({scorer}))
    return not kin & set(trained_on)


def in_words(
    comparisons: Sequence[Comparison],
    baseline: str,
    trained_on: Mapping[str, Sequence[str]],
    drift: Sequence[Mapping[str, object]],
    unit: str = "prompts",
) -> list[str]:
    """The answer, a line each: every scorer's headline for every arm, held-out scorers first; what that means
    for an arm that was trained on a scorer; how far its pictures have moved. unit: what is counted.
    """
    lines: list[str] = []
    for arm in dict.fromkeys(c.arm for c in comparisons):
        own = [c for c in comparisons if c.arm == arm and c.group is None and c.metric.headline]
        marks = {c.metric.scorer: _mark(c.metric.scorer, arm, baseline, trained_on) for c in own}
        apart = [c for c in own if marks[c.metric.scorer] in ("", HELD_OUT)]
        known = [c for c in own if c not in apart]
        lines += [
            f"{arm} against {baseline}, {_line(c, marks[c.metric.scorer], unit)}" for c in [*apart, *known]
        ]
        if known and not trained_on[arm]:
            continue  # the baseline alone was trained: what it gained there says nothing about this arm
        if warning := _warning(arm, apart, known):
            lines.append(warning)
        lines += [_moved(entry) for entry in drift if entry["arm"] == arm and _moved(entry)]
    return lines


def _mark(scorer: str, arm: str, baseline: str, trained_on: Mapping[str, Sequence[str]]) -> str:
    """Behind the scorer's name: who was trained on it; nothing where nobody was trained on any."""
    if not held_out(scorer, trained_on[arm]):
        return " (trained on it)"
    if not held_out(scorer, trained_on[baseline]):
        return f" ({baseline} was trained on it)"
    return HELD_OUT if trained_on[arm] or trained_on[baseline] else ""


def _line(c: Comparison, mark: str, unit: str) -> str:
    row = c.row
    if row.n == 0:
        return f"{c.metric.name}{mark}: no pictures to compare"
    text = (
        f"{c.metric.name}{mark}: {c.verdict}, {number(row.base)} -> {number(row.aligned)}, "
        f"{signed(row.difference)} {interval(row)}; better on {row.up} {unit}, worse on {row.down}"
    )
    if c.verdict == TOO_FEW:
        return f"{text} ({row.clusters} {unit}; an interval is trusted from 10 on)"
    mean = f"t test of the mean p = {p_text(row.p)}"
    if c.p_adjusted != row.p:
        mean += f", corrected {p_text(c.p_adjusted)}"
    apart = c.verdict == NO_CHANGE and (row.low > 0 or row.high < 0)
    also = "; the interval excludes 0, the test does not" if apart else ""
    return f"{text} (sign test p = {p_text(row.sign_p)}, {mean}{also})"


def _warning(arm: str, apart: Sequence[Comparison], known: Sequence[Comparison]) -> str:
    """What a gain of the scorers that an arm was trained on is worth."""
    if not known:
        return ""
    names = ", ".join(dict.fromkeys(c.metric.scorer for c in known))
    if not apart:
        return (
            f"{arm} was trained on every scorer here ({names}): a gain of theirs proves nothing; add one "
            "that it was not trained on with --scorers"
        )
    rose = [c for c in known if c.verdict == GAIN]
    names = ", ".join(dict.fromkeys(c.metric.scorer for c in rose))
    fell = ", ".join(c.metric.scorer for c in apart if c.verdict == LOSS)
    gained = ", ".join(c.metric.scorer for c in apart if c.verdict == GAIN)
    if rose and fell:
        return f"reward hacking: {arm} gains where it was trained ({names}) and loses on held-out {fell}"
    if rose and not gained:
        return (
            f"{arm} gains only where it was trained ({names}), no held-out scorer sees a gain: not shown to "
            "be real"
        )
    if rose:
        return f"{arm} gains where it was trained ({names}) and on held-out {gained}: the gain is real"
    return ""


def _moved(entry: Mapping[str, object]) -> str:
    """Large changes of the pictures themselves."""
    parts = []
    for key, word in (
        ("saturation", "saturation"),
        ("clipped", "clipped values"),
        ("diversity", "diversity"),
    ):
        now, before = entry[key], entry[f"{key}_base"]
        if not (isinstance(now, float) and isinstance(before, float)):
            continue
        change = relative_change(key, before, now)
        if abs(change) >= CHANGED and (key != "diversity" or change < 0):
            parts.append(f"{word} {before:.3f} -> {now:.3f}")
    return f"{entry['arm']}: pictures have moved: {', '.join(parts)}" if parts else ""


def relative_change(key: str, before: float, now: float) -> float:
    """Of saturation, clipped or diversity."""
    floor = 0.01 if key == "clipped" else 1e-6  # a change of next to nothing is no news
    return (now - before) / max(before, floor)


def number(value: float) -> str:
    """Three decimals, more for small numbers."""
    return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.4f}"


def signed(value: float) -> str:
    """With its sign."""
    return "-" if math.isnan(value) else f"{value:+.4f}" if value else "0"


def interval(row: Paired) -> str:
    """[low, high]."""
    finite = math.isfinite(row.low) and math.isfinite(row.high)
    return f"[{signed(row.low)}, {signed(row.high)}]" if finite else "(no interval)"


def p_text(value: float) -> str:
    """Few digits."""
    return f"{value:.1g}" if value < 0.001 else f"{value:.3f}"
