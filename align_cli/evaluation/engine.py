"""The one evaluation: pictures of all arms, numbers of all scorers, what they say. Stops and goes on.

    Evaluation -> pictures (drawn, or found in folders) -> scores -> results.json, results.csv

Every process of a run calls the same functions in the same order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align_cli.errors import UserError
from align_cli.evaluation import audit as auditing
from align_cli.evaluation import drift as drifting
from align_cli.evaluation.arms import Arm
from align_cli.evaluation.benchmarks import ShapesBenchmark, compositions
from align_cli.evaluation.by_protocol import draw_by_protocol
from align_cli.evaluation.compare import Design
from align_cli.evaluation.drawing import Progress, draw, find_missing
from align_cli.evaluation.looking import Looking, look, seen_results
from align_cli.evaluation.outcome import Facts, outcome
from align_cli.evaluation.prompts import PromptSet
from align_cli.evaluation.protocols import Protocol
from align_cli.evaluation.scoring import RewardScorer, Scorer, SetJudge, score
from align_cli.evaluation.store import Item, Store, read_picture
from align_cli.models.base import BaseModel
from align_cli.rewards.base import Reward
from align_cli.settings import SampleSettings
from align_cli.training.distributed import Ranks


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured. baseline: the arm that the others are compared with. given: arm -> the picture of
    every item, for pictures that are not drawn here. extra: scorers besides the rewards and the benchmark's
    own judge. protocol: a published way to draw and to average. interval: "t" or "bootstrap". looking: what
    is seen of the attention of the first prompts' pictures; None for nothing.
    """

    prompts: PromptSet
    arms: Sequence[Arm]
    baseline: str
    rewards: Sequence[Reward]
    items: Sequence[Item]
    seed: int = 0
    per_prompt: int = 1
    interval: str = "bootstrap"
    given: Mapping[str, Sequence[Path | None]] = field(default_factory=dict)
    extra: Sequence[Scorer] = ()
    protocol: Protocol | None = None
    looking: Looking | None = None
    command: Sequence[str] = ()
    created: str = ""
    notes: Sequence[str] = ()

    def scorers(self) -> list[Scorer]:
        """The benchmark's own judge first."""
        own: list[Scorer] = [SetJudge(self.prompts)] if self.prompts.judge is not None else []
        return [*own, *self.extra, *(RewardScorer(reward) for reward in self.rewards)]


def run(
    job: Evaluation,
    store: Store,
    ranks: Ranks,
    progress: Progress,
    model: BaseModel | None = None,
    sample: SampleSettings | None = None,
    missing: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Draw and score what is missing, compare.

    Args:
        model, sample: None where the pictures are given. missing: of `find_missing`, None to look now.
    Returns:
        the content of results.json, the same on every process.
    Raises:
        UserError: see `draw` and `score`.
    """
    begun = time.perf_counter()
    seconds: dict[str, float] = {}
    pictures = dict(job.given)
    official: dict[str, dict[str, float]] = {}
    if model is not None and sample is not None:
        if missing is None:
            missing = find_missing(store, job.arms, job.items, ranks)
        if job.protocol is None:
            draw(model, job.arms, job.items, sample, store, ranks, missing, progress)
        else:
            rewards = {reward.name: reward for reward in job.rewards}
            official = draw_by_protocol(
                job.protocol, model, job.arms, job.items, rewards, store, ranks, missing, progress
            )
        pictures = {arm.name: [store.path(arm.name, item) for item in job.items] for arm in job.arms}
        if job.looking is not None:
            look(job.looking, model, job.arms, job.items, sample, store, ranks, progress)
    seconds["drawing"] = time.perf_counter() - begun
    scored: list[tuple[Scorer, dict[str, dict[str, np.ndarray]]]] = []
    for scorer in job.scorers():
        scored.append((scorer, score(store.folder, scorer, pictures, job.items, ranks, progress)))
    drift = _drift(job, store, pictures, ranks, progress)
    seconds["scoring"] = time.perf_counter() - begun - seconds["drawing"]
    present = {arm: np.array([p is not None for p in paths]) for arm, paths in pictures.items()}
    design = Design(
        arms=tuple(arm.name for arm in job.arms),
        baseline=job.baseline,
        clusters=clusters_of(job.prompts, job.items),
        groups=[item.row.groups for item in job.items],
        present=present,
        interval=job.interval,
        seed=job.seed,
    )
    memory, gpu = peak_memory()
    facts_ = Facts(
        command=list(job.command),
        created=job.created,
        model=_model_facts(model),
        sample=asdict(sample) if sample is not None else {},
        seed=job.seed,
        per_prompt=job.per_prompt,
        seconds=seconds,
        protocol=_protocol(job, official),
        memory={"process": memory, "gpu": gpu},
        notes=list(job.notes),
    )
    results = outcome(
        store.folder, job.prompts, job.items, job.arms, job.baseline, pictures, scored, design, drift,
        audit(job, model), floor_of(job, pictures), facts_,
    )  # fmt: skip
    if job.looking is not None:
        clusters = clusters_of(job.prompts, job.looking.items(job.items))
        results["attention"] = seen_results(
            job.looking, store, job.arms, job.baseline, job.items, clusters, job.interval, results["unit"],
            job.seed,
        )  # fmt: skip
        results["words"] += results["attention"]["words"]
    return results


def peak_memory() -> tuple[int, int]:
    """(process, GPU) bytes: the most this process ever held, and the most its tensors held on any one GPU."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    gpu = max(map(torch.cuda.max_memory_allocated, gpus), default=0)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset), gpu
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), gpu


def _protocol(job: Evaluation, official: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    """What a published protocol reports."""
    if job.protocol is None:
        return None
    return {"name": job.protocol.name, "source": job.protocol.source, "averages": official}


def _model_facts(model: BaseModel | None) -> dict[str, str]:
    if model is None:
        return {"id": "pictures that were given", "family": "", "dtype": "uint8", "device": "cpu"}
    return {
        "id": model.model_id,
        **({"unet": model.denoiser_id} if model.denoiser_id else {}),
        "family": model.family,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def _drift(
    job: Evaluation,
    store: Store,
    pictures: Mapping[str, Sequence[Path | None]],
    ranks: Ranks,
    progress: Progress,
) -> list[dict[str, object]]:
    """How far every arm has moved from the baseline; nothing for one arm alone."""
    if len(job.arms) < 2:
        return []
    tower = next((r for r in job.rewards if isinstance(r, drifting.HasFeatures)), None)
    scorer = drifting.Drift(tower, pictures, job.baseline, job.per_prompt)
    values = score(store.folder, scorer, pictures, job.items, ranks, progress)
    others = [arm.name for arm in job.arms if arm.name != job.baseline]
    return [drifting.summary(values, arm, job.baseline, tower) for arm in others]


def clusters_of(prompts: PromptSet, items: Sequence[Item]) -> list[Hashable]:
    """What is no independent evidence, by name: pictures of one text; in the shapes world, of one set of
    objects.
    """
    if prompts.scenes is None:
        return [item.row.text for item in items]
    names = compositions(prompts.scenes)
    return [names[item.number] for item in items]


def audit(job: Evaluation, model: BaseModel | None) -> list[dict[str, object]]:
    """What every text encoder, arm by arm, and every scorer cuts from the prompts."""
    found = {}
    if model is not None:
        for arm in job.arms:
            with arm.at_work(model):
                found[arm.name] = _reading(job.prompts, model)
    scorers = {reward.name: reward.audit(job.prompts.texts) for reward in job.rewards}
    return [*auditing.by_arm(found), *auditing.audit(job.prompts, scorers, "scorer")]


def _reading(prompts: PromptSet, model: BaseModel) -> list[dict[str, object]]:
    """What the model's text encoders cut; where it reads sentence by sentence also what they alone would have
    cut.
    """
    now = model.audit_text(prompts.texts)
    if model.reader is None:
        return auditing.audit(prompts, now, "text encoder")
    plain = auditing.audit(prompts, model.plain_audit(prompts.texts), auditing.NOT_USED)
    return [*plain, *auditing.audit(prompts, now, auditing.BY_SENTENCE)]


def floor_of(job: Evaluation, pictures: Mapping[str, Sequence[Path | None]]) -> dict[str, float]:
    """Shapes world: what the baseline's pictures score against prompts of other pictures; else nothing."""
    paths = [path for path in pictures[job.baseline] if path is not None]
    if job.prompts.scenes is None or len(paths) < len(job.items):
        return {}
    shown = [read_picture(path) for path in paths]
    if any(picture.shape[:2] != (job.prompts.image_size,) * 2 for picture in shown):
        return {}  # given pictures of another size, which the oracle cannot read
    bench = ShapesBenchmark()
    scenes = [job.prompts.scenes[item.number] for item in job.items]
    found = bench.floor(np.stack(shown), scenes, seed=job.seed)
    return {f"{bench.name}/{key}": value for key, value in found.items()}


def check_size(prompts: PromptSet, model: BaseModel, sample: SampleSettings) -> None:
    """UserError if the benchmark's judge cannot read pictures of the model's size."""
    side = sample.image_size or model.image_size
    if prompts.image_size and side != prompts.image_size:
        raise UserError(
            f"{prompts.name} judges {prompts.image_size} px pictures of the shapes world, {model.model_id} "
            f"draws {side} px pictures; use --model tiny-sd15"
        )
