"""LongAlign: the maths of the LCM stages: scalings, clean latents, DDIM moves, Huber loss, timesteps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from align_cli.diffusion.consistency import c_out, c_skip, consistency
from align_cli.diffusion.process import NoiseProcess
from align_cli.diffusion.samplers import ddim_step
from align_cli.diffusion.unipc import unipc_timesteps
from align_cli.losses import huber_loss
from golden_checks.lines import Kind, Line, same
from golden_checks.longalign import tensor_named, values


def lcm_math(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    x = load_file(folder / "tensors.safetensors")
    t, z, pred = x["timesteps"], x["sample"], x["model_output"]
    yield values("c_skip", c_skip(t), x["c_skip"])
    yield values("c_out", c_out(t), x["c_out"])

    abar = x["alphas_cumprod"]
    for name in ("epsilon", "v_prediction", "sample"):
        process = NoiseProcess(abar, float(abar[0]), name)
        x0, _ = process.to_x0_eps(pred, z, t)
        yield values(f"pred_original_{name}", x0, x[f"pred_original_{name}"])
        by_hand = x["c_skip"].view(-1, 1, 1, 1) * z + x["c_out"].view(-1, 1, 1, 1) * x0
        yield values(f"consistency {name}", consistency(process, pred, z, t), by_hand)

    process = NoiseProcess(abar, float(abar[0]))
    x0, _ = process.to_x0_eps(pred, z, t)
    yield values("pred_original_epsilon_clamped", x0.clamp(-1, 1), x["pred_original_epsilon_clamped"])
    z = process.add_noise(x["pred_x0_in"], pred, t)
    given = {"ddim_step": t - case["step_ratio"], "ddim_step_prev_given": x["timesteps_prev_given"]}
    for name, before in given.items():
        yield values(name, ddim_step(process, pred, z, t, before.clamp(min=0)), x[name])

    for name, expected in x.items():
        if name.startswith("huber_loss_c"):
            c = float(name.removeprefix("huber_loss_c"))
            yield values(name, huber_loss(x["huber_a"], x["huber_b"], c), expected)

    for name, expected in case["sampler_timesteps"].items():
        if match := re.fullmatch(r"lcm_(\d+)_from_sd15_config", name):
            yield same(name, process.timesteps(int(match[1]), "lcm").tolist(), expected)
        if match := re.fullmatch(r"unipc_(\d+)_from_sd15_config", name):
            spacing = case["sampler_timesteps"]["unipc_timestep_spacing"]
            yield same(name, unipc_timesteps(process, int(match[1]), spacing).tolist(), expected)
    path = list(range(len(abar) - 1, -1, -case["step_ratio"]))
    found = process.timesteps(case["num_ddim_timesteps"], "trailing").tolist()
    yield same("timesteps of the reward stage", found, path)


KINDS = [Kind("longalign", tensor_named("ddim_step_prev_given"), lcm_math)]
