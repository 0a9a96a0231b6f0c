"""`t2ialign eval`: measure models and adapters on prompts, paired and with intervals. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align_cli import registry
from align_cli.checks import one_of
from align_cli.cli import options, planned
from align_cli.cli.launching import launched_several
from align_cli.errors import UserError
from align_cli.settings import check_kinds


def evaluate(
    benchmark: Annotated[
        str,
        typer.Argument(
            metavar="BENCHMARK|FILE",
            help="parti, hpsv2, coco, geneval, geneval-shapes, shapes; a file of prompts; or dpt-probe.",
        ),
    ],
    model: options.Model = None,
    unet: options.Unet = None,
    adapter: options.Adapters = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm", metavar="NAME=A@0.5+B", help="One more stack of adapters, by a name; repeatable."
        ),
    ] = None,
    all_methods: Annotated[
        bool,
        typer.Option(
            "--all-methods",
            help="shapes: all packaged adapters of the embedded models in one table; --model: of one.",
        ),
    ] = False,
    vs: Annotated[
        str | None,
        typer.Option("--vs", metavar="NAME", help="What the others are compared with. Default: base."),
    ] = None,
    scorers: Annotated[
        str | None,
        typer.Option(
            "--scorers",
            metavar="A,B,C",
            help="clip, pickscore, hpsv2, ...; NAME:PREPROCESSING for another one; none only draws.",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="NAME=PATH", help="Weights of a scorer; repeatable."),
    ] = None,
    trained_on: Annotated[
        list[str] | None,
        typer.Option(
            "--trained-on", metavar="NAME", help="Scorer that the adapters were trained on; repeatable."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="PATH", help="The benchmark's prompts, a file or a folder."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="NAME",
            help=f"dpt-probe: {', '.join(registry.GROUNDED)}. Default: what the adapter was trained on.",
        ),
    ] = None,
    data_path: options.DataPath = None,
    gallery: Annotated[
        int | None,
        typer.Option(
            "--gallery",
            metavar="N",
            min=0,
            help="dpt-probe: captions and pictures that retrieval chooses from; 0: none. Default: 100.",
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", metavar="NAME", help="Of a table: the one with the prompts.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="N of the prompts, spread evenly over the groups."),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", metavar="N", min=1, help="Shapes world: how many prompts are made; dpt-probe: items."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", help="Shapes world: test, val or train compositions."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="NAME",
            help="Shapes world: pair, triple, long (five sentences), single, count; repeatable.",
        ),
    ] = None,
    per_prompt: Annotated[
        int | None, typer.Option("--per-prompt", metavar="K", min=1, help="Pictures of every prompt.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="SEED", min=0, help="Seed of noise (and of prompts made here).")
    ] = 0,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--images",
            metavar="[NAME=]DIR",
            help="Score these pictures, draw none; repeatable, one arm each.",
        ),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="--images: go on without missing and broken pictures.")
    ] = False,
    geneval_results: Annotated[
        list[str] | None,
        typer.Option(
            "--geneval-results", metavar="[ARM=]FILE", help="What GenEval's own evaluator wrote; repeatable."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", metavar="NAME", help="parti, hpsv2: textcraftor, as its authors ran it."),
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Let the official hpsv2 package score, too (extra hpsv2).")
    ] = False,
    interval: Annotated[
        str | None,
        typer.Option("--interval", metavar="NAME", help="bootstrap, or t (default in the shapes world)."),
    ] = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    spacing: options.Spacing = None,
    eta: options.Eta = None,
    from_step: options.FromStep = None,
    self_correct: Annotated[
        float | None,
        typer.Option(
            "--self-correct",
            metavar="X",
            min=0,
            help="Adapters of dpt: one more arm, NAME-corrected, that corrects itself by this scale.",
        ),
    ] = None,
    correction: options.Correction = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", metavar="PIXELS", help="Pixels per side; 0: the model's.")
    ] = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    encoder_device: options.EncoderDevice = None,
    dtype: options.Dtype = None,
    text: options.Text = None,
    attention: Annotated[
        int,
        typer.Option(
            "--attention",
            metavar="N",
            min=0,
            help="Show where the pictures of the first N prompts look at their words; in the shapes world, "
            "how much of it lies on the thing.",
        ),
    ] = 0,
    parser: options.Parser = None,
    as_json: options.AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Default: runs/eval-BENCHMARK-..., one for every run."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the evaluation in the folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start afresh; files of other names are left alone.")
    ] = False,
    num_processes: options.NumProcesses = 1,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the sampling settings and the costs; draw and write nothing."),
    ] = False,
    gpu: planned.GpuName = None,
    mfu: planned.Mfu = None,
) -> None:
    """Measure alignment: same prompts and noise for every model, mean differences with 95 % intervals.

    Without --adapter and --arm the model is measured alone. Sampling settings come from the first adapter,
    else from the preset of the model; flags go above them.
    dpt-probe draws nothing: it asks the discriminators of DPT, one --adapter each, which text fits a picture
    and where a thing is, and compares them.
    """
    from align_cli.cli import eval_plan, eval_probe, eval_work

    planned.check_options(dry_run, gpu, mfu)
    if not dry_run and launched_several(num_processes):
        return
    if split is not None:
        one_of("--split", split, ("test", "val", "train"))
    if kind:
        check_kinds("--kind", tuple(kind))
    if interval is not None:
        one_of("--interval", interval, ("t", "bootstrap"))
    asked = eval_plan.Asked(
            benchmark=benchmark, model=model, adapters=adapter or [], arms=arm or [], vs=vs, scorers=scorers,
            weights=weights or [], trained_on=trained_on or [], prompts=prompts, data_path=data_path,
            column=column, limit=limit, n=n, split=split, kinds=tuple(kind) if kind else None,
            per_prompt=per_prompt, seed=seed,
            images=images or [], allow_missing=allow_missing, geneval_results=geneval_results or [],
            protocol=protocol, reference=reference, interval=interval,
            model_flags={
                "device": device, "encoder_device": encoder_device, "dtype": dtype, "text": text,
                "unet": unet,
            },
            sample_flags={
                "steps": steps, "guidance": guidance, "sampler": sampler, "spacing": spacing, "eta": eta,
                "image_size": image_size, "batch_size": batch_size, "from_step": from_step,
                "correction": correction,
            },
            self_correct=self_correct, attention=attention, parser=parser,
            as_json=as_json, out=out, resume=resume, overwrite=overwrite,
        )  # fmt: skip
    if all_methods:
        from align_cli.cli import eval_all

        eval_probe.refuse_elsewhere(benchmark, data, gallery)
        eval_all.evaluate(asked)
        return
    if benchmark == eval_probe.NAME:
        if dry_run:
            raise UserError("--dry-run plans evaluations that draw, and dpt-probe draws nothing")
        eval_probe.evaluate(asked, data, gallery)
        return
    eval_probe.refuse_elsewhere(benchmark, data, gallery)
    decided = eval_plan.decide(asked)
    if dry_run:
        planned.say_eval(asked, decided, gpu, mfu)
        return
    eval_work.evaluate(asked, decided)
