"""Ways to train a module of a frozen model: all of its weights, or a low-rank addition (LoRA) to some.

Both leave the model's own module as it was. While training, a `FullTuning` stands in for the module (a copy),
a `LoraTuning` works on it through hooks; trained ones are put to work with a scale, stacked, and taken off
again without a trace.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj", "q", "k", "v", "o",
)  # fmt: skip
"""Linear layers of attention in the denoisers of diffusers (of SD3 those of the picture's stream), in CLIP
and in T5."""


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
        held = {name: p.data for name, p in self.base.named_parameters()}
        untouched = not getattr(self.base, _MOVED, False)
        with torch.no_grad():
            own = dict(self.module.named_parameters())
            moved = {}
            for name, now in held.items():
                trained = own[name].to(now.device)
                if scale == 1 and untouched:
                    moved[name] = trained.to(now.dtype)
                else:
                    moved[name] = (now.float() + scale * (trained - self._origin(name, now))).to(now.dtype)
        try:
            self._put(moved)
            if untouched:
                setattr(self.base, _MOVED, held)
            yield
        finally:
            self._put(held)
            if untouched:
                delattr(self.base, _MOVED)

    def _origin(self, name: str, now: Tensor) -> Tensor:
        """The module's own weight, whatever others that are at work have put in its place."""
        origin: Mapping[str, Tensor] = getattr(self.base, _MOVED, {})
        return origin.get(name, now).float()

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self.base.named_parameters():
            p.data = values[name]


_MOVED = "_t2ialign_own_weights"
"""Attribute of a module whose weights are moved: its own ones."""


class LoraTuning:
    """A low-rank addition to linear layers: y = W x + scale (alpha / rank) B A x.

    A (rank, in) starts as in peft (Kaiming uniform), B (out, rank) at zero, so that training starts at the
    module itself. Keys of the state: "<layer>.lora_A.weight", "<layer>.lora_B.weight", as in peft.
    Source: Hu et al., arXiv 2106.09685.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str] = ATTENTION,
        rng: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        """targets: ends of the names of the layers. rng: a CPU generator for A, so that every machine starts
        the same. device: where the module works, which is not where it is if it is offloaded; None for the
        same.

        Raises:
            ValueError: no linear layer has such a name.
        """
        self.layers = linear_layers(module, targets)
        if not self.layers:
            raise ValueError(f"no linear layer is called {', '.join(targets)}")
        self.factor = alpha / rank
        self.weights: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            down = torch.empty(rank, layer.in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=rng)
            place = device or layer.weight.device
            self.weights[f"{name}.lora_A.weight"] = nn.Parameter(down.to(place))
            self.weights[f"{name}.lora_B.weight"] = nn.Parameter(
                torch.zeros(layer.out_features, rank, device=place)
            )

    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    def state(self) -> dict[str, Tensor]:
        return {k: p.detach().cpu().contiguous().clone() for k, p in self.weights.items()}

    def state_for(self, factor: float) -> dict[str, Tensor]:
        """The state of the same addition where alpha / rank is `factor`."""
        ratio = self.factor / factor
        return {k: x * ratio if k.endswith(".lora_B.weight") else x for k, x in self.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        check_state({k: p.shape for k, p in self.weights.items()}, state)
        with torch.no_grad():
            for name, value in state.items():
                self.weights[name].copy_(value)

    @contextmanager
    def attached(self, scale: float = 1.0) -> Iterator[None]:
        """Inside, the layers give the sum; several of them add up. With gradient to A and B."""
        hooks = []
        try:
            for name, layer in self.layers.items() if scale else ():
                a, b = (self.weights[f"{name}.lora_{x}.weight"] for x in "AB")
                hooks.append(layer.register_forward_hook(_adding(a, b, scale * self.factor)))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _adding(a: Tensor, b: Tensor, factor: float) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.dtype)
        return output + (F.linear(F.linear(x, a), b) * factor).to(output.dtype)

    return hook


def tuning_like(
    module: nn.Module, state: Mapping[str, Tensor], *, device: torch.device | None = None
) -> FullTuning | LoraTuning:
    """What such a state was trained as, not yet holding it: LoRA (scaled by alpha = rank) or all weights."""
    ends = ".lora_A.weight"
    layers = [key.removesuffix(ends) for key in state if key.endswith(ends)]
    if not layers:
        return FullTuning(module, device=device)
    rank = len(state[layers[0] + ends])
    return LoraTuning(module, rank=rank, alpha=rank, targets=layers, device=device)


def linear_layers(module: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Name -> linear layer of those whose name is one of `targets`, or ends with a dot and one of them."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets)
    }


def most_rank(module: nn.Module, targets: Sequence[str] = ATTENTION) -> int:
    """The largest rank that a change of these layers can have; 0 without such a layer."""
    layers = linear_layers(module, targets).values()
    return max((min(layer.weight.shape) for layer in layers), default=0)


def check_state(shapes: Mapping[str, Sequence[int]], state: Mapping[str, Tensor]) -> None:
    """ValueError naming missing, unused and wrongly shaped keys (of each kind, the first three)."""
    missing, unused = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    wrong = [
        f"{k} has shape {list(state[k].shape)}, expected {list(shapes[k])}"
        for k in sorted(shapes.keys() & state.keys())
        if list(state[k].shape) != list(shapes[k])
    ]
    problems = [f"missing {_few(missing)}"] * bool(missing) + [f"unused {_few(unused)}"] * bool(unused)
    if problems + wrong:
        raise ValueError("; ".join(problems + wrong[:3]))


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
