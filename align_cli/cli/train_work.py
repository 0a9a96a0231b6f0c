"""What `t2ialign train` does once it is decided: load, train, save. No torch at import."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align_cli import config, publishing, registry
from align_cli.cli.text import say_loading
from align_cli.cli.train_outcome import conclude
from align_cli.cli.watching import make_grid, make_guard
from align_cli.data.training import open_data
from align_cli.errors import UserError
from align_cli.launched import is_main, world_size
from align_cli.settings import OWN_SPACING
from align_cli.training import run_folder

if TYPE_CHECKING:
    from align_cli.data.base import Dataset
    from align_cli.methods.base import Method
    from align_cli.models.base import BaseModel


def run(
    resolved: config.Resolved, folder: Path, allowed: list[str], *, resume: bool, overwrite: bool
) -> None:
    """Load, train, save, evaluate. allowed: settings that may differ from those of a run that goes on."""
    if is_main():  # the others would meet its traces
        run_folder.check(folder, resume=resume, overwrite=overwrite)
    say_loading(resolved.model.name)
    dataset = open_data(resolved)
    method_class = registry.load(registry.METHODS, resolved.method)

    from rich.console import Console

    from align_cli.data.base import Fitted
    from align_cli.data.cache import drawing_identity
    from align_cli.methods.applies import why_not
    from align_cli.models.loading import load_model
    from align_cli.models.sharding import shard_frozen
    from align_cli.sampling import check_side
    from align_cli.training.distributed import Ranks, leave_group, on_rank
    from align_cli.training.loop import tracker_available
    from align_cli.training.loop import train as train_loop
    from align_cli.training.order import check_batch

    tracker_available(resolved.train.tracker)
    check_batch(len(dataset), resolved.train.batch_size, world_size())
    resolved = with_idle_encoders(resolved, dataset)
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
    resolved = with_own_sampling(resolved, model)
    if isinstance(dataset, Fitted):
        dataset.check_model(model)
    weights = drawing_identity(model)  # before a method changes any
    method: Method = method_class(model, resolved.method_config, seed=resolved.train.seed)
    method.check(resolved.train)
    sharded = resolved.train.shard != "none" and world_size() > 1
    if sharded:
        Ranks(model.device)  # the group
        shard_frozen(model)
    result = train_loop(
        method,
        dataset,
        resolved.train,
        folder,
        config=resolved.to_dict() | {run_folder.WEIGHTS: weights} | _start(resolved),
        origin=resolved.origin,
        config_text=lambda origin: replace(resolved, origin=dict(origin)).to_toml(),
        resume=resume,
        allow_change=allowed,
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
    if sharded:  # this process holds a part of it, and evaluates alone
        model = load_model(on_rank(resolved.model))
    conclude(resolved, folder, model, method, dataset, result)


def _start(resolved: config.Resolved) -> dict[str, str]:
    """Which adapter of --from the run stands on, for run.json: the name of its folder does not say."""
    from align_cli.adapters import read_adapter

    start = str(getattr(resolved.method_config, "from_adapter", ""))
    return {run_folder.START: read_adapter(start)[1].sha256} if start else {}


def push(folder: Path, target: publishing.Target) -> None:
    """Upload the adapter of a run that is done; it stays where it is."""
    adapter = folder / run_folder.ADAPTER
    try:
        address = publishing.push(adapter, target)
    except UserError as error:
        raise UserError(
            f"{error}; the run is done and {adapter} is saved: push it with 't2ialign adapters push "
            f"{adapter} {target.name}'"
        ) from error
    typer.echo(f"pushed to {target.name}: {address}")


def with_idle_encoders(resolved: config.Resolved, dataset: Dataset) -> config.Resolved:
    """The configuration with text encoders and autoencoder resting on the CPU where a cache holds everything
    that they give and the method takes it, no layer says where they are, and the model is on another
    device.
    """
    from align_cli.data.cached import CachedDataset
    from align_cli.models.loading import pick_device
    from align_cli.training.distributed import on_rank

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


def with_own_sampling(resolved: config.Resolved, model: BaseModel) -> config.Resolved:
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
