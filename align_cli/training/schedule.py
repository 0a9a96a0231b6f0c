"""Learning rate of every step, as a pure function."""

from __future__ import annotations

import math

from align_cli.settings import TrainSettings


def lr_at(settings: TrainSettings, step: int) -> float:
    """Learning rate of optimiser step `step` (0 is the first).

    constant: lr.
    cosine: lr_min + (lr - lr_min) (1 + cos(pi p)) / 2 with p = (step - warmup) / (steps - warmup).
    cosine-restarts: the same with p = (k mod lr_period) / lr_period, k = step // lr_every: a staircase with
    treads of lr_every steps that starts again after lr_period treads.
    The first lr_warmup steps are scaled by (step + 1) / lr_warmup.
    Source: softrepa official training, CosineAnnealingWarmRestarts(T_0=10, T_mult=1, eta_min=1e-5) stepped
    once per validation: cosine-restarts, lr_min = 1e-5, lr_period = 10, lr_every = its num_iter.
    """
    warm = min(1.0, (step + 1) / settings.lr_warmup) if settings.lr_warmup else 1.0
    if settings.lr_schedule == "constant":
        return settings.lr * warm
    if settings.lr_schedule == "cosine":
        phase = (step - settings.lr_warmup) / max(1, settings.steps - settings.lr_warmup)
        phase = min(1.0, max(0.0, phase))
    else:
        phase = (step // settings.lr_every) % settings.lr_period / settings.lr_period
    rate = settings.lr_min + (settings.lr - settings.lr_min) * (1 + math.cos(math.pi * phase)) / 2
    return rate * warm
