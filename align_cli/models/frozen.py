"""What the model classes of all families share: frozen modules, the autoencoder, reading prompts.

Letters: B batch, L tokens, D text width, C h w latent, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from align_cli.diffusion.process import Process
from align_cli.models.base import Posterior


class FrozenModel:
    """The part of `align_cli.models.base.BaseModel` that does not depend on the family.

    encoders: the text encoders, in the pipeline's order. All modules are put into eval mode and frozen.
    """

    family: str
    image_size: int
    text_width: int
    max_image_size: int = 0

    def __init__(
        self,
        *,
        model_id: str,
        process: Process,
        denoiser: nn.Module,
        vae: AutoencoderKL,
        encoders: Sequence[nn.Module],
    ) -> None:
        self.model_id, self.process = model_id, process
        self.denoiser, self.vae, self.encoders = denoiser, vae, list(encoders)
        for module in (denoiser, vae, *encoders):
            module.eval().requires_grad_(False)
        weight = next(denoiser.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.size_factor = self.vae_factor
        self.latent_channels = int(vae.config.latent_channels)

    def here(self, x: Tensor) -> Tensor:
        """x in the denoiser's dtype and on its device."""
        return x.to(self.device, self.dtype)

    def text_grad(self) -> AbstractContextManager[None]:
        """Inside: encoding prompts keeps a graph only if a text encoder is trained."""
        trained = any(p.requires_grad for encoder in self.encoders for p in encoder.parameters())
        return torch.set_grad_enabled(trained and torch.is_grad_enabled())

    def encode_image(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w): posterior mean + std * noise; mean if noise
        is None.
        """
        return self.posterior(pixels).draw(noise)

    def posterior(self, pixels: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] -> what `encode_image` draws from."""
        config = self.vae.config
        found = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return Posterior(found.mean, found.std, config.scaling_factor, config.shift_factor or 0.0)

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Scaled latents -> (B, 3, H, W) float32 in [0, 1]; differentiable; not clamped if asked."""
        config = self.vae.config
        z = latents.to(self.vae.dtype) / config.scaling_factor
        if config.shift_factor:
            z = z + config.shift_factor
        pixels: Tensor = self.vae.decode(z).sample.float() / 2 + 0.5
        return pixels.clamp(0, 1) if clamp else pixels


def clip_limit(tokenizer: Any, encoder: Any) -> int:
    """Tokens a CLIP text encoder reads, start and end included."""
    return min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))


def token_ids(tokenizer: Any, prompts: list[str], length: int) -> Any:
    """input_ids and attention_mask, (B, length) int64 each: padded and truncated to `length`."""
    return tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )


def count_tokens(tokenizer: Any, prompt: str) -> int:
    """Tokens of the prompt including start and end, before truncation."""
    return len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])


def clip_penultimate(tokenizer: Any, encoder: Any, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """What SDXL and SD3 read of a CLIP text encoder: the states before its last layer, and its first output.

    Returns:
        (B, length, D), and (B, P) for an encoder with projection (the projected end token), else the last
        states. No attention mask, as in diffusers.
    """
    ids = token_ids(tokenizer, prompts, length)["input_ids"]
    output = encoder(ids.to(encoder.device), output_hidden_states=True)
    return output.hidden_states[-2], output[0]
