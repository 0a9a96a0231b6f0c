"""`t2ialign eval`: measure alignment, of a model alone or of adapters against their base. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from align_cli import registry
from align_cli.cli import options
from align_cli.cli.text import print_table
from align_cli.files import file_errors, write_text
from align_cli.settings import EvalSettings, one_of


def evaluate(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help="Which benchmark: shapes.")],
    model: options.Model = None,
    adapter: options.Adapters = None,
    n: Annotated[int, typer.Option("--n", metavar="N", min=1, help="Prompts.")] = EvalSettings().num_prompts,
    seed: Annotated[
        int, typer.Option("--seed", metavar="SEED", min=0, help="Seed of prompts and noise.")
    ] = EvalSettings().seed,
    split: Annotated[
        str, typer.Option("--split", metavar="NAME", help="test, val or train compositions.")
    ] = "test",
    interval: Annotated[str, typer.Option("--interval", metavar="NAME", help="t or bootstrap.")] = "t",
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    spacing: options.Spacing = None,
    eta: options.Eta = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    encoder_device: options.EncoderDevice = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Folder for the numbers and a picture.")
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Measure alignment on held-out prompts: same prompts and noise for base and aligned, 95 % intervals.

    Without --adapter the model is measured alone. The floor is what the same pictures score against the
    prompts of other pictures.
    """
    from align_cli.cli.drawing import choose_folder, make_folder, make_plan

    registry.path_of(registry.BENCHMARKS, benchmark)
    one_of("--split", split, ("test", "val", "train"))
    one_of("--interval", interval, ("t", "bootstrap"))
    flags = {
        "steps": steps, "guidance": guidance, "sampler": sampler, "spacing": spacing, "eta": eta,
        "batch_size": batch_size,
    }  # fmt: skip
    devices = {"device": device, "encoder_device": encoder_device}
    plan = make_plan(model, adapter or [], {**devices, "dtype": dtype}, flags)
    numbers, picture = f"eval-{benchmark}.json", f"eval-{benchmark}.png"
    folder = None if out is None else choose_folder(out, "", [numbers, picture], overwrite)
    loaded, plan = plan.load()

    from align_cli.cli.progress import DrawingProgress
    from align_cli.evaluation.paired import evaluate_alignment, evaluate_base
    from align_cli.evaluation.results import BaseResult, PairedResult
    from align_cli.evaluation.sets import SetOptions, load_set

    prompts = list(load_set(benchmark, SetOptions(num=n, seed=seed, split=split)).scenes or ())
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
        with file_errors(f"cannot write {folder / numbers}", "choose another folder with --out"):
            write_text(folder / numbers, text + "\n")
        result.save_picture(folder / picture)
    if as_json:
        typer.echo(text)
        return
    print_table(result)
    if folder is not None:
        typer.echo(f"numbers: {folder / numbers}\npicture: {folder / picture}")
