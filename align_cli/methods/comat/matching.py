"""CoMat's concept matching: what captioners, and other rewards, say of decoded pictures.

Letters: B prompts of this process, C h w latent, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from align_cli.methods.base import StepContext
from align_cli.methods.comat.config import CoMatConfig
from align_cli.models.base import BaseModel
from align_cli.models.decoding import Judged, through_pictures
from align_cli.rewards.captioning import Captioner
from align_cli.rewards.weighted import WeightedRewards

CROPPED = 224
"""A crop is so many pixels smaller as this goes into the picture's side. Source: caption_blip.py."""
GRADIENT_NORM = 1e4
"""Of the pictures' gradient with norm_grad. Source: training_script.py."""

Crop = tuple[int, int] | None
"""Rows above and columns left of the crop; None for the whole picture."""


class ConceptMatching:
    """Minus the weighted rewards of a batch, and their gradient in the latents."""

    def __init__(self, model: BaseModel, config: CoMatConfig, rewards: WeightedRewards) -> None:
        self.model, self.config, self.rewards = model, config, rewards

    def loss(
        self, z: Tensor, prompts: list[str], crop: Crop, told: dict[str, float], ctx: StepContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss () of latents (B, C, h, w), its gradient (B, C, h, w), and the pictures (B, 3, H, W), not
        clamped; none with graph.

        told: gets reward/NAME, and the norm of the rewards' gradient in the pictures.
        """
        totals, pictures, norm = self._scored_tokens(prompts, ctx), list[Tensor](), z.new_zeros(())

        def keep_norm(gradient: Tensor) -> Tensor:
            own = gradient.detach().float().square().sum()
            norm.add_(own)
            return gradient / (own.sqrt() / GRADIENT_NORM) if self.config.norm_grad else gradient

        def judge(images: Tensor, rows: slice) -> Judged:
            pictures.append(images.detach())
            images.register_hook(keep_norm)
            return self._judged(images, prompts[rows], crop, totals, len(prompts))

        loss, slope, means = ctx.together(
            lambda: through_pictures(
                self.model, z, judge, chunk=self.config.decode_chunk, loss_scale=ctx.loss_scale, clamp=False
            ),
            z.device,
        )
        told |= {f"reward/{name}": float(x) for name, x in means.items()}
        told["reward/gradient_norm"] = float(norm.sqrt()) / ctx.loss_scale
        return loss, slope, torch.cat(pictures)

    def _scored_tokens(self, prompts: list[str], ctx: StepContext) -> dict[str, float]:
        """Captioner -> tokens that it scores, per process: the mean is over all tokens of the batch."""
        found = {}
        for name, reward in self.rewards.rewards.items():
            if isinstance(reward, Captioner):
                own = reward.token_counts(prompts).sum().reshape(1).to(self.model.device)
                found[name] = float(ctx.gather(own).sum()) / ctx.world_size
        return found

    def _judged(
        self, images: Tensor, prompts: list[str], crop: Crop, totals: Mapping[str, float], count: int
    ) -> Judged:
        """Of pictures (b, 3, H, W), as their part of the means over `count` pictures and `totals` tokens."""
        if self.config.official_range:
            images = images * 2 - 1
        if crop is not None:
            top, left = crop
            size = images.shape[-1] - images.shape[-1] // CROPPED
            images = images[:, :, top : top + size, left : left + size]
        parts: dict[str, Tensor] = {}
        for name, reward in self.rewards.rewards.items():
            if isinstance(reward, Captioner):
                parts[name] = -reward.token_losses(images, prompts)[0].sum() / totals[name]
            else:
                parts[name] = reward.score(images, prompts).sum() / count
        loss = -torch.stack([self.config.rewards[name] * x.to(images.device) for name, x in parts.items()])
        return loss.sum(), parts
