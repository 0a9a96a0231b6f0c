"""`t2ialign train`: train an alignment method, then prove with numbers what it did. No torch at import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align_cli import registry
from align_cli.checks import require_shares
from align_cli.cli import options, planned
from align_cli.cli.launching import launched_several
from align_cli.cli.sharding import with_sharding
from align_cli.cli.train_plan import Layers, check_allowed, describe, method_flags
from align_cli.cli.watching import check_guard
from align_cli.data.training import check_data, check_places, lacking
from align_cli.errors import UserError
from align_cli.files import only_writer
from align_cli.launched import is_main
from align_cli.rewards.spec import parse_places, parse_weights
from align_cli.training import run_folder
from align_cli.training.signals import Stopped, stopped_at_once


def train(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help=f"Which method: {', '.join(registry.METHODS)}.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="NAME", help="Alias, hub id or folder. Default: tiny-sd15, which is built in."
        ),
    ] = None,
    unet: options.Unet = None,
    preset: options.Preset = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="TOML file with settings; goes above the preset."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting; repeatable. --dry-run lists all keys."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="Optimiser steps.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="X", help="Learning rate.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", help="Pairs per step, all processes together."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="SEED", help="The only source of randomness.")
    ] = None,
    data: options.TrainData = None,
    data_path: options.DataPath = None,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="NAME", help="Stage of a method that has stages.")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            metavar="NAME=WEIGHT",
            help="Reward to train on, in place of the preset's; repeatable.",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            metavar="NAME=PATH",
            help="Hub id, folder or file of the weights of a reward, or of a scorer of --guard; repeatable.",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="Adapter of an earlier stage to start from."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="FOLDER", help="Encodings of the dataset, by 't2ialign encode'."),
    ] = None,
    text: options.Text = None,
    device: options.Device = None,
    encoder_device: options.EncoderDevice = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Folder of the run. Default: runs/METHOD-MODEL-seedN."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in the folder; its settings need not be given again."
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            metavar="KEY",
            help="--resume: this setting may differ from now on; repeatable. Also data (its content), start "
            "(the adapter of --from), weights (those of the base model).",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print every setting with its origin, and the costs; touch nothing."),
    ] = False,
    gpu: planned.GpuName = None,
    mfu: planned.Mfu = None,
    no_costs: planned.NoCosts = False,
    as_json: Annotated[bool, typer.Option("--json", help="--dry-run: print one JSON object.")] = False,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            "--guard", metavar="SCORER", help="Held-out scorer that watches the training; repeatable."
        ),
    ] = None,
    guard_every: Annotated[
        int | None,
        typer.Option("--guard-every", metavar="N", help="Steps between the guard's measurements; 0 is off."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep", metavar="WHICH", help="The adapter's step: last, or best by the held-out scorer."
        ),
    ] = None,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Skip the paired evaluation at the end.")
    ] = False,
    num_processes: options.NumProcesses = 1,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="REPO",
            help="After the run, upload the adapter to OWNER/NAME on the model hub (private if it is new).",
        ),
    ] = None,
) -> None:
    """Train a method and measure what it changed: base against aligned, same prompts and same noise.

    Settings come in layers: class defaults, preset, --config, --set, named flags. Resumed runs keep theirs.
    """
    planned.check_options(dry_run, gpu, mfu, as_json=as_json, no_costs=no_costs)
    if not dry_run and launched_several(num_processes):
        return
    rewards, places = parse_weights(reward or []), parse_places(weights or [])
    watching = {name: place for name, place in places.items() if name in (guard or [])}
    places = {name: place for name, place in places.items() if name not in watching or name in rewards}
    flags: dict[str, object] = {
        "model.name": model, "model.text": text, "model.device": device,
        "model.encoder_device": encoder_device, "model.unet": unet,
        "data.name": data, "data.path": data_path, "data.cache": cache, "train.steps": steps,
        "train.lr": lr, "train.batch_size": batch_size, "train.seed": seed,
        "guard.scorers": guard or None, "guard.every": guard_every, "guard.keep": keep,
        "guard.weights": watching or None,
        "eval.num_prompts": 0 if no_eval else None,
    }  # fmt: skip
    flags |= method_flags(method, stage, rewards, places, start)
    layers = Layers(method, preset, config_file, sets or [], flags)
    resolved, folder = layers.resolve(out, resume=resume)
    resolved.method_config.check_train(resolved.train)
    check_allowed(resolved, allow_change or [], resume=resume)
    check_data(resolved)
    check_guard(resolved)
    resolved = with_sharding(resolved)
    lack = lacking(resolved)
    if lack and not dry_run:
        raise UserError(lack)
    if dry_run:
        require_shares(resolved.train.batch_size, num_processes)
        if not as_json:
            typer.echo(describe(resolved))
            typer.echo(f"\noutput folder: {folder}")
        if lack:
            typer.echo(f"note: {lack}", err=True)
        if not no_costs:
            planned.say_train(resolved, folder, gpu, mfu, as_json=as_json)
        return
    check_places(resolved)
    from align_cli import publishing
    from align_cli.cli.train_work import push, run

    target = publishing.check(push_to_hub) if push_to_hub and is_main() else None
    try:
        with stopped_at_once(), only_writer(folder, main=is_main()):
            run(resolved, folder, allow_change or [], resume=resume, overwrite=overwrite)
            if target is not None:
                push(folder, target)
    except (KeyboardInterrupt, Stopped) as stop:
        known = (folder / run_folder.RUN).exists()
        hint = f"; go on with: {run_folder.resume_command(method, folder)}" if known else ""
        typer.echo(f"stopped at once{hint}", err=True)
        raise typer.Exit(128 + stop.number if isinstance(stop, Stopped) else 130) from None
