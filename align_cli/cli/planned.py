"""What `--dry-run` says of costs: parameters, FLOPs, memory, hours, disk. No torch at import."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_cli import config
from align_cli.cli.text import columns
from align_cli.errors import UserError
from align_cli.rewards.spec import NO_GRADIENT

if TYPE_CHECKING:
    from align_cli.cli.eval_plan import Asked, Decided
    from align_cli.data.cache import Shapes
    from align_cli.data.encoding import Request
    from align_cli.drawing import Plan
    from align_cli.planning.drawing import WorkPlan
    from align_cli.planning.gpus import Gpu
    from align_cli.planning.step import StepPlan

PNG, RESULT_BYTES = 1.6, 1500
"""Bytes per pixel of a PNG, and of a picture in results and report; about."""
MFU = 0.35
"""Share of a GPU's peak that a run is assumed to reach. Kernels of this project reach .2 to .5."""
SPARE = 0.1
"""Share of a GPU's memory to be left free for what the count leaves out (and for ECC, where it is on)."""
LEFT_OUT = (
    "memory is what the allocator is asked for: not in it are the CUDA context (about 0.5 GB), workspaces of "
    "cuDNN and cuBLAS, fragmentation, the drawing of grids and of the evaluation"
)

GpuName = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="--dry-run: plan for this GPU: A100-80GB, H100-SXM, T4, ..."),
]
Mfu = Annotated[
    float | None,
    typer.Option(
        "--mfu", metavar="X", min=0.01, max=1, help=f"--dry-run: assumed share of its peak. Default: {MFU}."
    ),
]

NoCosts = Annotated[
    bool,
    typer.Option(
        "--no-costs", help="--dry-run: leave out parameters, FLOPs, memory and hours, which take time."
    ),
]


def check_options(
    dry_run: bool, gpu: str | None, mfu: float | None, *, as_json: bool = False, no_costs: bool = False
) -> None:
    """UserError for options that only say something about a plan."""
    costs = {"--gpu": gpu is not None, "--mfu": mfu is not None, "--json": as_json}
    for flag, given in (costs | {"--no-costs": no_costs}).items():
        if given and not dry_run:
            raise UserError(f"{flag} is for --dry-run alone; give both, or leave it away")
        if given and no_costs and flag in costs:
            raise UserError(
                f"{flag} says something of costs, and --no-costs leaves them out; give one of them"
            )
    if gpu is not None:
        from align_cli.planning.gpus import gpu_named

        gpu_named(gpu)


def train_plan(
    resolved: config.Resolved, folder: Path, gpu_name: str | None, mfu: float | None
) -> dict[str, Any]:
    """What a run would cost, as plain JSON."""
    from align_cli.planning.disk import run_bytes
    from align_cli.planning.gpus import gpu_named

    gpu = None if gpu_name is None else gpu_named(gpu_name)
    kind = precision_of(resolved.train.precision, resolved.model.dtype)
    if gpu is not None:
        gpu.tflops(kind)
    from align_cli.planning.step import plan_step

    as_gpu = _as_gpu(resolved.model.device, gpu_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run says them
        plan = plan_step(resolved, as_gpu=as_gpu)
    side = resolved.sample.image_size or resolved.data.image_size
    found: dict[str, Any] = {
        "parameters": {"trained": plan.trained, "frozen": plan.frozen},
        "step": {
            "batch": resolved.train.batch_size * resolved.train.accumulation,
            "flops": sum(plan.flops.values()),
            "flops_by_part": plan.flops,
        },
        "memory": _memory(plan, as_gpu),
        "disk": run_bytes(resolved, plan, side),
        "output_folder": str(folder),
        "not_counted": [*plan.uncounted, LEFT_OUT],
    }
    if gpu is not None:
        flops = sum(plan.flops.values()) * resolved.train.steps
        found["gpu"] = on_gpu(gpu, flops, kind, mfu or MFU, plan.peak)
    return found


def precision_of(precision: str, dtype: str) -> str:
    """fp32, fp16 or bf16: that of most products, by autocast and the dtype of the weights."""
    return precision if precision != "fp32" else {"float16": "fp16", "bfloat16": "bf16"}.get(dtype, "fp32")


def on_gpu(gpu: Gpu, flops: float, precision: str, mfu: float, peak: int) -> dict[str, Any]:
    """Hours and whether it fits."""
    tflops = gpu.tflops(precision)
    return {
        "name": gpu.name,
        "peak_tflops": tflops,
        "precision": precision,
        "assumed_mfu": mfu,
        "hours": flops / (tflops * 1e12 * mfu) / 3600,
        "memory": gpu.memory,
        "fits": peak < gpu.memory,
        "tight": (1 - SPARE) * gpu.memory < peak < gpu.memory,
    }


def _on_cpu(device: str) -> bool:
    from align_cli.devices import pick_device

    return device == "cpu" or (device == "auto" and pick_device(device).type == "cpu")


def _memory(plan: StepPlan, as_gpu: bool) -> dict[str, Any]:
    return {
        "counted_as": "on a GPU" if as_gpu else "on a CPU",
        "weights": plan.weights,
        "gradients": plan.gradients,
        "optimizer": plan.optimizer,
        "activations_at_peak": plan.activations,
        "peak": plan.peak,
    }


def train_text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    parameters, step, memory = found["parameters"], found["step"], found["memory"]
    rows = [("plan of one process with the whole batch", "")]
    rows += [(f"  trained, group {name}", f"{n:,} parameters") for name, n in parameters["trained"].items()]
    rows += [(f"  frozen, {name}", f"{n:,} parameters") for name, n in parameters["frozen"].items()]
    rows += flops_rows(f"FLOPs per step of {step['batch']}", step["flops"], step["flops_by_part"])
    rows += memory_rows(memory)
    rows += gpu_rows(found.get("gpu"))
    rows += disk_rows(found["disk"])
    lines = [columns(rows), *(f"not counted: {text}" for text in found["not_counted"])]
    return "\n".join(lines)


def flops_rows(title: str, total: float, parts: Mapping[str, float]) -> list[tuple[str, str]]:
    """Total and parts."""
    shares = ", ".join(f"{name} {flops_text(n)}" for name, n in parts.items() if n > total / 1000)
    return [(f"  {title}", f"{flops_text(total)} ({shares})")]


def memory_rows(memory: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Peak, then what it is made of."""
    names = {
        "weights": "weights, trained and frozen",
        "gradients": "gradients",
        "optimizer": "optimiser state",
        "activations_at_peak": "activations and the rest at the peak",
    }
    parts = [(f"    {text}", size(memory[key])) for key, text in names.items() if key in memory]
    return [(f"  memory at the peak, {memory['counted_as']}", size(memory["peak"])), *parts]


def gpu_rows(gpu: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How long it takes, and whether it fits."""
    if gpu is None:
        return [("  hours", "name a GPU with --gpu")]
    said = (
        f"{time_text(gpu['hours'])} (assumes {gpu['assumed_mfu']:.0%} of {gpu['peak_tflops']:g} TFLOPs in "
        f"{gpu['precision']})"
    )
    fits = "fits" if gpu["fits"] else "WARNING: does not fit"
    fits = "WARNING: tight, a tenth should stay free" if gpu["tight"] else fits
    return [(f"  time on one {gpu['name']}", said), ("  its memory", f"{size(gpu['memory'])}: {fits}")]


def time_text(hours: float) -> str:
    """9.1 s, 12 min, 3.25 hours."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.2g} min"
    return f"{hours:.3g} hours" if hours < 100 else f"{hours:,.0f} hours"


def disk_rows(disk: Mapping[str, int]) -> list[tuple[str, str]]:
    """Total, then what it is made of."""
    rows = [("  on disk", size(sum(disk.values())))]
    return rows + [(f"    {name}", size(count)) for name, count in disk.items()]


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**28 else f"{count / 2**20:,.2f} MiB"


def flops_text(count: float) -> str:
    """1.2e12 -> "1.2 TFLOP"."""
    for unit, one in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def say_train(
    resolved: config.Resolved, folder: Path, gpu: str | None, mfu: float | None, *, as_json: bool
) -> None:
    """Print the plan of a run; with as_json one object with the settings and their origins in it."""
    try:
        found = train_plan(resolved, folder, gpu, mfu)
    except UserError as error:
        if as_json or gpu is not None:  # asked for by name
            raise
        typer.echo(f"note: the costs cannot be counted: {error}", err=True)
        return
    if not as_json:
        typer.echo("\n" + train_text(found))
        return
    settings = {key: {"value": value, "origin": origin} for key, value, origin in resolved.values()}
    typer.echo(json.dumps({"method": resolved.method, "settings": settings, "plan": found}, indent=2))


def say_eval(asked: Asked, decided: Decided, gpu: str | None, mfu: float | None) -> None:
    """Print what an evaluation would cost; nothing is loaded or written."""
    plan = decided.plan
    if plan is None:
        raise UserError("--dry-run plans drawing, and --images gives pictures that are drawn already")
    from align_cli.planning.drawing import plan_drawing
    from align_cli.sampling import own_settings

    pictures = len(decided.prompts) * decided.per_prompt * len(decided.arms)
    side = plan.sample.image_size
    drawing = replace(plan.sample, batch_size=min(plan.sample.batch_size, pictures))
    names = [choice.name for choice in decided.scorers if choice.name not in NO_GRADIENT]
    as_gpu = _as_gpu(plan.model.device, gpu)
    settled = partial(own_settings, settings=drawing, open_keys=plan.open_keys)
    work = plan_drawing(plan.model, drawing.batch_size, settled, names, as_gpu=as_gpu)
    typer.echo(columns([("setting", "value", "origin"), *_sampling_rows(asked, plan)]))
    rows = [("", ""), ("plan of one process", f"{pictures:,} pictures: {len(decided.prompts):,} prompts")]
    rows[-1] = (rows[-1][0], f"{rows[-1][1]} x {decided.per_prompt} x {len(decided.arms)} arms")
    disk = {
        "pictures (about)": int(pictures * (side or work.side) ** 2 * PNG),
        "results and report (about)": pictures * RESULT_BYTES,
    }
    _say_work(work, pictures, plan.model.dtype, disk, gpu, mfu, rows)
    if plan.adapters:
        typer.echo("not counted: what adapters add to a call")
    typer.echo(f"output folder: {decided.folder}")


def _sampling_rows(asked: Asked, plan: Plan) -> list[tuple[str, str, str]]:
    rows = []
    for field in fields(plan.sample):
        origin = plan.origin.partition(", with ")[0] or "default"
        if asked.sample_flags.get(field.name) is not None:
            origin = config.flag_name(f"sample.{field.name}") or f"--{field.name.replace('_', '-')}"
        elif field.name in plan.open_keys:
            origin = "the model"
        rows.append((f"sample.{field.name}", json.dumps(getattr(plan.sample, field.name)), origin))
    return rows


def say_encode(
    request: Request, shapes: Shapes, items: int, captions: int, gpu: str | None, mfu: float | None
) -> None:
    """Print what encoding, or drawing for a method, would cost beside its bytes."""
    from align_cli.data.drawn import DrawRequest
    from align_cli.planning.drawing import plan_drawing, plan_encoding

    as_gpu = _as_gpu(request.model.device, gpu)
    if isinstance(request, DrawRequest):
        drawing, size = request.drawing, request.batch_size
        work = plan_drawing(request.model, size, drawing, [], as_gpu=as_gpu, latents=True)
    else:
        text = request.layout != "captions"
        work = plan_encoding(request.model, request.batch_size, shapes.latent, text=text, as_gpu=as_gpu)
    rows = [("", ""), ("plan of one process", f"{items:,} pictures, {captions:,} captions")]
    _say_work(work, items, request.model.dtype, {}, gpu, mfu, rows)


def _as_gpu(device: str, gpu: str | None) -> bool:
    return gpu is not None or not _on_cpu(device)


def _say_work(
    work: WorkPlan,
    count: int,
    dtype: str,
    disk: Mapping[str, int],
    gpu_name: str | None,
    mfu: float | None,
    rows: list[tuple[str, str]],
) -> None:
    from align_cli.planning.gpus import gpu_named

    rows += [(f"  frozen, {name}", f"{n:,} parameters") for name, n in work.frozen.items()]
    rows += flops_rows(f"FLOPs per batch of {work.batch}", sum(work.flops.values()), work.flops)
    memory = {
        "counted_as": "on a GPU" if work.as_gpu else "on a CPU",
        "peak": work.peak,
        "weights": work.weights,
        "activations_at_peak": work.peak - work.weights,
    }
    rows += memory_rows(memory)
    if gpu_name is not None:
        total = sum(work.flops.values()) * -(-count // work.batch)
        kind = precision_of("fp32", dtype)
        rows += gpu_rows(on_gpu(gpu_named(gpu_name), total, kind, mfu or MFU, work.peak))
    else:
        rows += gpu_rows(None)
    rows += disk_rows(disk) if disk else []
    typer.echo(columns(rows))
    for text in (*work.uncounted, LEFT_OUT):
        typer.echo(f"not counted: {text}")
