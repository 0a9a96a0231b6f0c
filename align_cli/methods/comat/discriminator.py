"""CoMat's discriminator of latents: a denoiser with its own LoRA, and one linear layer over its channels.

Letters: B latents, C h w latent.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align_cli.models.base import BaseModel, TextCond
from align_cli.models.lora import attention_lora


class LatentDiscriminator:
    """One logit for each position of a clean latent: did the original model make it?

    It sees the latent without noise at the last timestep of the sampler, under the empty prompt. Its denoiser
    may be that of the model in training, since only one of both LoRAs is at work at a time.
    Source: CoMat, training_utils/gan_sdxl.py, class D_sd.
    """

    def __init__(self, model: BaseModel, *, rank: int, timestep: float, seed: int = 0) -> None:
        """model: whose denoiser it is, and whose encoding of the empty prompt. timestep: the sampler's last
        one.
        """
        self.model, self.timestep = model, timestep
        setting = "comat.discriminator_rank"
        self.lora = attention_lora(model.denoiser, rank, seed=seed + 1, setting=setting, model=model.model_id)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + 1)
            head = nn.Linear(model.latent_channels, 1)
        self.head = head.to(model.device)
        with torch.no_grad():
            self.empty = model.encode_text([""])

    def parameters(self) -> list[nn.Parameter]:
        return [*self.lora.parameters(), *self.head.parameters()]

    def at_work(self) -> AbstractContextManager[None]:
        """Calls, and the backward pass of what is checkpointed, belong inside."""
        return self.lora.attached()

    def logits(self, latents: Tensor) -> Tensor:
        """(B, h, w, 1) of scaled latents (B, C, h, w)."""
        t = torch.tensor(self.timestep, device=latents.device)
        empty: TextCond = self.empty[[0] * len(latents)]
        return self.head(self.model.predict(latents, t, empty).movedim(1, -1).float())

    def fooled(self, latents: Tensor) -> Tensor:
        """The generator's loss (): mean binary cross-entropy with "original", in nats."""
        found = self.logits(latents).float()
        return F.binary_cross_entropy_with_logits(found, torch.ones_like(found))

    def told_apart(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Its own loss (), one mean over the latents of both, and the share () of latents that it is right
        about, by the mean of their logits.
        """
        found = self.logits(torch.cat([fake.detach(), real])).float()
        wanted = torch.zeros_like(found)
        wanted[len(fake) :] = 1
        said = found.detach().flatten(1).mean(1) > 0
        right = (said == (wanted.flatten(1)[:, 0] > 0)).float().mean()
        return F.binary_cross_entropy_with_logits(found, wanted), right
