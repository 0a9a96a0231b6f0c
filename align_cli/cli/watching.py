"""What is seen of a method while it trains: sample grids, and the guard. No torch at import."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align_cli import config, registry
from align_cli.errors import UserError
from align_cli.launched import is_main
from align_cli.training import run_folder

if TYPE_CHECKING:
    from align_cli.data.base import Dataset
    from align_cli.evaluation.watch import Judge
    from align_cli.methods.base import Method
    from align_cli.models.base import BaseModel
    from align_cli.training.guard import Guard, Guarded
    from align_cli.training.loop import Grid

GRID_PROMPTS = 4
"""Rows of a sample grid."""


def val_prompts(
    resolved: config.Resolved, dataset: Dataset, num: int, seed: int, what: str, advice: str = ""
) -> list[str]:
    """Up to `num` captions of the dataset's validation split; of `dataset` itself, aloud, if it has none.

    what: "sample grids show", for that note, which ends in the advice.
    """
    from align_cli.training.order import item_rng

    few = replace(resolved.data, num_examples=num)
    try:
        table = registry.dataset_table(few.name, grounded=resolved.method_config.grounded)
        dataset = registry.load(table, few.name)(few, seed=seed, split="val", pictures=False)
    except UserError as error:
        if is_main():
            typer.echo(f"note: {what} training captions, there are no others: {error}{advice}", err=True)
    count = min(num, len(dataset))
    return [dataset.get(i, item_rng(seed, 0, i)).prompt for i in range(count)]


def make_grid(model: BaseModel, method: Method, dataset: Dataset, resolved: config.Resolved) -> Grid:
    """Draws base beside aligned for the first validation prompts, always from the same noise."""
    from align_cli.pictures import contact_sheet
    from align_cli.sampling import picture_seeds, sample

    seed = resolved.train.seed
    prompts = val_prompts(resolved, dataset, GRID_PROMPTS, seed, "sample grids show")

    def draw() -> Any:
        return sample(model, prompts, resolved.sample, picture_seeds(seed, len(prompts)))

    base: list[Any] = []

    def grid(step: int, path: Path) -> None:
        if not base:
            base.append(draw())
        with method.attach(model, 1.0):
            aligned = draw()
        rows = [list(pair) for pair in zip(base[0], aligned, strict=True)]
        title = f"{resolved.method} on {resolved.model.name}, step {step}"
        contact_sheet(rows, prompts, path, headers=["base", "aligned"], title=title)

    return grid


# ---------------------------------------------------------------- the guard


def check_guard(resolved: config.Resolved) -> None:
    """Look at the guard's settings before anything is loaded.

    Raises:
        UserError: scorers are named, but never used; keep best, but no scorer is held out from the training.
    """
    guard = resolved.guard
    if guard.scorers and not guard.every and resolved.origin["guard.every"] == "default":
        raise UserError(
            f"guard.scorers names {', '.join(guard.scorers)} (from {resolved.origin['guard.scorers']}), but "
            "nobody said how often to measure; give --guard-every N (steps)"
        )
    if not guard.every:
        return
    known = trained_on(resolved)
    apart = _held_out(resolved, known)
    for name in guard.scorers:
        if name not in apart:
            warnings.warn(
                f"guard.scorers: {name} is not held out, this run trains on {', '.join(known)}: its gain "
                "proves nothing",
                stacklevel=2,
            )
    if guard.keep == "best" and not apart:
        raise UserError(
            f"guard.keep best needs a held-out scorer, but this run trains on {', '.join(known)} and "
            f"guard.scorers is {', '.join(guard.scorers)}; give --guard with a scorer of another kind, or "
            "--keep last"
        )


def trained_on(resolved: config.Resolved) -> tuple[str, ...]:
    """Scorers that the run trains on, and those of the adapter that it starts from."""
    from align_cli.adapters import read_adapter
    from align_cli.evaluation.arms import rewards_in, rewards_of

    own = rewards_in(resolved.to_dict()[resolved.method])
    start = getattr(resolved.method_config, "from_adapter", "")
    return tuple(dict.fromkeys([*own, *(rewards_of(read_adapter(start)[1]) if start else ())]))


def _held_out(resolved: config.Resolved, known: Sequence[str]) -> list[str]:
    from align_cli.evaluation.guard import held_out

    return [name for name in resolved.guard.scorers if held_out(name, known)]


def make_guard(model: BaseModel, method: Method, dataset: Dataset, resolved: config.Resolved) -> Guard:
    """The guard of [guard], with nothing loaded yet."""
    from align_cli.evaluation.stats import MIN_CLUSTERS
    from align_cli.evaluation.watch import Watch
    from align_cli.training.guard import Guard

    chosen, apart = resolved.guard, _held_out(resolved, trained_on(resolved))
    prompts, clusters = _prompts(resolved, dataset)
    if len(set(clusters)) < MIN_CLUSTERS and is_main():
        typer.echo(
            f"note: the guard has {len(set(clusters))} independent prompts, too few to tell anything from "
            f"chance ({MIN_CLUSTERS} independent ones would do): it will give no alarm",
            err=True,
        )
    advice = "stop (Ctrl-C) and train with a lower --lr, fewer --steps or other rewards"
    if apart and chosen.keep == "best":
        advice += f"; the adapter gets the step that {apart[0]} says is best"
    elif apart:
        advice += f"; --keep best gives the adapter the step that {apart[0]} says is best, with --resume, too"
    watch = Watch(
        model,
        method,
        prompts,
        clusters,
        resolved.sample,
        chosen.seed,
        lambda: _judges(model, method, resolved, apart),
        advice,
    )
    return Guard(watch, chosen.every, chosen.keep, apart[0] if apart else "")


def _prompts(resolved: config.Resolved, dataset: Dataset) -> tuple[list[str], Sequence[Hashable]]:
    """Held-out prompts, and what each of them is evidence of."""
    from align_cli.evaluation.benchmarks import compositions
    from align_cli.evaluation.sets import SetOptions, load_set

    guard = resolved.guard
    own = resolved.data.name == "shapes" or registry.is_embedded(resolved.model.name)
    name = guard.prompts or ("shapes" if own else "")
    if not name:
        advice = "; name others with --set guard.prompts=FILE"
        texts = val_prompts(resolved, dataset, guard.num_prompts, guard.seed, "the guard measures", advice)
        return texts, texts
    made = SetOptions(num=guard.num_prompts, seed=guard.seed, split="val", kinds=resolved.eval.kinds)
    found = load_set(name, made if name == "shapes" else SetOptions()).limited(guard.num_prompts)
    return found.texts, found.texts if found.scenes is None else compositions(found.scenes)


def _judges(model: BaseModel, method: Method, resolved: config.Resolved, apart: Sequence[str]) -> list[Judge]:
    """The guard's scorers, and the rewards that the method trains on."""
    from align_cli.evaluation.watch import HELD_OUT, TRAINED, Judge
    from align_cli.rewards.loading import load_reward
    from align_cli.rewards.weighted import WeightedRewards

    guard = resolved.guard
    found = []
    for name in guard.scorers:
        reward = load_reward(name, source=guard.weights.get(name), device=model.device)
        found.append(Judge(name, reward, HELD_OUT if name in apart else TRAINED))
    own = getattr(method, "rewards", None)
    if isinstance(own, WeightedRewards):
        for name, reward in own.rewards.items():
            found.append(Judge(f"reward/{name}", reward, TRAINED, math.copysign(1.0, own.weights[name])))
    return found


def guard_words(found: Guarded, resolved: config.Resolved, folder: Path) -> list[str]:
    """What the guard says at the end, a line each."""
    from align_cli.evaluation.guard import number, signed

    lines = []
    if found.alarms:
        times = "time" if len(found.alarms) == 1 else "times"
        steps = ", ".join(map(str, found.alarms[:8])) + (", ..." if len(found.alarms) > 8 else "")
        lines.append(f"guard: {len(found.alarms)} {times} alarm, at step {steps}")
    best = found.best
    if best is None:
        return lines
    score = f"{number(best.score)}, {signed(best.change)}"
    if best.low is not None and best.high is not None:
        score += f" [{signed(best.low)}, {signed(best.high)}]"
    against = f"held-out {found.decides} {score} against the base model"
    if best.change <= 0:
        against += ": no step was better than the base model"
    elif best.low is None or best.low <= 0:
        against += ", which may be chance"
    if found.step == best.step:
        lines.append(f"guard: the adapter holds step {best.step}, the best: {against}")
    else:
        command = f"{run_folder.resume_command(resolved.method, folder)} --keep best"
        lines.append(f"guard: step {best.step} was better than the last: {against}; take it: {command}")
    return lines
