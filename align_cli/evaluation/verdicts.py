"""What GenEval's own evaluator wrote about our pictures, as a scorer of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from align_cli.errors import UserError, unknown
from align_cli.evaluation.geneval import read_results
from align_cli.evaluation.prompts import PromptSet
from align_cli.evaluation.scoring import Shown
from align_cli.evaluation.store import Item

METRIC = "geneval/correct"


class GenevalVerdicts:
    """files: arm -> the results file; correct: arm -> (prompt, picture) -> verdict."""

    name, headline, fraction = "geneval", METRIC, True

    def __init__(
        self, files: Mapping[str, Path], correct: Mapping[str, Mapping[tuple[int, int], bool]]
    ) -> None:
        self.files, self.correct = files, correct

    def facts(self) -> dict[str, str]:
        return {
            "name": self.name, "version": "as evaluated", "source": "results of GenEval's evaluator",
            "preprocessing": "the evaluator's", "scale": "share of correct pictures", "dtype": "",
        }  # fmt: skip

    def looks_at(self, arm: str, item: int) -> Sequence[Path]:
        return (self.files[arm],)

    def values(self, arm: str, pictures: Sequence[Shown], items: Sequence[Item]) -> dict[str, np.ndarray]:
        found = []
        for shown, item in zip(pictures, items, strict=True):
            if (item.number, item.k) not in self.correct[arm]:
                raise UserError(f"{self.files[arm]} says nothing about {shown.path}; evaluate all pictures")
            found.append(float(self.correct[arm][item.number, item.k]))
        return {METRIC: np.array(found)}


def read_verdicts(given: Sequence[str], prompts: PromptSet, arms: Sequence[str]) -> GenevalVerdicts:
    """--geneval-results [ARM=]FILE, one for every arm; without a name the files are in the order of the arms.

    Raises:
        UserError: no such arm or file, not one file per arm, or a file of other prompts.
    """
    files: dict[str, Path] = {}
    free = list(arms)
    for text in given:
        name, equals, rest = text.partition("=")
        if not equals or Path(text).exists():
            name, rest = (free[0] if free else ""), text
        if name not in arms:
            raise unknown("arm", name, arms, where=f"--geneval-results {text}")
        if name in files:
            raise UserError(f"--geneval-results {text}: the arm {name} has {files[name]} already")
        files[name] = Path(rest)
        free.remove(name)
    if free:
        raise UserError(
            f"--geneval-results: no file for the arm {free[0]}; write --geneval-results {free[0]}=FILE"
        )
    return GenevalVerdicts(files, {arm: read_results(path, prompts) for arm, path in files.items()})
