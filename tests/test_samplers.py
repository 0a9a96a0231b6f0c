"""DDIM, DDPM, guidance and the roll-out against diffusers, and its gradients against those of plain loops."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, UniPCMultistepScheduler
from model_helpers import field
from torch import nn

from align_cli.diffusion.flow import FlowProcess
from align_cli.diffusion.guidance import guided
from align_cli.diffusion.process import NoiseProcess
from align_cli.diffusion.rollout import rollout
from align_cli.diffusion.samplers import ddim_step, ddpm_step, lcm_step
from align_cli.models.base import TextCond

EPS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
V = EPS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def ddpm_config(config):
    return {k: v for k, v in config.items() if k != "set_alpha_to_one"}


class Toy(nn.Module):
    """A predictor that depends on everything it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.calls: list[tuple[int, int, bool]] = []

    def forward(self, z: torch.Tensor, t: torch.Tensor, cond: TextCond) -> torch.Tensor:
        self.calls.append((len(z), int(t), torch.is_grad_enabled()))
        text = cond.tokens.mean((1, 2))[:, None, None, None]
        return torch.tanh(self.weight * z) * 0.8 + text * (1 + t / 1000) + self.weight**2


COND, UNCOND = TextCond(field(1, 2, 3, 5)), TextCond(field(2, 2, 3, 5))
START = field(3, 2, 4, 6, 6)


@pytest.mark.parametrize("config", [EPS, V])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_rollout_equals_diffusers(config, eta, spacing):
    config = config | {"timestep_spacing": spacing}
    process, scheduler = NoiseProcess.from_scheduler_config(config), DDIMScheduler(**config)
    noises = [field(10 + i, 2, 4, 6, 6) for i in range(7)]
    toy, left = Toy(), iter(noises)
    with torch.no_grad():
        z = START.clone()
        scheduler.set_timesteps(7)
        for t, noise in zip(scheduler.timesteps, noises, strict=True):
            u, c = toy(z, t, UNCOND), toy(z, t, COND)
            z = scheduler.step(
                u + 3 * (c - u), t, z, eta=eta, variance_noise=noise if eta else None
            ).prev_sample
        ours = rollout(
            toy,
            process,
            START,
            steps=7,
            cond=COND,
            uncond=UNCOND,
            guidance=3.0,
            eta=eta,
            noise_fn=lambda: next(left),
        )
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [EPS, V])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm_rollout_equals_diffusers(config, spacing, monkeypatch):
    config = config | {"timestep_spacing": spacing}
    process, scheduler = NoiseProcess.from_scheduler_config(config), DDPMScheduler(**ddpm_config(config))
    noises = [field(10 + i, 2, 4, 6, 6) for i in range(6)]
    theirs, ours_noise = iter(noises), iter(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(theirs))
    toy = Toy()
    with torch.no_grad():
        z = START.clone()
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            z = scheduler.step(toy(z, t, COND), t, z).prev_sample
        ours = rollout(
            toy, process, START, steps=6, cond=COND, sampler="ddpm", noise_fn=lambda: next(ours_noise)
        )
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)


class PlainLCM(LCMScheduler):
    """As LongAlign draws with it: the prediction of the clean latent alone counts."""

    def get_scalings_for_boundary_condition_discrete(self, timestep):
        return 0, 1


@pytest.mark.parametrize("config", [EPS, V, EPS | {"prediction_type": "sample"}])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8, 50])
def test_lcm_rollout_equals_diffusers(config, steps, monkeypatch):
    process, scheduler = NoiseProcess.from_scheduler_config(config), PlainLCM(**config)
    noises = [field(10 + i, 2, 4, 6, 6) for i in range(steps - 1)]
    theirs, left = iter(noises), iter(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(theirs))
    toy = Toy()
    with torch.no_grad():
        z = START.clone()
        scheduler.set_timesteps(steps)
        assert process.timesteps(steps, "lcm").tolist() == scheduler.timesteps.tolist()
        for t in scheduler.timesteps:
            z = scheduler.step(toy(z, t, COND), t, z).prev_sample
        options = {"steps": steps, "cond": COND, "sampler": "lcm", "spacing": "lcm"}
        ours = rollout(toy, process, START, noise_fn=lambda: next(left), **options)
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [EPS, V, EPS | {"prediction_type": "sample"}])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25])
def test_unipc_rollout_equals_diffusers(config, spacing, steps):
    config = config | {"timestep_spacing": spacing}
    known = {k: v for k, v in config.items() if k not in ("clip_sample", "set_alpha_to_one")}
    process, scheduler = NoiseProcess.from_scheduler_config(config), UniPCMultistepScheduler(**known)
    toy = Toy()
    with torch.no_grad():
        z = START.clone()
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            z = scheduler.step(toy(z, t, COND), t, z).prev_sample
        theirs = [t for _, t, _ in toy.calls]
        toy.calls.clear()
        ours = rollout(toy, process, START, steps=steps, cond=COND, sampler="unipc")
    assert [t for _, t, _ in toy.calls] == theirs
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)


def test_unipc_is_differentiable_and_of_higher_order():
    process, toy = NoiseProcess.from_scheduler_config(EPS), Toy()

    def draw(sampler: str, steps: int) -> torch.Tensor:
        return rollout(toy, process, START, steps=steps, cond=COND, sampler=sampler, spacing="linspace")

    exact = draw("ddim", 1000)
    near, far = ((draw(name, 20) - exact).detach().square().mean() for name in ("unipc", "ddim"))
    assert near < far / 10
    (gradient,) = torch.autograd.grad(draw("unipc", 5).square().mean(), toy.weight)
    with torch.no_grad():
        values = []
        for change in (1e-2, -1e-2):
            toy.weight += change
            values.append(draw("unipc", 5).double().square().mean())
            toy.weight -= change
    torch.testing.assert_close(gradient.double(), (values[0] - values[1]) / 2e-2, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("sampler", "spacing"), [("ddim", "trailing"), ("ddpm", "leading"), ("lcm", "lcm"), ("unipc", "linspace")]
)
def test_a_rollout_may_end_with_the_clean_prediction(sampler, spacing):
    process, toy, steps = NoiseProcess.from_scheduler_config(EPS), Toy(), 4
    seen = []

    def predict(z, t, cond):
        seen.append((z, t, toy(z, t, cond)))
        return seen[-1][2]

    options = {"steps": steps, "cond": COND, "sampler": sampler, "spacing": spacing, "end": "x0"}
    found = rollout(predict, process, START, noise_fn=lambda: field(8, 2, 4, 6, 6), **options)
    z, t, pred = seen[-1]
    a, s = process.alphas_cumprod[t].sqrt(), (1 - process.alphas_cumprod[t]).sqrt()
    assert len(seen) == steps
    torch.testing.assert_close(found, (z - s * pred) / a)


def test_a_flow_may_end_so_too():
    toy, process = Toy(), FlowProcess()
    z, x0 = (rollout(toy, process, START, steps=3, cond=COND, end=end) for end in ("z", "x0"))
    torch.testing.assert_close(x0, z)


def test_long_align_steps_of_reward_lcm():
    # t = 999, 749, 499, 249; x <- sqrt(abar') x0 + sqrt(1 - abar') noise; the last x0 is the result
    process, toy = NoiseProcess.from_scheduler_config(EPS), Toy()
    noises = [field(20 + i, 2, 4, 6, 6) for i in range(3)]
    left, abar = iter(noises), process.alphas_cumprod
    x = START
    for t, noise in zip((999, 749, 499, 249), [*noises, None], strict=True):
        eps = toy(x.detach(), torch.tensor(t), COND)
        x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        if noise is not None:
            x = abar[t - 250].sqrt() * x0 + (1 - abar[t - 250]).sqrt() * noise
    options = {"sampler": "lcm", "spacing": "trailing", "detach_input": True, "end": "x0"}
    found = rollout(toy, process, START, steps=4, cond=COND, noise_fn=lambda: next(left), **options)
    torch.testing.assert_close(found, x0)
    expected, got = (torch.autograd.grad(y.square().mean(), toy.weight)[0] for y in (x0, found))
    torch.testing.assert_close(got, expected)


def test_steps_by_hand():
    process = NoiseProcess.from_scheduler_config({"trained_betas": [0.19, 0.36], "set_alpha_to_one": False})
    z, pred = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 0.5)
    x0 = (1 - 0.4816**0.5 * 0.5) / 0.72
    torch.testing.assert_close(ddim_step(process, pred, z, 1, 0).item(), 0.9 * x0 + 0.19**0.5 * 0.5)
    # DDPM: alpha = .5184 / .81 = .64, beta = .36
    mean = 0.9 * 0.36 / 0.4816 * x0 + 0.8 * 0.19 / 0.4816
    noise = torch.full_like(z, 2.0)
    expected = mean + (0.19 / 0.4816 * 0.36) ** 0.5 * 2
    torch.testing.assert_close(ddpm_step(process, pred, z, 1, 0, noise).item(), expected)
    torch.testing.assert_close(ddpm_step(process, pred, z, 1, -1).item(), x0, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lcm_step(process, pred, z, 1, 0, noise).item(), 0.9 * x0 + 0.19**0.5 * 2)
    torch.testing.assert_close(lcm_step(process, pred, z, 1, -1).item(), x0)


def test_steps_take_a_timestep_per_sample():
    process = NoiseProcess.from_scheduler_config(EPS)
    pred, noise = field(5, 3, 4, 6, 6), field(6, 3, 4, 6, 6)
    z, t, before = field(7, 3, 4, 6, 6), torch.tensor([901, 401, 1]), torch.tensor([801, 301, -99])
    together = ddim_step(process, pred, z, t, before, 0.3, noise)
    posterior = ddpm_step(process, pred, z, t, before, noise)
    renoised = lcm_step(process, pred, z, t, before, noise)
    for i in range(3):
        one = slice(i, i + 1)
        alone = ddim_step(process, pred[one], z[one], int(t[i]), int(before[i]), 0.3, noise[one])
        torch.testing.assert_close(together[one], alone)
        alone = ddpm_step(process, pred[one], z[one], int(t[i]), int(before[i]), noise[one])
        torch.testing.assert_close(posterior[one], alone)
        alone = lcm_step(process, pred[one], z[one], int(t[i]), int(before[i]), noise[one])
        torch.testing.assert_close(renoised[one], alone)


def test_guidance():
    toy, t = Toy(), torch.tensor(500)
    c, u = toy(START, t, COND), toy(START, t, UNCOND)
    torch.testing.assert_close(guided(toy, 7.5)(START, t, COND, UNCOND), u + 7.5 * (c - u))
    torch.testing.assert_close(guided(toy, 0.0)(START, t, COND, UNCOND), u)
    toy.calls.clear()
    torch.testing.assert_close(guided(toy, 1.0)(START, t, COND, None), c)
    assert toy.calls == [(2, 500, True)]
    with pytest.raises(ValueError, match="needs an unconditional input"):
        guided(toy, 2.0)(START, t, COND, None)


def plain_loop(toy: Toy, process: NoiseProcess, with_grad: set[int], *, detach: bool) -> torch.Tensor:
    z = START
    for i, t in enumerate(process.timesteps(5).tolist()):
        with torch.set_grad_enabled(i in with_grad):
            pred = toy(z.detach() if detach else z, torch.tensor(t), COND)
        z = ddim_step(process, pred, z, t, t - 200)
    return z


@pytest.mark.parametrize("grad_steps", [{0}, {1, 3}, {4}, {0, 1, 2, 3, 4}])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_rollout_gradients(grad_steps, detach, checkpoint):
    process, toy = NoiseProcess.from_scheduler_config(EPS), Toy()
    plain = plain_loop(toy, process, grad_steps, detach=detach)
    (expected,) = torch.autograd.grad(plain.square().mean(), toy.weight)
    toy.calls.clear()
    z = rollout(
        toy,
        process,
        START,
        steps=5,
        cond=COND,
        grad_steps=frozenset(grad_steps),
        detach_input=detach,
        checkpoint=checkpoint,
    )
    assert [grad for _, _, grad in toy.calls] == [i in grad_steps for i in range(5)]
    torch.testing.assert_close(z, plain)
    (got,) = torch.autograd.grad(z.square().mean(), toy.weight)
    torch.testing.assert_close(got, expected)


def test_rollout_without_gradient_steps_has_no_graph():
    toy, seen = Toy(), []
    process = NoiseProcess.from_scheduler_config(EPS)
    z = rollout(toy, process, START.half(), steps=3, cond=COND, grad_steps=frozenset(), callback=seen.append)
    assert not z.requires_grad
    assert z.dtype == torch.float32
    assert seen == [0, 1, 2]
    assert rollout(toy, process, START, steps=3, cond=COND).requires_grad


def test_rollout_refuses_nonsense():
    process, toy = NoiseProcess.from_scheduler_config(EPS), Toy()
    with pytest.raises(ValueError, match="no sampler 'euler' for .* epsilon: ddim, ddpm, lcm, unipc"):
        rollout(toy, process, START, steps=3, cond=COND, sampler="euler")
    with pytest.raises(ValueError, match=r"grad_steps must be in \[0, 3\)"):
        rollout(toy, process, START, steps=3, cond=COND, grad_steps=frozenset({3}))
    with pytest.raises(ValueError, match="ends in z, x0 or before, not 'x1'"):
        rollout(toy, process, START, steps=3, cond=COND, end="x1")
    for options in ({"sampler": "ddpm"}, {"sampler": "lcm"}, {"eta": 0.5}):
        with pytest.raises(ValueError, match="needs noise_fn"):
            rollout(toy, process, START, steps=3, cond=COND, **options)


@pytest.mark.parametrize("mixed", [True, False])
def test_steps_without_gradient_leave_no_cast_weights_behind(mixed):
    """Older versions of torch took them in the steps with gradient, too, and the weights had none."""
    process, layer, seen = NoiseProcess.from_scheduler_config(EPS), nn.Linear(6, 6), []

    def predict(z, t, cond):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return layer(z)

    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        options = {"steps": 4, "cond": COND, "grad_steps": frozenset({1, 3})}
        z = rollout(predict, process, START, **options)
        assert torch.is_autocast_cache_enabled()
    assert seen == [(mixed, False), (mixed, True)] * 2
    z.sum().backward()
    assert float(layer.weight.grad.abs().max()) > 0
