"""`t2ialign train`: train an alignment method, then prove with numbers what it did. No torch at import."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_cli import config, registry
from align_cli.cli import options
from align_cli.cli.text import columns, say_loading
from align_cli.cli.train_data import check_data, lacking, open_data
from align_cli.cli.watching import check_guard, guard_words, make_grid, make_guard
from align_cli.errors import UserError
from align_cli.rewards.spec import parse_places, parse_weights
from align_cli.settings import OWN_SPACING
from align_cli.training import run_folder
from align_cli.training.signals import Stopped, stopped_at_once

if TYPE_CHECKING:
    from align_cli.data.base import Dataset
    from align_cli.methods.base import Method
    from align_cli.models.base import BaseModel
    from align_cli.training.loop import TrainResult


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every setting with its origin; touch nothing.")
    ] = False,
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
) -> None:
    """Train a method and measure what it changed: base against aligned, same prompts and same noise.

    Settings come in layers: class defaults, preset, --config, --set, named flags. Resumed runs keep theirs.
    """
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
    flags |= _method_flags(method, stage, rewards, places, start)
    layers = _Layers(method, preset, config_file, sets or [], flags)
    resolved, folder = layers.resolve(out, resume=resume)
    resolved.method_config.check_train(resolved.train)
    check_data(resolved)
    check_guard(resolved)
    lack = lacking(resolved)
    if lack and not dry_run:
        raise UserError(lack)
    if dry_run:
        typer.echo(describe(resolved))
        typer.echo(f"\noutput folder: {folder}")
        if lack:
            typer.echo(f"note: {lack}", err=True)
        return
    try:
        with stopped_at_once():
            _run(resolved, folder, resume=resume, overwrite=overwrite)
    except (KeyboardInterrupt, Stopped) as stop:
        known = (folder / run_folder.RUN).exists()
        hint = f"; go on with: {run_folder.resume_command(method, folder)}" if known else ""
        typer.echo(f"stopped at once{hint}", err=True)
        raise typer.Exit(128 + stop.number if isinstance(stop, Stopped) else 130) from None


def _method_flags(
    method: str,
    stage: str | None,
    rewards: dict[str, float],
    places: dict[str, str],
    start: Path | None,
) -> dict[str, object]:
    """The flags that are settings of some methods. UserError for one that this method does not have."""
    given: dict[str, object] = {
        "stage": stage,
        "rewards": rewards or None,
        "reward_weights": places or None,
        "from_adapter": start,
    }
    known = {f.name for f in fields(registry.load(registry.METHOD_CONFIGS, method))}
    for name, value in given.items():
        if value is not None and name not in known:
            raise UserError(f"{config.flag_name(f'{method}.{name}')} is no option of {method}")
    return {f"{method}.{name}": value for name, value in given.items()}


class _Layers:
    """What the user gave, and the configuration it makes."""

    def __init__(
        self, method: str, preset: str | None, file: Path | None, sets: list[str], flags: dict[str, object]
    ) -> None:
        self.method, self.preset, self.file, self.sets, self.flags = method, preset, file, sets, flags

    def fresh(self) -> config.Resolved:
        """The configuration of a new run."""
        return config.resolve(
            self.method, preset=self.preset, config_file=self.file, sets=self.sets, flags=self.flags
        )

    def resolve(self, out: Path | None, *, resume: bool) -> tuple[config.Resolved, Path]:
        """Configuration and output folder. A run that goes on takes its own settings in place of a preset."""
        if not resume:
            fresh = self.fresh()
            return fresh, out or Path("runs") / default_name(fresh)
        if out is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it only serves to find the folder
                out = Path("runs") / default_name(self.fresh())
        return self._resumed(out), out

    def _resumed(self, folder: Path) -> config.Resolved:
        saved = run_folder.read_run(folder)
        where = str(folder / run_folder.RUN)
        old = config.Resolved.from_dict(saved["config"], saved.get("origin"), where=where)
        if old.method != self.method:
            raise UserError(
                f"{folder} holds a run of {old.method}, not of {self.method}; choose another --out"
            )
        if self.preset or self.file:  # the same command as before, and --resume: it must come to the same
            return self.fresh()
        path = folder / run_folder.CONFIG
        from_file = f"file {path}"
        with warnings.catch_warnings():  # an idle setting was told when the run began
            warnings.filterwarnings("ignore", message=rf".*\(from {re.escape(from_file)}\)")
            now = config.resolve(
                self.method, preset=config.NO_PRESET, config_file=path, sets=self.sets, flags=self.flags
            )
        origin = {key: old.origin[key] if text == from_file else text for key, text in now.origin.items()}
        return replace(now, origin=origin)


def default_name(resolved: config.Resolved) -> str:
    """softrepa-tiny-sd15-seed42, textcraftor-text-tiny-sd15-seed42."""
    tail = Path(resolved.model.name.rstrip("/")).name.removeprefix("embedded:")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", tail).strip("-.") or "model"
    parts = [resolved.method, stage_of(resolved), slug, f"seed{resolved.train.seed}"]
    return "-".join(part for part in parts if part)


def stage_of(resolved: config.Resolved) -> str:
    """The stage of a method that has stages, else ""."""
    return str(getattr(resolved.method_config, "stage", ""))


def describe(resolved: config.Resolved) -> str:
    """Every setting with its value and its origin, in columns."""
    rows = [("setting", "value", "origin")]
    rows += [(key, json.dumps(value), origin) for key, value, origin in resolved.values()]
    return f"method: {resolved.method}\n\n{columns(rows)}"


def _run(resolved: config.Resolved, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Load, train, save, evaluate."""
    say_loading(resolved.model.name)
    dataset = open_data(resolved)
    run_folder.check(folder, resume=resume, overwrite=overwrite)
    method_class = registry.load(registry.METHODS, resolved.method)

    from rich.console import Console

    from align_cli.data.base import Fitted
    from align_cli.methods.applies import why_not
    from align_cli.models.loading import load_model
    from align_cli.sampling import check_side
    from align_cli.training.distributed import is_main, leave_group, on_rank
    from align_cli.training.loop import tracker_available
    from align_cli.training.loop import train as train_loop

    tracker_available(resolved.train.tracker)
    resolved = _with_idle_encoders(resolved, dataset)
    model = load_model(on_rank(resolved.model))
    if model.family not in method_class.families:
        reason = why_not(resolved.method, model.family)
        raise UserError(
            f"{resolved.method} does not train models of the family {model.family} ({resolved.model.name})"
            f"{': ' if reason else ''}{reason}; it trains {', '.join(sorted(method_class.families))}"
        )
    if resolved.method_config.pictures and resolved.data.name != "shapes":
        check_side(model, resolved.data.image_size, "data.image_size")
    if resolved.train.gradient_checkpointing:
        denoiser: Any = model.denoiser
        denoiser.enable_gradient_checkpointing()
    resolved = _with_own_sampling(resolved, model)
    if isinstance(dataset, Fitted):
        dataset.check_model(model)
    method: Method = method_class(model, resolved.method_config, seed=resolved.train.seed)
    method.check(resolved.train)
    result = train_loop(
        method,
        dataset,
        resolved.train,
        folder,
        config=resolved.to_dict(),
        origin=resolved.origin,
        config_text=resolved.to_toml(),
        resume=resume,
        overwrite=overwrite,
        num_workers=resolved.data.num_workers,
        grid=make_grid(model, method, dataset, resolved) if resolved.train.grid_every else None,
        guard=make_guard(model, method, dataset, resolved) if resolved.guard.every else None,
        console=Console(stderr=True),
    )
    leave_group()
    if not is_main():
        return
    if result.signal:
        typer.echo(f"stopped after step {result.step} of {resolved.train.steps}; saved: {result.checkpoint}")
        typer.echo(f"go on with: {run_folder.resume_command(resolved.method, folder)}")
        raise typer.Exit(128 + result.signal)
    _conclude(resolved, folder, model, method, dataset, result)


def _with_idle_encoders(resolved: config.Resolved, dataset: Dataset) -> config.Resolved:
    """The configuration with text encoders and autoencoder resting on the CPU where a cache holds everything
    that they give and the method takes it, no layer says where they are, and the model is on another
    device.
    """
    from align_cli.data.cached import CachedDataset
    from align_cli.models.loading import pick_device
    from align_cli.training.distributed import is_main, on_rank

    key, said = "model.encoder_device", "the cache"
    if resolved.origin[key] not in ("default", said):
        return resolved
    idle = resolved.method_config.cached_text and isinstance(dataset, CachedDataset) and dataset.exact
    if idle and pick_device(on_rank(resolved.model).device).type != "cpu":
        if is_main():
            typer.echo(
                "the cache holds all encodings: text encoders and autoencoder rest on the CPU", err=True
            )
        place, origin = "offload", said
    else:
        place, origin = "", "default"
    model = replace(resolved.model, encoder_device=place)
    return replace(resolved, model=model, origin=resolved.origin | {key: origin})


def _with_own_sampling(resolved: config.Resolved, model: BaseModel) -> config.Resolved:
    """The configuration with the model's own sampler and timestep spacing where no layer names one (or a
    preset a spacing, and a layer above it a sampler with its own), and with a look whether it can draw so.
    """
    from align_cli.sampling import check_settings, own_settings

    layers = {key: resolved.origin[f"sample.{key}"] for key in ("sampler", "spacing")}
    keys = {key for key, layer in layers.items() if layer == "default"}
    if resolved.sample.sampler in OWN_SPACING and layers["spacing"].startswith("preset"):
        keys |= {"spacing"} if layers["sampler"] != layers["spacing"] else set()
    drawing = own_settings(model, resolved.sample, keys)
    check_settings(model, drawing)
    changed = {key for key in keys if getattr(drawing, key) != getattr(resolved.sample, key)}
    origin = resolved.origin | {f"sample.{key}": "the model" for key in changed}
    return replace(resolved, sample=drawing, origin=origin)


def _conclude(
    resolved: config.Resolved,
    folder: Path,
    model: BaseModel,
    method: Method,
    dataset: Dataset,
    result: TrainResult,
) -> None:
    """Save the adapter, evaluate, write result.json, print."""
    from align_cli.adapters import save_adapter
    from align_cli.evaluation.engine import peak_memory
    from align_cli.evaluation.store import REPORT
    from align_cli.files import file_errors, write_text
    from align_cli.training.log import duration_text

    adapter = folder / run_folder.ADAPTER
    save_adapter(
        adapter,
        method,
        config=resolved.to_dict(),
        origin=resolved.origin,
        step=result.kept_step,
        seed=resolved.train.seed,
        seconds=result.seconds + _seconds_before(resolved),
        stage=stage_of(resolved),
        data_fingerprint=dataset.fingerprint(),
    )
    typer.echo(f"trained {result.step} steps in {duration_text(result.seconds)}: {adapter}", err=True)
    watched = guard_words(result.guarded, resolved, folder) if result.guarded else []
    memory, gpu = peak_memory()
    numbers: dict[str, Any] = {
        "method": resolved.method,
        "model": resolved.model.name,
        "step": result.step,
        "train_seconds": round(result.seconds, 2),
        "train_peak_memory_bytes": memory,
        "train_peak_gpu_memory_bytes": gpu,
        "last_metrics": result.metrics,
        "adapter": run_folder.ADAPTER,
        "adapter_step": result.kept_step,
        "guard": asdict(result.guarded) if result.guarded else None,
        "evaluation": None,
    }
    show = _evaluate(resolved, folder, model) if resolved.eval.num_prompts else None
    if show is not None:
        numbers["evaluation"] = show[0]
    path = folder / run_folder.RESULT
    with file_errors(f"cannot write {path}", f"the adapter is saved in {adapter}"):
        write_text(path, json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    if show is not None:
        show[1]()
    gpu_text = f", {gpu / 2**30:.2f} GiB on the GPU" if gpu else ""
    typer.echo(
        f"training: {result.step} steps, {result.seconds:.1f} s, peak memory {memory / 2**20:,.0f} "
        f"MiB{gpu_text}"
    )
    for line in watched:
        typer.echo(line)
    typer.echo(f"adapter: {adapter}")
    if show is not None:
        typer.echo(f"picture: {folder / run_folder.PICTURE}")
        typer.echo(f"report: {folder / run_folder.EVALUATION / REPORT}")
    typer.echo(f"numbers: {path}")


def _seconds_before(resolved: config.Resolved) -> float:
    """Training seconds of the adapter that this run began from; 0 if it has gone since."""
    from align_cli.adapters import read_adapter

    start = str(getattr(resolved.method_config, "from_adapter", ""))
    try:
        return read_adapter(start)[1].seconds if start else 0.0
    except UserError:
        return 0.0


def _evaluate(
    resolved: config.Resolved, folder: Path, model: BaseModel
) -> tuple[dict[str, Any], Callable[[], None]] | None:
    """The paired evaluation of the shapes world, as `t2ialign eval shapes --adapter RUN` does it: its
    numbers, and what prints its table; or None.
    """
    from align_cli.cli.measuring import measure
    from align_cli.evaluation import engine
    from align_cli.evaluation.arms import make_arms
    from align_cli.evaluation.outcome import write
    from align_cli.evaluation.report import write_report
    from align_cli.evaluation.sets import SetOptions, load_set
    from align_cli.evaluation.sheet import save_sheet
    from align_cli.evaluation.store import REPORT, Store, identity, make_items
    from align_cli.evaluation.tables import print_results
    from align_cli.rewards.loading import load_reward
    from align_cli.training.distributed import Ranks

    chosen = resolved.eval
    options = SetOptions(num=chosen.num_prompts, seed=chosen.seed, split=chosen.split, kinds=chosen.kinds)
    prompts = load_set("shapes", options)
    side = resolved.sample.image_size or model.image_size
    knows = resolved.data.name == "shapes" or registry.is_embedded(resolved.model.name)
    if not knows or side != prompts.image_size:
        typer.echo("note: no paired evaluation, it measures pictures of the shapes world only", err=True)
        return None
    place = folder / run_folder.EVALUATION
    arms = make_arms([str(folder / run_folder.ADAPTER)], [])
    job = engine.Evaluation(
        prompts=prompts,
        arms=arms,
        baseline=arms[0].name,
        rewards=[load_reward("shapes")],
        items=make_items(prompts, 1, chosen.seed),
        seed=chosen.seed,
        interval="t",
        command=["t2ialign", *sys.argv[1:]],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    store = Store(
        place, identity(prompts, 1, arms, chosen.seed, resolved.model, resolved.sample, None, model)
    )
    store.begin(job.command, job.created, resume=False, overwrite=True)
    found = measure(job, store, Ranks.alone(model.device), model, resolved.sample)
    write(place, found)
    write_report(found, place, place / REPORT)
    save_sheet(found, place, folder / run_folder.PICTURE)
    return {key: value for key, value in found.items() if key != "items"}, lambda: print_results(found)
