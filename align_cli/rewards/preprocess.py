"""From pictures to what an image tower reads: the scorers' own preprocessing, and those used in training.

Letters: B pictures, H W pixels, S the side that the tower reads. All take and give float32 in [0, 1] (bicubic
may leave it); `Preprocess` adds the normalisation. Everything has gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from align_cli.pictures import to_uint8

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LONGALIGN_CROP = 504
"""Pixels; a crop that is no multiple of the VAE's 8, against blocky blur. Source: LongAlign loss.py."""


@dataclass(frozen=True)
class Preprocess:
    """words: what a number is quoted with. resize: (B, 3, H, W), S -> (B, 3, S, S). mean, std: its own."""

    words: str
    resize: Callable[[Tensor, int], Tensor]
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Tensor, size: int) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, size, size) float32, normalised."""
        pixels = self.resize(images.float(), size)
        mean, std = (pixels.new_tensor(x).view(3, 1, 1) for x in (self.mean, self.std))
        return (pixels - mean) / std


def shortest_side(images: Tensor, size: int) -> Tensor:
    """CLIP's own transform: shortest side to `size`, bicubic, then the centre.

    Without gradients the pictures are rounded to 8 bit and resized by Pillow, as if they came from a file:
    bit for bit the official result. With gradients (grad mode, and images that require them) it is the same
    filter in floating point, clamped to [0, 1] after each of its two passes as in Pillow, but not rounded: at
    most about one level of 255 away for 8-bit pictures, and equal where nothing is to be resized.
    Source: OpenAI CLIP's transform; so does open_clip.
    """
    return _shortest_side(images, size, lambda free: round(free / 2))


def shortest_side_floor(images: Tensor, size: int) -> Tensor:
    """The same as transformers' CLIPImageProcessor does it: half a pixel of border is rounded down (OpenAI
    rounds it to even). Source: PickScore's and Denscore's processor.
    """
    return _shortest_side(images, size, lambda free: free // 2)


def _shortest_side(images: Tensor, size: int, offset: Callable[[int], int]) -> Tensor:
    height, width = images.shape[-2:]
    short = min(height, width)
    new = (int(size * height / short), int(size * width / short))
    if torch.is_grad_enabled() and images.requires_grad:
        pixels = images
        for between in ((height, new[1]), new):  # Pillow's order: rows become shorter first
            if pixels.shape[-2:] != between:
                pixels = _interpolate(pixels, between, "bicubic").clamp(0, 1)
    else:
        pixels = _pillow(images, new)
    top, left = offset(new[0] - size), offset(new[1] - size)
    return pixels[..., top : top + size, left : left + size]


def _pillow(images: Tensor, new: tuple[int, int]) -> Tensor:
    """Bicubic by Pillow on 8-bit pictures; new: (height, width). A picture with a NaN is NaN everywhere, so
    that its score is.
    """
    resized = [
        np.asarray(Image.fromarray(picture).resize((new[1], new[0]), Image.Resampling.BICUBIC))
        for picture in map(np.ascontiguousarray, to_uint8(images.nan_to_num()))
    ]
    pixels = torch.from_numpy(np.stack(resized)).to(images.device).permute(0, 3, 1, 2).float() / 255
    broken = images.isnan().flatten(1).any(1).view(-1, 1, 1, 1)
    return pixels.masked_fill(broken, float("nan"))


def longest_side(images: Tensor, size: int, *, antialias: bool = True) -> Tensor:
    """HPSv2's transform: longest side to `size`, bicubic in floating point and not clamped; black bars fill
    the rest. Nothing is resized where the longest side is `size`.

    antialias: torchvision's default since 0.17; False is what the numbers of 2023 were most likely made with.
    Source: hpsv2 1.2.0, preprocess_val.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        new = (max(1, round(height * scale)), max(1, round(width * scale)))
        images = _interpolate(images, new, "bicubic", antialias=antialias)
        height, width = new
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


def longest_side_plain(images: Tensor, size: int) -> Tensor:
    """`longest_side` without antialiasing."""
    return longest_side(images, size, antialias=False)


def pooled(images: Tensor, size: int) -> Tensor:
    """TextCraftor's: adaptive average pooling to a square, whatever the shape. Source: standard_process."""
    return F.adaptive_avg_pool2d(images, size)


def longalign(images: Tensor, size: int) -> Tensor:
    """LongAlign's: the centre of at most 504 x 504 pixels, then bilinear with antialiasing to a square.

    In training the crop is random: cut it before, then nothing is cut here. Source: LongAlign loss.py.
    """
    height, width = images.shape[-2:]
    new = (min(height, LONGALIGN_CROP), min(width, LONGALIGN_CROP))
    top, left = (height - new[0]) // 2, (width - new[1]) // 2
    return _interpolate(images[..., top : top + new[0], left : left + new[1]], (size, size), "bilinear")


def _interpolate(images: Tensor, new: tuple[int, int], mode: str, *, antialias: bool = True) -> Tensor:
    return F.interpolate(images, new, mode=mode, align_corners=False, antialias=antialias)


SHORTEST = Preprocess("official: shortest side, bicubic (8 bit), centre crop", shortest_side)
SHORTEST_FLOOR = Preprocess("official: shortest side, bicubic (8 bit), centre crop", shortest_side_floor)
LONGEST = Preprocess("official: longest side, bicubic antialiased, zero pad", longest_side)
LONGEST_PLAIN = Preprocess("longest side, bicubic without antialiasing, zero pad", longest_side_plain)
TEXTCRAFTOR = Preprocess("textcraftor: adaptive average pooling to a square", pooled)
LONGALIGN = Preprocess("longalign: centre of 504 x 504, bilinear to a square", longalign)
