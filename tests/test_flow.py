"""The flow process and its Euler path: numbers worked out by hand, and diffusers' scheduler."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from model_helpers import field

from align_cli.diffusion.flow import UNSUPPORTED, FlowProcess
from align_cli.diffusion.process import NoiseProcess
from align_cli.diffusion.rollout import rollout
from align_cli.diffusion.samplers import euler_step, samplers_of
from align_cli.models.base import TextCond

FLOW = FlowProcess()


def one(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


def test_by_hand():
    x0, eps = one(2.0), one(-1.0)
    for t in (250, 250.0, torch.tensor(250), torch.tensor([250.0])):
        assert FLOW.add_noise(x0, eps, t).item() == 0.75 * 2 - 0.25  # (1 - .25) 2 + .25 (-1)
        assert FLOW.target(x0, eps, t).item() == -3
        found = FLOW.to_x0_eps(one(-3.0), one(1.25), t)
        assert [v.item() for v in found] == [2, -1]
    assert FLOW.add_noise(x0, eps, 0).item() == 2
    assert FLOW.add_noise(x0, eps, 1000).item() == -1
    torch.testing.assert_close(FLOW.add_noise(x0, eps, 8.92857).item(), 2 - 3 * 0.00892857)
    assert FLOW.prediction_type == FLOW.timestep_spacing == "flow"


def test_one_timestep_per_sample():
    x0, eps, t = field(0, 3, 4, 6, 6), field(1, 1, 4, 6, 6), torch.tensor([0, 400, 1000])
    z, v = FLOW.add_noise(x0, eps, t), FLOW.target(x0, eps, t)
    assert z.shape == v.shape == x0.shape
    torch.testing.assert_close(z[1], 0.6 * x0[1] + 0.4 * eps[0])
    back, noise = FLOW.to_x0_eps(v, z, t)
    torch.testing.assert_close(back, x0, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(noise, eps.expand_as(x0), atol=1e-6, rtol=1e-6)


def test_precision():
    x0, eps = field(0, 1, 4, 6, 6).half(), field(1, 1, 4, 6, 6).half()
    exact = FLOW.add_noise(x0.float(), eps.float(), torch.tensor([501]))
    got = FLOW.add_noise(x0, eps, torch.tensor([501]))
    assert got.dtype == FLOW.target(x0, eps, 1).dtype == torch.float16
    assert torch.equal(got, exact.half())
    assert FLOW.add_noise(x0.double(), eps.double(), 501).dtype == torch.float64


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.5])
@pytest.mark.parametrize("n", [1, 2, 4, 7, 28, 50, 333, 1000])
def test_timesteps_have_the_bits_of_diffusers(shift, n):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    assert torch.equal(FlowProcess(shift=shift).timesteps(n), scheduler.timesteps)


def test_official_timesteps():
    # sigma' = 1000, 667.66, 335.33, 2.994 in thousandths, then 3 sigma' / (1 + 2 sigma')
    expected = torch.tensor([1000, 857.692, 602.151, 8.929])
    torch.testing.assert_close(FLOW.timesteps(4), expected, atol=1e-3, rtol=0)
    assert FLOW.timesteps(4).dtype == torch.float32
    assert FLOW.timesteps(1).tolist() == [1000]
    for n in (0, 1001):
        with pytest.raises(ValueError, match=r"must be in \[1, 1000\]"):
            FLOW.timesteps(n)
    with pytest.raises(ValueError, match="one spacing of its own, not 'leading'"):
        FLOW.timesteps(4, "leading")


def test_configurations():
    config = dict(FlowMatchEulerDiscreteScheduler(shift=2.5, num_train_timesteps=500).config)
    assert FlowProcess.from_scheduler_config(config) == FlowProcess(shift=2.5, num_train_timesteps=500)
    assert FlowProcess.from_scheduler_config({}).shift == 1  # the scheduler's own default
    for key in UNSUPPORTED:
        assert key in config
        with pytest.raises(ValueError, match=f"unsupported {key}"):
            FlowProcess.from_scheduler_config(config | {key: True})
    with pytest.raises(ValueError, match="shift must be > 0"):
        FlowProcess(shift=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        FLOW.shift = 1.0  # type: ignore[misc]


def toy(z: torch.Tensor, t: torch.Tensor, cond: TextCond) -> torch.Tensor:
    return torch.tanh(z) * 0.8 + cond.tokens.mean((1, 2))[:, None, None, None] * (1 + t / 1000)


COND, UNCOND = TextCond(field(1, 2, 3, 5)), TextCond(field(2, 2, 3, 5))
START = field(3, 2, 4, 6, 6)


def test_euler_by_hand():
    z = euler_step(FLOW, one(0.5), one(1.0), 800.0, 300.0)
    torch.testing.assert_close(z.item(), 1 - 0.5 * 0.5)
    many = euler_step(FLOW, field(0, 2, 1, 2, 2), field(1, 2, 1, 2, 2), torch.tensor([800.0, 10.0]), 0.0)
    expected = field(1, 2, 1, 2, 2) - torch.tensor([0.8, 0.01]).view(2, 1, 1, 1) * field(0, 2, 1, 2, 2)
    torch.testing.assert_close(many, expected)
    # a velocity that is right everywhere leads to x0 in one step, and in many
    x0 = field(5, 2, 4, 6, 6)
    for steps in (1, 5):
        z = rollout(lambda *_: START - x0, FLOW, START, steps=steps, cond=COND)
        torch.testing.assert_close(z, x0, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rollout_equals_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(7)
    z, seen = START, []
    for t in scheduler.timesteps:
        u, c = toy(z, t, UNCOND), toy(z, t, COND)
        z = scheduler.step(u + 4 * (c - u), t, z).prev_sample
    ours = rollout(
        toy, FlowProcess(shift=shift), START, steps=7, cond=COND, uncond=UNCOND, guidance=4.0,
        sampler="euler", callback=seen.append,
    )  # fmt: skip
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)
    assert seen == list(range(7))


def test_samplers_of_a_process():
    eps = NoiseProcess.from_scheduler_config({})
    assert samplers_of(FLOW) == ("euler",)
    assert samplers_of(eps) == ("ddim", "ddpm", "lcm", "unipc")
    for sampler in ("ddim", "ddpm", "lcm", "unipc"):
        with pytest.raises(ValueError, match=f"no sampler '{sampler}' for prediction type flow: euler"):
            rollout(toy, FLOW, START, steps=3, cond=COND, sampler=sampler)
    with pytest.raises(ValueError, match="no sampler 'euler' for prediction type epsilon: ddim, ddpm"):
        rollout(toy, eps, START, steps=3, cond=COND, sampler="euler")
    with pytest.raises(ValueError, match="one spacing of its own"):
        rollout(toy, FLOW, START, steps=3, cond=COND, spacing="trailing")


@pytest.mark.parametrize("grad_steps", [{0}, {2}, {0, 1, 2}])
def test_rollout_gradients(grad_steps):
    weight = torch.tensor(0.7, requires_grad=True)

    def predict(z: torch.Tensor, t: torch.Tensor, cond: TextCond) -> torch.Tensor:
        return torch.tanh(weight * z) + toy(z, t, cond)

    z, sigmas = START, [*(FLOW.timesteps(3) / 1000).tolist(), 0.0]
    for i, t in enumerate(FLOW.timesteps(3)):
        with torch.set_grad_enabled(i in grad_steps):
            v = predict(z, t, COND)
        z = z + (sigmas[i + 1] - sigmas[i]) * v
    (expected,) = torch.autograd.grad(z.square().mean(), weight)
    ours = rollout(predict, FLOW, START, steps=3, cond=COND, grad_steps=frozenset(grad_steps))
    (got,) = torch.autograd.grad(ours.square().mean(), weight)
    torch.testing.assert_close(got, expected)
