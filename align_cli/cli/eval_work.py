"""What `t2ialign eval` does: check what can be checked, then load, draw and score. No torch at import."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align_cli import registry
from align_cli.cli.drawing import Plan, make_plan
from align_cli.errors import UserError
from align_cli.evaluation import arms as arming
from align_cli.evaluation import folders
from align_cli.evaluation.arms import Arm
from align_cli.evaluation.prompts import PromptSet
from align_cli.evaluation.sets import SetOptions, load_set
from align_cli.evaluation.store import ABOUT, REPORT, RESULTS, Store, check_folder

if TYPE_CHECKING:
    from align_cli.evaluation.engine import Evaluation
    from align_cli.models.base import BaseModel
    from align_cli.rewards.base import Reward
    from align_cli.training.distributed import Ranks


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The command line, option by option. model_flags, sample_flags: fields of ModelSettings and
    SampleSettings, None where not given.
    """

    benchmark: str
    model: str | None
    adapters: list[str]
    arms: list[str]
    vs: str | None
    scorers: str | None
    weights: list[str]
    trained_on: list[str]
    prompts: Path | None
    data_path: Path | None
    column: str | None
    limit: int | None
    n: int | None
    split: str | None
    per_prompt: int | None
    seed: int
    images: list[str]
    allow_missing: bool
    geneval_results: list[str]
    interval: str | None
    model_flags: Mapping[str, Any]
    sample_flags: Mapping[str, Any]
    as_json: bool
    out: Path | None
    resume: bool
    overwrite: bool


@dataclass(frozen=True)
class ScorerChoice:
    """A scorer to load. source: None for the published weights."""

    name: str
    preprocessing: str
    source: str | None


def evaluate(asked: Asked) -> None:
    """The whole command."""
    _check_options(asked)
    arms = _arms(asked)
    baseline = arming.baseline([arm.name for arm in arms], asked.vs)
    prompts = _prompts(asked)
    per_prompt = asked.per_prompt or _own_per_prompt(prompts)
    plan = None if asked.images else _plan(asked, arms)
    choices = scorer_choices(asked, prompts, plan)
    identity = _identity(asked, prompts, arms, per_prompt, plan)
    folder, own = asked.out, asked.out is None
    if folder is None:
        folder = Path("runs") / default_name(prompts.name, identity)
    resume = asked.resume or (own and not asked.overwrite and (folder / ABOUT).exists())
    check_folder(folder, resume=resume, overwrite=asked.overwrite)
    _work(asked, arms, baseline, prompts, per_prompt, plan, choices, identity, folder, resume)


def _work(
    asked: Asked,
    arms: list[Arm],
    baseline: str,
    prompts: PromptSet,
    per_prompt: int,
    plan: Plan | None,
    choices: list[ScorerChoice],
    identity: dict[str, Any],
    folder: Path,
    resume: bool,
) -> None:
    """From here on torch is there, and maybe several processes."""
    from align_cli.cli.text import say_loading

    say_loading(plan.model.name if plan is not None else "the scorers")
    from align_cli.devices import pick_device
    from align_cli.evaluation import engine
    from align_cli.training.distributed import Ranks, leave_group, on_rank, rank_device

    where = rank_device(str(asked.model_flags["device"] or "auto"))
    ranks = Ranks(pick_device(where))
    rewards = _rewards(choices, where)
    items = engine.items_of(prompts, per_prompt, asked.seed)
    given, notes = _given(asked, items)
    model: BaseModel | None = None
    if plan is not None:
        stacks = [list(arm.adapters) for arm in arms]
        model, plan = replace(plan, model=on_rank(plan.model)).load(stacks, quiet=True)
        engine.check_size(prompts, model, plan.sample)
        identity = {
            **_identity(asked, prompts, arms, per_prompt, plan),
            "device": model.device.type,
            "weights": engine.weights_of(model),
        }
    command = ["t2ialign", *sys.argv[1:]]
    created = datetime.now(UTC).isoformat(timespec="seconds")
    store = Store(folder, identity)
    ranks.on_main(lambda: store.begin(command, created, resume=resume, overwrite=asked.overwrite))
    job = engine.Evaluation(
        prompts=prompts,
        arms=arms,
        baseline=baseline,
        rewards=rewards,
        items=items,
        seed=asked.seed,
        per_prompt=per_prompt,
        interval=asked.interval or ("t" if prompts.scenes is not None else "bootstrap"),
        given=given,
        extra=_geneval(asked, prompts, arms),
        command=command,
        created=created,
        notes=notes,
    )
    try:
        results = _measure(job, store, ranks, model, plan)
    except KeyboardInterrupt:
        if ranks.main:
            typer.echo(f"stopped; what is finished is kept, go on with: {_again(folder)}", err=True)
        raise typer.Exit(130) from None
    ranks.on_main(lambda: _write(folder, prompts, job, results, asked.as_json))
    leave_group()


def _measure(
    job: Evaluation, store: Store, ranks: Ranks, model: BaseModel | None, plan: Plan | None
) -> dict[str, Any]:
    """Draw and score, with progress."""
    from align_cli.cli.progress import CountingProgress
    from align_cli.evaluation import engine
    from align_cli.evaluation.drawing import find_missing

    missing = find_missing(store, job.arms, job.items, ranks) if model is not None else {}
    totals = {f"drawing {name}": len(job.items) for name in missing}
    done = {f"drawing {name}": len(job.items) - len(rows) for name, rows in missing.items()}
    names = [scorer.name for scorer in job.scorers()] + (["drift"] if len(job.arms) > 1 else [])
    pictures = {arm.name: job.given.get(arm.name, job.items) for arm in job.arms}
    there = sum(1 for of in pictures.values() for picture in of if picture is not None)
    totals |= {f"scoring {name}": there for name in names}
    if ranks.main and plan is not None:
        typer.echo(plan.describe(), err=True)
        left = sum(map(len, missing.values()))
        typer.echo(f"{left} of {sum(totals[k] for k in done)} pictures to draw, in {store.folder}", err=True)
    with CountingProgress(totals, done, quiet=not ranks.main) as bar:

        def progress(what: str, more: int) -> None:
            more = min(more, bar.totals[what] - bar.done[what])  # an estimate where several processes work
            if more:
                bar(what, more)

        sample = plan.sample if plan is not None else None
        return engine.run(job, store, ranks, progress, model, sample, missing)


def _write(folder: Path, prompts: PromptSet, job: Evaluation, results: dict[str, Any], as_json: bool) -> None:
    """Files, then what is printed."""
    from align_cli.evaluation import outcome
    from align_cli.evaluation.tables import print_results

    outcome.write(folder, results)
    written = [f"numbers: {folder / RESULTS}"]
    if prompts.name == "geneval":
        written += _geneval_folders(folder, prompts, job)
    written.append(_report(folder, results))
    if as_json:
        typer.echo(json.dumps(results, indent=1, allow_nan=False))
        return
    print_results(results)
    typer.echo("\n".join(line for line in written if line))


def _report(folder: Path, results: dict[str, Any]) -> str:
    from align_cli.evaluation.report import write_report

    write_report(results, folder, folder / REPORT)
    return f"report: {folder / REPORT}"


def _again(folder: Path) -> str:
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    place = [] if "--out" in words else ["--out", str(folder)]
    return shlex.join(["t2ialign", *words, *place, "--resume"])


# ---------------------------------------------------------------- what is asked for


def _check_options(asked: Asked) -> None:
    if not asked.images:
        if asked.allow_missing:
            raise UserError("--allow-missing is for pictures that are given with --images")
        return
    drawing = {"--model": asked.model, "--adapter": asked.adapters, "--arm": asked.arms}
    drawing |= {f"--{key.replace('_', '-')}": value for key, value in asked.sample_flags.items()}
    for flag, value in drawing.items():
        if value:
            raise UserError(f"{flag} is for drawing, --images gives pictures that are drawn already")


def _arms(asked: Asked) -> list[Arm]:
    if asked.images:
        named = folders.parse_folders(asked.images)
        marked = tuple(dict.fromkeys(asked.trained_on))
        base = next(iter(named))
        chosen = asked.vs if asked.vs in named else base
        return [Arm(name, trained_on=() if name == chosen else marked) for name in named]
    return arming.make_arms(asked.adapters, asked.arms, asked.trained_on)


def _prompts(asked: Asked) -> PromptSet:
    options = SetOptions(
        prompts=asked.prompts, data_path=asked.data_path, column=asked.column, num=asked.n, seed=asked.seed,
        split=asked.split,
    )  # fmt: skip
    return load_set(asked.benchmark, options).limited(asked.limit)


def _own_per_prompt(prompts: PromptSet) -> int:
    if prompts.name == "geneval":
        from align_cli.evaluation.geneval import PER_PROMPT

        return PER_PROMPT
    return 1


def _plan(asked: Asked, arms: Sequence[Arm]) -> Plan:
    specs = list(dict.fromkeys(spec for arm in arms for spec in arm.adapters))
    return make_plan(asked.model, specs, asked.model_flags, asked.sample_flags)


def scorer_choices(asked: Asked, prompts: PromptSet, plan: Plan | None) -> list[ScorerChoice]:
    """The scorers of a run: those named, else the benchmark's own, else tiny-clip for an embedded model and
    clip for any other.

    Raises:
        UserError: an unknown scorer, one named twice, weights for a scorer that is not used.
    """
    if asked.scorers is not None:
        words = [word.strip() for word in asked.scorers.split(",") if word.strip()]
    elif prompts.judge is not None:
        words = []
    elif prompts.scenes is not None:
        words = ["shapes"]
    else:
        tiny = plan is not None and registry.model_source(plan.model.name).startswith("embedded:")
        words = ["tiny-clip" if tiny else "clip"]
    if words == ["none"]:
        words = []
    pairs = [word.partition(":")[::2] for word in words]
    names = [name for name, _ in pairs]
    for name in [*names, *asked.trained_on]:
        registry.path_of(registry.REWARDS, name)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--scorers names {twice} twice")
    sources = {}
    for text in asked.weights:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise UserError(f"--weights {text}: write --weights NAME=PATH")
        if name not in names:
            raise UserError(
                f"--weights {text}: {name} is not among the scorers ({', '.join(names) or 'none'})"
            )
        sources[name] = path
    return [ScorerChoice(name, way or "official", sources.get(name)) for name, way in pairs]


def _rewards(choices: Sequence[ScorerChoice], device: str) -> list[Reward]:
    from align_cli.rewards.loading import load_reward

    return [
        load_reward(c.name, source=c.source, preprocessing=c.preprocessing, device=device) for c in choices
    ]


def _identity(
    asked: Asked, prompts: PromptSet, arms: list[Arm], per_prompt: int, plan: Plan | None
) -> dict[str, Any]:
    """What fixes the pictures, as far as the plan is decided: it names the default folder, and once the model
    is loaded it tells whether a folder is this run's. The devices are this machine's own matter.
    """
    about: dict[str, Any] = {
        "benchmark": {"name": prompts.name, "prompts": len(prompts), "fingerprint": prompts.fingerprint},
        "per_prompt": per_prompt,
    }
    if plan is None:
        found = folders.parse_folders(asked.images)
        return about | {"images": {name: str(path.resolve()) for name, path in found.items()}}
    return about | {
        "model": asdict(replace(plan.model, device="auto", encoder_device="")),
        "seed": asked.seed,
        "sample": asdict(plan.sample),
        "arms": {arm.name: {"adapters": list(arm.adapters), "sha256": list(arm.hashes)} for arm in arms},
    }


def default_name(benchmark: str, identity: Mapping[str, Any]) -> str:
    """eval-parti-1a2b3c4d: one name for every run."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", benchmark).strip("-.")[:40] or "prompts"
    return f"eval-{slug}-{sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]}"


def _given(asked: Asked, items: Sequence[Any]) -> tuple[dict[str, list[Path | None]], list[str]]:
    """Pictures of --images, and what is to be said about them."""
    found: dict[str, list[Path | None]] = {}
    notes: list[str] = []
    for name, folder in folders.parse_folders(asked.images).items():
        found[name], said = folders.match(folder, items, allow_missing=asked.allow_missing)
        notes += said
    return found, notes


def _geneval(asked: Asked, prompts: PromptSet, arms: Sequence[Arm]) -> list[Any]:
    """GenEval's own verdicts as a scorer."""
    if not asked.geneval_results:
        return []
    if prompts.name != "geneval":
        raise UserError("--geneval-results is for t2ialign eval geneval")
    from align_cli.evaluation.verdicts import read_verdicts

    return [read_verdicts(asked.geneval_results, prompts, [arm.name for arm in arms])]


def _geneval_folders(folder: Path, prompts: PromptSet, job: Evaluation) -> list[str]:
    """The official layout of every arm's pictures, for the official evaluator."""
    from align_cli.evaluation.geneval import write_folder

    lines = []
    for arm in job.arms:
        if arm.name in job.given:
            continue
        store = Store(folder, {})
        pictures = {(item.number, item.k): store.path(arm.name, item) for item in job.items}
        place = folder / "geneval" / arm.name
        write_folder(prompts, pictures, place)
        lines.append(f"for GenEval's evaluator: {place}")
    return lines
