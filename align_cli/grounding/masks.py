"""Masks of the nouns of a prompt in a picture.

Letters: B pictures, N nouns of a picture, S boxes of a picture, H W pixels.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskRequest:
    """What a masker is built from. MASKERS maps its name to a builder.

    detector, segmenter: hub ids or folders, "" for the builder's own. box_threshold: least score of a box.
    text_threshold: least score of a token that belongs to a box's phrase. dtype: of the networks' weights.
    """

    detector: str = ""
    segmenter: str = ""
    box_threshold: float = 0.3
    text_threshold: float = 0.25
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


class Masker(Protocol):
    """Finds the nouns of a prompt in its picture."""

    def masks(self, images: Tensor, nouns: Sequence[Sequence[str]]) -> list[Tensor | None]:
        """One mask for each noun of each picture, without gradients.

        Args:
            images: (B, 3, H, W) float, clamped to [0, 1] here. nouns: of each of the B pictures.
        Returns:
            B times (N, H, W) bool on the device of the pictures: all False where a noun was not found,
            (0, H, W) for a picture without nouns; None where nothing could be said of the picture, which is
            then left out.
        Raises:
            ValueError: another number of noun lists than of pictures.
        """


def sent_to_detector(nouns: Sequence[str]) -> str:
    """The nouns as GroundingDINO reads them: lower case, a full stop after each.

    Source: CoMat gsam_interface.py, GroundingDINO's preprocess_caption.
    """
    return " . ".join(nouns).lower().strip() + "."


def clean_phrase(phrase: str) -> str:
    """What a detector says that a box shows, without full stops, special tokens and blanks around it."""
    for mark in (".", "[CLS]", "[SEP]", "[PAD]"):
        phrase = phrase.replace(mark, "")
    return phrase.strip()


def counted(nouns: Sequence[str], phrases: Sequence[str]) -> list[tuple[int, int]]:
    """(box, noun) of every box whose phrase is one of the nouns, in the order of the boxes. A phrase of two
    nouns ("dog cat") counts for neither.

    Source: CoMat gsam_interface.py. Deviations: words are compared as the detector's tokenizer leaves them,
    without capitals, accents and blanks ("T-shirt" comes back as "t - shirt").
    """
    said = [_plain(clean_phrase(phrase)) for phrase in phrases]
    wanted = [_plain(clean_phrase(noun)) for noun in nouns]
    return [
        (box, i) for box, words in enumerate(said) for i, noun in enumerate(wanted) if words == noun != ""
    ]


def _plain(words: str) -> str:
    apart = unicodedata.normalize("NFD", words.lower())
    return "".join(c for c in apart if unicodedata.category(c) != "Mn" and not c.isspace())


def masks_of_nouns(number: int, pairs: Sequence[tuple[int, int]], segments: Tensor) -> Tensor:
    """The union of the segments of each noun's boxes.

    Args:
        number: N. pairs: P times (box, noun), as of `counted`. segments: (P, H, W) bool, of each pair.
    Returns:
        (N, H, W) bool; all False for a noun without a box.
    Raises:
        ValueError: another number of segments than of pairs.
    Source: CoMat gsam_interface.py, get_mask.
    """
    if len(segments) != len(pairs):
        raise ValueError(f"{len(pairs)} pairs of box and noun, but {len(segments)} segments")
    out = torch.zeros(number, *segments.shape[1:], dtype=torch.bool, device=segments.device)
    for (_, noun), segment in zip(pairs, segments, strict=True):
        out[noun] |= segment
    return out
