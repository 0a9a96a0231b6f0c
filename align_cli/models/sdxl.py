"""SDXL: two CLIP text encoders, pooled text and picture sizes beside the text, a UNet with epsilon target.

Letters: B batch, L tokens, D text width (of both encoders together), P pooled width, C h w latent,
H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from align_cli.cuts import Cut, cuts
from align_cli.diffusion.process import NoiseProcess
from align_cli.models.attention import AttentionMaps
from align_cli.models.base import TextCond
from align_cli.models.frozen import FrozenModel, clip_limit, clip_penultimate, count_tokens, penultimate
from align_cli.models.segments import Tower
from align_cli.models.unet import unet_predict


def size_ids(z: Tensor, vae_factor: int) -> Tensor:
    """SDXL's time_ids of latents (B, C, h, w): (B, 6) float32, each row (H, W, 0, 0, H, W) in pixels.

    Original size, upper left corner of the crop, target size: a picture that was never resized or cropped.
    Source: SoftREPA sampler.py; diffusers' pipeline does the same by default.
    """
    height, width = z.shape[-2] * vae_factor, z.shape[-1] * vae_factor
    row = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=z.device)
    return row.expand(len(z), -1)


class SDXLModel(FrozenModel):
    """A frozen SDXL pipeline; see `align_cli.models.base.BaseModel`.

    zeros_for_empty: the unconditional text is zeros, not the encoding of the empty prompt (the pipeline's
    force_zeros_for_empty_prompt; true for SDXL base, and in the official SoftREPA code).
    """

    family = "sdxl"

    def __init__(
        self,
        *,
        model_id: str,
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        process: NoiseProcess,
        zeros_for_empty: bool = True,
    ) -> None:
        super().__init__(model_id=model_id, process=process, denoiser=unet, vae=vae, encoders=text_encoders)
        self.tokenizers, self.zeros_for_empty = tokenizers, zeros_for_empty
        self.image_size = int(unet.config.sample_size) * self.vae_factor
        self.text_width = int(unet.config.cross_attention_dim)
        self.pooled_width = int(text_encoders[1].config.projection_dim)

    @property
    def plain_limit(self) -> int:
        """Tokens the text encoders read, start and end included."""
        return min(map(clip_limit, self.tokenizers, self.encoders))

    def plain_count(self, prompt: str) -> int:
        """Tokens of the prompt including start and end, before truncation."""
        return count_tokens(self.tokenizers[0], prompt)

    def plain_audit(self, prompts: Sequence[str]) -> dict[str, list[Cut]]:
        """What each text encoder reads of the prompts."""
        first, second = (cuts(tokenizer, self.plain_limit, prompts) for tokenizer in self.tokenizers)
        return {"text_encoder": first, "text_encoder_2": second}

    def plain_text(self, prompts: list[str]) -> TextCond:
        """tokens (B, L, D): both encoders' states before the last layer, side by side; pooled (B, P): the
        second encoder's projection. No gradient unless a text encoder requires it.
        """
        with self.text_at_work():
            (first, _), (second, pooled) = (
                clip_penultimate(tokenizer, encoder, prompts, self.plain_limit)
                for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True)
            )
        return TextCond(self.here(torch.cat([first, second], dim=-1)), self.here(pooled))

    def plain_uncond(self, batch: int) -> TextCond:
        """Zeros, or the encoding of the empty prompt (see `zeros_for_empty`), `batch` rows."""
        if self.zeros_for_empty:
            tokens = torch.zeros(batch, self.plain_limit, self.text_width)
            return TextCond(self.here(tokens), self.here(torch.zeros(batch, self.pooled_width)))
        empty = self.plain_text([""])
        assert empty.pooled is not None
        return TextCond(empty.tokens.expand(batch, -1, -1), empty.pooled.expand(batch, -1))

    def towers(self) -> list[Tower]:
        """Both text encoders, read before the last layer."""

        def reading(place: int) -> Callable[[Tensor], Tensor]:
            return lambda ids: penultimate(self.encoders[place], ids)[0]

        limit = self.plain_limit
        return [
            Tower("text_encoder", self.tokenizers[0], limit, reading(0)),
            Tower("text_encoder_2", self.tokenizers[1], limit, reading(1)),
        ]

    def pooled_text(self, prompts: list[str]) -> Tensor:
        """The second encoder's projection (B, P) of whole prompts, truncated as ever."""
        _, pooled = clip_penultimate(self.tokenizers[1], self.encoders[1], prompts, self.plain_limit)
        return self.here(pooled)

    @property
    def summary_width(self) -> int:
        """Of the second encoder's projection."""
        return self.pooled_width

    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond, keep: AttentionMaps | None = None) -> Tensor:
        """eps or velocity, as `process` says. z_t (B, C, h, w), t () or (B,) -> (B, C, h, w) in the model's
        dtype. Without cond.time_ids the picture is one of the latents' own size, uncropped.
        """
        if cond.time_ids is None:
            cond = replace(cond, time_ids=size_ids(z_t, self.vae_factor))
        return unet_predict(self.denoiser, z_t, t, cond, keep)
