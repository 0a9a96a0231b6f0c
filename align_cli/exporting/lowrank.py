"""LoRA factors of what was trained as all weights, and what they leave out.

Letters: o outputs, i inputs of a linear layer, r rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.exporting import Part
from align_cli.models.states import LORA_A, LORA_B, check_state


def factors(change_oi: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, i) and B (o, r), float32, whose product B A is nearest to the change in the sum of squares.

    Ranks beyond the smaller side of the matrix are rows and columns of zeros.
    Source: singular value decomposition (Eckart-Young), the values shared evenly between A and B.
    """
    u, s, vh = torch.linalg.svd(change_oi.float(), full_matrices=False)
    root = s[:rank].sqrt()
    a = torch.zeros(rank, change_oi.shape[1])
    b = torch.zeros(change_oi.shape[0], rank)
    a[: len(root)] = root[:, None] * vh[:rank]
    b[:, : len(root)] = u[:, :rank] * root
    return a, b


def low_rank(part: Part, base: nn.Module, rank: int) -> tuple[Part, dict[str, float], list[str]]:
    """A LoRA in place of all weights of a module.

    base: the module with its own weights, float32, on the CPU. Layers that training did not move are left
    out.
    Returns:
        The LoRA; "<part>.<layer>" -> share of the layer's change that it leaves out, |D - B A| / |D| (root of
        the sum of squares); and what it leaves out of everything, in words.
    Raises:
        UserError: other weights than those of `base`, or no linear layer that differs from it.
    """
    own = dict(base.named_parameters())
    try:
        check_state({name: p.shape for name, p in own.items()}, part.state)
    except ValueError as error:
        raise UserError(f"the {part.name} of the adapter does not fit the base model: {error}") from error
    linear = {name for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}
    state: dict[str, Tensor] = {}
    sizes: dict[str, float] = {}
    left: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, p in own.items():
        change = part.state[name].float() - p.detach()
        size = float(change.norm())
        layer, _, kind = name.rpartition(".")
        if size == 0:
            continue
        if kind != "weight" or layer not in linear:
            others[name] = size
            continue
        a, b = factors(change, rank)
        state[layer + LORA_A], state[layer + LORA_B] = a, b
        sizes[layer], left[layer] = size, float((change - b @ a).norm())
    if not state:
        raise UserError(f"no linear layer of the {part.name} differs from the base model's")
    lines = [
        f"{part.name}: rank {rank} leaves out {_share(left, sizes):.2%} of the change of {len(left)} linear "
        "layers (root of the sum of squares)"
    ]
    if others:
        lines.append(
            f"{part.name}: not contained: {_kinds(others, base)}; with them "
            f"{_share(left | others, sizes | others):.2%} of the whole change is left out"
        )
    shares = {f"{part.name}.{layer}": loss / sizes[layer] for layer, loss in left.items()}
    return Part(part.name, state, 1.0), shares, lines


def _share(some: Mapping[str, float], of: Mapping[str, float]) -> float:
    """Norm of `some` over the norm of `of`."""
    return math.hypot(*some.values()) / math.hypot(*of.values())


def _kinds(names: Mapping[str, float], base: nn.Module) -> str:
    """Parameters in words: embeddings by name, others counted by the class of their layer."""
    counts: Counter[str] = Counter()
    for name in names:
        layer, _, kind = name.rpartition(".")
        module = base.get_submodule(layer)
        if isinstance(module, nn.Embedding):
            counts[name] += 1
        else:
            counts[f"{kind} of {type(module).__name__}"] += 1
    return ", ".join(f"{name}" if "." in name else f"{n} x {name}" for name, n in counts.items())
