"""The preprocessing of a transformers model, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from align_cli.errors import UserError
from align_cli.pictures import to_uint8
from align_cli.rewards.base import Request
from align_cli.rewards.places import option

TWIN_TOLERANCE = 0.05
"""Largest difference, in units of normalised pixels, between what the processor makes of a picture and what
`TensorTwin` makes of it: a few levels of 255, since processors round to 8 bit.
"""
MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of filters -> interpolate's names."""


class TensorTwin:
    """What an image processor does, with gradients: resize, crop the centre, normalise."""

    def __init__(self, processor: Any) -> None:
        self.size = dict(processor.size) if processor.do_resize else {}
        self.mode = MODES[int(processor.resample)]
        self.crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else {}
        self.mean, self.std = processor.image_mean, processor.image_std
        if not processor.do_normalize:
            self.mean, self.std = [0.0] * 3, [1.0] * 3

    @classmethod
    def of(cls, processor: Any) -> TensorTwin | None:
        """The twin of a processor; None if it makes something else of a picture."""
        ramp = torch.linspace(0, 1, 96).expand(80, 96)
        image = torch.stack([ramp, ramp.flip(1) * 0.5, ramp * ramp])
        picture = Image.fromarray(to_uint8(image[None])[0])
        try:
            twin = cls(processor)
            wanted = processor(images=[picture], return_tensors="pt")["pixel_values"].float()
            got = twin(torch.from_numpy(to_uint8(image[None])[0]).permute(2, 0, 1) / 255)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            return None
        if wanted.numel() != got.numel() or wanted.shape[-2:] != got.shape[-2:]:
            return None
        return twin if float((wanted.reshape(got.shape) - got).abs().max()) <= TWIN_TOLERANCE else None

    def __call__(self, image: Tensor, *, clamp: bool = True) -> Tensor:
        """(..., 3, H, W) in about [0, 1] -> (..., 3, h, w), normalised. clamp: what is resized, to [0, 1]."""
        height, width = image.shape[-2:]
        new = self._resized(height, width)
        if new != (height, width):
            antialias = self.mode != "nearest"
            options: dict[str, Any] = {"antialias": True, "align_corners": False} if antialias else {}
            flat = image.reshape(-1, 3, height, width)
            image = F.interpolate(flat, new, mode=self.mode, **options).view(*image.shape[:-2], *new)
            image = image.clamp(0, 1) if clamp else image
        if self.crop:
            high, wide = self.crop["height"], self.crop["width"]
            top, left = (new[0] - high) // 2, (new[1] - wide) // 2
            image = image[..., top : top + high, left : left + wide]
        mean, std = (image.new_tensor(x).view(3, 1, 1) for x in (self.mean, self.std))
        return (image - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if "shortest_edge" in self.size:
            scale = self.size["shortest_edge"] / min(height, width)
            return int(height * scale), int(width * scale)
        return (self.size["height"], self.size["width"]) if self.size else (height, width)


def twin_of(processor: Any, request: Request) -> TensorTwin:
    """The twin of a model's processor. UserError if it makes something else of a picture."""
    twin = TensorTwin.of(processor)
    if twin is None:
        raise UserError(
            f"{request.name}: {request.source} gives no gradients to train with, because its processor "
            f"({type(processor).__name__}) does more than resize, crop and normalise a picture; name another "
            f"model with {option(request.name)}"
        )
    return twin
