"""What a training takes from the configuration of `accelerate launch`: whether the frozen weights are spread
over the processes. No torch.

accelerate hands its configuration on in variables of the environment.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from align_cli.config import Resolved
from align_cli.errors import UserError, first_line
from align_cli.launched import asked, is_main, world_size

KEY = "train.shard"
SPREAD = "the frozen weights are spread over the processes, what is trained stays whole (train.shard frozen)"
WHOLE = "every process holds the whole model, what is trained and its optimiser (train.shard none)"
NO_SHARD = ("NO_SHARD", "3")
"""As accelerate writes that strategy of FSDP's first version: every process holds the whole model."""


@dataclass(frozen=True)
class Wish:
    """What accelerate asks for. name: in its words; spread: whether the frozen weights are to be spread."""

    name: str
    spread: bool


def with_sharding(resolved: Resolved) -> Resolved:
    """The configuration with train.shard as accelerate's asks for it, where no layer says it.

    Raises:
        UserError: sharded weights where a process needs them whole; an unreadable configuration of DeepSpeed.
    """
    _note_precision(resolved)
    wish = wished()
    if wish is not None and resolved.train.shard == "none" and resolved.origin[KEY] == "default":
        if is_main():
            typer.echo(f"note: accelerate asks for {wish.name}: {SPREAD if wish.spread else WHOLE}", err=True)
        if wish.spread:
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


def wished() -> Wish | None:
    """FSDP or a stage of DeepSpeed's ZeRO, of which only what it spreads is taken; None for neither.

    Raises:
        UserError: the configuration file of DeepSpeed cannot be read, or its stage is none.
    """
    if asked("ACCELERATE_USE_FSDP"):
        whole = os.environ.get("FSDP_SHARDING_STRATEGY", "").upper() in NO_SHARD
        whole = whole and os.environ.get("FSDP_VERSION", "1") == "1"  # the second has no such setting
        return Wish("FSDP without sharding" if whole else "FSDP", not whole)
    if not asked("ACCELERATE_USE_DEEPSPEED"):
        return None
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # as in accelerate
    where = "accelerate's zero_stage"
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none" and (said := _stage_in(Path(file))) != "auto":
        stage, where = said, f"zero_optimization.stage of {file}"
    if stage not in ("0", "1", "2", "3"):
        raise UserError(f"{where} must be one of 0, 1, 2, 3, not {stage!r}; mend accelerate's configuration")
    return Wish(f"DeepSpeed's ZeRO-{stage} (its engine is not used)", stage == "3")


def _stage_in(path: Path) -> str:
    """The stage of ZeRO in a configuration file of DeepSpeed; "0", its default, where it says none. "auto":
    accelerate's.
    """
    try:
        zero = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
        return str(zero.get("stage", 0))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"the configuration of DeepSpeed {path} cannot be read: {first_line(error)}; mend it, or give "
            "accelerate zero_stage in its place"
        ) from error


def _note_precision(resolved: Resolved) -> None:
    """accelerate's mixed_precision is not train.precision: told where they differ."""
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted not in ("no", resolved.train.precision) and is_main():
        typer.echo(
            f"note: accelerate's mixed_precision {wanted} has no effect: train.precision is "
            f"{resolved.train.precision}",
            err=True,
        )
