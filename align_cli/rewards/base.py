"""The contract of a reward: a frozen scorer of pictures against prompts.

Letters: B pictures (and prompts), H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from align_cli.cuts import Cut
from align_cli.errors import unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What `load_reward` asks the builder of a reward for. REWARDS maps a name to such a builder.

    source: hub id, folder or file that the user named; "" for the builder's own. preprocessing: "official" or
    another one that the reward has; the builder raises UserError (`choose_preprocessing`) for any other.
    """

    name: str
    source: str
    preprocessing: str
    device: torch.device
    dtype: torch.dtype


class Reward(ABC):
    """A frozen scorer of pictures against prompts. Higher is better.

    name: as registered. version: of the weights, in words. source: hub id, folder or file of the weights, as
    given. preprocessing, scale: in words. differentiable: whether `score` has gradients with respect to the
    pictures. headline: the key of `metrics` that decides. fraction: every metric is in [0, 1] and is
    averaged as a share.
    """

    differentiable: bool = True
    fraction: bool = False

    def __init__(
        self,
        *,
        name: str,
        version: str,
        source: str,
        preprocessing: str,
        scale: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.version, self.source = name, version, source
        self.preprocessing, self.scale = preprocessing, scale
        self.device, self.dtype = torch.device(device), dtype
        self.headline = name

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """One number per picture; picture i does not see the other pictures, nor their prompts.

        Args:
            images: (B, 3, H, W) float in [0, 1]; (B, 4, H, W) loses its alpha, (B, 1, H, W) is grey.
            prompts: B texts.
        Returns:
            (B,) float32 on the scorer's device.
        Raises:
            ValueError: other shapes or numbers of pictures (see `rgb`).
        """

    def metrics(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """All numbers the scorer has: key -> (B,) float32, NaN where the prompt does not ask for it."""
        return {self.name: self.score(images, prompts)}

    def audit(self, prompts: Sequence[str]) -> list[Cut]:
        """What the scorer's tokenizer cuts, per prompt."""
        return [Cut(0, 0, "") for _ in prompts]

    def facts(self) -> dict[str, str]:
        """What a number of this scorer has to be quoted with."""
        return {
            "name": self.name,
            "version": self.version,
            "source": self.source,
            "preprocessing": self.preprocessing,
            "scale": self.scale,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def rgb(images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
    """(B, 3, H, W) of pictures with 1, 3 or 4 channels: alpha dropped (as PIL's convert("RGB") does), grey
    repeated.

    Raises:
        ValueError: not (B, 1 | 3 | 4, H, W) floating point, or not one prompt per picture.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4) or not images.is_floating_point():
        raise ValueError(
            "pictures must be (B, 3, H, W) float in [0, 1] (or 1 or 4 channels), got "
            f"{tuple(images.shape)} {images.dtype}"
        )
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts")
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def choose_preprocessing(request: Request, ways: Mapping[str, T]) -> T:
    """The way that the request names. UserError listing those that the reward has."""
    if request.preprocessing not in ways:
        raise unknown("preprocessing", request.preprocessing, ways, where=request.name)
    return ways[request.preprocessing]
