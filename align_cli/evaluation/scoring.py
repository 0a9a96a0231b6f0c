"""Scoring the pictures of an evaluation: one file of numbers per arm and scorer, which a run goes on with.

    scores/ARM/SCORER.jsonl    first line: the scorer's facts; then one line per picture:
                               {"item": 3, "picture": "sha256", "values": {"clip": 0.31}}

While several processes score, each appends to a file of its own (SCORER.part-RANK.jsonl); the main process
joins them. A batch counts as scored once all its lines are there and are of the pictures as they are now;
batches depend on the order of items alone, as in drawing.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from align_cli.data.cache import module_sha256
from align_cli.data.shards import file_sha256
from align_cli.errors import UserError
from align_cli.evaluation.drawing import Progress
from align_cli.evaluation.prompts import PromptSet
from align_cli.evaluation.store import SCORES, Item, read_picture
from align_cli.files import file_errors, write_text
from align_cli.rewards.base import Reward
from align_cli.training.distributed import Ranks

BATCH = 16
"""Pictures that are scored at once."""
ADVICE = "make room, then go on with --resume"


@dataclass(frozen=True)
class Shown:
    """One picture to be scored. item: its position; identity: see `identity`; pixels: (H, W, 3) uint8."""

    item: int
    path: Path
    identity: str
    pixels: np.ndarray


class Scorer(Protocol):
    """What gives numbers to pictures: a reward, the judge of a benchmark, drift.

    headline: the metric that decides, never NaN; "" for none. fraction: every metric is in [0, 1] and is
    averaged as a share. looks_at: other files that the numbers of a picture depend on.
    """

    name: str
    headline: str
    fraction: bool

    def facts(self) -> dict[str, str]:
        """What a number of this scorer has to be quoted with; other facts, other numbers."""
        ...

    def looks_at(self, arm: str, item: int) -> Sequence[Path]: ...

    def values(self, arm: str, pictures: Sequence[Shown], items: Sequence[Item]) -> dict[str, np.ndarray]:
        """metric -> (B,), NaN where not asked; picture i is of items[i]."""
        ...


class RewardScorer:
    """A reward at work on pictures from files."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.name, self.headline, self.fraction = reward.name, reward.headline, reward.fraction

    def facts(self) -> dict[str, str]:
        return self.reward.facts() | {"weights": weights_sha256(self.reward)}

    def looks_at(self, arm: str, item: int) -> Sequence[Path]:
        return ()

    @torch.no_grad()
    def values(self, arm: str, pictures: Sequence[Shown], items: Sequence[Item]) -> dict[str, np.ndarray]:
        texts = [item.row.text for item in items]
        found: dict[str, np.ndarray] = {}
        for places in alike([p.pixels for p in pictures]):
            images = as_tensor([pictures[i].pixels for i in places]).to(self.reward.device)
            numbers = self.reward.metrics(images, [texts[i] for i in places])
            for key, x in numbers.items():
                row = found.setdefault(key, np.full(len(pictures), np.nan))
                row[places] = x.float().cpu().numpy()
        return found


class SetJudge:
    """The benchmark's own judge, which knows what every prompt asks for."""

    fraction = True

    def __init__(self, prompts: PromptSet) -> None:
        if prompts.judge is None:
            raise ValueError(f"{prompts.name} has no judge")
        self.judge, self.name, self.headline = prompts.judge, prompts.name, prompts.headline
        self.side = prompts.image_size

    def facts(self) -> dict[str, str]:
        return {
            "name": self.name, "version": "exact", "source": "the benchmark's own judge",
            "preprocessing": "none", "scale": "share of prompts", "dtype": "uint8",
        }  # fmt: skip

    def looks_at(self, arm: str, item: int) -> Sequence[Path]:
        return ()

    def values(self, arm: str, pictures: Sequence[Shown], items: Sequence[Item]) -> dict[str, np.ndarray]:
        if odd := next((p for p in pictures if self.side and p.pixels.shape[:2] != (self.side,) * 2), None):
            height, width = odd.pixels.shape[:2]
            raise UserError(
                f"{self.name} judges {self.side} x {self.side} pictures of the shapes world, {odd.path} is "
                f"{height} x {width}"
            )
        found = self.judge(np.stack([p.pixels for p in pictures]), [item.row for item in items])
        return {key: np.asarray(x, float) for key, x in found.items()}


@lru_cache(maxsize=32)
def weights_sha256(reward: object) -> str:
    """Hash of all modules of a reward, so that numbers of other weights of the same name are never taken for
    its own; "" for a reward without any.
    """
    modules = [part for _, part in sorted(vars(reward).items()) if isinstance(part, torch.nn.Module)]
    hashes = [module_sha256(module) for module in modules]
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest() if hashes else ""


def alike(pictures: Sequence[np.ndarray]) -> list[list[int]]:
    """Positions of pictures of one size, together."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, picture in enumerate(pictures):
        sizes.setdefault(picture.shape, []).append(i)
    return list(sizes.values())


def as_tensor(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """(B, 3, H, W) float32 in [0, 1] of B pictures (H, W, 3) uint8 of one size."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


class Scores:
    """The numbers of one scorer for one arm, on disk."""

    def __init__(self, folder: Path, arm: str, scorer: Scorer) -> None:
        self.folder, self.arm, self.scorer = folder / SCORES / arm, arm, scorer
        self.path = self.folder / f"{scorer.name}.jsonl"
        self.head = json.dumps({"scorer": scorer.facts()}, sort_keys=True)
        self._stem = f"{scorer.name}.part-"  # a bare number would be a version: hpsv2.1 is no part of hpsv2

    def read(self) -> dict[int, tuple[str, dict[str, float]]]:
        """item -> (sha256 of the picture, metric -> value). Lines that are cut off, and files of another
        version of the scorer, do not count.
        """
        found: dict[int, tuple[str, dict[str, float]]] = {}
        for path in [self.path, *self._parts()]:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except FileNotFoundError:
                continue
            if not lines or lines[0] != self.head:
                continue
            for line in lines[1:]:
                try:
                    row = json.loads(line)
                    values = {k: math.nan if v is None else float(v) for k, v in row["values"].items()}
                    found[int(row["item"])] = (row["picture"], values)
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
        return found

    def part(self, rank: int) -> Part:
        """Where process `rank` writes."""
        return Part(self.folder / f"{self._stem}{rank}.jsonl", self.head)

    def join(self) -> None:
        """Write all numbers into the one file and remove the parts."""
        found = self.read()
        lines = [self.head]
        for i in sorted(found):
            picture, values = found[i]
            plain = {k: None if math.isnan(v) else v for k, v in values.items()}
            lines.append(json.dumps({"item": i, "picture": picture, "values": plain}))
        text = "\n".join(lines) + "\n"
        with file_errors(f"cannot write {self.path}", ADVICE):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.path.exists() or self.path.read_text(encoding="utf-8") != text:
                write_text(self.path, text)
            for path in self._parts():
                path.unlink()

    def _parts(self) -> list[Path]:
        files = self.folder.glob("*.jsonl")
        return sorted(
            p for p in files if p.name.startswith(self._stem) and p.stem[len(self._stem) :].isdigit()
        )


class Part:
    """Appends whole batches to one file."""

    def __init__(self, path: Path, head: str) -> None:
        self.path, self.head = path, head
        self.begun = False

    def add(self, pictures: Sequence[Shown], values: Mapping[str, np.ndarray]) -> None:
        """One line per picture. UserError if they cannot be written."""
        lines = []
        for i, shown in enumerate(pictures):
            plain = {k: None if np.isnan(x[i]) else float(x[i]) for k, x in values.items()}
            lines.append(json.dumps({"item": shown.item, "picture": shown.identity, "values": plain}))
        with file_errors(f"cannot write {self.path}", ADVICE):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.begun:  # of what a stopped process left, nothing counts but lines of this version
                old = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
                write_text(self.path, "\n".join(old if old[:1] == [self.head] else [self.head]) + "\n")
                self.begun = True
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")


def score(
    folder: Path,
    scorer: Scorer,
    pictures: Mapping[str, Sequence[Path | None]],
    items: Sequence[Item],
    ranks: Ranks,
    progress: Progress,
) -> dict[str, dict[str, np.ndarray]]:
    """Numbers of one scorer for all pictures of all arms; those that are on disk are not made again.

    Args:
        folder: of the evaluation. pictures: arm -> the file of every item, None where there is none.
        progress: called with "scoring NAME" and a number of pictures.
    Returns:
        metric -> arm -> (N,) float64, NaN where not asked or without picture; the same on every process.
    Raises:
        UserError: a picture that cannot be read, a number that is none (the picture is named), a full disk.
    """
    for arm, paths in pictures.items():
        scores = Scores(folder, arm, scorer)
        todo: list[int] = []
        ranks.on_main(partial(_find_unscored, scores, paths, todo))
        todo = ranks.objects(todo)[0]
        left = sum(
            paths[i] is not None for b in todo for i in range(b * BATCH, min((b + 1) * BATCH, len(items)))
        )
        progress(f"scoring {scorer.name}", sum(path is not None for path in paths) - left)
        mine = todo[ranks.rank :: ranks.world_size]
        ranks.on_all(partial(_score_batches, scores, mine, paths, items, ranks, progress))
        ranks.on_main(scores.join)
    return _table(folder, scorer, pictures, len(items))


def _score_batches(
    scores: Scores,
    batches: Sequence[int],
    paths: Sequence[Path | None],
    items: Sequence[Item],
    ranks: Ranks,
    progress: Progress,
) -> None:
    """This process's share: score the batches of these numbers and append what comes out."""
    scorer, arm, part = scores.scorer, scores.arm, scores.part(ranks.rank)
    for b in batches:
        shown = [
            Shown(i, path, identity(scorer, arm, i, path), read_picture(path))
            for i in range(b * BATCH, min((b + 1) * BATCH, len(items)))
            if (path := paths[i]) is not None
        ]
        of = [items[s.item] for s in shown]
        values = scorer.values(arm, shown, of)
        check_numbers(scorer, shown, of, values)
        part.add(shown, values)
        progress(f"scoring {scorer.name}", len(shown) * ranks.world_size)


def _find_unscored(scores: Scores, paths: Sequence[Path | None], todo: list[int]) -> None:
    """Adds to `todo` the numbers of the batches that are to be scored."""
    have = scores.read()
    found = set()
    for i, path in enumerate(paths):
        if path is not None and (i not in have or have[i][0] != identity(scores.scorer, scores.arm, i, path)):
            found.add(i // BATCH)
    todo.extend(sorted(found))


def identity(scorer: Scorer, arm: str, item: int, path: Path) -> str:
    """Hash of all that the numbers of a picture depend on, besides the scorer. UserError without a file."""
    with file_errors(f"cannot read {path}"):
        hashes = [file_sha256(p) for p in (path, *scorer.looks_at(arm, item))]
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()


def check_numbers(
    scorer: Scorer, shown: Sequence[Shown], items: Sequence[Item], values: Mapping[str, np.ndarray]
) -> None:
    """UserError naming the first picture that got no number: infinity anywhere, NaN in the headline."""
    for key, x in values.items():
        bad = np.isinf(x) | (np.isnan(x) if key == scorer.headline else False)
        if bad.any():
            i = int(np.argmax(bad))
            prompt = items[i].row.text
            short = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            raise UserError(
                f"scorer {scorer.name} gave {float(x[i])} for {shown[i].path} (prompt {short!r}); look at "
                "the picture and at the weights of the scorer, or leave it out of --scorers"
            )
    if scorer.headline and scorer.headline not in values:
        raise ValueError(f"{scorer.name} has no metric {scorer.headline}")


def _table(
    folder: Path, scorer: Scorer, pictures: Mapping[str, Sequence[Path | None]], n: int
) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for arm, paths in pictures.items():
        rows = Scores(folder, arm, scorer).read()
        if lost := next((path for i, path in enumerate(paths) if path is not None and i not in rows), None):
            raise UserError(
                f"the numbers of {scorer.name} for {lost} are gone from {folder / SCORES / arm} (does "
                "another process work in this folder?); go on with --resume"
            )
        for i, (_, values) in rows.items():
            if i < n and paths[i] is not None:
                for key, value in values.items():
                    found.setdefault(key, {a: np.full(n, np.nan) for a in pictures})[arm][i] = value
    return found
