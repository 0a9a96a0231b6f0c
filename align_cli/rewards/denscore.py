"""Denscore, the reward of LongAlign: the mean over the sentences of a caption.

Letters: B pictures (and captions), S segments of all captions, D the common width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from align_cli.rewards import preprocess
from align_cli.rewards.base import Cut, Request
from align_cli.rewards.clip import TINY_CLIP, ClipReward, Kind, build_kind, ways
from align_cli.sentences import split_sentences

_SCALE = "mean over sentences of the cosine of image and sentence"

KINDS = {
    "denscore": Kind(
        "luping-liu/Denscore",
        "Denscore, ViT-H/14",
        "ViT-H-14",
        ways(preprocess.SHORTEST_FLOOR),
        scale=_SCALE,
    ),
    "tiny-denscore": replace(TINY_CLIP, scale=_SCALE),
}
"""Of the published one: longalign.md 5.1, and the processor that the official code names (CLIP-ViT-H-14 of
laion).
"""


class Denscore(ClipReward):
    """score = x . t, t the mean of the sentences' unit vectors (not renormalised). LongAlign's tables show it
    times 100. Source: LongAlign loss.py, dense_score.
    """

    def text_vectors(self, prompts: Sequence[str]) -> Tensor:
        """B captions -> (B, D) float32: means of the unit vectors of their segments, so at most of length
        1.
        """
        segments = [split_sentences(text) for text in prompts]
        vectors = super().text_vectors([s for own in segments for s in own])
        ends = accumulate(map(len, segments), initial=0)
        return torch.stack([vectors[a:b].mean(0) for a, b in pairwise(ends)])

    def sentence_scores(self, image: Tensor, prompt: str) -> list[tuple[str, float]]:
        """Each sentence of one caption with its own cosine. image: (3, H, W) in [0, 1]."""
        segments = split_sentences(prompt)
        with torch.no_grad():
            values = super().text_vectors(segments) @ self.image_vectors(image[None])[0]
        return list(zip(segments, values.tolist(), strict=True))

    def audit(self, prompts: Sequence[str]) -> list[Cut]:
        """Per caption: the tokens of its longest sentence, and all that any sentence loses."""
        out = []
        for text in prompts:
            cuts = super().audit(split_sentences(text))
            lost = " ".join(cut.lost for cut in cuts if cut.lost)
            out.append(Cut(self.limit, max(cut.tokens for cut in cuts), lost))
        return out


def build_denscore(request: Request) -> ClipReward:
    return build_kind(request, KINDS[request.name], Denscore)
