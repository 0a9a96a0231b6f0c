"""The paired evaluation: base and aligned model draw the same prompts from the same noise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import numpy as np
import torch

from align_cli import adapters
from align_cli.errors import UserError
from align_cli.evaluation.benchmarks import ShapesBenchmark, spread, wrong
from align_cli.evaluation.results import BaseResult, Example, PairedResult, RunFacts
from align_cli.evaluation.stats import Estimate, Paired, paired, rate
from align_cli.methods.base import Method
from align_cli.models.base import BaseModel
from align_cli.pictures import to_uint8
from align_cli.sampling import picture_seeds, sample
from align_cli.settings import SampleSettings
from align_cli.shapes.captions import Prompt

Progress = Callable[[str, int, int], None]
"""Called as (what, done, total) while pictures are drawn; what is "base" or "aligned"."""
NUM_EXAMPLES = 9
"""Rows of the before/after picture."""


@dataclass(frozen=True)
class Measurement:
    """One model's pictures of an evaluation, judged. N prompts.

    values: metric -> (N,), NaN where not asked. pictures: (N, H, W, 3) uint8. seconds: drawing and judging.
    """

    values: dict[str, np.ndarray]
    pictures: np.ndarray
    floor: dict[str, float]
    seconds: float


def evaluate_alignment(
    model: BaseModel,
    aligned: Method | Sequence[str],
    prompts: list[Prompt],
    settings: SampleSettings,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    interval: str = "t",
    split: str = "test",
) -> PairedResult:
    """Draw every prompt with the base model and with the aligned one, from the same noise, and compare.

    Args:
        model: the base model, untouched before and after.
        aligned: a method (its current trained state) or adapter specs as on the command line ("PATH@0.7").
        prompts: from `ShapesBenchmark.prompts`. seed: start noise of picture i comes from (seed, i).
        interval: "t" or "bootstrap"; clustered by composition in both.
        split: which split the prompts are of, for the record.
    Raises:
        UserError: the model's pictures cannot be judged, or an adapter does not fit.
    """
    with _attached(model, aligned):
        pass  # an adapter that does not fit is an error before minutes of drawing, not after
    first = measure(model, prompts, settings, seed, progress, what="base")
    with _attached(model, aligned):
        second = measure(model, prompts, settings, seed, progress, what="aligned")
    texts, objects = [p.text for p in prompts], compositions(prompts)
    bench = ShapesBenchmark()

    def compare(rows: np.ndarray) -> dict[str, Paired]:
        names = [objects[i] for i in np.nonzero(rows)[0]]
        return {
            m: paired(first.values[m][rows], second.values[m][rows], names, interval=interval, seed=seed)
            for m in bench.metrics
        }

    named = () if isinstance(aligned, Sequence) else (aligned.name,)
    specs = tuple(str(a) for a in aligned) if isinstance(aligned, Sequence) else named
    seconds = {"base": first.seconds, "aligned": second.seconds}
    chosen = spread(prompts, NUM_EXAMPLES)
    missed = [wrong(first.values, i) for i in chosen], [wrong(second.values, i) for i in chosen]
    return PairedResult(
        facts=_run_facts(model, specs, prompts, settings, seed, split, seconds),
        headline=bench.headline,
        rows=compare(np.ones(len(prompts), bool)),
        kinds={k: compare(np.array([p.kind == k for p in prompts])) for k in _kinds(prompts)},
        floor=first.floor,
        examples=[
            Example(texts[i], first.pictures[i], second.pictures[i], a, b)
            for i, a, b in zip(chosen, *missed, strict=True)
        ],
    )


def evaluate_base(
    model: BaseModel,
    prompts: list[Prompt],
    settings: SampleSettings,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    split: str = "test",
) -> BaseResult:
    """The same evaluation of one model alone. Arguments as in `evaluate_alignment`."""
    one = measure(model, prompts, settings, seed, progress, what="base")
    texts, objects = [p.text for p in prompts], compositions(prompts)

    def rates(rows: np.ndarray) -> dict[str, Estimate]:
        names = [objects[i] for i in np.nonzero(rows)[0]]
        return {m: rate(one.values[m][rows], names) for m in ShapesBenchmark.metrics}

    return BaseResult(
        facts=_run_facts(model, (), prompts, settings, seed, split, {"base": one.seconds}),
        headline=ShapesBenchmark.headline,
        rows=rates(np.ones(len(prompts), bool)),
        kinds={k: rates(np.array([p.kind == k for p in prompts])) for k in _kinds(prompts)},
        floor=one.floor,
        examples=[
            Example(texts[i], one.pictures[i], one.pictures[i], wrong(one.values, i), wrong(one.values, i))
            for i in spread(prompts, NUM_EXAMPLES)
        ],
    )


def measure(
    model: BaseModel,
    prompts: list[Prompt],
    settings: SampleSettings,
    seed: int,
    progress: Progress | None = None,
    *,
    what: str = "base",
) -> Measurement:
    """Draw the prompts with the model as it is now, and judge the pictures."""
    bench = ShapesBenchmark()
    if not bench.suits(model):
        raise UserError(
            f"the shapes benchmark judges 32 px pictures of the shapes world, {model.model_id} draws "
            f"{model.image_size} px pictures; use --model tiny-sd15"
        )
    start = time.perf_counter()
    tell = None if progress is None else lambda done, total: progress(what, done, total)
    texts = [p.text for p in prompts]
    pictures = to_uint8(sample(model, texts, settings, picture_seeds(seed, len(prompts)), tell))
    values = bench.judge(pictures, prompts)
    floor = bench.floor(pictures, prompts, seed=seed)
    return Measurement(values, pictures, floor, time.perf_counter() - start)


def compositions(prompts: Sequence[Prompt]) -> list[Hashable]:
    """What each prompt asks to be drawn, whatever its words: prompts of one composition are no independent
    evidence, so the intervals are clustered by it.
    """
    return [tuple(sorted(p.spec.objects)) for p in prompts]


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


def _attached(model: BaseModel, aligned: Method | Sequence[str]) -> AbstractContextManager[None]:
    return (
        adapters.attach(model, list(aligned)) if isinstance(aligned, Sequence) else aligned.attach(model, 1.0)
    )


def _kinds(prompts: list[Prompt]) -> list[str]:
    return list(dict.fromkeys(p.kind for p in prompts))


def _run_facts(
    model: BaseModel,
    specs: tuple[str, ...],
    prompts: list[Prompt],
    settings: SampleSettings,
    seed: int,
    split: str,
    seconds: dict[str, float],
) -> RunFacts:
    memory, gpu = peak_memory()
    return RunFacts(
        benchmark=ShapesBenchmark.name,
        model=model.model_id,
        adapters=specs,
        prompts=len(prompts),
        distinct_prompts=len({p.text for p in prompts}),
        kinds={k: sum(p.kind == k for p in prompts) for k in _kinds(prompts)},
        split=split,
        seed=seed,
        sample=asdict(settings),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        seconds={k: round(v, 2) for k, v in seconds.items()},
        peak_memory_bytes=memory,
        peak_gpu_memory_bytes=gpu,
    )
