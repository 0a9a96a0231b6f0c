"""The noise process against diffusers' schedulers and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from align_cli.diffusion.process import NoiseProcess

SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
CONFIGS = [
    SD15,
    SD15
    | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    SD15
    | {"beta_schedule": "linear", "set_alpha_to_one": True, "steps_offset": 0, "num_train_timesteps": 500},
    SD15 | {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4},
    SD15 | {"prediction_type": "sample"},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_same_bits_as_diffusers(config):
    ours, theirs = NoiseProcess.from_scheduler_config(config), DDIMScheduler(**config)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.final_alpha_cumprod == float(theirs.final_alpha_cumprod)
    total = ours.num_train_timesteps
    t = torch.tensor([0, total // 2, total - 1])
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t), atol=0, rtol=0)
    if ours.prediction_type == "v_prediction":
        torch.testing.assert_close(ours.target(x0, eps, t), theirs.get_velocity(x0, eps, t), atol=0, rtol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 15, 20, 25, 28, 30, 33, 50, 77, 333, 999, 1000])
def test_timesteps_as_diffusers(spacing, n):
    config = SD15 | {"timestep_spacing": spacing, "steps_offset": 1 if n < 1000 else 0}
    theirs = DDIMScheduler(**config)
    theirs.set_timesteps(n)
    ours = NoiseProcess.from_scheduler_config(config)
    assert ours.timesteps(n).tolist() == theirs.timesteps.tolist()[:n]
    assert NoiseProcess.from_scheduler_config(SD15 | {"steps_offset": 0}).timesteps(
        4, "trailing"
    ).tolist() == [
        999,
        749,
        499,
        249,
    ]


def test_official_timesteps():
    process = NoiseProcess.from_scheduler_config(SD15)
    assert process.timesteps(4).tolist() == [751, 501, 251, 1]
    assert process.timesteps(30)[[0, -1]].tolist() == [958, 1]
    # TextCraftor's own variant equals trailing where n divides 1000
    assert process.timesteps(25, "trailing")[[0, 1, -1]].tolist() == [999, 959, 39]


def test_lcm_timesteps():
    process = NoiseProcess.from_scheduler_config(SD15)
    assert process.timesteps(4, "lcm").tolist() == [999, 759, 499, 259]
    with pytest.raises(ValueError, match="among 50 of at least as many timesteps, not 51 of 1000"):
        process.timesteps(51, "lcm")
    with pytest.raises(ValueError, match="not 1 of 4"):
        NoiseProcess.from_scheduler_config(CONFIGS[3]).timesteps(1, "lcm")


def test_by_hand():
    process = NoiseProcess.from_scheduler_config(
        {"trained_betas": [0.19, 0.36], "prediction_type": "v_prediction"}
    )
    torch.testing.assert_close(process.alphas_cumprod, torch.tensor([0.81, 0.5184]))
    x0, eps = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    a, s = 0.9, math.sqrt(0.19)
    torch.testing.assert_close(process.add_noise(x0, eps, 0).item(), 2 * a - s)
    torch.testing.assert_close(process.target(x0, eps, 0).item(), -a - 2 * s)


@pytest.mark.parametrize("config", CONFIGS)
def test_prediction_splits_into_x0_and_eps(config):
    process = NoiseProcess.from_scheduler_config(config)
    last = process.num_train_timesteps - 1
    x0, eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in (0, last // 2, last):
        z = process.add_noise(x0, eps, t)
        found_x0, found_eps = process.to_x0_eps(process.target(x0, eps, t), z, torch.tensor([t, t]))
        torch.testing.assert_close(found_x0, x0, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found_eps, eps, atol=1e-4, rtol=1e-4)


def test_zero_terminal_snr_is_pure_noise():
    process = NoiseProcess.from_scheduler_config(CONFIGS[1])
    assert process.alphas_cumprod[999] == 0
    x0, eps = torch.randn(2, 1, 4, 8, 8)
    assert torch.equal(process.add_noise(x0, eps, 999), eps)
    found = process.to_x0_eps(process.target(x0, eps, 999), eps, 999)
    assert all(torch.isfinite(x).all() for x in found)
    torch.testing.assert_close(found[0], x0)


def test_half_precision_is_computed_in_float32():
    process = NoiseProcess.from_scheduler_config(SD15)
    x0, eps = torch.randn(2, 1, 4, 8, 8).half()
    exact = process.add_noise(x0.float(), eps.float(), torch.tensor([500]))
    got = process.add_noise(x0, eps, torch.tensor([500]))
    assert got.dtype == torch.float16
    assert torch.equal(got, exact.half())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "score"}, "prediction_type 'score'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'squaredcos_cap_v2'"),
        ({"timestep_spacing": "middle"}, "timestep_spacing 'middle'"),
        ({"rescale_betas_zero_snr": True}, "needs prediction_type v_prediction"),
    ],
)
def test_unsupported_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        NoiseProcess.from_scheduler_config(SD15 | config)


def test_impossible_timesteps():
    process = NoiseProcess.from_scheduler_config(SD15)
    for n in (0, 1001):
        with pytest.raises(ValueError, match=r"must be in \[1, 1000\]"):
            process.timesteps(n)
    with pytest.raises(ValueError, match="exceed 999"):
        process.timesteps(1000)
    with pytest.raises(ValueError, match="unknown spacing"):
        process.timesteps(4, "middle")
