"""From pictures to what an image tower reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from reward_helpers import pictures

from align_cli.rewards import preprocess
from align_cli.rewards.preprocess import LONGEST, LONGEST_PLAIN, SHORTEST, SHORTEST_FLOOR, TEXTCRAFTOR

SIZES = [(20, 28), (33, 16), (16, 16), (64, 61), (19, 24), (9, 12)]


def pil_reference(picture: torch.Tensor, size: int) -> torch.Tensor:
    """OpenAI CLIP's transform, written with Pillow alone; (3, size, size), not normalised."""
    image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
    short = min(image.size)
    wide, high = int(size * image.width / short), int(size * image.height / short)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("size", SIZES)
def test_shortest_side_is_pillow_to_the_bit(size):
    x = pictures(2, size)
    wanted = torch.stack([pil_reference(picture, 16) for picture in x])
    assert torch.equal(preprocess.shortest_side(x, 16), wanted)


@pytest.mark.parametrize("way", [SHORTEST, LONGEST, TEXTCRAFTOR, preprocess.LONGALIGN])
def test_a_broken_picture_stays_broken_and_alone(way):
    x = pictures(2)
    wanted = way(x, 16)
    x[0, 1, 2, 3] = float("nan")
    assert way(x, 16)[0].isnan().any()
    assert torch.equal(way(x, 16)[1], wanted[1])


@pytest.mark.parametrize("size", SIZES)
def test_gradient_path_is_close_to_pillow(size):
    """Two roundings of Pillow, one per pass, and no more."""
    x = pictures(2, size)
    official = preprocess.shortest_side(x, 16)
    smooth = preprocess.shortest_side(x.requires_grad_(), 16)
    assert smooth.requires_grad
    assert float((smooth.detach() - official).abs().max()) <= 1.25 / 255
    if size == (16, 16):
        assert torch.equal(smooth, official)
    with torch.no_grad():
        assert torch.equal(preprocess.shortest_side(x, 16), official)


@pytest.mark.parametrize("size", SIZES)
def test_floor_is_the_processor_of_transformers(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    x = pictures(2, size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    images = [Image.fromarray((p * 255).round().byte().permute(1, 2, 0).numpy()) for p in x]
    wanted = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(SHORTEST_FLOOR(x, 16), wanted, atol=1e-6, rtol=0)


def test_the_two_crops_differ_where_half_a_pixel_is_left():
    x = torch.zeros(1, 3, 16, 19)
    x[..., 2] = 1  # 3 columns too many: 1.5 is rounded to 2 by OpenAI and to 1 by transformers
    assert preprocess.shortest_side(x, 16)[0, 0, 0].tolist()[:2] == [1, 0]
    assert preprocess.shortest_side_floor(x, 16)[0, 0, 0].tolist()[:2] == [0, 1]


def test_longest_side_pads_with_black_before_normalising():
    white = torch.ones(1, 3, 8, 16)
    pixels = preprocess.longest_side(white, 16)
    assert pixels[0, 0, :, 0].tolist() == [0] * 4 + [1] * 8 + [0] * 4
    black = [-m / s for m, s in zip(preprocess.CLIP_MEAN, preprocess.CLIP_STD, strict=True)]
    torch.testing.assert_close(LONGEST(white, 16)[0, :, 0, 0], torch.tensor(black))
    odd = preprocess.longest_side(torch.ones(1, 3, 16, 9), 16)[0, 0, 0]
    assert odd.tolist() == [0] * 3 + [1] * 9 + [0] * 4  # 7 missing: 3 left, 4 right


def test_longest_side_leaves_a_fitting_picture_alone_and_does_not_clamp():
    x = pictures(1, (16, 16))
    assert torch.equal(preprocess.longest_side(x, 16), x)
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 1
    assert float(preprocess.longest_side(edge, 24).max()) > 1
    assert not torch.equal(LONGEST(pictures(1, (40, 40)), 16), LONGEST_PLAIN(pictures(1, (40, 40)), 16))
    assert preprocess.longest_side(torch.ones(1, 3, 1, 200), 16).shape[-2:] == (16, 16)


def test_pooling_by_hand():
    x = torch.arange(9.0).view(1, 1, 3, 3).expand(1, 3, 3, 3) / 9
    wanted = torch.tensor([[2.0, 3.0], [5.0, 6.0]]) / 9  # bins of 2, overlapping in the middle
    torch.testing.assert_close(preprocess.pooled(x, 2)[0, 0], wanted)
    normal = (wanted - TEXTCRAFTOR.mean[2]) / TEXTCRAFTOR.std[2]
    torch.testing.assert_close(TEXTCRAFTOR(x, 2)[0, 2], normal)


def test_longalign_crops_only_large_pictures():
    x = torch.zeros(1, 3, 512, 508)
    x[..., 4:508, 2:506] = 1
    torch.testing.assert_close(preprocess.longalign(x, 4), torch.ones(1, 3, 4, 4))
    small = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 3, 4, 4)
    torch.testing.assert_close(preprocess.longalign(small, 4), small)


@pytest.mark.parametrize("way", [SHORTEST, LONGEST, TEXTCRAFTOR, preprocess.LONGALIGN])
def test_gradients(way):
    """Directional derivatives against central differences: all ways are linear inside [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(1, 3, 20, 28, generator=generator)
    d, w = (torch.randn(shape, generator=generator) for shape in ((1, 3, 20, 28), (1, 3, 16, 16)))
    value = lambda s: float((way((x + s * d).requires_grad_(), 16) * w).sum().detach())  # noqa: E731
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((way(y, 16) * w).sum(), y)
    assert float((gradient * d).sum()) == pytest.approx((value(0.02) - value(-0.02)) / 0.04, rel=2e-3)
