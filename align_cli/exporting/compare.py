"""What every export ends with: what was written, opened by its library, against what was trained."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from align_cli.errors import UserError, first_line
from align_cli.models.base import BaseModel

PROMPTS = ["a photo of an astronaut riding a horse on mars", "two red circles above a blue square", ""]
"""What the text encoders read when outputs are compared."""
SIDE = 16
"""Most latent positions along a side when predictions are compared: they tell as much as a whole picture."""
SHARE, FLOOR = 0.02, 1e-4
"""A comparison of outputs fails if the difference is above this share of the adapter's own effect and above
this share of the output: far above rounding, far below a layer that is not at work."""


class Largest:
    """The largest difference that was seen, and the largest value."""

    def __init__(self) -> None:
        self.difference = self.value = 0.0
        self.count = 0

    def tensor(self, got: Tensor, expected: Tensor) -> None:
        """Take in one pair of equal shapes."""
        if got.numel() == 0:
            return
        gap = (got.detach().float() - expected.detach().float()).abs().max()
        self.difference = max(self.difference, float(gap) if torch.isfinite(gap) else float("inf"))
        self.value = max(self.value, float(expected.detach().float().abs().max()))
        self.count += 1

    def tensors(self, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Take in all tensors of two mappings with the same keys."""
        assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())[:3]
        for name, value in expected.items():
            self.tensor(got[name], value)

    def line(self, how: str, dtype: torch.dtype, *, slack: int = 0) -> str:
        """In words.

        dtype: of what was written. slack: roundings of that dtype that the compared values went through on
        top of being written.
        Raises:
            UserError: the difference is above what rounding explains.
        """
        text = (
            f"{how}: {self.count} tensors, largest difference {self.difference:.3g} (largest value "
            f"{self.value:.3g})"
        )
        roundings = slack + (dtype != torch.float32)
        if not self.difference <= roundings * torch.finfo(dtype).eps * self.value:
            advice = "" if dtype == torch.float32 else "; take --dtype float32"
            raise UserError(
                f"what was written does not hold what was trained, so nothing was kept; {text}{advice}"
            )
        return text


@dataclass(frozen=True)
class Outputs:
    """What a model makes of PROMPTS. tokens (B, L, D); pooled (B, P) or None; prediction (B, C, h, w), or
    None where it was not asked for.
    """

    tokens: Tensor
    pooled: Tensor | None
    prediction: Tensor | None

    def distance(self, other: Outputs) -> dict[str, float]:
        """Largest difference of each kind that both have."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in OUTPUTS}
        return {name: float((a - b).abs().max()) for name, (a, b) in pairs.items() if a is not None}

    def size(self) -> dict[str, float]:
        """Largest value of each kind."""
        found = {name: getattr(self, name) for name in OUTPUTS}
        return {name: float(x.abs().max()) for name, x in found.items() if x is not None}


OUTPUTS = {"tokens": "text embedding", "pooled": "pooled text", "prediction": "prediction of the denoiser"}
"""Fields of `Outputs`, in words."""


@torch.no_grad()
def outputs(model: BaseModel, *, denoiser: bool) -> Outputs:
    """The model as it is now, with the adapter that is at work; denoiser: also what the denoiser says."""
    change = next(reversed(model.text_changes), None)
    cond = model.encode_text(PROMPTS) if change is None else change.encode(PROMPTS)
    prediction = None
    if denoiser:
        side = min(SIDE, model.image_size // model.vae_factor)
        shape = (len(PROMPTS), model.latent_channels, side, side)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        prediction = model.predict(z, torch.tensor(500), cond).float()
    pooled = None if cond.pooled is None else cond.pooled.float()
    return Outputs(cond.tokens.float(), pooled, prediction)


def compare_outputs(own: Outputs, adapted: Outputs, opened: Outputs, how: str, *, exact: bool) -> list[str]:
    """One line per kind of output: how far what was opened is from the adapter at work.

    own: of the base model. exact: more than rounding is an error.
    Raises:
        UserError: `exact`, and it is more.
    """
    effect, gap, size = own.distance(adapted), opened.distance(adapted), adapted.size()
    lines = []
    for name, words in OUTPUTS.items():
        if name not in gap:
            continue
        text = (
            f"{how}: the {words} differs from the adapter's by at most {gap[name]:.3g} (the adapter changes "
            f"it by up to {effect[name]:.3g})"
        )
        if exact and not gap[name] <= max(SHARE * effect[name], FLOOR * size[name]):
            raise UserError(f"what was written does not do what was trained, so nothing was kept; {text}")
        lines.append(text)
    return lines


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the libraries raise inside when a disk refuses becomes a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # the last: torch's zip writer
        full = any(os.strerror(number) in str(error) for number in (ENOSPC, EDQUOT))
        reason = "the disk is full; make room, then give the command again" if full else first_line(error)
        raise UserError(f"cannot write {path.name}: {reason}") from error


@contextmanager
def silent() -> Iterator[None]:
    """No reports of the libraries on what they load and what they will rename: the comparison tells."""
    logs = (transformers_logging, diffusers_logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
