"""`t2ialign eval shapes --all-methods`: every packaged adapter against the base of its model. No torch at
import.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align_cli.cli import eval_plan, eval_work
from align_cli.cli.eval_plan import Asked
from align_cli.cli.text import columns
from align_cli.errors import UserError
from align_cli.evaluation.store import ABOUT, Store, make_items
from align_cli.packaged import packaged_adapters

if TYPE_CHECKING:
    from align_cli.evaluation.all_methods import Comparison, Family
    from align_cli.evaluation.engine import Evaluation

BENCHMARK = "shapes"
TABLE, TEXT, CHART = "table.json", "table.md", "table.png"
FREE = ("benchmark", "model", "limit", "n", "split", "seed", "as_json", "out", "resume", "overwrite")
"""What may be asked for beside --all-methods; everything else is fixed by the adapters."""
FLAGS = {"adapters": "adapter", "arms": "arm", "kinds": "kind"}
"""Fields of `Asked` whose options have other names."""


def evaluate(asked: Asked) -> None:
    """Measure model by model, then write and print the one table.

    Raises:
        UserError: an option that the table fixes; no packaged adapter; what an evaluation says.
    """
    _check(asked)
    models = _models(asked)
    _check_prompts(asked)
    folder = asked.out or Path("runs") / "eval-all-methods"
    families = [_measure(asked, model, adapters, folder) for model, adapters in models.items()]
    from align_cli.launched import is_main
    from align_cli.training.distributed import leave_group

    leave_group()
    if is_main():
        _conclude(asked, [family for family in families if family is not None], folder)


def _check(asked: Asked) -> None:
    if asked.benchmark != BENCHMARK:
        raise UserError(
            f"--all-methods measures exactly, in the shapes world: t2ialign eval {BENCHMARK} --all-methods"
        )
    given = {field.name: getattr(asked, field.name) for field in fields(Asked) if field.name not in FREE}
    given |= {**given.pop("model_flags"), **given.pop("sample_flags"), "device": None}
    for name, value in given.items():
        if value not in (None, [], False, 0):
            flag = FLAGS.get(name, name.replace("_", "-"))
            raise UserError(
                f"--{flag} does not go with --all-methods, which compares the packaged adapters as they are; "
                "measure your own with --adapter or --arm"
            )


def _check_prompts(asked: Asked) -> None:
    """UserError, before anything is drawn, for so few prompts that the table has an empty column."""
    from align_cli.evaluation.all_methods import LONG

    name, kind = LONG
    if all(row.groups.get(name) != kind for row in eval_plan.prompts_of(asked).rows):
        raise UserError(
            f"there is no {kind} caption among so few prompts, and the table has a column of them; give a "
            "greater --n, or --limit"
        )


def _models(asked: Asked) -> dict[str, dict[str, Path]]:
    """Model -> name of its packaged adapters -> folder."""
    found: dict[str, dict[str, Path]] = {}
    for name, folder in packaged_adapters().items():
        model = folder.parent.name
        if asked.model in (None, model):
            found.setdefault(model, {})[name] = folder
    if not found:
        known = ", ".join(dict.fromkeys(folder.parent.name for folder in packaged_adapters().values()))
        raise UserError(f"there are no packaged adapters of {asked.model}; there are some of {known}")
    return found


def _measure(asked: Asked, model: str, adapters: dict[str, Path], out: Path) -> Family | None:
    """One evaluation of all adapters of a model; None on every process but the first."""
    folder = out / model
    own = replace(
        asked,
        model=model,
        arms=[f"{path.name}={path}" for path in adapters.values()],
        scorers=None,
        out=folder,
        resume=(folder / ABOUT).exists() and not asked.overwrite,
        as_json=False,
    )
    decided = eval_plan.decide(own)
    found: list[Family] = []

    def finish(store: Store, job: Evaluation, results: dict[str, Any]) -> None:
        from align_cli.adapters import read_adapter
        from align_cli.evaluation.all_methods import family_of
        from align_cli.evaluation.sheet import save_sheet

        eval_work.write_results(store, results)
        save_sheet(results, store.folder, out / f"{model}.png")
        known = {path.name: (name, read_adapter(path)[1]) for name, path in adapters.items()}
        found.append(family_of(results, known, _overheads(job, decided)))

    eval_work.measured(own, decided, finish)
    return found[0] if found else None


def _overheads(job: Evaluation, decided: eval_plan.Decided) -> dict[str, float]:
    from align_cli.evaluation.overhead import overheads

    assert decided.plan is not None  # pictures are drawn here
    typer.echo(f"timing {len(job.arms)} arms ...", err=True)
    model, plan = decided.plan.load([list(arm.adapters) for arm in job.arms], quiet=True)
    items = make_items(job.prompts, 1, job.seed)
    return overheads(model, job.arms, items, plan.sample)


def _conclude(asked: Asked, families: list[Family], folder: Path) -> None:
    from importlib.metadata import version

    import align_cli
    from align_cli.evaluation.all_methods import Comparison, footnote, judged, markdown, to_text
    from align_cli.evaluation.forest import save_forest
    from align_cli.evaluation.outcome import PACKAGES
    from align_cli.files import file_errors, write_text

    prompts = eval_plan.prompts_of(asked)
    found = Comparison(
        command=["t2ialign", *sys.argv[1:]],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"t2ialign": align_cli.__version__, **{name: version(name) for name in PACKAGES}},
        prompts=prompts.source,
        num=len(prompts),
        seed=asked.seed,
        families=judged(families),
    )
    with file_errors(f"cannot write to {folder}", "make room, then give the same command again"):
        write_text(folder / TABLE, to_text(found))
        write_text(folder / TEXT, f"{markdown(found)}\n{footnote(found)}\n")
    save_forest(found, folder / CHART)
    if asked.as_json:
        typer.echo(to_text(found).rstrip())
        return
    _print(found)
    for name in (TABLE, TEXT, CHART, *(f"{family.model}.png" for family in families)):
        typer.echo(f"wrote {folder / name}")


def _print(found: Comparison) -> None:
    from align_cli.evaluation.all_methods import HEADS, cells_of, footnote

    typer.echo(columns([HEADS, *cells_of(found)]))
    typer.echo(footnote(found))
