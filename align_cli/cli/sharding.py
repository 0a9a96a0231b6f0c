"""Whether the frozen weights of a training are spread over its processes. No torch."""

from __future__ import annotations

import warnings
from dataclasses import replace

import typer

from align_cli.cli.launching import asked
from align_cli.config import Resolved
from align_cli.errors import UserError
from align_cli.launched import is_main, world_size

KEY = "train.shard"


def with_sharding(resolved: Resolved) -> Resolved:
    """The configuration with train.shard as accelerate's asks for it, where no layer says it.

    Raises:
        UserError: sharded weights where a process needs them whole.
    """
    wanted = resolved.train.shard
    if wanted == "none" and resolved.origin[KEY] == "default" and asked("ACCELERATE_USE_FSDP"):
        if is_main():
            typer.echo(
                "note: accelerate asks for FSDP: the frozen weights are spread over the processes, what is "
                "trained stays whole (train.shard frozen)",
                err=True,
            )
        train = replace(resolved.train, shard="frozen")
        resolved = replace(resolved, train=train, origin=resolved.origin | {KEY: "accelerate"})
    if resolved.train.shard == "none":
        return resolved
    alone = {"train.grid_every": resolved.train.grid_every, "guard.every": resolved.guard.every}
    drawn = next((key for key, every in alone.items() if every), "")
    why = f"with {drawn} one process draws alone" if drawn else resolved.method_config.whole
    if why:
        raise UserError(
            f"{KEY} frozen does not go with these settings of {resolved.method}: {why}; leave it away (with "
            "accelerate: a configuration without FSDP)"
        )
    if world_size() == 1:
        warnings.warn(f"{KEY} frozen has no effect in one process", stacklevel=2)
    return resolved
