"""What the tests of SoftREPA share."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from model_helpers import field

from align_cli import config
from align_cli.adapters import save_adapter
from align_cli.methods.base import Batch, StepContext
from align_cli.methods.softrepa.config import SoftREPAConfig
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.models.loading import load_model

PROMPTS = ["a red circle", "a blue square", "two green triangles", "a yellow circle above a red square"]
WARM = {"temperature": 1.0}
"""Random models have errors of about 1, where the official temperature leaves no gradient."""


def exact(model):
    """The same model with its denoiser in float64, so that what differs is not the rounding of a machine."""
    twin = copy.copy(model)
    twin.denoiser = copy.deepcopy(model.denoiser).double()
    return twin


def make(model, **options) -> SoftREPA:
    """The method with tokens loud enough to be seen, in all blocks."""
    everywhere = {"num_layers": -1} if model.family == "sd3" else {"stages": "TTT"}
    settings = {**WARM, **everywhere, "init": "normal", "init_noise": 0.5, **options}
    return SoftREPA(model, SoftREPAConfig(**settings), seed=0)


def save_random_adapter(folder: Path, model: Path, *sets: str) -> Path:
    """An adapter with random tokens, strong enough to be seen; `sets` are settings on top of the defaults."""
    flags = {"model.name": str(model), "model.device": "cpu"}
    resolved = config.resolve("softrepa", preset=config.NO_PRESET, sets=list(sets), flags=flags)
    method = SoftREPA(load_model(resolved.model), resolved.method_config)
    with torch.no_grad():
        for group in method.trainables().values():
            for parameter in group:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(folder, method, resolved.to_dict(), resolved.origin)
    return folder


def a_batch(n: int = 4, **extra) -> Batch:
    return Batch(PROMPTS[:n], field(0, n, 3, 32, 32).clamp(-1, 1), list(range(n)), dict(extra))


def run(method: SoftREPA, batch: Batch, seed: int = 3, **options):
    """Values, gradients and losses of one step."""
    losses: list[torch.Tensor] = []

    def backward(loss: torch.Tensor) -> None:
        assert loss.ndim == 0
        loss.backward()
        losses.append(loss.detach())

    method.tokens.zero_grad()
    ctx = StepContext(step=0, rng=torch.Generator().manual_seed(seed), backward=backward, **options)
    values = method.step(batch, ctx)
    return values, [p.grad.clone() for p in method.tokens.parameters()], losses
