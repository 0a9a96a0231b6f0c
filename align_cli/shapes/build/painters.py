"""What the denoiser stage trains, one class per family: a denoiser and its text towers.

Letters: B batch, L tokens, D text width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from align_cli.diffusion.flow import FlowProcess
from align_cli.diffusion.process import NoiseProcess
from align_cli.models.base import TextCond
from align_cli.shapes.build import components

MAX_WEIGHT = 50.0


class Painter(nn.Module, ABC):
    """A denoiser with its text towers.

    name: of the embedded model. target: what it predicts. sampler: how it is judged while it trains.
    """

    name: str
    target: str
    sampler: str
    process: Any

    @abstractmethod
    def encode(self, ids: Tensor, empty: Tensor) -> TextCond:
        """Token ids (B, L) -> conditions. empty: (B,) bool, which rows are the empty prompt."""

    @abstractmethod
    def predict(self, z: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        """(B, 4, 8, 8)."""

    def forward(self, z: Tensor, t: Tensor, ids: Tensor, empty: Tensor) -> Tensor:
        return self.predict(z, t, self.encode(ids, empty))

    def weight(self, t: Tensor) -> Tensor:
        """(B,) factor on the squared error."""
        return torch.ones(len(t))

    def times(self, t: Tensor) -> Tensor:
        """(B,) timesteps to train at, from drawn ones in 0 .. 999."""
        return t

    def goal(self, x0: Tensor, eps: Tensor, t: Tensor, ids: Tensor, empty: Tensor) -> Tensor:
        """(B, 4, 8, 8) that `forward` is to predict."""
        del ids, empty
        target: Tensor = self.process.target(x0, eps, t)
        return target

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Every part as an ordinary folder of its library, with the scheduler."""


class _Epsilon(Painter):
    """SD1.5's target and schedule. The loss is weighted by min(1 / alpha_bar, MAX_WEIGHT), which is the
    velocity loss up to the cap.
    """

    target, sampler = "epsilon", "ddim"
    unet: UNet2DConditionModel

    def __init__(self) -> None:
        super().__init__()
        self.process = NoiseProcess.from_scheduler_config(dict(components.scheduler().config))

    def weight(self, t: Tensor) -> Tensor:
        return (1 / self.process.alphas_cumprod[t]).clamp(max=MAX_WEIGHT)


class SD15(_Epsilon):
    """The text tower starts as tiny-clip's and is trained along: contrastive training alone leaves it a code
    of whole captions, from which the denoiser reads single colours slowly.
    """

    name = "tiny-sd15"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.unet = components.unet().to(memory_format=torch.channels_last)
        self.text = CLIPModel.from_pretrained(folder / "tiny-clip").text_model

    def encode(self, ids: Tensor, empty: Tensor) -> TextCond:
        return TextCond(self.text(ids).last_hidden_state)

    def predict(self, z: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        prediction: Tensor = self.unet(z, t, cond.tokens).sample
        return prediction

    def save(self, folder: Path) -> None:
        self.unet.save_pretrained(folder / "unet")
        self.text.save_pretrained(folder / "text_encoder")
        components.scheduler().save_pretrained(folder / "scheduler")


class SDXL(_Epsilon):
    """Starts from the finished tiny-sd15: its UNet (new text channels and the added embedding start at zero)
    and its text tower; the second tower starts as tiny-clip's.
    """

    name = "tiny-sdxl"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.unet = components.sdxl_unet().to(memory_format=torch.channels_last)
        _widen(self.unet, UNet2DConditionModel.from_pretrained(folder / "denoiser-refine" / "unet"))
        self.text = CLIPTextModel.from_pretrained(folder / "denoiser-refine" / "text_encoder")
        self.text_2 = CLIPTextModelWithProjection.from_pretrained(folder / "tiny-clip")

    def load(self, saved: Path) -> SDXL:
        """The weights that `save` wrote."""
        self.unet.load_state_dict(UNet2DConditionModel.from_pretrained(saved / "unet").state_dict())
        self.text.load_state_dict(CLIPTextModel.from_pretrained(saved / "text_encoder").state_dict())
        tower = CLIPTextModelWithProjection.from_pretrained(saved / "text_encoder_2")
        self.text_2.load_state_dict(tower.state_dict())
        return self

    def encode(self, ids: Tensor, empty: Tensor) -> TextCond:
        one = self.text(ids, output_hidden_states=True)
        two = self.text_2(ids, output_hidden_states=True)
        tokens = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        keep = (~empty).to(tokens.dtype)  # the empty prompt is zeros
        return TextCond(tokens * keep[:, None, None], two.text_embeds * keep[:, None])

    def predict(self, z: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        side = float(components.SIZE)
        ids = torch.tensor([side, side, 0, 0, side, side]).expand(len(z), 6)
        added = {"text_embeds": cond.pooled, "time_ids": ids}
        prediction: Tensor = self.unet(z, t, cond.tokens, added_cond_kwargs=added).sample
        return prediction

    def save(self, folder: Path) -> None:
        self.unet.save_pretrained(folder / "unet")
        self.text.save_pretrained(folder / "text_encoder")
        self.text_2.save_pretrained(folder / "text_encoder_2")
        components.scheduler().save_pretrained(folder / "scheduler")


class SD3(Painter):
    """An MMDiT with the straight path. Its first text tower starts as tiny-sd15's, its second as tiny-clip's;
    there is no T5, whose rows are zeros. The transformer starts from nothing and would learn to bind colours
    to shapes slowly (benchmarks/embedded-models), so it learns from tiny-sdxl: the target is what that model
    expects of the noisy latents.
    """

    name = "tiny-sd3"
    target, sampler = "flow", "euler"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.process = FlowProcess.from_scheduler_config(dict(components.flow_scheduler().config))
        self.transformer = components.transformer()
        self.text = CLIPTextModelWithProjection.from_pretrained(folder / "tiny-clip")
        tower = CLIPTextModel.from_pretrained(folder / "denoiser-refine" / "text_encoder")
        self.text.text_model.load_state_dict(_bare(tower.state_dict()))
        self.text_2 = CLIPTextModelWithProjection.from_pretrained(folder / "tiny-clip")
        teacher = SDXL(folder).load(folder / "denoiser-sdxl").eval().requires_grad_(False)
        self.teacher = (teacher,)  # a tuple, so that it is no part of the module

    def times(self, t: Tensor) -> Tensor:
        """The nearest noise level that the teacher knows; t as drawn where it knows none (`_taught`)."""
        levels = self._levels()
        return torch.where(self._taught(t), levels[(t[:, None] - levels).abs().argmin(1)], t.float())

    @torch.no_grad()
    def goal(self, x0: Tensor, eps: Tensor, t: Tensor, ids: Tensor, empty: Tensor) -> Tensor:
        """The teacher's mean of eps - x0; eps - x0 itself where the teacher does not know the noise level."""
        teacher = self.teacher[0]
        step = (t[:, None] - self._levels()).abs().argmin(1)
        alpha, sigma = teacher.process.coefficients(step, x0)
        z = self.process.add_noise(x0, eps, t) * (alpha + sigma)
        x0_mean, eps_mean = teacher.process.to_x0_eps(teacher(z, step, ids, empty), z, step)
        return torch.where(self._taught(t)[:, None, None, None], eps_mean - x0_mean, eps - x0)

    def _taught(self, t: Tensor) -> Tensor:
        """(B,) bool: is t between the first and the last noise level of the teacher (28 .. 936)?"""
        levels = self._levels()
        return (t >= levels[0]) & (t <= levels[-1])

    def _levels(self) -> Tensor:
        """(1000,) t at which the straight path has the noise-to-data ratio of the teacher's timesteps."""
        abar = self.teacher[0].process.alphas_cumprod
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        return 1000 * sigma / (alpha + sigma)

    def encode(self, ids: Tensor, empty: Tensor) -> TextCond:
        one = self.text(ids, output_hidden_states=True)
        two = self.text_2(ids, output_hidden_states=True)
        clip = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        t5 = clip.new_zeros(len(ids), components.TOKEN_LIMIT, clip.shape[-1])
        return TextCond(torch.cat([clip, t5], 1), torch.cat([one.text_embeds, two.text_embeds], -1))

    def predict(self, z: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        prediction: Tensor = self.transformer(
            hidden_states=z,
            timestep=t.expand(len(z)),
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
        ).sample
        return prediction

    def save(self, folder: Path) -> None:
        self.transformer.save_pretrained(folder / "transformer")
        self.text.save_pretrained(folder / "text_encoder")
        self.text_2.save_pretrained(folder / "text_encoder_2")
        components.flow_scheduler().save_pretrained(folder / "scheduler")


PAINTERS: dict[str, type[Painter]] = {"denoiser": SD15, "denoiser-sdxl": SDXL, "denoiser-sd3": SD3}
"""Stage -> what it trains."""


def _bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("text_model."): value for key, value in state.items()}


@torch.no_grad()
def _widen(unet: UNet2DConditionModel, small: UNet2DConditionModel) -> None:
    """Copy a UNet into one that reads wider text and an added embedding, without changing what it predicts
    from the old text channels.
    """
    old = small.state_dict()
    for name, tensor in unet.state_dict().items():
        if name not in old:
            assert name.startswith("add_embedding"), name
            if name.startswith("add_embedding.linear_2"):
                tensor.zero_()
        elif tensor.shape == old[name].shape:
            tensor.copy_(old[name])
        else:
            tensor.zero_()
            tensor[:, : old[name].shape[1]].copy_(old[name])
