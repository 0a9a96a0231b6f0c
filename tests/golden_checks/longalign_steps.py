"""LongAlign: one step of every stage, with the parts that the case stands in for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from align_cli.diffusion.consistency import consistency
from align_cli.diffusion.process import NoiseProcess
from align_cli.losses import common_direction, reweight_text
from align_cli.methods.base import StepContext
from align_cli.methods.longalign.config import LongAlignConfig
from align_cli.methods.longalign.method import OWN, LongAlign
from align_cli.models.base import TextCond
from align_cli.models.unet import unet_predict
from align_cli.rewards.clip import ClipReward
from golden_checks.lines import Kind, Line, same
from golden_checks.longalign import GRADIENTS, values

SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
}  # fmt: skip
SCALING = 0.18215


class GivenModel:
    """A UNet with given texts and the decoder of the case. Notes what it was asked and what it said."""

    family, text_width, vae_factor, latent_channels = "sd15", 0, 1, 4
    device = encoder_device = torch.device("cpu")
    zeros_for_empty = False

    def __init__(self, unet: nn.Module, told: Tensor, free: Tensor) -> None:
        self.denoiser, self.told, self.free = unet, told, free
        self.process = NoiseProcess.from_scheduler_config(SCHEDULE)
        self.vae = nn.Identity()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def at_work(self, *_: nn.Module) -> Any:
        return nullcontext()

    def encode_text(self, prompts: list[str]) -> TextCond:
        return TextCond(self.told[: len(prompts)])

    def uncond(self, batch: int) -> TextCond:
        return TextCond(self.free[:batch])

    def predict(self, z: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        said = unet_predict(self.denoiser, z, t, cond)
        self.calls.append((z.detach(), said.detach()))
        return said

    def decode(self, z: Tensor, *, clamp: bool = True) -> Tensor:
        pixels = torch.tanh(0.1 * (z / SCALING)[:, :3]) * 0.5 + 0.5
        return pixels.clamp(0, 1) if clamp else pixels


class GivenReward(ClipReward):
    """The image and text vectors of the case."""

    def __init__(self, projection: Tensor, texts: Tensor) -> None:
        self.projection, self.texts = projection, texts

    def image_vectors(self, images: Tensor) -> Tensor:
        return F.normalize(images.flatten(1) @ self.projection, dim=-1)

    def text_vectors(self, prompts: Any) -> Tensor:
        return self.texts[: len(prompts)]


def train_steps(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    x = load_file(folder / "tensors.safetensors")
    beside = folder.parent / "unet_lora"
    facts = json.loads((beside / "case.json").read_text())
    owners = torch.tensor([0, 0, 1, 1, 1])
    segments = F.normalize(x["segment_text_embeds"], dim=-1)
    texts = torch.stack([segments[owners == i].mean(0) for i in range(2)])
    rewards = {facts["name"]: facts for facts in case["reward_settings"]}

    def made(stage: str, **settings: Any) -> tuple[LongAlign, GivenModel]:
        unet = UNet2DConditionModel(**facts["unet_config"]).eval()
        unet.load_state_dict(load_file(beside / "unet.safetensors"))
        unet.requires_grad_(False)
        told = torch.cat([x["cond_clip"], x["cond_t5"]], dim=1)
        free = torch.cat([x["uncond_clip"], x["uncond_t5"]], dim=1)
        model = GivenModel(unet, told, free)
        config = LongAlignConfig(
            stage=stage,
            t5="",
            rewards={"denscore": 1.0},
            lora_rank=facts["rank"],
            lora_dropout=0.0,
            **settings,
        )
        method = LongAlign(model, config)  # type: ignore[arg-type]
        method.use_rewards({"denscore": GivenReward(x["image_projection"], texts)})
        method.loras[OWN].load_state(named(load_file(beside / "lora_fp32.safetensors")))
        return method, model

    def gradients(name: str, method: LongAlign) -> Iterator[Line]:
        prefix = f"{name}/grad/"
        expected = named({k.removeprefix(prefix): v for k, v in x.items() if k.startswith(prefix)})
        weights = method.loras[OWN].weights
        yield same(f"{name}/gradients", sorted(weights), sorted(expected))
        largest = max(float(v.abs().max()) for v in expected.values())
        worst = max(float((weights[k].grad - v).abs().max()) for k, v in expected.items())
        yield Line(f"{name}/grad", worst, GRADIENTS * largest)

    for name in ("align_l2", "align_huber"):
        method, model = made("align", loss=name.removeprefix("align_"))
        with method.loras[OWN].attached():
            given = x["latents"], x[f"{name}/start_timesteps"], x[f"{name}/noise"]
            said = method.align(["", ""], *given, context())
        yield values(f"{name}/noisy_latents", model.calls[0][0], x[f"{name}/noisy_latents"])
        yield values(f"{name}/noise_pred", model.calls[0][1], x[f"{name}/noise_pred"])
        yield values(f"{name}/loss", torch.tensor(said["loss"]), x[f"{name}/loss"])
        yield from gradients(name, method)

    for name in ("lcm_huber", "lcm_l2"):
        method, model = made("lcm", loss=name.removeprefix("lcm_"))
        t = x[f"{name}/start_timesteps"]
        said = method.distil(["", ""], x["latents"], t, x[f"{name}/noise"], context())
        (rows, both), (before, target), (z, student) = model.calls
        e = (t - method.config.skip).clamp(min=0)
        yield same(f"{name}/end_timesteps", e.tolist(), x[f"{name}/end_timesteps"].tolist())
        free, told = both.chunk(2)
        x0, eps = model.process.to_x0_eps(free + method.config.guidance * (told - free), rows[:2], t)
        found = {
            "noisy_latents": z,
            "student_noise_pred": student,
            "student_consistency": consistency(model.process, student, z, t),
            "teacher_x0_guided": x0,
            "teacher_noise_guided": eps,
            "x_prev": before,
            "target_noise_pred": target,
            "target_consistency": consistency(model.process, target, before, e),
            "loss": torch.tensor(said["loss"]),
        }
        for key, value in found.items():
            yield values(f"{name}/{key}", value, x[f"{name}/{key}"])
        yield from gradients(name, method)

    for name in ("reward_a", "reward_b", "reward_lcm"):
        few = name == "reward_lcm"
        omega = 0.3 if few else rewards[name]["omega"]
        steps = {"steps": 4, "grad_stride": 1} if few else {}
        method, model = made("reward-lcm" if few else "reward", omega=omega, **steps)
        first = 0 if few else rewards[name]["first_gradient_index"]
        ctx = context(seed=0 if few else seed_that_draws(first, method.config.grad_stride))
        renoise = iter([x[f"{name}/renoise_{i}"] for i in range(4)] if few else [])
        method._noise = lambda *_, noise=renoise: next(noise)  # type: ignore[method-assign]
        with method.loras[OWN].attached():
            z = method.draw(["", ""], x[f"{name}/initial_noise"], ctx)
            if not few:
                told_last = model.calls[-1][1].chunk(2)
            loss, gradient, _ = method._scored(z, ["", ""], ctx)
            z.backward(gradient)
        image = model.decode(z.detach())
        if not few:
            guided = told_last[0] + method.config.guidance * (told_last[1] - told_last[0])
            yield values(f"{name}/last_noise_pred_guided", guided, x[f"{name}/last_noise_pred_guided"])
        reward = method.rewards.rewards["denscore"]
        used = reweight_text(texts, common_direction(texts), omega)
        yield values(f"{name}/image", image, x[f"{name}/image"])
        yield values(f"{name}/scores", (reward.image_vectors(image) * used).sum(-1), x[f"{name}/scores"])
        yield values(f"{name}/loss", loss, x[f"{name}/loss"])
        yield from gradients(name, method)


def named(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """ "000.up.LAYER" -> "LAYER.lora_B.weight"; down is A."""
    out = {}
    for key, value in given.items():
        _, part, layer = key.split(".", 2)
        out[f"{layer}.lora_{'B' if part == 'up' else 'A'}.weight"] = value
    return out


def context(seed: int = 0) -> StepContext:
    rng = torch.Generator().manual_seed(seed)
    return StepContext(step=0, rng=rng, backward=lambda loss: loss.backward())


def seed_that_draws(first: int, below: int) -> int:
    """A seed whose first number below `below` is `first`."""
    for seed in range(1000):
        if int(torch.randint(below, (), generator=torch.Generator().manual_seed(seed))) == first:
            return seed
    raise ValueError(f"no seed draws {first}")


KINDS = [
    Kind("longalign", lambda _, case: "reward_settings" in case and "stand_ins" in case, train_steps),
]
