"""The base model contract: a frozen text-to-image pipeline of one family around the real library modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from align_cli.cuts import Cut
from align_cli.diffusion.process import Process

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from align_cli.models.attention import AttentionMaps
    from align_cli.models.segments import SegmentReader, Tower


@dataclass
class TextCond:
    """Encoded prompts. tokens (B, L, D); pooled (B, P) or None; time_ids (B, 6) or None."""

    tokens: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> TextCond:
        """Rows of every field."""
        take = lambda x: None if x is None else x[index]  # noqa: E731
        return TextCond(self.tokens[index], take(self.pooled), take(self.time_ids))

    @staticmethod
    def cat(parts: list[TextCond]) -> TextCond:
        """Concatenate rows of every field."""
        join = lambda xs: None if xs[0] is None else torch.cat(xs)  # noqa: E731
        return TextCond(
            torch.cat([p.tokens for p in parts]),
            join([p.pooled for p in parts]),
            join([p.time_ids for p in parts]),
        )


@dataclass
class Posterior:
    """What the autoencoder says about pictures: latents are (mean + std * noise - shift) * scale.

    mean, std: (B, C, h, w), unscaled, in the autoencoder's dtype; std is None for one frozen draw in `mean`.
    """

    mean: Tensor
    std: Tensor | None
    scale: float
    shift: float = 0.0

    def draw(self, noise: Tensor | None) -> Tensor:
        """Scaled latents (B, C, h, w). noise: (B, C, h, w) of N(0, 1), None for the mean; unused by a frozen
        draw.
        """
        latents = self.mean
        if noise is not None and self.std is not None:
            latents = latents + self.std * noise.to(latents.device, latents.dtype)
        if self.shift:
            latents = latents - self.shift
        return latents * self.scale


class TextChange(Protocol):
    """What an adapter makes of the text: embeddings that are mixed with the model's own, from some step on.

    Source: TextCraftor section 4.1: embeddings are mixed, not weights.
    """

    scale: float
    """Share of the changed embedding: 0 is the model's own, 1 the changed one."""

    def at_work(self) -> AbstractContextManager[None]:
        """Inside, the model reads prompts as the adapter has it, whatever the scale."""
        ...

    def first_step(self, steps: int) -> int:
        """Index of the first of `steps` sampling steps that it is for; 0 is the noisiest."""
        ...

    def encode(self, prompts: list[str]) -> TextCond:
        """`BaseModel.encode_text` as the adapter has it."""
        ...

    def uncond(self, batch: int) -> TextCond:
        """`BaseModel.uncond` as the adapter has it."""
        ...


class Critic(Protocol):
    """What an adapter says of a picture in the making: how well does it fit its prompt, and what would make
    it fit better?

    Source: DPT's self-correction, generate_with_correction of txt2img.py.
    """

    def judge(self, prompts: list[str]) -> Callable[..., tuple[Tensor, Tensor]]:
        """A function of noisy latents (B, C, h, w), one for each prompt, and t (): scores (B,), and the
        gradient (B, C, h, w) of their sum with respect to the latents. With dropout=True under the
        dropout of training.
        """
        ...


class BaseModel(Protocol):
    """A frozen pipeline of one family. Every module is in eval mode and requires no gradient."""

    family: str
    """sd15, sd21 (both UNets with one text encoder), sdxl or sd3."""
    model_id: str
    """What the user named: alias, hub id or absolute path."""
    denoiser_id: str
    """Hub id or path of a separately tuned denoiser in place of the pipeline's own; empty for that."""
    process: Process
    denoiser: nn.Module
    """The UNet or transformer, for methods that hook into it."""
    denoiser_part: str
    """What the pipeline calls it: unet or transformer."""
    image_size: int
    """Pixels of the model's own square picture."""
    latent_channels: int
    text_width: int
    """D of the encoded text."""
    vae_factor: int
    """Pixels per latent position along one side."""
    size_factor: int
    """The sides of a picture are multiples of it, in pixels: vae_factor, times the patch of a transformer."""
    max_image_size: int
    """Pixels of the longest side the denoiser has positions for; 0 if there is no such limit."""
    text_changes: list[TextChange]
    """What adapters that are at work make of the text; `models.conditioning.StepText` mixes it in."""
    critics: list[Critic]
    """What adapters that are at work can say of a picture in the making; `sampling.Correction` uses it."""
    reader: SegmentReader | None
    """What reads prompts in place of the pipeline's own way; None for that."""
    encoders: list[nn.Module]
    """The text encoders, in the pipeline's order."""
    vae: AutoencoderKL
    """The autoencoder."""
    device: torch.device
    """Of the denoiser, and of every tensor that a method here returns."""
    encoder_device: torch.device
    """Where the text encoders and the autoencoder work."""
    dtype: torch.dtype
    offloaded: bool
    """Whether text encoders and autoencoder are on `device` only while they work."""

    def using(
        self, *, denoiser: nn.Module | None = None, encoders: Mapping[int, nn.Module] | None = None
    ) -> AbstractContextManager[None]:
        """Inside, other modules of the same architecture stand in place of the denoiser and of some text
        encoders (by their place in `encoders`).
        """
        ...

    def offload_encoders(self) -> None:
        """From now on the text encoders and the autoencoder are on `device` only while they work, else on the
        CPU.
        """
        ...

    def at_work(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """Inside, offloaded modules are on `device`. The methods here see to that themselves; around a call
        whose activations are computed again in the backward pass it has to reach as far as that.
        """
        ...

    def reading(self, reader: SegmentReader | None) -> AbstractContextManager[None]:
        """Inside, prompts are read by `reader`; None: as the pipeline does."""
        ...

    def encode_text(self, prompts: list[str]) -> TextCond:
        """Encode prompts, truncated to the model's token limit. No gradient unless a text encoder requires
        it.
        """
        ...

    def uncond(self, batch: int) -> TextCond:
        """The unconditional input of classifier-free guidance, `batch` rows (SD1.5: the encoding of "")."""
        ...

    @property
    def summary_width(self) -> int:
        """P of `summarised`; 0 for a family whose summaries nothing reads."""
        ...

    def summarised(self, prompts: list[str]) -> tuple[TextCond, Tensor]:
        """`encode_text`, and one vector (B, P) for each whole prompt: the state of the end token after the
        final norm (SD1.x, SD2.x), the pooled text of SDXL.
        """
        ...

    def token_count(self, prompt: str) -> int:
        """Tokens of the prompt including start and end, before truncation."""
        ...

    @property
    def token_limit(self) -> int:
        """Tokens the text encoder reads, start and end included."""
        ...

    def audit_text(self, prompts: Sequence[str]) -> dict[str, list[Cut]]:
        """What each text encoder reads of the prompts: name of the encoder in the pipeline -> one per prompt.
        The first encoder is called text_encoder, the others text_encoder_2 and text_encoder_3.
        """
        ...

    def plain_audit(self, prompts: Sequence[str]) -> dict[str, list[Cut]]:
        """`audit_text` without a reader."""
        ...

    def towers(self) -> list[Tower]:
        """The CLIP text encoders with their tokenizers, whose states lie side by side in the tokens of a
        prompt. UserError if the family has no use for that.
        """
        ...

    def words(self) -> tuple[Any, int]:
        """The tokenizer whose tokens attention maps are of, and how many of a prompt it reads: the first one,
        whose tokens are the first rows of the encoded text.
        """
        ...

    def encode_image(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w): posterior mean + std * noise; mean if noise
        is None.
        """
        ...

    def posterior(self, pixels: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] -> what `encode_image` draws from."""
        ...

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Scaled latents -> (B, 3, H, W) float32 in [0, 1]; differentiable; not clamped if asked."""
        ...

    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond, keep: AttentionMaps | None = None) -> Tensor:
        """eps, v or velocity as the family is trained. z_t (B, C, h, w), t () or (B,) -> (B, C, h, w).

        keep: filled with attention maps, inside `attention.watched(denoiser)`.
        """
        ...
