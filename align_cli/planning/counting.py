"""What work would cost, found by running it without numbers: bytes held at its fullest, and FLOPs.

Weights and activations are fake tensors of torch: shapes, dtypes and lifetimes are real, values and memory
are not. So the code that is counted is the code that runs. Small tensors that are made of random numbers or
lists stay real, which keeps timesteps and counts what they are.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

EMPTY = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty)
"""What they give is waste where nothing is computed that fills it."""
BACKWARD, OTHER = "backward", "other"
"""Parts of the work: what the backward pass computes (also again), and what no module does."""


@dataclass
class Count:
    """held: bytes now. peak: most bytes so far. flops: by part of the work."""

    held: int = 0
    peak: int = 0
    flops: Counter[str] = field(default_factory=Counter)

    @property
    def all_flops(self) -> int:
        """Of all parts."""
        return sum(self.flops.values())

    def change(self, size: int) -> None:
        """So many bytes more, or less."""
        self.held += size
        self.peak = max(self.peak, self.held)


class Counting(TorchDispatchMode):
    """Inside, every storage that an operator makes counts until nothing refers to it any more.

    A number that is read from a fake tensor is 1, a truth value True.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()
        self.parts = [OTHER]
        self.away = False
        self._known: dict[int, weakref.ref[Any]] = {}
        self._ignored: set[int] = set()

    def know(self, tensor: Tensor) -> None:
        """Count the storage of this tensor, if it does not count yet."""
        if self.away:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._ignored or not size:
            return
        count, known = self.count, self._known

        def gone(_ref: Any) -> None:
            known.pop(key, None)
            count.change(-size)

        known[key] = weakref.ref(storage, gone)
        count.change(size)

    def hold(self, *modules: nn.Module) -> None:
        """Count the parameters and buffers of these modules."""
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.know(tensor)

    def ignore(self, *modules: nn.Module) -> None:
        """Never count parameters and buffers of these modules, which live as long as the count."""
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._ignored.add(tensor.untyped_storage()._cdata)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Inside, what is made is on another device and does not count."""
        before, self.away = self.away, True
        try:
            yield
        finally:
            self.away = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _number(args[0].dtype)
        if func is aten.nonzero.default:
            return _certain(args[0]).nonzero()
        if func is aten.index.Tensor:
            args = (args[0], _numbered(args[1]))
        out = func(*args, **kwargs)
        if func._overloadpacket in EMPTY and not isinstance(out, FakeTensor):
            out.zero_()
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            backward = torch._C._current_autograd_node() is not None
            self.count.flops[BACKWARD if backward else self.parts[-1]] += int(
                formula(*args, **kwargs, out_val=out)
            )
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, Tensor):
                self.know(leaf)
            elif isinstance(leaf, (tuple, list)):
                for inner in tree_leaves(leaf):
                    if isinstance(inner, Tensor):
                        self.know(inner)
        return out


def _certain(mask: Tensor) -> Tensor:
    """A real mask: of a fake one, True everywhere."""
    return torch.ones(mask.shape, dtype=torch.bool) if isinstance(mask, FakeTensor) else mask


def _numbered(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks among the indices as numbers, which fake tensors can be indexed with."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += _certain(index).nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _number(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))


FORMULAS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operator -> FLOPs: torch's own table (a multiply-add is two), and attention on a CPU."""


class WithoutNumbers(TorchFunctionMode):
    """Inside, Python code that asks fake tensors for values goes on: everything is finite, arrays are zeros.

    as_gpu: under autocast the operators that CUDA computes in float32 do so here, too.
    """

    def __init__(self, *, as_gpu: bool) -> None:
        super().__init__()
        self.as_gpu = as_gpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, Tensor) and func in (torch.isfinite, Tensor.isfinite, torch.isnan, Tensor.isnan):
            return torch.tensor(func in (torch.isfinite, Tensor.isfinite)).expand(first.shape)
        if isinstance(first, FakeTensor):
            if func in (Tensor.numpy, Tensor.__array__):
                return torch.zeros(first.shape, dtype=first.dtype).numpy()
            if func is Tensor.tolist:
                return torch.zeros(first.shape, dtype=first.dtype).tolist()
        if self.as_gpu and func in WIDE and torch.is_autocast_enabled("cpu"):
            args = tuple(_wide(x) for x in args)
            kwargs = {name: _wide(x) for name, x in kwargs.items()}
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _wide(x: Any) -> Any:
    half = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if half else x


WIDE = frozenset(
    {
        torch.layer_norm, torch.nn.functional.layer_norm, torch.group_norm, torch.nn.functional.group_norm,
        torch.softmax, Tensor.softmax, torch.nn.functional.softmax, torch.log_softmax, Tensor.log_softmax,
        torch.nn.functional.log_softmax, torch.nn.functional.cross_entropy, torch.nn.functional.mse_loss,
        torch.nn.functional.normalize, torch.exp, Tensor.exp, torch.pow, Tensor.pow, torch.rsqrt,
        Tensor.rsqrt, torch.nn.functional.binary_cross_entropy_with_logits,
    }
)  # fmt: skip
"""Source: torch's documentation of automatic mixed precision, CUDA operators that autocast to float32."""
