"""T5 beside a denoiser that does not know it: where its encoder comes from, and what it says of prompts.

Letters: B prompts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5EncoderModel, T5TokenizerFast

from align_cli.cuts import Cut, cuts
from align_cli.errors import UserError
from align_cli.models.frozen import t5_states
from align_cli.models.loading import load_tokenizer, load_weights, quiet
from align_cli.models.sources import (
    TRANSFORMERS_STEM,
    find_module,
    read_json,
    weight_file,
    with_tokenizer,
)

EMBEDDED = "embedded:tiny-t5"
"""The T5 of the shapes world."""
LARGE = "google-t5/t5-large"
"""The T5 of LongAlign."""
HOW = (
    f"get it with 'hf download {LARGE}' where there is a network, or name a T5 with --set longalign.t5=PLACE "
    f"(hub id, folder of transformers or diffusers, or {EMBEDDED})"
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
    if "/" not in source and not source.startswith("embedded:") and not Path(source).expanduser().is_dir():
        raise UserError(f"no T5 {source!r}: there is no such folder; {HOW}")
    try:
        found, prefix = find_module(source, "text_encoder_3", half=dtype != torch.float32, advice=HOW)
    except UserError as error:
        raise UserError(str(error) if HOW in str(error) else f"no T5: {error}; {HOW}") from error
    words = "tokenizer_3/" if prefix else ""
    found = with_tokenizer(found, words)
    weight = weight_file(found, prefix, TRANSFORMERS_STEM, half=dtype != torch.float32)
    described = f"{prefix}config.json" in found.files
    if weight is None or not described:
        lacking = f"{TRANSFORMERS_STEM}.safetensors (or .bin)" if described else "config.json"
        raise UserError(f"no T5 in {source}: no {prefix}{lacking} in {found.folder}; {HOW}")
    kind = read_json(found.folder / prefix / "config.json", source).get("model_type")
    if kind != "t5":
        raise UserError(f"{source} is no T5: its model_type is {kind!r}; {HOW}")
    with quiet():
        tokenizer = load_tokenizer(T5TokenizerFast, found, words.rstrip("/"))
        encoder = load_weights(
            T5EncoderModel, found.folder / prefix, weight.rpartition("/")[2], dtype, f"T5 {source}"
        )
    return tokenizer, encoder.to(device).eval().requires_grad_(False)
