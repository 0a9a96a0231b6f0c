"""What an evaluation is to do, decided from the command line before anything is loaded. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_cli import registry
from align_cli.drawing import Plan, make_plan
from align_cli.errors import UserError
from align_cli.evaluation import arms as arming
from align_cli.evaluation import folders
from align_cli.evaluation.arms import Arm
from align_cli.evaluation.prompts import PromptSet
from align_cli.evaluation.sets import SetOptions, load_set
from align_cli.evaluation.store import ABOUT, check_folder, identity, identity_of_prompts, refuse_other_run
from align_cli.rewards.spec import parse_places

if TYPE_CHECKING:
    from align_cli.evaluation.protocols import Protocol
    from align_cli.evaluation.verdicts import GenevalVerdicts

REFERENCED = ("hpsv2", "hpsv2.1")
"""Scorers that have an official package beside ours."""


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
    kinds: tuple[str, ...] | None
    per_prompt: int | None
    seed: int
    images: list[str]
    allow_missing: bool
    geneval_results: list[str]
    protocol: str | None
    reference: bool
    interval: str | None
    model_flags: Mapping[str, Any]
    sample_flags: Mapping[str, Any]
    self_correct: float | None
    attention: int
    parser: str | None
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


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What follows from it. plan: how pictures are drawn, None where they are given. identity: of `store`, as
    far as it is known. verdicts: of --geneval-results. folder: to write to; resume: go on with what lies
    there.
    """

    prompts: PromptSet
    per_prompt: int
    arms: list[Arm]
    baseline: str
    plan: Plan | None
    protocol: Protocol | None
    scorers: list[ScorerChoice]
    interval: str
    identity: dict[str, Any]
    verdicts: GenevalVerdicts | None
    folder: Path
    resume: bool


def decide(asked: Asked) -> Decided:
    """Check all that can be checked without weights.

    Raises:
        UserError: options that do not go together, bad prompts or adapters, an unknown scorer, a folder that
            is not to be written to.
    """
    _check_options(asked)
    arms = _arms(asked)
    baseline = arming.baseline([arm.name for arm in arms], asked.vs)
    check_scorers(asked)
    chosen = _protocol(asked)
    plan = None if asked.images else _plan(asked, arms, chosen)
    prompts = prompts_of(asked)  # the prompts of the shapes world need torch: after what does not
    per_prompt = asked.per_prompt or _own_per_prompt(prompts)
    about = _identity(asked, prompts, per_prompt, arms, plan)
    folder = asked.out or Path("runs") / default_name(prompts.name, about)
    # a folder that is named by what fixes the run is this run's: the same command goes on
    resume = asked.resume or (asked.out is None and not asked.overwrite and (folder / ABOUT).exists())
    check_folder(folder, resume=resume, overwrite=asked.overwrite)
    if resume:
        refuse_other_run(folder, _certain(about, plan))
    verdicts = _verdicts(asked, prompts, arms)
    return Decided(
        prompts=prompts,
        per_prompt=per_prompt,
        arms=arms,
        baseline=baseline,
        plan=plan,
        protocol=chosen,
        scorers=scorer_choices(asked, prompts, plan, chosen),
        interval=asked.interval or ("t" if prompts.scenes is not None else "bootstrap"),
        identity=about,
        verdicts=verdicts,
        folder=folder,
        resume=resume,
    )


def _certain(about: dict[str, Any], plan: Plan | None) -> dict[str, Any]:
    """What of `about` loading the model will not change: not its dtype, nor what it chooses by itself."""
    if plan is None:
        return about
    model = {key: value for key, value in about["model"].items() if key != "dtype"}
    sample = {key: value for key, value in about["sample"].items() if key not in plan.open_keys}
    return about | {"model": model, "sample": sample}


def _verdicts(asked: Asked, prompts: PromptSet, arms: Sequence[Arm]) -> GenevalVerdicts | None:
    """GenEval's own verdicts, read and checked."""
    if not asked.geneval_results:
        return None
    if prompts.name != "geneval":
        raise UserError("--geneval-results is for t2ialign eval geneval")
    from align_cli.evaluation.verdicts import read_verdicts

    return read_verdicts(asked.geneval_results, prompts, [arm.name for arm in arms])


def _identity(
    asked: Asked, prompts: PromptSet, per_prompt: int, arms: list[Arm], plan: Plan | None
) -> dict[str, Any]:
    """Of drawn pictures, or of folders of given ones."""
    if plan is not None:
        return identity(prompts, per_prompt, arms, asked.seed, plan.model, plan.sample, asked.protocol)
    found = folders.parse_folders(asked.images)
    named = {name: str(path.resolve()) for name, path in found.items()}
    return {**identity_of_prompts(prompts, per_prompt), "images": named}


def _check_options(asked: Asked) -> None:
    if asked.parser is not None and not asked.attention:
        raise UserError("--parser finds the words that --attention N shows; give that, too")
    if asked.attention and asked.protocol is not None:
        raise UserError(f"--attention does not go with --protocol {asked.protocol}, whose noise is its own")
    if not asked.images:
        if asked.allow_missing:
            raise UserError("--allow-missing is for pictures that are given with --images")
        return
    drawing: dict[str, object] = {
        "--model": asked.model, "--adapter": asked.adapters, "--arm": asked.arms,
        "--self-correct": asked.self_correct, "--attention": asked.attention or None,
    }  # fmt: skip
    settings = {**asked.sample_flags, **asked.model_flags}
    settings.pop("device")  # that of the scorers
    drawing |= {f"--{key.replace('_', '-')}": value for key, value in settings.items()}
    for flag, value in drawing.items():
        if _given(value):
            raise UserError(f"{flag} is for drawing, --images gives pictures that are drawn already")


def _given(value: object) -> bool:
    """Whether an option was typed; 0 is a value."""
    return value is not None and value != []


def _arms(asked: Asked) -> list[Arm]:
    if asked.images:
        named = folders.parse_folders(asked.images)
        marked = tuple(dict.fromkeys(asked.trained_on))
        base = next(iter(named))
        chosen = asked.vs if asked.vs in named else base
        return [Arm(name, trained_on=() if name == chosen else marked) for name in named]
    return arming.make_arms(asked.adapters, asked.arms, asked.trained_on, asked.self_correct)


def prompts_of(asked: Asked) -> PromptSet:
    """The prompts that are asked for. UserError if there are none such."""
    options = SetOptions(
        prompts=asked.prompts, data_path=asked.data_path, column=asked.column, num=asked.n, seed=asked.seed,
        split=asked.split, kinds=asked.kinds,
    )  # fmt: skip
    return load_set(asked.benchmark, options).limited(asked.limit)


def _own_per_prompt(prompts: PromptSet) -> int:
    if prompts.name == "geneval":
        from align_cli.evaluation.geneval import PER_PROMPT

        return PER_PROMPT
    return 1


def _protocol(asked: Asked) -> Protocol | None:
    """The protocol of --protocol; UserError where another option contradicts it."""
    if asked.protocol is None:
        return None
    from align_cli.evaluation.protocols import protocol

    found = protocol(asked.protocol, asked.benchmark)
    fixed = {"--scorers": asked.scorers, "--per-prompt": asked.per_prompt, "--images": asked.images}
    fixed |= {f"--{key.replace('_', '-')}": value for key, value in asked.sample_flags.items()}
    fixed |= {f"--{key}": asked.model_flags[key] for key in ("dtype", "text")}
    fixed |= {"--seed": asked.seed or None}  # 0 where it is not given
    for flag, value in fixed.items():
        if _given(value):
            raise UserError(f"{flag} does not go with --protocol {found.name}, which fixes it")
    return found


def _plan(asked: Asked, arms: Sequence[Arm], chosen: Protocol | None) -> Plan:
    specs = list(dict.fromkeys(spec for arm in arms for spec in arm.adapters))
    held, drawing = dict(asked.model_flags), dict(asked.sample_flags)
    if chosen is not None:
        held["dtype"], drawing = chosen.dtype, asdict(chosen.sample)
    plan = make_plan(asked.model, specs, held, drawing)
    if _given(asked.sample_flags["correction"]) and not (asked.self_correct or plan.sample.self_correct):
        raise UserError("--correction says what self-correction moves; give its scale with --self-correct")
    return plan


def check_scorers(asked: Asked) -> None:
    """UserError for an unknown scorer in --scorers or --trained-on, one named twice, weights in another form
    than NAME=PATH.
    """
    names = [name for name, _ in _pairs(asked.scorers or "")]
    if asked.scorers is not None and not names and asked.scorers.strip() != "none":
        raise UserError("--scorers names no scorer; write --scorers none to draw only")
    for name in [*names, *asked.trained_on]:
        registry.path_of(registry.REWARDS, name)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--scorers names {twice} twice")
    parse_places(asked.weights)


def scorer_choices(
    asked: Asked, prompts: PromptSet, plan: Plan | None, chosen: Protocol | None = None
) -> list[ScorerChoice]:
    """The scorers of a run: the protocol's, else those named, else the benchmark's own, else tiny-clip for an
    embedded model and clip for any other.

    Raises:
        UserError: weights, or --reference, for a scorer that is not used.
    """
    if chosen is not None:
        pairs = [(name, chosen.preprocessing) for name in chosen.scorers]
    elif asked.scorers is not None:
        pairs = _pairs(asked.scorers)
    elif prompts.judge is not None:
        pairs = []
    elif prompts.scenes is not None:
        pairs = [("shapes", "")]
    else:
        tiny = plan is not None and registry.is_embedded(plan.model.name)
        pairs = [("tiny-clip" if tiny else "clip", "")]
    names = [name for name, _ in pairs]
    if asked.reference and not any(name in REFERENCED for name in names):
        raise UserError(f"--reference needs a scorer that it is of: --scorers {' or '.join(REFERENCED)}")
    sources = parse_places(asked.weights)
    for name, path in sources.items():
        if name not in names:
            raise UserError(
                f"--weights {name}={path}: {name} is not among the scorers ({', '.join(names) or 'none'})"
            )
    return [ScorerChoice(name, way or "official", sources.get(name)) for name, way in pairs]


def _pairs(text: str) -> list[tuple[str, str]]:
    """ "clip,hpsv2:textcraftor" -> (name, preprocessing) each; "none" is none."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    parts = [word.partition(":") for word in ([] if words == ["none"] else words)]
    return [(name, way) for name, _, way in parts]


def default_name(benchmark: str, identity: Mapping[str, Any]) -> str:
    """eval-parti-1a2b3c4d: one name for every run."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", benchmark).strip("-.")[:40] or "prompts"
    return f"eval-{slug}-{sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]}"
