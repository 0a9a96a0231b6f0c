"""What the model classes of all families share: frozen modules, the autoencoder, reading prompts.

Letters: B batch, L tokens, D text width, C h w latent, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from align_cli.cuts import Cut
from align_cli.diffusion.process import Process
from align_cli.models.base import Critic, Posterior, TextChange, TextCond

if TYPE_CHECKING:
    from align_cli.models.attention import AttentionMaps
    from align_cli.models.segments import SegmentReader, Tower


class FrozenModel(ABC):
    """The part of `align_cli.models.base.BaseModel` that does not depend on the family.

    encoders: the text encoders, in the pipeline's order. All modules are put into eval mode and frozen.
    Encoders and autoencoder may be on another device than the denoiser (`encoder_device`), or rest on the CPU
    between calls (`offload_encoders`); what they return is on the denoiser's, and gradients flow back.
    """

    family: str
    image_size: int
    text_width: int
    max_image_size: int = 0
    denoiser_part: str = "unet"
    zeros_for_empty: bool = False
    """Whether the unconditional text is zeros, not the encoding of the empty prompt."""

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
        self.denoiser_id = ""
        self.denoiser, self.vae, self.encoders = denoiser, vae, list(encoders)
        for module in (denoiser, vae, *encoders):
            module.eval().requires_grad_(False)
        weight = next(denoiser.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.encoder_device = next(vae.parameters()).device
        self.text_changes: list[TextChange] = []
        self.critics: list[Critic] = []
        self.reader: SegmentReader | None = None
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

    # ------------------------------------------------------------ text

    @contextmanager
    def reading(self, reader: SegmentReader | None) -> Iterator[None]:
        """Inside, prompts are read by `reader`; None: as the pipeline does."""
        before = self.reader
        try:
            self.reader = reader
            yield
        finally:
            self.reader = before

    @property
    def token_limit(self) -> int:
        """Tokens of a prompt that are read."""
        return self.plain_limit if self.reader is None else self.reader.limit

    def token_count(self, prompt: str) -> int:
        """Tokens of the prompt, before anything is cut."""
        return self.plain_count(prompt) if self.reader is None else self.reader.count(prompt)

    def audit_text(self, prompts: Sequence[str]) -> dict[str, list[Cut]]:
        """What each text encoder reads of the prompts."""
        return self.plain_audit(prompts) if self.reader is None else self.reader.audit(prompts)

    def encode_text(self, prompts: list[str]) -> TextCond:
        """The prompts as the denoiser reads them. No gradient unless a text encoder requires it."""
        return self.plain_text(prompts) if self.reader is None else self.reader.encode(prompts)

    def uncond(self, batch: int) -> TextCond:
        """Zeros, or the encoding of the empty prompt (see `zeros_for_empty`), `batch` rows."""
        return self.plain_uncond(batch) if self.reader is None else self.reader.uncond(batch)

    @property
    @abstractmethod
    def plain_limit(self) -> int:
        """`token_limit` without a reader."""

    @abstractmethod
    def plain_count(self, prompt: str) -> int:
        """`token_count` without a reader."""

    @abstractmethod
    def plain_audit(self, prompts: Sequence[str]) -> dict[str, list[Cut]]:
        """`audit_text` without a reader."""

    @abstractmethod
    def plain_text(self, prompts: list[str]) -> TextCond:
        """`encode_text` without a reader."""

    @abstractmethod
    def plain_uncond(self, batch: int) -> TextCond:
        """`uncond` without a reader."""

    @abstractmethod
    def towers(self) -> list[Tower]:
        """The text encoders for reading sentence by sentence. UserError if the family has no use for that."""

    def words(self) -> tuple[Any, int]:
        """See `BaseModel.words`."""
        return self.towers()[0].tokenizer, self.token_limit

    @abstractmethod
    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond, keep: AttentionMaps | None = None) -> Tensor:
        """See `BaseModel.predict`."""

    def pooled_text(self, prompts: list[str]) -> Tensor | None:
        """The pooled text (B, P) of whole prompts, None where the family has none."""
        return None

    @property
    def summary_width(self) -> int:
        """Of `summarised`; 0 for a family whose summaries nothing reads."""
        return 0

    def summarised(self, prompts: list[str]) -> tuple[TextCond, Tensor]:
        """`encode_text`, and one vector (B, P) for each whole prompt, truncated as ever."""
        cond = self.encode_text(prompts)
        summary = cond.pooled if cond.pooled is not None else self.pooled_text(prompts)
        assert summary is not None
        return cond, summary

    # ------------------------------------------------------------ pictures

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
    return penultimate(encoder, token_ids(tokenizer, prompts, length)["input_ids"])


def penultimate(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`clip_penultimate` of token ids (B, L)."""
    output = encoder(ids.to(encoder.device), output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def t5_states(tokenizer: Any, encoder: nn.Module, prompts: list[str], length: int) -> Tensor:
    """(B, length, D): T5's last states of whole prompts, padded and truncated to `length`.

    No attention mask, as in diffusers and in LongAlign: padding is attended to, and its states are used.
    """
    ids = token_ids(tokenizer, prompts, length)["input_ids"]
    states: Tensor = encoder(ids.to(next(encoder.parameters()).device))[0]
    return states
