"""T5 beside a denoiser that does not know it: where its encoder comes from, and what it says of prompts.

Letters: B prompts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import T5EncoderModel, T5TokenizerFast

from align_cli.cuts import Cut, cuts
from align_cli.models.encoders import EncoderKind, load_encoder
from align_cli.models.frozen import t5_states

EMBEDDED = "embedded:tiny-t5"
"""The T5 of the shapes world."""
LARGE = "google-t5/t5-large"
"""The T5 of LongAlign."""
T5 = EncoderKind(
    title="T5",
    model_type="t5",
    encoder=T5EncoderModel,
    tokenizer=T5TokenizerFast,
    part="text_encoder_3",
    words="tokenizer_3",
    words_files=(frozenset({"tokenizer.json"}), frozenset({"spiece.model"})),
    how=f"get it with 'hf download {LARGE}' where there is a network, or name a T5 with "
    f"--set longalign.t5=PLACE (hub id, folder of transformers or diffusers, or {EMBEDDED})",
)


class T5Reader:
    """Whole prompts as a frozen T5 reads them, padded to `length`, its padding read along.

    Source: LongAlign tools.py, caption2embed: no attention mask, and every state is used.
    """

    def __init__(self, tokenizer: Any, encoder: T5EncoderModel, length: int) -> None:
        """length: tokens, the end token included."""
        self.tokenizer, self.encoder, self.length = tokenizer, encoder, length
        self.width = int(encoder.config.d_model)

    @torch.no_grad()
    def states(self, prompts: list[str]) -> Tensor:
        """(B, length, D), in T5's dtype and on its device, without gradient."""
        return t5_states(self.tokenizer, self.encoder, prompts, self.length)

    def audit(self, prompts: Sequence[str]) -> dict[str, list[Cut]]:
        """What is cut from the prompts."""
        return {"t5": cuts(self.tokenizer, self.length, prompts)}


def load_t5(source: str, *, device: torch.device | str, dtype: torch.dtype) -> tuple[Any, T5EncoderModel]:
    """Tokenizer and frozen encoder of a T5; of a whole T5 the encoder's weights alone are kept.

    Args:
        source: hub id, folder (of transformers, or a pipeline of diffusers with text_encoder_3), or
            "embedded:tiny-t5".
    Raises:
        UserError: there is none, or it is damaged; says how to get one.
    """
    found: tuple[Any, T5EncoderModel] = load_encoder(T5, source, device=device, dtype=dtype)
    return found
