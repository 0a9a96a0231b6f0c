"""CoMat on tiny models: what reads, finds nouns and captions by a fixed rule, and one step of it."""

from __future__ import annotations

import torch
from torch import nn

from align_cli.grounding.entities import Entity
from align_cli.methods.base import Batch, StepContext
from align_cli.methods.comat.config import CoMatConfig
from align_cli.methods.comat.method import CoMat
from align_cli.models.states import LORA_B
from align_cli.rewards.captioning import Captioner

PROMPTS = ["a red circle left of a blue square", "two green triangles", "a yellow square"]


class Counted(Captioner):
    """Scores the brightness of a picture for every token of its prompt: what it wants is known."""

    def __init__(self) -> None:
        super().__init__(name="tiny-blip", version="", source="", preprocessing="", scale="")
        self.seen: list[torch.Tensor] = []

    def token_counts(self, prompts):
        return torch.tensor([float(len(p.split())) for p in prompts])

    def token_losses(self, images, prompts):
        self.seen.append(images.detach())
        counts = self.token_counts(prompts)
        return counts * (1 - images.flatten(1).mean(1)), counts


class Words2:
    """Nouns by a fixed rule: the word after each colour."""

    def entities(self, prompt):
        words = prompt.split()
        colors = {"red", "green", "blue", "yellow"}
        return [
            Entity(words[i + 1], (i + 1, i + 2), (word, words[i + 1]))
            for i, word in enumerate(words)
            if word in colors
        ]


class Halves:
    """The first noun is in the left half, the second in the right one, a third nowhere; a picture without
    nouns, or with one that is "gone", is left out or empty.
    """

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def masks(self, images, nouns):
        self.seen.append(images)
        found = []
        for image, own in zip(images, nouns, strict=True):
            masks = torch.zeros(len(own), *image.shape[-2:], dtype=torch.bool)
            half = image.shape[-1] // 2
            for n, mask in enumerate(masks[:2]):
                mask[:, slice(0, half) if n == 0 else slice(half, None)] = True
            found.append(masks)
        return found


def make(model, *, reader=None, masker=None, **options) -> CoMat:
    settings = {
        "rewards": {"tiny-blip": 1.0},
        "lora_rank": 2,
        "steps": 5,
        "grad_steps": 2,
        "real": "drawn",
        "token_weight": 0.1,
        "pixel_weight": 0.05,
    }
    method = CoMat(model, CoMatConfig(**{**settings, **options}), seed=1)
    if method.config.concept:
        method.use_rewards({"tiny-blip": Counted()})
    if method.config.concentration:
        method.look_for_nouns(reader or Words2(), masker or Halves())
    if method.config.fidelity_weight:
        method.discriminate(model)
    return method


def stir(method: CoMat, size: float = 0.05) -> CoMat:
    """LoRA that does something."""
    rng = torch.Generator().manual_seed(9)
    loras = [method.lora] + ([method.discriminator.lora] if method.discriminator else [])
    with torch.no_grad():
        for lora in loras:
            for name, p in lora.weights.items():
                if name.endswith(LORA_B):
                    p.copy_(torch.randn(p.shape, generator=rng) * size)
    return method


def run(method: CoMat, *, batch: Batch | None = None, seed: int = 0, scale: float = 1.0) -> dict[str, float]:
    """One step; gradients stay in the parameters."""
    groups = method.trainables()
    for group in groups.values():
        for p in group:
            p.grad = None

    def backward(loss, group=None):
        torch.autograd.backward(loss * scale, inputs=groups[group])

    rng = torch.Generator().manual_seed(seed)
    ctx = StepContext(step=0, rng=rng, backward=backward, loss_scale=scale)
    return method.step(batch or Batch(list(PROMPTS)), ctx)


def gradient(method: CoMat, group: str) -> torch.Tensor:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in method.trainables()[group]]
    return torch.cat([g.flatten() for g in found])


def numbers(module: nn.Module) -> list[torch.Tensor]:
    return [x.clone() for x in module.state_dict().values()]
