"""Several rewards with weights, as what is trained on.

Letters: B pictures of this process, G prompts of all processes, D width of the towers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from align_cli.errors import UserError
from align_cli.rewards.base import Reward
from align_cli.rewards.clip import ClipReward
from align_cli.rewards.loading import load_reward


class RewardSettings(Protocol):
    """The settings of a method that trains on rewards, as far as they say which."""

    @property
    def rewards(self) -> Mapping[str, float]: ...
    @property
    def reward_weights(self) -> Mapping[str, str]: ...
    @property
    def reward_preprocessing(self) -> str: ...
    @property
    def reward_dtype(self) -> str: ...


def load_rewards(settings: RewardSettings, device: torch.device) -> dict[str, Reward]:
    """The rewards whose weight is not 0. UserError if weights are missing."""
    return {
        name: load_reward(
            name,
            source=settings.reward_weights.get(name),
            preprocessing=settings.reward_preprocessing,
            device=device,
            dtype=getattr(torch, settings.reward_dtype),
        )
        for name, weight in settings.rewards.items()
        if weight
    }


class WeightedRewards:
    """sum_k weight_k r_k of pictures and prompts, per picture.

    pairing: "batch" gives PickScore of a picture as the mean over the prompts of the whole batch, as in
    TextCraftor's released code (three quarters of its pairs are mismatched at batch 4); "diagonal" under its
    own prompt. Source: textcraftor.md section 3.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], weights: Mapping[str, float], pairing: str = "diagonal"
    ) -> None:
        self.rewards, self.weights, self.pairing = dict(rewards), dict(weights), pairing

    def batch_text(self, prompts: Sequence[str], gather: Callable[[Tensor], Tensor]) -> Tensor | None:
        """(G, D): the prompts of all processes, which pairing "batch" needs; None where nothing does."""
        pick = self.rewards.get("pickscore")
        if self.pairing != "batch" or not isinstance(pick, ClipReward):
            return None
        return gather(pick.text_vectors(prompts))

    def score(
        self, images: Tensor, prompts: Sequence[str], batch_text: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Reward name -> (B,) float32, with gradients to the images.

        Args:
            images: (B, 3, H, W) in [0, 1]. prompts: B. batch_text: what `batch_text` gave.
        Raises:
            UserError: a reward that is not finite; names the reward and the prompt.
        """
        found = {name: self._one(name, images, prompts, batch_text) for name in self.rewards}
        for name, r in found.items():
            bad = ~torch.isfinite(r.detach())
            if bad.any():
                prompt = prompts[int(bad.nonzero()[0])]
                raise UserError(
                    f"the reward {name} is {float(r.detach()[bad][0])} for a picture of {prompt!r}; try "
                    "other rewards, a lower --lr, or --set train.max_grad_norm=1"
                )
        return found

    def _one(self, name: str, images: Tensor, prompts: Sequence[str], batch_text: Tensor | None) -> Tensor:
        reward = self.rewards[name]
        if name == "pickscore" and batch_text is not None and isinstance(reward, ClipReward):
            return (reward.image_vectors(images) @ batch_text.T).mean(1) * reward.factor
        return reward.score(images, prompts)

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """(B,) float32: the weighted sum."""
        return torch.stack([self.weights[name] * r for name, r in scores.items()]).sum(0)
