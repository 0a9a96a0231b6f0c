"""The end of a training: adapter, paired evaluation, result.json, what is printed. No torch at import."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align_cli import config, registry
from align_cli.cli.train_plan import stage_of
from align_cli.cli.watching import guard_words
from align_cli.errors import UserError
from align_cli.training import run_folder

if TYPE_CHECKING:
    from align_cli.data.base import Dataset
    from align_cli.methods.base import Method
    from align_cli.models.base import BaseModel
    from align_cli.training.loop import TrainResult


def conclude(
    resolved: config.Resolved,
    folder: Path,
    model: BaseModel,
    method: Method,
    dataset: Dataset,
    result: TrainResult,
) -> None:
    """Save the adapter, evaluate, write result.json, print."""
    from align_cli.adapters import save_adapter
    from align_cli.evaluation.engine import peak_memory
    from align_cli.evaluation.store import REPORT
    from align_cli.files import file_errors, write_text
    from align_cli.training.log import duration_text

    adapter = folder / run_folder.ADAPTER
    changed = run_folder.changes_in(run_folder.read_run(folder), result.step)
    info = save_adapter(
        adapter,
        method,
        config=resolved.to_dict(),
        origin=resolved.origin | run_folder.origins(changed),
        step=result.kept_step,
        seed=resolved.train.seed,
        seconds=result.seconds + _seconds_before(resolved),
        stage=stage_of(resolved),
        data_fingerprint=dataset.fingerprint(),
    )
    typer.echo(f"trained {result.step} steps in {duration_text(result.seconds)}: {adapter}", err=True)
    watched = guard_words(result.guarded, resolved, folder) if result.guarded else []
    memory, gpu = peak_memory()
    numbers: dict[str, Any] = {
        "method": resolved.method,
        "model": resolved.model.name,
        "step": result.step,
        "train_seconds": round(result.seconds, 2),
        "train_peak_memory_bytes": memory,
        "train_peak_gpu_memory_bytes": gpu,
        "last_metrics": result.metrics,
        "adapter": run_folder.ADAPTER,
        "adapter_step": result.kept_step,
        "guard": asdict(result.guarded) if result.guarded else None,
        "evaluation": None,
    }
    show = _evaluate(resolved, folder, model) if resolved.eval.num_prompts else None
    if show is not None:
        numbers["evaluation"] = show[0]
    path = folder / run_folder.RESULT
    if show is None:
        numbers["evaluation"] = _earlier_evaluation(path, info.sha256)
    advice = f"the adapter is saved in {adapter}; make room, then go on with --resume"
    with file_errors(f"cannot write {path}", advice):
        write_text(path, json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    if show is not None:
        show[1]()
    gpu_text = f", {gpu / 2**30:.2f} GiB on the GPU" if gpu else ""
    typer.echo(
        f"training: {result.step} steps, {result.seconds:.1f} s, peak memory {memory / 2**20:,.0f} "
        f"MiB{gpu_text}"
    )
    for line in watched:
        typer.echo(line)
    typer.echo(f"adapter: {adapter}")
    if show is not None:
        typer.echo(f"picture: {folder / run_folder.PICTURE}")
        typer.echo(f"report: {folder / run_folder.EVALUATION / REPORT}")
    typer.echo(f"numbers: {path}")


def _earlier_evaluation(path: Path, sha256: str) -> dict[str, Any] | None:
    """The evaluation that result.json holds, if it is of an adapter with this hash."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["evaluation"]
        return found if any(sha256 in arm["hashes"] for arm in found["arms"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _seconds_before(resolved: config.Resolved) -> float:
    """Training seconds of the adapter that this run began from; 0 if it has gone since."""
    from align_cli.adapters import read_adapter

    start = str(getattr(resolved.method_config, "from_adapter", ""))
    try:
        return read_adapter(start)[1].seconds if start else 0.0
    except UserError:
        return 0.0


def _evaluate(
    resolved: config.Resolved, folder: Path, model: BaseModel
) -> tuple[dict[str, Any], Callable[[], None]] | None:
    """The paired evaluation of the shapes world, as `t2ialign eval shapes --adapter RUN` does it: its
    numbers, and what prints its table; or None.
    """
    from align_cli.cli.measuring import measure
    from align_cli.evaluation import engine
    from align_cli.evaluation.arms import make_arms
    from align_cli.evaluation.outcome import write
    from align_cli.evaluation.report import write_report
    from align_cli.evaluation.sets import SetOptions, load_set
    from align_cli.evaluation.sheet import save_sheet
    from align_cli.evaluation.store import REPORT, Store, identity, make_items
    from align_cli.evaluation.tables import print_results
    from align_cli.rewards.loading import load_reward
    from align_cli.training.distributed import Ranks

    chosen = resolved.eval
    options = SetOptions(num=chosen.num_prompts, seed=chosen.seed, split=chosen.split, kinds=chosen.kinds)
    prompts = load_set("shapes", options)
    side = resolved.sample.image_size or model.image_size
    knows = resolved.data.name == "shapes" or registry.is_embedded(resolved.model.name)
    if not knows or side != prompts.image_size:
        typer.echo("note: no paired evaluation, it measures pictures of the shapes world only", err=True)
        return None
    place = folder / run_folder.EVALUATION
    arms = make_arms([str(folder / run_folder.ADAPTER)], [])
    job = engine.Evaluation(
        prompts=prompts,
        arms=arms,
        baseline=arms[0].name,
        rewards=[load_reward("shapes")],
        items=make_items(prompts, 1, chosen.seed),
        seed=chosen.seed,
        interval="t",
        command=["t2ialign", *sys.argv[1:]],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    store = Store(
        place, identity(prompts, 1, arms, chosen.seed, resolved.model, resolved.sample, None, model)
    )
    store.begin(job.command, job.created, resume=False, overwrite=True)
    found = measure(job, store, Ranks.alone(model.device), model, resolved.sample)
    write(place, found)
    write_report(found, place, place / REPORT)
    save_sheet(found, place, folder / run_folder.PICTURE)
    return {key: value for key, value in found.items() if key != "items"}, lambda: print_results(found)
