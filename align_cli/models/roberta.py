"""RoBERTa, which reads the phrases that are to be found in a picture.

Letters: B phrases, L tokens of the longest, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

from align_cli.errors import UserError
from align_cli.models.encoders import EncoderKind, load_encoder

EMBEDDED = "embedded:tiny-roberta"
"""The RoBERTa of the shapes world."""
BASE = "FacebookAI/roberta-base"
"""The RoBERTa of DPT."""


class RobertaStates(RobertaModel):
    """RoBERTa without its pooler, of a file that may have one, or heads."""

    _keys_to_ignore_on_load_unexpected = ("pooler", "lm_head", "classifier", "qa_outputs")

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config, add_pooling_layer=False)


ROBERTA = EncoderKind(
    title="RoBERTa",
    model_type="roberta",
    encoder=RobertaStates,
    tokenizer=RobertaTokenizerFast,
    part="text_encoder",
    words="tokenizer",
    words_files=(frozenset({"tokenizer.json"}), frozenset({"vocab.json", "merges.txt"})),
    how=f"get it with 'hf download {BASE}' where there is a network, or name a RoBERTa with "
    f"--set dpt.phrase_encoder=PLACE (hub id, folder of transformers, or {EMBEDDED})",
)


class PhraseReader:
    """A frozen RoBERTa and its tokenizer. Phrases of more tokens than it has positions are cut.

    Source: DPT models/model.py: the last hidden states, padding masked out. Deviations: DPT fails on a phrase
    that is too long.
    """

    def __init__(self, tokenizer: Any, encoder: RobertaModel) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        config = encoder.config
        self.width = int(config.hidden_size)
        positions = int(config.max_position_embeddings) - int(config.pad_token_id) - 1
        self.limit = min(int(tokenizer.model_max_length), positions)
        """Tokens that are read, start and end included; the positions begin after that of padding."""

    def read(self, phrases: Sequence[str]) -> Any:
        """BatchEncoding of the phrases: input_ids and attention_mask (B, L) int64 on the CPU, filled up to
        the longest; its `char_to_token` tells the token of a character.
        """
        return self.tokenizer(
            list(phrases), padding="longest", truncation=True, max_length=self.limit, return_tensors="pt"
        )

    @torch.no_grad()
    def states(self, encoding: Any) -> Tensor:
        """(B, L, W), in the encoder's dtype (also under autocast) and on its device, without gradient.
        encoding: from `read`.
        """
        device = self.encoder.device
        with torch.autocast(device.type, enabled=False):
            states: Tensor = self.encoder(
                encoding["input_ids"].to(device), encoding["attention_mask"].to(device)
            ).last_hidden_state
        return states


def load_roberta(source: str, *, device: torch.device | str, dtype: torch.dtype) -> PhraseReader:
    """The frozen RoBERTa of a place; of one with heads, the encoder alone.

    Args:
        source: hub id, folder of transformers, or "embedded:tiny-roberta".
    Raises:
        UserError: there is none, or it is damaged; says how to get one.
    """
    tokenizer, encoder = load_encoder(ROBERTA, source, device=device, dtype=dtype)
    known = int(encoder.config.vocab_size)
    if len(tokenizer) > known:
        raise UserError(
            f"RoBERTa {source} is damaged: its tokenizer has {len(tokenizer)} tokens, its encoder knows "
            f"{known}; {ROBERTA.how}"
        )
    return PhraseReader(tokenizer, encoder)
