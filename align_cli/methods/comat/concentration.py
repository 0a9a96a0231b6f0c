"""CoMat's attribute concentration: attention on the words of a noun belongs to where the noun is.

Letters: B prompts and pictures, N nouns of a prompt, P kept tokens, M maps, H heads, r side of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align_cli.grounding.entities import Entity
from align_cli.losses import attention_losses, mask_at
from align_cli.models.attention import AttentionMaps


@dataclass(frozen=True)
class Words:
    """The nouns of B prompts, and which tokens are theirs and their attributes'.

    entities: those of each prompt. positions: (B, P) int64, the tokens of all of them; rows are filled up
    with 0, the begin token. own: (N, P) bool each, which of these are those of a noun.
    """

    entities: list[list[Entity]]
    positions: Tensor
    own: list[Tensor]

    @classmethod
    def of(cls, entities: list[list[Entity]], device: torch.device) -> Words:
        columns = [sorted({p for entity in found for p in entity.positions}) for found in entities]
        width = max(map(len, columns), default=0)
        rows = [column + [0] * (width - len(column)) for column in columns]
        positions = torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), width)
        own = [  # no word is at 0
            torch.tensor([[p in entity.positions for p in row] for entity in found], dtype=torch.bool)
            for found, row in zip(entities, rows, strict=True)
        ]
        return cls(entities, positions, [x.view(len(x), width).to(device) for x in own])

    @property
    def nouns(self) -> list[list[str]]:
        """Of each prompt, as the detector is asked for them."""
        return [[entity.noun for entity in found] for found in self.entities]

    @property
    def count(self) -> int:
        """Nouns of all prompts."""
        return sum(map(len, self.entities))

    def losses(self, kept: Sequence[AttentionMaps], masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Token and pixel loss: () float32 each, summed over steps and layers, the mean over B.

        Args:
            kept: maps of `positions` in each step, (B, H, r, r, P). masks: of each picture (N, h, w) bool,
            None for a picture that is left out.
        Source: CoMat, AttrConcenTrainableSDPipeline.py; nothing is averaged over steps, layers or maps of
        the token loss. Pictures without nouns, or left out, count in the mean.
        """
        token = pixel = torch.zeros((), device=self.positions.device)
        for maps in kept:
            for found in maps.maps.values():
                whole = torch.stack(found, 1)
                for one, own, mask in zip(whole, self.own, masks, strict=True):
                    if mask is None or not len(mask):
                        continue
                    tokens, pixels = attention_losses(one, own, mask_at(mask.to(one.device), one.shape[-2]))
                    token, pixel = token + tokens, pixel + pixels
        return token / len(self.own), pixel / len(self.own)
