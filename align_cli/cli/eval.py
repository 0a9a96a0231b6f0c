"""`t2ialign eval`: measure alignment, of a model alone or of adapters against their base. No torch here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from align_cli import registry
from align_cli.errors import UserError
from align_cli.settings import EvalSettings

PLAIN_WIDTH = 100
"""Columns of a table that goes to a file or a pipe."""


def evaluate(
    benchmark: Annotated[str, typer.Argument(help="Which benchmark: shapes.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Alias, hub id or folder. Default: the adapter's, else tiny-sd15."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Adapter folder, or FOLDER@SCALE; repeatable, stacks."),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Prompts.")] = EvalSettings().num_prompts,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of prompts and noise.")
    ] = EvalSettings().seed,
    split: Annotated[str, typer.Option("--split", help="test, val or train compositions.")] = "test",
    interval: Annotated[str, typer.Option("--interval", help="t or bootstrap.")] = "t",
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Guidance scale; 1 is off.")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="ddim, ddpm; SD3: euler.")] = None,
    spacing: Annotated[str | None, typer.Option("--spacing", help="leading, trailing or linspace.")] = None,
    eta: Annotated[float | None, typer.Option("--eta", help="DDIM eta; 0 is deterministic.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Pictures drawn at once.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the numbers and a picture.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
) -> None:
    """Measure alignment on held-out prompts: same prompts and noise for base and aligned, 95 % intervals.

    Without --adapter the model is measured alone. The floor is what the same pictures score against the
    prompts of other pictures.
    """
    from align_cli.cli.drawing import choose_folder, make_folder, make_plan

    registry.path_of(registry.BENCHMARKS, benchmark)
    if interval not in ("t", "bootstrap"):
        raise UserError(f"--interval must be t or bootstrap, got {interval!r}")
    flags = {
        "steps": steps, "guidance": guidance, "sampler": sampler, "spacing": spacing, "eta": eta,
        "batch_size": batch_size,
    }  # fmt: skip
    plan = make_plan(model, adapter or [], {"device": device, "dtype": dtype}, flags)
    numbers, picture = f"eval-{benchmark}.json", f"eval-{benchmark}.png"
    folder = None if out is None else choose_folder(out, "", [numbers, picture], overwrite)
    prompts = registry.load(registry.BENCHMARKS, benchmark)().prompts(n, seed, split=split)

    from rich.console import Console

    from align_cli.cli.progress import DrawingProgress
    from align_cli.evaluation.paired import evaluate_alignment, evaluate_base
    from align_cli.evaluation.results import BaseResult, PairedResult

    loaded, plan = plan.load()
    if folder is not None:
        make_folder(folder)
    typer.echo(plan.describe(), err=True)
    result: BaseResult | PairedResult
    with DrawingProgress() as progress:
        if plan.adapters:
            result = evaluate_alignment(
                loaded, plan.adapters, prompts, plan.sample, seed, progress, interval=interval, split=split
            )
        else:
            result = evaluate_base(loaded, prompts, plan.sample, seed, progress, split=split)
    text = json.dumps(result.to_json(), indent=2, allow_nan=False)
    if folder is not None:
        write_text(folder / numbers, text + "\n")
        result.save_picture(folder / picture)
    if as_json:
        typer.echo(text)
        return
    console = Console()
    width = console.width if console.is_terminal else PLAIN_WIDTH
    Console(width=width).print(result.to_table(width))
    if folder is not None:
        typer.echo(f"numbers: {folder / numbers}\npicture: {folder / picture}")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename. UserError if that fails."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder with --out") from error
