"""SD3 and SD3.5: two CLIP text encoders and T5, an MMDiT with a flow-matching velocity.

Letters: B batch, L rows of the CLIP part, N rows of the T5 part, D text width, P pooled width, C h w latent,
H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from align_cli.cuts import Cut, cuts
from align_cli.diffusion.flow import FlowProcess
from align_cli.errors import UserError
from align_cli.models.attention import AttentionMaps
from align_cli.models.base import TextCond
from align_cli.models.frozen import FrozenModel, clip_limit, clip_penultimate, count_tokens, t5_states
from align_cli.models.segments import Tower


def mmdit_predict(
    transformer: nn.Module, z_t: Tensor, t: Tensor, cond: TextCond, keep: AttentionMaps | None = None
) -> Tensor:
    """One MMDiT call. z_t (B, C, h, w), t () or (B,) in [0, 1000], int or float, cond.tokens (B, L + N, D),
    cond.pooled (B, P) -> velocity (B, C, h, w) in the transformer's dtype.

    keep: filled with maps of the text rows that it names, inside `attention.watched(transformer)`.
    """
    if cond.pooled is None:
        raise ValueError("an MMDiT needs pooled text")
    dtype = next(transformer.parameters()).dtype
    velocity: Tensor = transformer(
        hidden_states=z_t.to(dtype),
        timestep=t.to(z_t.device).expand(len(z_t)),
        encoder_hidden_states=cond.tokens.to(dtype),
        pooled_projections=cond.pooled.to(dtype),
        joint_attention_kwargs=None if keep is None else {"keep": keep},
    ).sample
    if keep is not None:
        keep.closed = True
    return velocity


class SD3Model(FrozenModel):
    """A frozen SD3 pipeline; see `align_cli.models.base.BaseModel`.

    t5: its tokenizer and encoder, or None: then zeros stand in their place, as many rows as the CLIP part has
    (as in older versions of diffusers; newer ones take max_sequence_length rows).
    t5_length: rows of the T5 part, never more than the T5 tokenizer's own limit; unused without T5.
    """

    family = "sd3"
    denoiser_part = "transformer"

    def __init__(
        self,
        *,
        model_id: str,
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
        t5: tuple[T5TokenizerFast, T5EncoderModel] | None,
        t5_length: int,
        vae: AutoencoderKL,
        transformer: SD3Transformer2DModel,
        process: FlowProcess,
    ) -> None:
        encoders = [*text_encoders, *([] if t5 is None else [t5[1]])]
        super().__init__(model_id=model_id, process=process, denoiser=transformer, vae=vae, encoders=encoders)
        self.tokenizers = tokenizers
        self.clip_length = min(map(clip_limit, tokenizers, text_encoders))
        self.t5_tokenizer = None if t5 is None else t5[0]
        self.t5_length = self.clip_length if t5 is None else min(t5_length, int(t5[0].model_max_length))
        config = transformer.config
        self.size_factor = self.vae_factor * int(config.patch_size)
        self.image_size = int(config.sample_size) * self.vae_factor
        self.max_image_size = int(config.pos_embed_max_size) * self.size_factor
        self.text_width = int(config.joint_attention_dim)

    @property
    def plain_limit(self) -> int:
        """Tokens read by the text encoder that reads most: T5, or CLIP where there is none."""
        return self.clip_length if self.t5_tokenizer is None else self.t5_length

    def plain_count(self, prompt: str) -> int:
        """Tokens of the prompt, as T5 (or CLIP where there is none) counts them, before truncation."""
        return count_tokens(self.t5_tokenizer or self.tokenizers[0], prompt)

    def plain_audit(self, prompts: Sequence[str]) -> dict[str, list[Cut]]:
        """What each text encoder reads of the prompts; T5, where there is one, reads most."""
        first, second = (cuts(tokenizer, self.clip_length, prompts) for tokenizer in self.tokenizers)
        found = {"text_encoder": first, "text_encoder_2": second}
        if self.t5_tokenizer is not None:
            found["text_encoder_3"] = cuts(self.t5_tokenizer, self.t5_length, prompts)
        return found

    def plain_text(self, prompts: list[str]) -> TextCond:
        """tokens (B, L + N, D): both CLIPs' states before the last layer side by side, zeros up to D, and
        below them the T5 states; pooled (B, P): both projections. No attention mask anywhere. No
        gradient unless a text encoder requires it.
        """
        with self.text_at_work():
            (first, pooled), (second, pooled_2) = (
                clip_penultimate(tokenizer, encoder, prompts, self.clip_length)
                for tokenizer, encoder in zip(self.tokenizers, self.encoders[:2], strict=True)
            )
            clip = self.here(torch.cat([first, second], dim=-1))
            clip = F.pad(clip, (0, self.text_width - clip.shape[-1]))
            tokens = torch.cat([clip, self.here(self._t5_states(prompts, clip))], dim=1)
            return TextCond(tokens, self.here(torch.cat([pooled, pooled_2], dim=-1)))

    def _t5_states(self, prompts: list[str], like: Tensor) -> Tensor:
        """(B, N, D): T5's last states, or zeros."""
        if self.t5_tokenizer is None:
            return like.new_zeros(len(prompts), self.t5_length, self.text_width)
        return t5_states(self.t5_tokenizer, self.encoders[2], prompts, self.t5_length)

    def plain_uncond(self, batch: int) -> TextCond:
        """The encoding of the empty prompt, `batch` rows."""
        empty = self.plain_text([""])
        assert empty.pooled is not None
        return TextCond(empty.tokens.expand(batch, -1, -1), empty.pooled.expand(batch, -1))

    @property
    def summary_width(self) -> int:
        """Of the pooled text: both projections side by side."""
        transformer: Any = self.denoiser
        return int(transformer.config.pooled_projection_dim)

    def words(self) -> tuple[CLIPTokenizer, int]:
        """The first CLIP tokenizer, and the rows of the CLIP part."""
        return self.tokenizers[0], self.clip_length

    def towers(self) -> list[Tower]:
        """UserError."""
        raise UserError(
            f"model.text segments does not apply to {self.model_id}: it is for SD1.x, SD2.x and SDXL; SD3 "
            "has T5 for long prompts; leave --text away, or give --text plain"
        )

    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond, keep: AttentionMaps | None = None) -> Tensor:
        """The velocity eps - x0. z_t (B, C, h, w), t () or (B,) in [0, 1000] -> (B, C, h, w) in the model's
        dtype. keep: gets maps of the CLIP rows.
        """
        if keep is not None:  # counted from the end: soft tokens stand in front
            behind = self.clip_length - cond.tokens.shape[1]
            keep.rows = slice(-cond.tokens.shape[1], behind or None)
        return mmdit_predict(self.denoiser, z_t, t, cond, keep)
