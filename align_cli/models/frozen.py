"""What the model classes of all families share: frozen modules, the autoencoder, reading prompts.

Letters: B batch, L tokens, D text width, C h w latent, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from align_cli.diffusion.process import Process
from align_cli.models.base import Posterior, TextChange


class FrozenModel:
    """The part of `align_cli.models.base.BaseModel` that does not depend on the family.

    encoders: the text encoders, in the pipeline's order. All modules are put into eval mode and frozen.
    Encoders and autoencoder may be on another device than the denoiser (`encoder_device`), or rest on the CPU
    between calls (`offload_encoders`); what they return is on the denoiser's, and gradients flow back.
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
        self.encoder_device = next(vae.parameters()).device
        self.text_changes: list[TextChange] = []
        self.offloaded = False
        self.vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.size_factor = self.vae_factor
        self.latent_channels = int(vae.config.latent_channels)

    def here(self, x: Tensor) -> Tensor:
        """x in the denoiser's dtype and on its device."""
        return x.to(self.device, self.dtype)

    @contextmanager
    def using(
        self, *, denoiser: nn.Module | None = None, encoders: Mapping[int, nn.Module] | None = None
    ) -> Iterator[None]:
        """Inside, other modules of the same architecture stand in place of the denoiser and of some text
        encoders.

        encoders: by their place in `encoders`.
        """
        before = self.denoiser, list(self.encoders)
        try:
            self.denoiser = denoiser or self.denoiser
            for place, module in (encoders or {}).items():
                self.encoders[place] = module
            yield
        finally:
            self.denoiser, self.encoders[:] = before

    def offload_encoders(self) -> None:
        """From now on the text encoders and the autoencoder are on `device` only while they work, else on the
        CPU. Changes nothing where `device` is the CPU.
        """
        self.offloaded = self.device.type != "cpu"
        if self.offloaded:
            self.encoder_device = self.device
            for module in (self.vae, *self.encoders):
                module.to("cpu")

    @contextmanager
    def at_work(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, offloaded modules are on `device`: as copies, the weights on the CPU wait for the end.

        So the way back costs nothing, and a graph that was recorded inside keeps the copies that it needs for
        as long as it lives (checkpointing has to go around the whole call). A module with a trained parameter
        comes to stay: its optimiser needs it in one place. (A method that trains one moves it there before it
        hands out `trainables`.)
        """
        replaced: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for module in modules if self.offloaded else ():
                if _trained(module):
                    module.to(self.device)
                else:
                    _copy_to(module, self.device, replaced)
            yield
        finally:
            for held, name, x in replaced:
                held[name] = x

    @contextmanager
    def text_at_work(self) -> Iterator[None]:
        """Inside: the text encoders are where they work."""
        with self.at_work(*self.encoders):
            yield

    def encode_image(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w): posterior mean + std * noise; mean if noise
        is None.
        """
        return self.posterior(pixels).draw(noise)

    def posterior(self, pixels: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] -> what `encode_image` draws from."""
        config = self.vae.config
        with self.at_work(self.vae):
            found = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        mean, std = found.mean.to(self.device), found.std.to(self.device)
        return Posterior(mean, std, config.scaling_factor, config.shift_factor or 0.0)

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Scaled latents -> (B, 3, H, W) float32 in [0, 1]; differentiable; not clamped if asked."""
        config = self.vae.config
        with self.at_work(self.vae):
            z = latents.to(self.vae.device, self.vae.dtype) / config.scaling_factor
            if config.shift_factor:
                z = z + config.shift_factor
            decoded = self.vae.decode(z).sample
        pixels: Tensor = decoded.to(self.device).float() / 2 + 0.5
        return pixels.clamp(0, 1) if clamp else pixels


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _copy_to(
    module: nn.Module, device: torch.device, replaced: list[tuple[dict[str, Any], str, Tensor]]
) -> None:
    """Put copies on `device` in place of all parameters and buffers; shared ones stay shared.

    replaced: gets (dictionary, name, original) of each.
    """
    copies: dict[Tensor, Tensor] = {}
    for part in module.modules():
        both: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for held in both:
            for name, x in held.items():
                if x is not None:
                    if x not in copies:
                        copies[x] = x.detach().to(device)
                    replaced.append((held, name, x))
                    held[name] = copies[x]


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
