"""From a reward's name to the loaded scorer, each of which is there once."""

from __future__ import annotations

from pathlib import Path

import torch

from align_cli import registry
from align_cli.devices import pick_device
from align_cli.rewards.base import Request, Reward

_LOADED: dict[tuple[str, str, str, str, torch.dtype], Reward] = {}


def load_reward(
    name: str,
    *,
    source: str | None = None,
    preprocessing: str = "official",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Reward:
    """The scorer called `name`; the same object for the same arguments.

    Args:
        source: hub id, folder or file of other weights than the published ones. preprocessing: "official", or
        another one that the reward has ("textcraftor": what TextCraftor trains with). device: auto, cpu,
        cuda, cuda:N, mps. dtype: of the weights; scores are float32.
    Raises:
        UserError: unknown name or preprocessing; weights that are not there (says which file, which place and
        which option), unreadable or misfitting ones; a device that is not there.
    """
    build = registry.load(registry.REWARDS, name)
    where = pick_device(str(device))
    if str(where) == "cuda":
        where = torch.device("cuda", torch.cuda.current_device())
    found = Path(source).expanduser() if source else None
    place = "" if found is None else str(found.resolve() if found.exists() else source)
    key = (name, place, preprocessing, str(where), dtype)
    if key not in _LOADED:
        made: Reward = build(Request(name, source or "", preprocessing, where, dtype))
        _LOADED[key] = made
    return _LOADED[key]


def forget_rewards() -> None:
    """Lets go of all loaded scorers; their memory is free once nobody else holds them."""
    _LOADED.clear()
