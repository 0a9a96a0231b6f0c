"""SD1.x and SD2.x: one CLIP text encoder, an autoencoder and a UNet with epsilon or velocity target.

Letters: B batch, L tokens, D text width, C h w latent, H W pixels.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from align_cli.diffusion.process import NoiseProcess
from align_cli.models.base import Posterior, TextCond

SD21_WIDTH = 1024
"""Text width of SD2.x (OpenCLIP ViT-H); SD1.x has 768."""


def unet_family(text_width: int) -> str:
    """ "sd21" for the text width of SD2.x, else "sd15" (SD1.x, and the embedded tiny models of any width).

    The family says what an adapter can be moved to, so it goes by the architecture, not by the target:
    SD2.1-base predicts eps and SD2.1 velocity, and both are sd21.
    """
    return "sd21" if text_width == SD21_WIDTH else "sd15"


def unet_predict(unet: nn.Module, z_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
    """One UNet call. z_t (B, C, h, w), t () or (B,), cond.tokens (B, L, D) -> (B, C, h, w) in the UNet's
    dtype.
    """
    dtype = next(unet.parameters()).dtype
    prediction: Tensor = unet(
        z_t.to(dtype), t.to(z_t.device).expand(len(z_t)), encoder_hidden_states=cond.tokens.to(dtype)
    ).sample
    return prediction


class UNetModel:
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
        self.model_id, self.process = model_id, process
        self.tokenizer, self.text_encoder, self.vae, self.denoiser = tokenizer, text_encoder, vae, unet
        for module in (text_encoder, vae, unet):
            module.eval().requires_grad_(False)
        weight = next(unet.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.family = unet_family(unet.config.cross_attention_dim)
        self.vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_size = int(unet.config.sample_size) * self.vae_factor
        self.latent_channels = int(vae.config.latent_channels)
        self.text_width = int(unet.config.cross_attention_dim)

    @property
    def token_limit(self) -> int:
        """Tokens the text encoder reads, start and end included."""
        return min(
            int(self.tokenizer.model_max_length), int(self.text_encoder.config.max_position_embeddings)
        )

    def token_count(self, prompt: str) -> int:
        """Tokens of the prompt including start and end, before truncation."""
        return len(self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"])

    def encode_text(self, prompts: list[str]) -> TextCond:
        """Last hidden state after the final norm, (B, L, D), padded and truncated to `token_limit`.

        An attention mask is passed only if the encoder's configuration asks for one, as diffusers does (SD1.x
        and SD2.x do not). No gradient unless the text encoder requires it.
        """
        encoded = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.token_limit,
            truncation=True,
            return_tensors="pt",
        )
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = encoded["attention_mask"].to(self.device)
        trained = any(p.requires_grad for p in self.text_encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            states = self.text_encoder(encoded["input_ids"].to(self.device), attention_mask=mask)
        return TextCond(states.last_hidden_state)

    def uncond(self, batch: int) -> TextCond:
        """The encoding of the empty prompt, `batch` rows."""
        return TextCond(self.encode_text([""]).tokens.expand(batch, -1, -1))

    def encode_image(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w): posterior mean + std * noise; mean if noise
        is None.
        """
        return self.posterior(pixels).draw(noise)

    def posterior(self, pixels: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] -> what `encode_image` draws from."""
        found = self.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        return Posterior(found.mean, found.std, self.vae.config.scaling_factor)

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Scaled latents -> (B, 3, H, W) float32 in [0, 1]; differentiable; not clamped if asked."""
        pixels = (
            self.vae.decode(latents.to(self.dtype) / self.vae.config.scaling_factor).sample.float() / 2 + 0.5
        )
        return pixels.clamp(0, 1) if clamp else pixels

    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        """eps or velocity, as `process` says. z_t (B, C, h, w), t () or (B,) -> (B, C, h, w) in the model's
        dtype.
        """
        return unet_predict(self.denoiser, z_t, t, cond)
