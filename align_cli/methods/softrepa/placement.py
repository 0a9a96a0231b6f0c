"""Where the soft tokens of a family go: their shapes, what they start from, and how they enter the denoiser.

Letters: B batch, N soft tokens, D text width, P width of the MMDiT's text stream, Y blocks with tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.methods.softrepa.config import SoftREPAConfig
from align_cli.methods.softrepa.mmdit import block_tokens, inserted_per_block
from align_cli.methods.softrepa.tokens import SoftTokens, inserted, selected_blocks
from align_cli.models.base import BaseModel


class Placement(Protocol):
    """How the soft tokens of one family enter its denoiser."""

    token_shape: tuple[int, ...]
    """Shape of dc_tokens."""
    table_width: int
    """Columns of dc_t_tokens."""
    idle: tuple[str, ...]
    """Settings of the method that do nothing in this family."""

    def project(self, encoding: Tensor) -> Tensor:
        """A row of the text encoding, (D,), in the space of the tokens."""
        ...

    def soft(self, denoiser: nn.Module, tokens: SoftTokens, t: Tensor) -> Tensor:
        """The tokens as the denoiser reads them at timesteps t () or (B,): (..., 1 or B, N, width)."""
        ...

    def inserted(
        self, denoiser: nn.Module, soft_at: Callable[[Tensor], Tensor], scale: float
    ) -> AbstractContextManager[None]:
        """Soft tokens at work on a denoiser of this family inside the `with` block. soft_at: as `soft` gives
        them, from the timesteps of a call.
        """
        ...


class UNetPlacement:
    """SD1.x, SD2.x, SDXL: one set of tokens behind the first text token, for chosen stages of the UNet."""

    idle: tuple[str, ...] = ("num_layers", "token_space")

    def __init__(self, unet: Any, config: SoftREPAConfig) -> None:
        if config.token_space != "text":
            raise UserError(
                "softrepa.token_space projected is for SD3 alone: a UNet reads the text as it is encoded"
            )
        try:
            selected_blocks(unet, config.stages)
        except ValueError as error:
            raise UserError(f"softrepa.stages: {error}") from error
        self.stages = config.stages
        self.table_width = int(unet.config.cross_attention_dim)
        self.token_shape: tuple[int, ...] = (config.num_tokens, self.table_width)

    def project(self, encoding: Tensor) -> Tensor:
        """The row itself."""
        return encoding

    def soft(self, denoiser: nn.Module, tokens: SoftTokens, t: Tensor) -> Tensor:
        """(1 or B, N, D); see `SoftTokens.rows`."""
        return tokens.rows(t)

    def inserted(
        self, denoiser: nn.Module, soft_at: Callable[[Tensor], Tensor], scale: float
    ) -> AbstractContextManager[None]:
        """See `tokens.inserted`."""
        return inserted(denoiser, self.stages, soft_at, scale)


class MMDiTPlacement:
    """SD3: a set of tokens of its own in front of the text for each of the first blocks."""

    idle: tuple[str, ...] = ("stages",)

    def __init__(self, transformer: Any, config: SoftREPAConfig) -> None:
        blocks = len(transformer.transformer_blocks)
        if config.num_layers > blocks:
            raise UserError(
                f"softrepa.num_layers is {config.num_layers}, but this transformer has {blocks} blocks; "
                f"give 1 to {blocks}, or -1 for all"
            )
        layers = blocks if config.num_layers == -1 else config.num_layers
        stream = int(transformer.config.caption_projection_dim)
        self.projected = config.token_space == "projected"
        width = stream if self.projected else int(transformer.config.joint_attention_dim)
        self.embedder: Callable[[Tensor], Tensor] = transformer.context_embedder
        self.token_shape: tuple[int, ...] = (layers, config.num_tokens, width)
        self.table_width = layers * stream

    def project(self, encoding: Tensor) -> Tensor:
        """The row itself, or in the text stream if the tokens are there."""
        return self.embedder(encoding) if self.projected else encoding

    def soft(self, denoiser: nn.Module, tokens: SoftTokens, t: Tensor) -> Tensor:
        """(Y, 1 or B, N, P); see `mmdit.block_tokens`."""
        return block_tokens(denoiser, tokens, t, projected=self.projected)

    def inserted(
        self, denoiser: nn.Module, soft_at: Callable[[Tensor], Tensor], scale: float
    ) -> AbstractContextManager[None]:
        """See `mmdit.inserted_per_block`."""
        return inserted_per_block(denoiser, soft_at, self.token_shape[0], scale)


PLACEMENTS: dict[str, Callable[[Any, SoftREPAConfig], Placement]] = {
    "sd15": UNetPlacement,
    "sd21": UNetPlacement,
    "sdxl": UNetPlacement,
    "sd3": MMDiTPlacement,
}
"""Family -> its placement; the families of the method."""


def placement(model: BaseModel, config: SoftREPAConfig) -> Placement:
    """The placement for a model. UserError for another family, and for settings that do not fit the model."""
    if model.family not in PLACEMENTS:
        raise UserError(
            f"softrepa works on {', '.join(sorted(PLACEMENTS))}; {model.model_id} is {model.family}"
        )
    return PLACEMENTS[model.family](model.denoiser, config)
