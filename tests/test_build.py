"""The recipe of the embedded models: what a larger model takes over from a smaller one."""

from __future__ import annotations

import pytest
import torch

from align_cli.shapes.build import components
from align_cli.shapes.build.painters import PAINTERS, SDXL, _widen


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """What the stages before leave behind, with random weights."""
    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    clip = components.clip(components.tokenizer())
    clip.save_pretrained(folder / "tiny-clip")
    clip.text_model.save_pretrained(folder / "denoiser-refine" / "text_encoder")
    components.unet().save_pretrained(folder / "denoiser-refine" / "unet")
    return folder


def test_widened_unet_predicts_as_before():
    """It reads wider text and pooled text, and at first heeds only what the small one read."""
    torch.manual_seed(1)
    small, wide = components.unet().eval(), components.sdxl_unet().eval()
    _widen(wide, small)
    z, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 32, 2 * components.WIDTH)
    added = {"text_embeds": torch.randn(2, components.WIDTH), "time_ids": torch.full((2, 6), 32.0)}
    with torch.no_grad():
        found = wide(z, t, text, added_cond_kwargs=added).sample
        expected = small(z, t, text[..., : components.WIDTH]).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        wide.add_embedding.linear_2.weight.fill_(0.01)
        assert not torch.allclose(wide(z, t, text, added_cond_kwargs=added).sample, found, atol=1e-3)


@pytest.mark.parametrize("stage", PAINTERS)
def test_painters_learn_in_all_their_parts(stage, stages):
    """Predictions of the right shape, and a gradient in the denoiser and in every text tower (SDXL's second
    from the second step on, when the weights that read it are no longer zero).
    """
    model = PAINTERS[stage](stages)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ids, empty = torch.tensor([[1, 5, 2], [1, 2, 2], [1, 7, 2]]), torch.tensor([False, True, False])
    z, t = torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 900])
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        found = model(z, t, ids, empty)
        assert found.shape == z.shape
        (found.square().mean((1, 2, 3)) * model.weight(t)).mean().backward()
    for name, part in model.named_children():
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters()), name
    if isinstance(model, SDXL):
        cond = model.encode(ids, empty)
        assert cond.tokens[1].abs().max() == cond.pooled[1].abs().max() == 0 < cond.pooled[0].abs().max()
