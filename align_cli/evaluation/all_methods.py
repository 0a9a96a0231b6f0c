"""One comparison of every method on every embedded model: its numbers, from the results of one paired
evaluation per model, and the table in words. No torch.

    results.json of each model, facts of each adapter -> Comparison -> table.json, table.md, what is printed
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from align_cli.adapters import AdapterInfo
from align_cli.errors import UserError
from align_cli.evaluation.arms import BASE
from align_cli.evaluation.outcome import plain
from align_cli.evaluation.stats import GAIN, LOSS, NO_CHANGE, TOO_FEW, holm, verdict_of

FORMAT = 1
HEADLINE = "shapes/all"
SKILLS = ("object", "color", "shape", "count", "relation", "background", "facts", "all")
"""Means that are shown of every arm, without their "shapes/". object is attribute binding."""
LONG = ["Kind", "long"]
"""Captions of five sentences, beyond what the text encoder of the embedded models reads at once."""
NAMES = {
    "softrepa": "SoftREPA", "longalign": "LongAlign", "textcraftor": "TextCraftor", "dpt": "DPT",
    "comat": "CoMat",
}  # fmt: skip


HEADS = (
    "model", "method", *(name for name in SKILLS if name != "facts"), "gain in all [95 %]",
    "the same, long captions", "trained numbers", "training", "drawing",
)  # fmt: skip
"""Columns of the table."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A paired difference to the base with its 95 % interval, which too few prompts have not got, its verdict
    (see `judged`), and its p before any correction.
    """

    difference: float
    low: float | None
    high: float | None
    n: int
    verdict: str
    p: float | None = None

    def words(self) -> str:
        """+.012 [-.010, +.034]"""
        if self.low is None or self.high is None:
            return f"{signed(self.difference)} ({self.verdict})"
        return f"{signed(self.difference)} [{signed(self.low)}, {signed(self.high)}]"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one model. adapter: name of the packaged adapter; sha256: of its tensors. skills: metric
    -> mean, None where no prompt asks for it. gain: in HEADLINE; long_gain: of long captions alone. trained:
    numbers. seconds: of training. overhead: time of drawing as a multiple of the base's. right: per prompt,
    whether all of it was drawn.
    """

    method: str
    stage: str
    adapter: str
    sha256: str
    skills: dict[str, float | None]
    gain: Gain
    long_gain: Gain
    trained: int
    seconds: float
    overhead: float
    right: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """All methods on one model. base: as `Row.skills`; right: as `Row.right`, of the base."""

    model: str
    base: dict[str, float | None]
    right: str
    sample: dict[str, Any]
    rows: list[Row]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The content of table.json. prompts: in words, what was drawn; seed: of prompts and noise."""

    command: list[str]
    created: str
    versions: dict[str, str]
    prompts: str
    num: int
    seed: int
    families: list[Family]
    format: int = field(default=FORMAT)


def family_of(
    results: Mapping[str, Any],
    adapters: Mapping[str, tuple[str, AdapterInfo]],
    overheads: Mapping[str, float],
) -> Family:
    """What one evaluation says.

    Args:
        results: the content of its results.json. adapters: arm -> name of the packaged adapter, and its
        facts. overheads: arm -> time of drawing as a multiple of the base's.
    """
    return Family(
        model=results["model"]["id"],
        base=_skills(results, BASE),
        right=_right(results, BASE),
        sample=dict(results["sample"]),
        rows=[
            Row(
                method=info.method,
                stage=info.stage,
                adapter=name,
                sha256=info.sha256,
                skills=_skills(results, arm),
                gain=_gain(results, arm, None),
                long_gain=_gain(results, arm, LONG),
                trained=sum(_count(shape) for shape in info.shapes.values()),
                seconds=info.seconds,
                overhead=overheads[arm],
                right=_right(results, arm),
            )
            for arm, (name, info) in adapters.items()
        ],
    )


def _count(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _skills(results: Mapping[str, Any], arm: str) -> dict[str, float | None]:
    rows = {row["metric"]: row["mean"] for row in results["means"] if row["arm"] == arm and not row["group"]}
    return {name: rows[f"shapes/{name}"] for name in SKILLS}


def _gain(results: Mapping[str, Any], arm: str, group: list[str] | None) -> Gain:
    row = next(
        row
        for row in results["comparisons"]
        if (row["arm"], row["metric"], row["group"]) == (arm, HEADLINE, group)
    )
    return Gain(**{key: row[key] for key in ("difference", "low", "high", "n", "verdict", "p")})


def judged(families: Sequence[Family]) -> list[Family]:
    """The same with verdicts over the whole table: the p of a column's differences, of all methods on all
    models, are corrected together by Holm's method.
    """
    rows = [row for family in families for row in family.rows]
    gains, long_gains = _judged([row.gain for row in rows]), _judged([row.long_gain for row in rows])
    told = iter([replace(row, gain=one, long_gain=two)
                 for row, one, two in zip(rows, gains, long_gains, strict=True)])  # fmt: skip
    return [replace(family, rows=[next(told) for _ in family.rows]) for family in families]


def _judged(gains: Sequence[Gain]) -> list[Gain]:
    known = {i: gain.p for i, gain in enumerate(gains) if gain.verdict != TOO_FEW and gain.p is not None}
    found = list(gains)
    for i, p in zip(known, holm(list(known.values())), strict=True):
        low, high = gains[i].low, gains[i].high
        verdict = NO_CHANGE if low is None or high is None else verdict_of(low, high, p)
        found[i] = replace(gains[i], verdict=verdict)
    return found


def _right(results: Mapping[str, Any], arm: str) -> str:
    return "".join(str(int(item["scores"][HEADLINE][arm])) for item in results["items"])


# ---------------------------------------------------------------- files


def to_text(found: Comparison) -> str:
    """table.json."""
    return json.dumps(plain(asdict(found)), indent=1, allow_nan=False) + "\n"


def read(path: Path) -> Comparison:
    """What `to_text` wrote. UserError if it cannot be read."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        families = [
            Family(
                **{
                    **family,
                    "rows": [
                        Row(**{**row, "gain": Gain(**row["gain"]), "long_gain": Gain(**row["long_gain"])})
                        for row in family["rows"]
                    ],
                }
            )
            for family in raw["families"]
        ]
        return Comparison(**{**raw, "families": families})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no table of all methods: {error}") from error


# ---------------------------------------------------------------- words


def markdown(found: Comparison) -> str:
    """The table for README: a row per model and method, the base of each model first."""
    lines = [_line(HEADS), _line(["---"] * len(HEADS))]
    lines += [_line(cells) for cells in cells_of(found, bold=True)]
    return "\n".join(lines) + "\n"


def cells_of(found: Comparison, *, bold: bool = False) -> list[list[str]]:
    """The cells of the table, row by row. bold: mark gains and losses that chance alone seldom gives."""
    lines = []
    for family in found.families:
        lines.append([family.model, "base", *_means(family.base), "", "", "", "", "1"])
        for row in family.rows:
            gains = [_marked(gain, bold) for gain in (row.gain, row.long_gain)]
            cost = [f"{row.trained:,}", duration(row.seconds), f"{row.overhead:.2f}"]
            lines.append([family.model, title(row), *_means(row.skills), *gains, *cost])
    return lines


def title(row: Row) -> str:
    """The method as it is written, with its stage where it has several."""
    name = NAMES.get(row.method, row.method)
    return f"{name} ({row.stage})" if row.stage else name


def footnote(found: Comparison) -> str:
    """What the table is of, and how to read it."""
    return (
        f"{found.num} prompts of {found.prompts}, the same prompts and noise for all, "
        f"{_drawn(found.families)}; one training run each. "
        "all: all that is asked for is there, and no object more; object: colour and shape on one thing. "
        "Differences are paired, with intervals clustered by composition; bold: beyond chance, corrected for "
        "the number of comparisons (Holm). drawing: time as a multiple of the base's."
    )


def _drawn(families: Sequence[Family]) -> str:
    """ddim, 20 steps, guidance 4; of each model where they differ."""
    words = {
        family.model: f"{family.sample['sampler']}, {family.sample['steps']} steps, guidance "
        f"{family.sample['guidance']:g}"
        for family in families
    }
    if len(set(words.values())) == 1:
        return words[families[0].model]
    return "; ".join(f"{model}: {said}" for model, said in words.items())


def _means(skills: Mapping[str, float | None]) -> list[str]:
    found = [skills[name] for name in SKILLS if name != "facts"]
    return ["-" if mean is None else f"{mean:.3f}".lstrip("0") for mean in found]


def _marked(gain: Gain, bold: bool) -> str:
    return f"**{gain.words()}**" if bold and gain.verdict in (GAIN, LOSS) else gain.words()


def signed(value: float) -> str:
    """+.012; .000 for nothing at all."""
    return (f"{value:+.3f}" if value else "0.000").replace("0.", ".", 1)


def duration(seconds: float) -> str:
    """68 s, 4.2 min"""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
