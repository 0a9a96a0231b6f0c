"""A model without weights at work: its parts count apart, and of calls without gradient that are alike only
the first is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from align_cli.models.base import BaseModel, TextCond
from align_cli.models.empty import MODE
from align_cli.models.loading import load_model
from align_cli.planning.counting import Counting
from align_cli.settings import ModelSettings

DENOISER, TEXT, VAE, REWARD = "denoiser", "text encoders", "autoencoder", "rewards"


def planned_model(
    settings: ModelSettings, counting: Counting, *, as_gpu: bool, denoiser: bool = True
) -> BaseModel:
    """The model with fake weights, those that are on the device held by `counting`.

    as_gpu: encoders that rest on the CPU do not count but while they work, those that work there not at all.
    denoiser: whether it is there.
    """
    with counting.elsewhere():
        model = load_model(settings, empty=True)
    away = settings.encoder_device if as_gpu and settings.encoder_device in ("offload", "cpu") else ""
    (counting.hold if denoiser else counting.ignore)(model.denoiser)
    named(counting, DENOISER, model.denoiser)
    vae: Any = model.vae
    named(counting, VAE, vae.encoder, vae.decoder)
    named(counting, TEXT, *model.encoders)
    if not away:
        counting.hold(model.vae, *model.encoders)
    else:
        counting.ignore(model.vae, *model.encoders)
        changed: Any = model
        changed.at_work = _working(counting, away)
    _once(model, counting)
    return model


def named(counting: Counting, part: str, *modules: nn.Module) -> None:
    """FLOPs of the modules' forward passes count for this part."""

    def begin(_module: nn.Module, _args: Any) -> None:
        counting.parts.append(part)

    def end(_module: nn.Module, _args: Any, _output: Any) -> None:
        counting.parts.pop()

    for module in modules:
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end, always_call=True)


def _working(counting: Counting, away: str) -> Callable[..., Any]:
    """`BaseModel.at_work` of encoders that rest on the CPU (offload) or work there (cpu)."""
    here: set[nn.Module] = set()

    @contextmanager
    def at_work(*modules: nn.Module) -> Iterator[None]:
        if away == "cpu":
            with counting.elsewhere():
                yield
            return
        coming = [module for module in modules if module not in here]
        frozen = [m for m in coming if not any(p.requires_grad for p in m.parameters())]
        size = sum(x.nbytes for m in frozen for x in (*m.parameters(), *m.buffers()))
        here.update(frozen)
        counting.count.change(size)
        try:
            yield
        finally:
            counting.count.change(-size)
            here.difference_update(frozen)

    return at_work


def _once(model: BaseModel, counting: Counting) -> None:
    """Count what `model.predict` costs without gradient once for each shape; later calls add that."""
    predict = model.predict
    found: dict[Any, tuple[int, int, tuple[int, ...], torch.dtype]] = {}

    def quick(z_t: Tensor, t: Tensor, cond: TextCond, keep: Any = None) -> Tensor:
        if torch.is_grad_enabled() or keep is not None:
            return predict(z_t, t, cond, keep) if keep is not None else predict(z_t, t, cond)
        hooks = sum(len(m._forward_hooks) for m in model.denoiser.modules())
        key = (
            model.denoiser, tuple(z_t.shape), z_t.dtype, tuple(t.shape), tuple(cond.tokens.shape),
            torch.is_autocast_enabled("cpu"), hooks,
        )  # fmt: skip
        count = counting.count
        if key not in found:
            base, flops, peak = count.held, count.flops[DENOISER], count.peak
            count.peak = base
            out = predict(z_t, t, cond)
            found[key] = (count.peak - base, count.flops[DENOISER] - flops, tuple(out.shape), out.dtype)
            count.peak = max(peak, count.peak)
            return out
        most, flops, shape, dtype = found[key]
        count.peak = max(count.peak, count.held + most)
        count.flops[DENOISER] += flops
        with MODE:
            return torch.empty(shape, dtype=dtype)

    cast("Any", model).predict = quick
