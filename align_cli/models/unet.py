"""SD1.x and SD2.x: one CLIP text encoder, an autoencoder and a UNet with epsilon or velocity target.

Letters: B batch, L tokens, D text width, P pooled width, C h w latent, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from align_cli.cuts import Cut, cuts
from align_cli.diffusion.process import NoiseProcess
from align_cli.models.attention import AttentionMaps
from align_cli.models.base import TextCond
from align_cli.models.frozen import FrozenModel, clip_limit, count_tokens, token_ids
from align_cli.models.segments import Tower

SD21_WIDTH = 1024
"""Text width of SD2.x (OpenCLIP ViT-H); SD1.x has 768."""


def unet_family(text_width: int) -> str:
    """ "sd21" for the text width of SD2.x, else "sd15" (SD1.x, and the embedded tiny models of any width).

    The family says what an adapter can be moved to, so it goes by the architecture, not by the target:
    SD2.1-base predicts eps and SD2.1 velocity, and both are sd21.
    """
    return "sd21" if text_width == SD21_WIDTH else "sd15"


def unet_predict(
    unet: nn.Module, z_t: Tensor, t: Tensor, cond: TextCond, keep: AttentionMaps | None = None
) -> Tensor:
    """One UNet call. z_t (B, C, h, w), t () or (B,), cond.tokens (B, L, D) -> (B, C, h, w) in the UNet's
    dtype. A UNet of SDXL also needs cond.pooled (B, P) and cond.time_ids (B, 6).

    keep: filled with cross-attention maps, inside `attention.watched(unet)`.
    """
    dtype = next(unet.parameters()).dtype
    added = None
    if cond.pooled is not None:
        if cond.time_ids is None:
            raise ValueError("pooled text without time_ids; see align_cli.models.sdxl.size_ids")
        added = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids}
    prediction: Tensor = unet(
        z_t.to(dtype),
        t.to(z_t.device).expand(len(z_t)),
        encoder_hidden_states=cond.tokens.to(dtype),
        added_cond_kwargs=added,
        cross_attention_kwargs=None if keep is None else {"keep": keep},
    ).sample
    if keep is not None:
        keep.closed = True
    return prediction


class UNetModel(FrozenModel):
    """A frozen SD1.x or SD2.x pipeline; see `align_cli.models.base.BaseModel`."""

    def __init__(
        self,
        *,
        model_id: str,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        process: NoiseProcess,
    ) -> None:
        super().__init__(model_id=model_id, process=process, denoiser=unet, vae=vae, encoders=[text_encoder])
        self.tokenizer = tokenizer
        self.family = unet_family(unet.config.cross_attention_dim)
        self.image_size = int(unet.config.sample_size) * self.vae_factor
        self.text_width = int(unet.config.cross_attention_dim)

    @property
    def text_encoder(self) -> nn.Module:
        """The only text encoder."""
        return self.encoders[0]

    @property
    def plain_limit(self) -> int:
        """Tokens the text encoder reads, start and end included."""
        return clip_limit(self.tokenizer, self.text_encoder)

    def plain_count(self, prompt: str) -> int:
        """Tokens of the prompt including start and end, before truncation."""
        return count_tokens(self.tokenizer, prompt)

    def plain_audit(self, prompts: Sequence[str]) -> dict[str, list[Cut]]:
        """What the text encoder reads of the prompts."""
        return {"text_encoder": cuts(self.tokenizer, self.plain_limit, prompts)}

    def plain_text(self, prompts: list[str]) -> TextCond:
        """Last hidden state after the final norm, (B, L, D), padded and truncated to `plain_limit`.

        An attention mask is passed only if the encoder's configuration asks for one, as diffusers does (SD1.x
        and SD2.x do not). No gradient unless the text encoder requires it.
        """
        return TextCond(self._encoded(prompts).last_hidden_state.to(self.device))

    def _encoded(self, prompts: list[str]) -> Any:
        encoded = token_ids(self.tokenizer, prompts, self.plain_limit)
        with self.text_at_work():
            mask = None
            if getattr(self.text_encoder.config, "use_attention_mask", False):
                mask = encoded["attention_mask"].to(self.text_encoder.device)
            ids = encoded["input_ids"].to(self.text_encoder.device)
            return self.text_encoder(ids, attention_mask=mask)

    @property
    def summary_width(self) -> int:
        """Of the text encoder."""
        return self.text_width

    def summarised(self, prompts: list[str]) -> tuple[TextCond, Tensor]:
        """`encode_text`, and the state (B, P) at the end of each whole prompt, after the final norm and
        without projection. Source: pooler_output, which DPT takes.
        """
        said = self._encoded(prompts)
        cond = TextCond(said.last_hidden_state.to(self.device))
        if self.reader is not None:
            cond = self.encode_text(prompts)
        return cond, said.pooler_output.to(self.device)

    def plain_uncond(self, batch: int) -> TextCond:
        """The encoding of the empty prompt, `batch` rows."""
        return TextCond(self.plain_text([""]).tokens.expand(batch, -1, -1))

    def towers(self) -> list[Tower]:
        """The only text encoder, read after the final norm; without attention mask."""

        def states(ids: Tensor) -> Tensor:
            encoder: Any = self.text_encoder
            found: Tensor = encoder(ids.to(encoder.device)).last_hidden_state
            return found

        return [Tower("text_encoder", self.tokenizer, self.plain_limit, states)]

    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond, keep: AttentionMaps | None = None) -> Tensor:
        """eps or velocity, as `process` says. z_t (B, C, h, w), t () or (B,) -> (B, C, h, w) in the model's
        dtype.
        """
        return unet_predict(self.denoiser, z_t, t, cond, keep)
