"""A published protocol inside an evaluation: its noise, its batches, its averages; the pictures are kept and
compared like any others.

    protocol/ARM.jsonl    first line: protocol and scorers; then {"batch": 0, "pictures": 4, "means": {...}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from align_cli.errors import UserError
from align_cli.evaluation.arms import Arm
from align_cli.evaluation.drawing import Progress, picture_facts
from align_cli.evaluation.protocols import Protocol, averages, run
from align_cli.evaluation.scoring import RewardScorer
from align_cli.evaluation.store import PROTOCOL, Item, Store
from align_cli.files import file_errors, write_text
from align_cli.models.base import BaseModel
from align_cli.pictures import to_uint8
from align_cli.rewards.base import Reward
from align_cli.training.distributed import Ranks


def draw_by_protocol(
    chosen: Protocol,
    model: BaseModel,
    arms: Sequence[Arm],
    items: Sequence[Item],
    rewards: Mapping[str, Reward],
    store: Store,
    ranks: Ranks,
    missing: Mapping[str, Sequence[int]],
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Draw and score what is missing, from the first unfinished batch on.

    Args: as of `drawing.draw`; rewards: the protocol's scorers by name.
    Returns:
        arm -> name -> number, what the protocol reports: see `averages`.
    Raises:
        UserError: several processes (the noise of a batch follows from all batches before it).
    """
    if ranks.world_size > 1:
        raise UserError(f"--protocol {chosen.name} draws all noise from one generator: use one process")
    size = chosen.sample.batch_size
    texts, groups = [item.row.text for item in items], [item.row.groups for item in items]
    found: dict[str, dict[str, float]] = {}
    for arm in arms:
        gone = set(missing[arm.name])
        notes = _Notes(store.folder / PROTOCOL / f"{arm.name}.jsonl", chosen, rewards)
        unfinished = {i // size for i in gone}
        done = 0
        while done < len(notes.batches) and done not in unfinished:
            done += 1
        notes.keep(done)
        own = picture_facts(model, arm, chosen.sample) | {"protocol": chosen.name}

        def save(i: int, image: Tensor, arm: Arm = arm, gone: set[int] = gone, own: dict = own) -> None:
            if i in gone:
                store.save(arm.name, items[i], to_uint8(image[None])[0], own)

        with arm.at_work(model):
            for count, means in run(chosen, model, texts, rewards, done=done, save=save):
                first = len(notes.batches) * size
                drawn = [store.path(arm.name, item) for item in items[first : first + count]]
                notes.add(drawn, means)
                progress(f"drawing {arm.name}", sum(i in gone for i in range(first, first + count)))
        found[arm.name] = averages(chosen, notes.batches, groups)
    return found


class _Notes:
    """What a protocol notes of its batches, on disk. Lines cut off or of other scorers do not count."""

    def __init__(self, path: Path, chosen: Protocol, rewards: Mapping[str, Reward]) -> None:
        self.path = path
        scorers = {name: RewardScorer(rewards[name]).facts() for name in chosen.scorers}
        self.head = json.dumps({"protocol": chosen.name, "scorers": scorers}, sort_keys=True)
        self.batches: list[tuple[int, dict[str, float]]] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines[1:] if lines[:1] == [self.head] else []:
            try:
                row = json.loads(line)
                if row["batch"] != len(self.batches):
                    break
                self.batches.append((int(row["pictures"]), dict(row["means"])))
            except (ValueError, KeyError, TypeError):
                break

    def keep(self, count: int) -> None:
        """Forget all batches but the first `count`."""
        self.batches = self.batches[:count]
        lines = [self.head, *(self._line(i) for i in range(count))]
        with file_errors(f"cannot write {self.path}", "make room, then go on with --resume"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, "\n".join(lines) + "\n")

    def add(self, pictures: Sequence[Path], means: Mapping[str, float]) -> None:
        """Note one more batch, of these pictures. UserError for a mean that is no number, or a full disk."""
        if bad := next((name for name, value in means.items() if not math.isfinite(value)), None):
            raise UserError(
                f"scorer {bad} gave {means[bad]} for one of the pictures {pictures[0]} to {pictures[-1].name}"
                "; look at them and at the weights of the scorer"
            )
        self.batches.append((len(pictures), dict(means)))
        doing, advice = f"cannot write {self.path}", "make room, then go on with --resume"
        with file_errors(doing, advice), self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(len(self.batches) - 1) + "\n")

    def _line(self, i: int) -> str:
        pictures, means = self.batches[i]
        return json.dumps({"batch": i, "pictures": pictures, "means": means})
