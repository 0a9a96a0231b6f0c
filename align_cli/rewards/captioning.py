"""What rewards have in common that ask a captioner how likely the prompt is as the picture's caption.

Letters: B pictures, L tokens, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from align_cli.rewards.base import Reward

UNSCORED = -100
"""Label of a token that nothing is asked of: padding, and what stands before the prompt."""


class Captioner(Reward):
    """Minus the mean loss, in nats per token, of the prompt and its end as the picture's caption. It has
    gradients in the picture, whose values may leave [0, 1].
    """

    @abstractmethod
    def token_losses(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies of each prompt's scored tokens in nats, and how many these are.

        Args:
            images: (B, 3, H, W) float, in [0, 1] or a little beyond. prompts: B texts.
        Returns:
            (B,) float32 both; with gradients in the pictures.
        Raises:
            ValueError: other shapes or numbers of pictures (see `rgb`).
        """

    @abstractmethod
    def token_counts(self, prompts: Sequence[str]) -> Tensor:
        """How many tokens of each prompt `token_losses` scores: (B,) float32, at least 1 each."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        loss_B, count_B = self.token_losses(images, prompts)
        return -loss_B / count_B

    def batch_score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """CoMat's reward: () float32, minus the mean over all scored tokens of the batch."""
        loss_B, count_B = self.token_losses(images, prompts)
        return -loss_B.sum() / count_B.sum()


def smoothed_losses(logits_BLV: Tensor, labels_BL: Tensor, smoothing: float) -> Tensor:
    """Cross-entropies of the next tokens, summed per picture.

    Args:
        logits_BLV: (B, L, V). labels_BL: (B, L) int64, `UNSCORED` where nothing is asked.
    Returns:
        (B,) float32, nats.
    Source: transformers 4.31, BlipTextLMHeadModel.
    """
    losses = F.cross_entropy(
        logits_BLV[:, :-1].float().transpose(1, 2),
        labels_BL[:, 1:],
        ignore_index=UNSCORED,
        label_smoothing=smoothing,
        reduction="none",
    )
    return losses.sum(1)


def scored(labels_BL: Tensor) -> Tensor:
    """(B,) float32: how many next tokens the labels ask for."""
    return (labels_BL[:, 1:] != UNSCORED).sum(1).float()
