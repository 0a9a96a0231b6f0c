"""What `t2ialign eval` does once it is decided: load, draw, score, write and print. No torch at import."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align_cli.cli.eval_plan import REFERENCED, Asked, Decided, ScorerChoice
from align_cli.cli.measuring import measure
from align_cli.cli.text import say_loading
from align_cli.evaluation import folders
from align_cli.evaluation.store import GENEVAL, REPORT, RESULTS, Item, Store, identity, make_items
from align_cli.files import only_writer
from align_cli.launched import is_main

if TYPE_CHECKING:
    from align_cli.evaluation.engine import Evaluation
    from align_cli.evaluation.looking import Looking
    from align_cli.models.base import BaseModel
    from align_cli.rewards.base import Reward


Finish = Callable[["Store", "Evaluation", dict[str, Any]], None]
"""What the main process does with the content of results.json."""


def evaluate(asked: Asked, decided: Decided) -> None:
    """Measure, write, print."""
    from align_cli.training.distributed import leave_group

    def finish(store: Store, job: Evaluation, results: dict[str, Any]) -> None:
        _note_replaced(store.folder / RESULTS, results)
        written = [*write_results(store, results), *_geneval_folders(store, job)]
        if asked.as_json:
            typer.echo(json.dumps(results, indent=1, allow_nan=False))
            return
        from align_cli.evaluation.tables import print_results

        print_results(results)
        typer.echo("\n".join(written))

    measured(asked, decided, finish)
    leave_group()


def measured(asked: Asked, decided: Decided, finish: Finish) -> dict[str, Any]:
    """The content of results.json, by the work of this process or shared with others. UserError if another
    command writes to the folder.
    """
    with only_writer(decided.folder, main=is_main()):
        return _measured(asked, decided, finish)


def _measured(asked: Asked, decided: Decided, finish: Finish) -> dict[str, Any]:
    plan, prompts, arms = decided.plan, decided.prompts, decided.arms
    say_loading(plan.model.name if plan is not None else "the scorers")
    from align_cli.devices import pick_device
    from align_cli.evaluation import engine
    from align_cli.training.distributed import Ranks, rank_device
    from align_cli.training.signals import Stopped, stopped_at_once

    device = rank_device(str(asked.model_flags["device"] or "auto"))
    ranks = Ranks(pick_device(device))
    items = make_items(prompts, decided.per_prompt, asked.seed)
    if decided.protocol is not None:  # all its noise comes from one generator
        items = [replace(item, seed=decided.protocol.seed) for item in items]
    given, notes = _given(asked, items)
    for arm in arms:
        if arm.self_correct is not None and plan is not None:
            way = f"{arm.self_correct:g} ({plan.sample.correction})"
            notes.append(f"{arm.name}: self-correction {way}, one more pass, forward and back, in every step")
    rewards = _rewards(
        decided.scorers, device, reference=asked.reference
    )  # before the model: missing weights are told before minutes of drawing
    model: BaseModel | None = None
    about, looking = decided.identity, None
    if plan is not None:
        stacks = [list(arm.adapters) for arm in arms]
        model, plan = plan.load(stacks, quiet=True)
        engine.check_size(prompts, model, plan.sample)
        about = identity(
            prompts, decided.per_prompt, arms, asked.seed, plan.model, plan.sample, asked.protocol, model
        )
        looking = _looking(asked, decided, model, items)
    job = engine.Evaluation(
        prompts=prompts,
        arms=arms,
        baseline=decided.baseline,
        rewards=rewards,
        items=items,
        seed=asked.seed if decided.protocol is None else decided.protocol.seed,
        per_prompt=decided.per_prompt,
        interval=decided.interval,
        given=given,
        extra=[] if decided.verdicts is None else [decided.verdicts],
        protocol=decided.protocol,
        looking=looking,
        command=["t2ialign", *sys.argv[1:]],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=notes,
    )
    store = Store(decided.folder, about)
    sample, words = (plan.sample, plan.describe()) if plan is not None else (None, "")
    try:
        with stopped_at_once():
            ranks.on_main(
                lambda: store.begin(
                    job.command, job.created, resume=decided.resume, overwrite=asked.overwrite
                )
            )
            results = measure(job, store, ranks, model, sample, words)
            ranks.on_main(lambda: finish(store, job, results))
    except Stopped as stop:
        if ranks.main:
            typer.echo(f"stopped; what is finished is kept, go on with: {_again(store.folder)}", err=True)
        raise typer.Exit(128 + stop.number) from None
    return results


def write_results(store: Store, results: dict[str, Any]) -> list[str]:
    """The files of the numbers and the report; a line for each."""
    from align_cli.evaluation.outcome import write
    from align_cli.evaluation.report import write_report

    folder = store.folder
    write(folder, results)
    write_report(results, folder, folder / REPORT)
    return [f"numbers: {folder / RESULTS}", f"report: {folder / REPORT}"]


def _note_replaced(path: Path, results: dict[str, Any]) -> None:
    """Earlier results of the same pictures by other scorers do not go without a word."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["scorers"]
        names = [scorer["name"] for scorer in before]
    except (OSError, ValueError, KeyError, TypeError):
        return
    gone = [name for name in names if name not in [scorer["name"] for scorer in results["scorers"]]]
    if gone:
        typer.echo(
            f"note: {path} is written anew without {', '.join(gone)}, whose scores are kept; name them in "
            "--scorers to have them in it again",
            err=True,
        )


def _looking(asked: Asked, decided: Decided, model: BaseModel, items: Sequence[Item]) -> Looking | None:
    """What is seen of attention. UserError, before anything is drawn, where there is none to be seen."""
    if not asked.attention:
        return None
    from align_cli import registry
    from align_cli.evaluation.attention import reader_of
    from align_cli.evaluation.looking import Looking, check_arms
    from align_cli.shapes.masks import ShapesMasker

    check_arms(model, decided.arms)
    shapes = decided.prompts.scenes is not None
    world = shapes or (decided.plan is not None and registry.is_embedded(decided.plan.model.name))
    reader = reader_of(model, asked.parser or "auto", world=world)
    found = Looking(asked.attention, reader, ShapesMasker() if world else None)
    found.entities(found.items(items))
    return found


def _again(folder: Path) -> str:
    """What to type to go on."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    place = [] if "--out" in words else ["--out", str(folder)]
    return shlex.join(["t2ialign", *words, *place, "--resume"])


def _rewards(choices: Sequence[ScorerChoice], device: str, *, reference: bool) -> list[Reward]:
    from align_cli.rewards.loading import load_reward

    found: list[Reward] = []
    for c in choices:
        found.append(load_reward(c.name, source=c.source, preprocessing=c.preprocessing, device=device))
        if reference and c.name in REFERENCED:
            from align_cli.rewards.hpsv2_reference import load_reference

            found.append(load_reference(c.name, source=c.source, device=found[-1].device))
    return found


def _given(asked: Asked, items: Sequence[Item]) -> tuple[dict[str, list[Path | None]], list[str]]:
    """Pictures of --images, and what is to be said about them."""
    found: dict[str, list[Path | None]] = {}
    notes: list[str] = []
    for name, folder in folders.parse_folders(asked.images).items():
        found[name], said = folders.match(
            folder, items, allow_missing=asked.allow_missing, limited=asked.limit is not None
        )
        notes += said
    return found, notes


def _geneval_folders(store: Store, job: Evaluation) -> list[str]:
    """The official layout of every arm's pictures, for the official evaluator; a line for each."""
    if job.prompts.name != "geneval" or job.given:
        return []
    from align_cli.evaluation.geneval import write_folder

    lines = []
    for arm in job.arms:
        place = store.folder / GENEVAL / arm.name
        write_folder(job.prompts, {(i.number, i.k): store.path(arm.name, i) for i in job.items}, place)
        lines.append(f"for GenEval's evaluator: {place}")
    return lines
