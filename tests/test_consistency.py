"""Boundary scalings of consistency models, and the function that they make."""

from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler
from model_helpers import field

from align_cli.diffusion.consistency import c_out, c_skip, consistency
from align_cli.diffusion.process import NoiseProcess

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_scalings_as_diffusers():
    scheduler, t = LCMScheduler(), torch.tensor([0, 1, 10, 500, 999])
    theirs = [scheduler.get_scalings_for_boundary_condition_discrete(int(i)) for i in t]
    for ours, expected in zip((c_skip(t), c_out(t)), zip(*theirs, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected))
    torch.testing.assert_close(c_skip(t) + c_out(t) ** 2, torch.ones(5))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_right_prediction_gives_the_clean_latent(kind):
    process = NoiseProcess.from_scheduler_config(SD15 | {"prediction_type": kind})
    x0, eps, t = field(0, 3, 4, 6, 6), field(1, 3, 4, 6, 6), torch.tensor([0, 300, 999])
    z = process.add_noise(x0, eps, t)
    found = consistency(process, process.target(x0, eps, t), z, t)
    assert torch.equal(found[0], z[0])
    torch.testing.assert_close(found[1:], x0[1:], atol=1e-4, rtol=1e-3)
    one = consistency(process, process.target(x0, eps, t)[1:2], z[1:2], torch.tensor(300))
    torch.testing.assert_close(one, found[1:2])


def test_gradient():
    process = NoiseProcess.from_scheduler_config(SD15)
    pred = field(2, 1, 2, 3, 3).double().requires_grad_()
    z, t = field(3, 1, 2, 3, 3).double().requires_grad_(), torch.tensor([40])
    assert torch.autograd.gradcheck(lambda p, x: consistency(process, p, x, t), (pred, z))
