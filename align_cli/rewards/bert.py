"""BLIP's text side: the WordPiece tokenizer of uncased BERT."""

from __future__ import annotations

from pathlib import Path

from transformers import BertTokenizer

from align_cli.errors import UserError, first_line
from align_cli.rewards.places import Place, option
from align_cli.rewards.weights import read_json

BERT = "google-bert/bert-base-uncased"
"""Where the vocabulary comes from if none lies beside the weights. Source: BLIP, init_tokenizer (its two
tokens [DEC] and [ENC] come after this vocabulary; no reward here uses them).
"""


def bert_tokenizer(own: Place) -> BertTokenizer:
    """The tokenizer from vocab.txt or tokenizer.json beside the weights, else from `BERT`.

    Raises:
        UserError: no vocabulary is there; names the files and the option.
    """
    for at in (own, Place(own.reward, BERT, repo=BERT)):
        for name in ("vocab.txt", "tokenizer.json"):
            if (path := at.find(name)) is not None:
                return tokenizer_from(_vocabulary(path, own.reward))
    raise UserError(
        f"{own.reward}: no vocab.txt (or tokenizer.json) beside the weights in {own.label}, and {BERT} is "
        "not in the local cache; put its vocab.txt beside the weights and pass the folder with "
        f"{option(own.reward)}"
    )


def tokenizer_from(vocabulary: dict[str, int]) -> BertTokenizer:
    """The tokenizer of a vocabulary: piece -> id."""
    return BertTokenizer(vocab=vocabulary, do_lower_case=True)


def _vocabulary(path: Path, reward: str) -> dict[str, int]:
    if path.suffix == ".json":
        vocabulary = read_json(path, reward).get("model", {}).get("vocab")
        if not isinstance(vocabulary, dict):
            raise UserError(f"{reward}: {path} holds no WordPiece vocabulary")
        return vocabulary
    try:
        pieces = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{reward}: {path} cannot be read: {first_line(error)}") from error
    return {piece: number for number, piece in enumerate(pieces)}
