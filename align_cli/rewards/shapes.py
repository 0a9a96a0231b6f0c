"""The oracle of the shapes world as a reward: exact, several numbers, no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from align_cli.errors import UserError
from align_cli.rewards.base import Request, Reward, choose_preprocessing, rgb
from align_cli.shapes.captions import parse
from align_cli.shapes.oracle import METRICS, judge
from align_cli.shapes.world import SIZE


class ShapesOracle(Reward):
    """Reads 32 x 32 pictures and says what is true of the prompt. `score`: 1 where everything is, else 0."""

    differentiable = False
    fraction = True

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(
            name="shapes",
            version="exact, no learned part",
            source="embedded:shapes",
            preprocessing="none",
            scale="share of the facts that are true; all: 1 or 0",
            device=device,
        )
        self.headline = "shapes/all"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.metrics(images, prompts)[self.headline]

    def metrics(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """shapes/object, shapes/color, ..., shapes/all -> (B,) in [0, 1], NaN where the prompt does not ask.

        Raises:
            UserError: pictures that are not 32 x 32, or a prompt that is no sentence of the shapes world.
        """
        pictures = rgb(images, prompts)
        if tuple(pictures.shape[-2:]) != (SIZE, SIZE):
            height, width = pictures.shape[-2:]
            raise UserError(
                f"shapes reads {SIZE} x {SIZE} pictures of the shapes world, these are {height} x {width}; "
                "draw them with --model tiny-sd15, or score with tiny-clip"
            )
        specs = []
        for text in prompts:
            try:
                specs.append(parse(text))
            except UserError as error:
                raise UserError(f"shapes cannot judge the prompt {text!r}: {error}") from error
        values = judge(pictures, specs)
        return {
            f"{self.name}/{key}": torch.tensor(values[key], dtype=torch.float32, device=self.device)
            for key in METRICS
        }


def build_shapes(request: Request) -> ShapesOracle:
    choose_preprocessing(request, {"official": None})
    if request.source:
        raise UserError(f"shapes has no weights; leave --weights shapes={request.source} out")
    return ShapesOracle(request.device)
