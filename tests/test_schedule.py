"""Learning rates worked out by hand and from the official run; the moving average."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_helpers import settings

from align_cli.training.ema import Ema
from align_cli.training.schedule import lr_at

OFFICIAL = [
    1e-3,
    9.7577e-4,
    9.0546e-4,
    7.9595e-4,
    6.5796e-4,
    5.05e-4,
    3.5204e-4,
    2.1405e-4,
    1.0454e-4,
    3.423e-5,
]
"""softrepa.md (e): measured windows of CosineAnnealingWarmRestarts(T_0=10, eta_min=1e-5)."""


def test_restarts_match_the_official_staircase():
    s = settings(lr=1e-3, lr_min=1e-5, lr_schedule="cosine-restarts", lr_every=500, lr_period=10)
    for k, rate in enumerate([*OFFICIAL, OFFICIAL[0], OFFICIAL[1]]):
        assert lr_at(s, 500 * k) == pytest.approx(rate, rel=1e-4)
        assert lr_at(s, 500 * k + 499) == lr_at(s, 500 * k)


def test_cosine_and_warm_up():
    s = settings(lr=1.0, lr_min=0.2, lr_schedule="cosine", steps=110, lr_warmup=10)
    assert lr_at(s, 0) == pytest.approx(0.1)
    assert lr_at(s, 9) == lr_at(s, 10) == pytest.approx(1.0)
    assert lr_at(s, 60) == pytest.approx(0.6)
    assert lr_at(s, 109) == pytest.approx(0.2, abs=1e-3)
    assert lr_at(s, 500) == pytest.approx(0.2)
    assert lr_at(settings(lr=1.0, lr_warmup=4), 1) == 0.5
    assert lr_at(settings(lr=1.0), 11) == 1.0


def test_ema_by_hand():
    p = nn.Parameter(torch.tensor([1.0]))
    ema = Ema([p], decay=0.5)
    for value in (2.0, 3.0):
        with torch.no_grad():
            p.fill_(value)
        ema.update()
    # decays 1/10 and 2/11: 1 -> 0.1 + 1.8 = 1.9 -> 1.9 * 2/11 + 3 * 9/11 = 2.8
    assert ema.average[0].item() == pytest.approx(2.8)
    with ema.applied():
        assert p.item() == pytest.approx(2.8)
    assert p.item() == 3.0
    other = Ema([nn.Parameter(torch.zeros(1))], decay=0.5)
    other.load_state(**ema.state())
    assert other.updates == 2 and torch.equal(other.average[0], ema.average[0])


def test_ema_gives_back_the_parameters_after_an_error():
    p = nn.Parameter(torch.tensor([1.0]))
    ema = Ema([p], decay=0.9)
    ema.average[0].fill_(7.0)
    with pytest.raises(RuntimeError), ema.applied():
        raise RuntimeError
    assert p.item() == 1.0
