"""CoMat: pictures drawn with gradient in some steps, and the discriminator of latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn

from align_cli.diffusion.process import NoiseProcess
from align_cli.methods.comat.config import CoMatConfig
from align_cli.methods.comat.discriminator import LatentDiscriminator
from align_cli.methods.comat.method import CoMat, Plan
from align_cli.models.base import TextCond
from align_cli.models.unet import UNetModel
from golden_checks.comat_attention import our_name, tuned_unet
from golden_checks.lines import DERIVED, FORWARD, Kind, Line, compare, same

GENERATED = 1e-3
"""Relative tolerance of gradients through several sampling steps. Source: comat.md, quick test list."""


def model_of(case: dict[str, Any], x: dict[str, Tensor]) -> tuple[UNetModel, dict[str, Tensor]]:
    """The case's UNet and autoencoder as a base model whose texts are given, and the state of its LoRA."""
    unet, lora = tuned_unet(case, x)
    config = case.get("vae_config")
    vae = AutoencoderKL(**(config or {"block_out_channels": [8], "norm_num_groups": 4}))
    if config:
        vae.load_state_dict({k.removeprefix("vae."): v for k, v in x.items() if k.startswith("vae.")})
    if "vae_scaling_factor" in case:
        vae.register_to_config(scaling_factor=case["vae_scaling_factor"])
    process = NoiseProcess.from_scheduler_config(case["scheduler"])
    model = UNetModel(
        model_id="golden",
        tokenizer=None,
        text_encoder=nn.Identity(),
        vae=vae,
        unet=unet,
        process=process,
    )
    return model, lora.state()


def rank_of(state: dict[str, Tensor]) -> int:
    return len(next(value for key, value in state.items() if key.endswith("lora_A.weight")))


def generation(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """The whole path, the picture and the gradient of the LoRA."""
    x = load_file(folder / "tensors.safetensors")
    model, state = model_of(case, x)
    config = CoMatConfig(
        lora_rank=rank_of(state),
        steps=case["num_inference_steps"],
        grad_steps=len(case["gradient_steps"]),
        guidance=case["guidance_scale"],
        detach_input=folder.name.endswith("detached"),
        fidelity_weight=0,
    )
    method = CoMat(model, config)
    method.load_state({f"unet.{key}": value for key, value in state.items()})
    path = model.process.timesteps(config.steps, "leading")
    yield same("timesteps", path.tolist(), case["timesteps"])
    noises = iter(x["step_noise"])
    cond, empty = TextCond(x["prompt_embeds"]), TextCond(x["null_embeds"])
    plan = Plan(tuple(case["gradient_steps"]))
    z = method.draw_encoded(cond, empty, x["initial_latents"], lambda: next(noises), plan).latents
    yield compare("final_latents", z, x["final_latents"], DERIVED)
    image = model.decode(z, clamp=False)
    yield compare("image", image, x["image"], DERIVED)
    scalar = (image * x["image_weight"]).sum()
    yield compare("scalar", scalar, x["scalar"], DERIVED)
    scalar.backward()
    for key in sorted(k for k in x if k.startswith("grad.lora.")):
        found = method.lora.weights[our_name(key.removeprefix("grad.lora."))].grad
        got = torch.zeros_like(x[key]) if found is None else found
        yield compare(key, got, x[key], GENERATED)


def discriminator(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """Logits, both losses, and their gradients."""
    x = load_file(folder / "tensors.safetensors")
    model, state = model_of(case, x)
    path = model.process.timesteps(50, "leading")
    yield same("timestep_used", int(path[-1]), case["timestep_used"])
    yield same("first_timestep", int(path[0]), case["first_timestep"])
    model.encode_text = lambda _: TextCond(x["null_embeds"][:1])  # type: ignore[method-assign]
    found = LatentDiscriminator(model, rank=rank_of(state), timestep=int(path[-1]))
    found.lora.load_state(state)
    found.head.load_state_dict({"weight": x["mlp.weight"], "bias": x["mlp.bias"]})
    yield same("n_trainable_tensors", len(found.parameters()), case["n_trainable_tensors"])
    with found.at_work():
        for name in ("fake", "real"):
            logits = found.logits(x[f"{name}_latents"])
            yield compare(f"logits_{name}", logits, x[f"logits_{name}"], FORWARD)
        latents = x["fake_latents"].clone().requires_grad_()
        loss = found.fooled(latents)
        yield compare("g_loss", loss, x["g_loss"], FORWARD)
        (slope,) = torch.autograd.grad(loss, latents)
        yield compare("grad_g_loss.fake_latents", slope, x["grad_g_loss.fake_latents"], DERIVED)
        own, _ = found.told_apart(x["fake_latents"], x["real_latents"])
        yield compare("d_loss", own, x["d_loss"], FORWARD)
        own.backward()
    for key in sorted(k for k in x if k.startswith("grad_d_loss.")):
        name = key.removeprefix("grad_d_loss.")
        part = getattr(found.head, name.removeprefix("mlp.")) if name.startswith("mlp.") else None
        weight = found.lora.weights[our_name(name.removeprefix("lora."))] if part is None else part
        yield compare(key, weight.grad, x[key], DERIVED)


KINDS = [
    Kind("comat", lambda _, case: "gradient_steps" in case and "step_noise" in str(case), generation),
    Kind("comat", lambda _, case: "timestep_used" in case, discriminator),
]
