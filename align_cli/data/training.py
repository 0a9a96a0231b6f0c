"""What a run trains on: a dataset, or a folder of `t2ialign encode`. No torch at import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from align_cli import config, registry
from align_cli.adapters import read_adapter
from align_cli.errors import UserError
from align_cli.launched import tell

if TYPE_CHECKING:
    from align_cli.data.base import Dataset


LARGE_FILE = 100_000_000
"""Bytes above which reading a file takes seconds."""


def check_data(resolved: config.Resolved) -> None:
    """UserError for an unknown dataset, for captions alone where the method needs pictures, and for encodings
    where it needs false pictures, too.
    """
    _table(resolved)
    if resolved.method_config.grounded and resolved.data.cache:
        raise UserError(
            f"{resolved.method} learns from false pictures and captions, too, and encodings hold none: leave "
            "--cache (data.cache) away"
        )
    if resolved.method_config.pictures and resolved.data.name in registry.CAPTIONS_ONLY:
        raise registry.no_pictures(resolved.data.name, f"{resolved.method} trains on pictures with captions")


def check_places(resolved: config.Resolved) -> None:
    """UserError for data, encodings or an adapter to start from that are not there."""
    for key, place in (("data.path", resolved.data.path), ("data.cache", resolved.data.cache)):
        if place and not Path(place).expanduser().exists():
            raise UserError(f"{config.flag_name(key)} {place} ({key}) does not exist")
    if start := str(getattr(resolved.method_config, "from_adapter", "")):
        read_adapter(start)


def lacking(resolved: config.Resolved) -> str:
    """What the data lack that the method learns from, and how to get it; "" if nothing."""
    method, data, chosen = resolved.method, resolved.data, resolved.method_config
    if not chosen.latents or chosen.pictures or data.cache or data.name in registry.LATENTS:
        return ""
    place = "" if data.name == "shapes" else f" --data-path {data.path or 'FILE'}"
    return (
        f"{method} needs latents that the original model made of the prompts: make them with t2ialign encode "
        f"--for {method} --model {resolved.model.name} --data {data.name}{place} and give the folder with "
        f"--cache, name the official list with --data latents, or let every step draw them with --set "
        f"{method}.real=drawn; --set {method}.fidelity_weight=0 does without"
    )


def _table(resolved: config.Resolved) -> registry.Table:
    """Where the dataset is registered. UserError if it is not there."""
    return registry.dataset_table(resolved.data.name, grounded=resolved.method_config.grounded)


def open_data(resolved: config.Resolved) -> Dataset:
    """The training data: a registered dataset, or what was encoded or drawn of it.

    UserError for data that cannot be read, and for drawn latents where the method does not learn from such.
    """
    from align_cli.data.cached import CachedDataset

    named = registry.load(_table(resolved), resolved.data.name)
    say_reading(resolved.data.path)
    cache, chosen = resolved.data.cache, resolved.method_config
    kind = CachedDataset if cache else named
    stored = bool(cache) or resolved.data.name in registry.LATENTS
    wanted = chosen.pictures or (chosen.latents and stored)
    dataset: Dataset = kind(resolved.data, seed=resolved.train.seed, split="train", pictures=wanted)
    if isinstance(dataset, CachedDataset):
        _check_drawn(resolved, dataset.drawn)
    elif stored and not wanted:
        tell(
            f"note: {resolved.method} reads the prompts of {resolved.data.path} alone with these settings, "
            "not its latents"
        )
    return dataset


def _check_drawn(resolved: config.Resolved, drawn: bool) -> None:
    """Whether what a cache holds, latents that a model drew or encodings of pictures, is for the method."""
    from align_cli.data.drawn import PURPOSES

    cache, chosen = resolved.data.cache, resolved.method_config
    if drawn and not chosen.latents:
        if resolved.method in PURPOSES:
            raise UserError(
                f"the latents in {cache} are of no use to {resolved.method} with these settings: give --set "
                f"{resolved.method}.real=stored and a {resolved.method}.fidelity_weight above 0, or leave "
                "--cache (data.cache) away"
            )
        raise UserError(
            f"the latents in {cache} were drawn by a model, for methods that learn from such examples, and "
            f"{resolved.method} does not; encode pictures with t2ialign encode, or leave --cache "
            "(data.cache) away"
        )
    if chosen.latents and not chosen.pictures and not drawn:
        tell(
            f"note: {cache} holds encodings of pictures; {resolved.method} takes them for what the original "
            "model draws (t2ialign encode --for draws such)"
        )


def say_reading(path: str) -> None:
    """Tell on stderr that a large file is about to be read; says nothing of any other path."""
    from align_cli.data.filling import size_text

    file = Path(path).expanduser()
    size = file.stat().st_size if file.is_file() else 0
    if size >= LARGE_FILE:
        tell(f"reading {path} ({size_text(size)}) ...")
