"""Masks by the oracle of the shapes world."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from align_cli import registry
from align_cli.grounding.masks import MaskRequest
from align_cli.shapes.oracle import MIN_COVER, find
from align_cli.shapes.world import SHAPES, SIZE, coverage, render, sample_scenes

NOUNS = ["circle", "Squares", "triangle", "background", "dog"]


@pytest.fixture
def masker():
    return registry.load(registry.MASKERS, "shapes")(MaskRequest())


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(60, np.random.default_rng(0))


def pixels(scenes) -> torch.Tensor:
    return torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 255


def drawn(scene, shape: str) -> torch.Tensor:
    """The pixels that objects of a shape fill."""
    things = [t for t in scene.things if t.shape == shape]
    columns = (np.array([getattr(t, name) for t in things]) for name in "xyr")
    filled = coverage(np.full(len(things), SHAPES.index(shape)), *columns)
    return torch.from_numpy(filled > MIN_COVER).any(0)


def test_masks_are_the_objects(masker, scenes):
    for scene, masks in zip(scenes, masker.masks(pixels(scenes), [NOUNS] * len(scenes)), strict=True):
        assert masks.shape == (5, SIZE, SIZE) and masks.dtype == torch.bool
        assert not masks[3:].any()
        for shape, mask in zip(SHAPES, masks, strict=False):
            if not any(t.shape == shape for t in scene.things):
                assert not mask.any()
                continue
            wanted = drawn(scene, shape)
            assert (mask & wanted).sum() / (mask | wanted).sum() > 0.9


def test_blob_masks(scenes):
    """A mask each, apart from each other, of the area that the blob has."""
    blobs = find(render(scenes))
    assert blobs.masks.shape == (len(blobs.image), SIZE, SIZE)
    np.testing.assert_allclose(blobs.masks.sum((1, 2)), blobs.area, rtol=0.15)
    together = np.zeros((len(scenes), SIZE, SIZE), int)
    np.add.at(together, blobs.image, blobs.masks)
    assert together.max() == 1
    assert find(np.zeros((2, SIZE, SIZE, 3), np.uint8)).masks.shape == (0, SIZE, SIZE)


def test_other_pictures(masker, scenes):
    """Larger ones, values beyond [0, 1], a picture that is not finite, one without nouns or objects."""
    x = pixels(scenes[:4])
    plain = masker.masks(x, [NOUNS[:3]] * 4)
    large = masker.masks(torch.nn.functional.interpolate(x, scale_factor=2), [NOUNS[:3]] * 4)
    for one, two in zip(plain, large, strict=True):
        assert two.shape == (3, 2 * SIZE, 2 * SIZE)
        assert torch.equal(two, one.repeat_interleave(2, 1).repeat_interleave(2, 2))
    x[1, 0, 3, 3] = float("inf")
    beyond = 1.3 * x - 0.1
    empty, broken, same, nothing = masker.masks(
        torch.cat([beyond[:3], torch.zeros(1, 3, SIZE, SIZE)]).requires_grad_(), [[], NOUNS, NOUNS[:3], NOUNS]
    )
    assert empty.shape == (0, SIZE, SIZE) and broken is None
    assert torch.equal(same, masker.masks(beyond[2:3].clamp(0, 1), [NOUNS[:3]])[0]) and same.any()
    assert nothing.shape == (5, SIZE, SIZE) and not nothing.any()
    with pytest.raises(ValueError, match="4 pictures, but nouns of 1"):
        masker.masks(x, [NOUNS])
