"""All weights of a module of a frozen model, trained in a copy of it; LoRA, the other way, is in lora.py.

Both leave the model's own module as it was. While training, a `FullTuning` stands in for the module, a
`LoraTuning` works on it through hooks; trained ones are put to work with a scale, stacked, and taken off
again without a trace.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from align_cli.models.lora import LoraTuning
from align_cli.models.moving import moved_weights, own_weights
from align_cli.models.states import LORA_A, check_state


class FullTuning:
    """All weights of a module, float32, in a copy of it."""

    def __init__(self, module: nn.Module, *, device: torch.device | None = None) -> None:
        """device: where the module works, which is not where it is if it is offloaded; None for the same."""
        self.base = module
        copied = nn.Module.to(copy.deepcopy(module), device, torch.float32)  # diffusers' own `to` warns
        self.module = copied.requires_grad_(True).eval()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def state(self) -> dict[str, Tensor]:
        """Parameter name -> value."""
        return {k: p.detach().cpu().contiguous().clone() for k, p in self.module.named_parameters()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        mine = dict(self.module.named_parameters())
        check_state({k: p.shape for k, p in mine.items()}, state)
        with torch.no_grad():
            for name, value in state.items():
                mine[name].copy_(value)

    @contextmanager
    def attached(self, scale: float = 1.0) -> Iterator[None]:
        """Inside, the module's weights are W + scale (trained - W); several add up, in any order."""
        if scale == 0:
            yield
            return
        untouched = own_weights(self.base) is None
        with torch.no_grad():
            trained = dict(self.module.named_parameters())
            moved = {}
            for name, p in self.base.named_parameters():
                now, then = p.data, trained[name].to(p.device)
                if scale == 1 and untouched:
                    moved[name] = then.to(now.dtype)
                else:
                    wide = now.to(torch.promote_types(now.dtype, torch.float32))
                    moved[name] = (wide + scale * (then - self._origin(name, wide))).to(now.dtype)
        with moved_weights(self.base, moved):
            yield

    def _origin(self, name: str, now: Tensor) -> Tensor:
        """The module's own weight, whatever others that are at work have put in its place (`now`)."""
        return (own_weights(self.base) or {}).get(name, now).to(now.dtype)


def tuning_like(
    module: nn.Module, state: Mapping[str, Tensor], *, device: torch.device | None = None
) -> FullTuning | LoraTuning:
    """What such a state was trained as, not yet holding it: LoRA (scaled by alpha = rank) or all weights."""
    layers = [key.removesuffix(LORA_A) for key in state if key.endswith(LORA_A)]
    if not layers:
        return FullTuning(module, device=device)
    rank = len(state[layers[0] + LORA_A])
    return LoraTuning(module, rank=rank, alpha=rank, targets=lambda _: layers, device=device)
