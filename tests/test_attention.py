"""Cross-attention maps: what they are, which are kept, and that watching changes nothing."""

from __future__ import annotations

import pytest
import torch
from model_helpers import PROMPTS, field, load, sdxl_unet
from softrepa_helpers import save_random_adapter

from align_cli.adapters import attach
from align_cli.errors import UserError
from align_cli.losses import attention_losses, mask_at
from align_cli.models.attention import AttentionMaps, check_layers, layer_names, watched
from align_cli.models.parts import outline


@pytest.fixture(params=["sd15", "sdxl", "sd3", "sd35"])
def model(request, tiny_sd15_folder, tiny_sdxl_folder, tiny_sd3_folder, tiny_sd3_no_t5_folder):
    folders = {"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}
    return load((folders | {"sd35": tiny_sd3_no_t5_folder})[request.param])


def look(model, keep=None, z=None):
    z = field(0, 2, model.latent_channels, 8, 8) if z is None else z
    with watched(model.denoiser):
        return model.predict(z, torch.tensor(300), model.encode_text(PROMPTS), keep)


# ---------------------------------------------------------------- capture


def test_maps_are_probabilities_over_the_tokens(model):
    keep = AttentionMaps()
    look(model, keep)
    assert set(keep.maps) == {name for name in layer_names(model.denoiser, 8) if not name.startswith("down")}
    for layer, found in keep.maps.items():
        side = int(layer.partition("_")[2])
        for one in found:
            assert one.shape[0] == 2 and one.shape[2:4] == (side, side)
            torch.testing.assert_close(one.sum(-1), torch.ones_like(one[..., 0]))
            assert float(one.std(-1).mean()) > 0


def test_watching_changes_no_prediction_and_leaves_no_trace(model):
    z = field(0, 2, model.latent_channels, 8, 8)
    before = dict(model.denoiser.attn_processors)
    plain = model.predict(z, torch.tensor(300), model.encode_text(PROMPTS))
    assert torch.equal(look(model, z=z), plain)
    torch.testing.assert_close(look(model, AttentionMaps(), z), plain, atol=1e-5, rtol=1e-5)
    assert model.denoiser.attn_processors == before


def test_only_chosen_layers_and_tokens_are_kept(model):
    whole, some = AttentionMaps(), AttentionMaps()
    look(model, whole)
    last = list(whole.maps)[-1]
    positions = torch.tensor([[3, 1], [2, 5]])
    some = AttentionMaps([last], positions)
    look(model, some)
    assert list(some.maps) == [last] and len(some.maps[last]) == len(whole.maps[last])
    for kept, full in zip(some.maps[last], whole.maps[last], strict=True):
        for row, columns in enumerate(positions):
            torch.testing.assert_close(kept[row], full[row][..., columns])


def test_maps_have_a_graph_also_where_activations_are_computed_again(model):
    """Non-reentrant checkpointing: the same gradient, and nothing is kept twice."""
    slopes = []
    for again in (False, True):
        z = field(0, 2, model.latent_channels, 8, 8).requires_grad_()
        keep = AttentionMaps()
        if again:
            model.denoiser.enable_gradient_checkpointing()
        with watched(model.denoiser):
            model.predict(z, torch.tensor(300), model.encode_text(PROMPTS), keep)
            counts = {layer: len(found) for layer, found in keep.maps.items()}
            total = sum(x[..., 2].square().sum() for found in keep.maps.values() for x in found)
            total.backward()
        model.denoiser.disable_gradient_checkpointing()
        assert counts == {layer: len(found) for layer, found in keep.maps.items()}
        slopes.append(z.grad)
    assert float(slopes[0].abs().max()) > 0
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-7, rtol=1e-4)


def joint_by_hand(model, name: str, z: torch.Tensor) -> torch.Tensor:
    """What a softmax over all keys, of picture and text, gives to the CLIP rows of a block: (B, H, N, L)."""
    attn = model.denoiser.get_submodule(name)
    seen: dict[str, torch.Tensor] = {}
    layers = ("to_q", "to_k", "add_k_proj")
    hooks = [
        getattr(attn, layer).register_forward_hook(lambda _m, _i, out, layer=layer: seen.update({layer: out}))
        for layer in layers
    ]
    model.predict(z, torch.tensor(300), model.encode_text(PROMPTS))
    for hook in hooks:
        hook.remove()
    q, k, text = (seen[layer].unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in layers)
    if attn.norm_q is not None:
        q, k, text = attn.norm_q(q), attn.norm_k(k), attn.norm_added_k(text)
    keys = torch.cat([k, text], 2)
    probabilities = (q @ keys.mT / q.shape[-1] ** 0.5).softmax(-1)
    return probabilities[..., k.shape[2] : k.shape[2] + model.clip_length]


@pytest.mark.parametrize("kind", ["tiny_sd3_folder", "tiny_sd3_no_t5_folder"])
def test_maps_of_sd3_are_the_share_of_a_word_in_what_goes_to_clips_rows(request, kind):
    """Renormalised: the plain softmax over all keys at these rows, divided by its sum there."""
    model = load(request.getfixturevalue(kind))
    z, keep = field(0, 2, model.latent_channels, 8, 8), AttentionMaps()
    look(model, keep, z)
    assert list(keep.maps) == ["joint_4"] and len(keep.maps["joint_4"]) == 3
    for block, found in enumerate(keep.maps["joint_4"]):
        plain = joint_by_hand(model, f"transformer_blocks.{block}.attn", z)
        assert 0.05 < float(plain.sum(-1).mean()) < 0.95  # the rest goes to the picture and to T5
        torch.testing.assert_close(found.flatten(2, 3), plain / plain.sum(-1, keepdim=True))


def test_looking_beside_sd3s_attention_changes_no_bit(tiny_sd3_folder):
    """The maps are computed beside the attention, not in its place."""
    model = load(tiny_sd3_folder)
    z = field(0, 2, model.latent_channels, 8, 8)
    plain = model.predict(z, torch.tensor(300), model.encode_text(PROMPTS))
    assert torch.equal(look(model, AttentionMaps(), z), plain)


@pytest.mark.parametrize("scale", ["", "@0.5"])
def test_soft_tokens_in_front_of_sd3s_text_are_left_out(tiny_sd3_folder, tmp_path, scale):
    """The rows are counted from the end, also where soft tokens have a strength of their own."""
    adapter = save_random_adapter(tmp_path / "a", tiny_sd3_folder, "softrepa.num_layers=2")
    model = load(tiny_sd3_folder)
    z, keep = field(0, 2, model.latent_channels, 8, 8), AttentionMaps()
    bare = AttentionMaps()
    look(model, bare, z)
    with attach(model, [f"{adapter}{scale}"]):
        plain = model.predict(z, torch.tensor(300), model.encode_text(PROMPTS))
        assert torch.equal(look(model, keep, z), plain)
    first, last = keep.maps["joint_4"][0], keep.maps["joint_4"][-1]
    assert first.shape[-1] == model.clip_length
    torch.testing.assert_close(first, bare.maps["joint_4"][0])  # the first block's words have not met them
    assert float((last - bare.maps["joint_4"][-1]).abs().max()) > 3e-5


def test_an_unknown_layer_is_refused(model):
    with pytest.raises(
        UserError, match=r"comat.attention_layers: here has no cross-attention up_64 .*(mid|joint)_4"
    ):
        check_layers(model.denoiser, ["up_64"], 8, "comat.attention_layers", "here")


def test_the_layers_of_the_published_models():
    """Spec (b): SD1.5 and SDXL at 512 px."""
    sd15, sdxl = outline("sd15", "unet"), sdxl_unet()
    up = [name for name in layer_names(sd15, 64) if not name.startswith("down")]
    assert up == ["mid_8", "up_16", "up_32", "up_64"]
    assert [n for n in layer_names(sdxl, 64) if not n.startswith("down")] == ["mid_16", "up_16", "up_32"]


# ---------------------------------------------------------------- losses


def test_losses_by_hand():
    """One map, one head, 2 x 2 cells, two tokens; the noun's mask is the left column."""
    a = torch.tensor([[[0.4, 0.1], [0.2, 0.1]], [[0.5, 0.3], [0.1, 0.1]]])  # token, row, column
    maps = a.permute(1, 2, 0)[None, None]
    masks = torch.tensor([[[True, False], [True, False]]])
    token, pixel = attention_losses(maps, torch.tensor([[True, True]]), masks)
    inside = [0.6 / 0.8, 0.6 / 1.0]
    assert float(token) == pytest.approx(sum((1 - x) ** 2 for x in inside) / 2)
    seen = torch.tensor([0.9, 0.4, 0.3, 0.2])
    wanted = torch.tensor([1.0, 0.0, 1.0, 0.0])
    bce = -(wanted * seen.log() + (1 - wanted) * (1 - seen).log()).mean()
    assert float(pixel) == pytest.approx(float(bce))


def test_two_nouns_share_the_loss_and_maps_add_up():
    maps = field(1, 3, 2, 4, 4, 5).softmax(-1)
    words = torch.tensor([[True, True, False, False, False], [False, False, True, False, False]])
    masks = field(2, 2, 4, 4) > 0
    both = attention_losses(maps, words, masks)
    apart = [attention_losses(maps, words[[n]], masks[[n]]) for n in range(2)]
    for k in range(2):
        assert float(both[k]) == pytest.approx(float(apart[0][k] + apart[1][k]) / 2, rel=1e-5)
    single = sum(attention_losses(maps[[m]], words, masks)[0] for m in range(3))
    assert float(both[0]) == pytest.approx(float(single), rel=1e-5)


def test_a_noun_that_is_not_there_gives_no_token_gradient():
    maps = field(1, 3, 2, 4, 4, 2).softmax(-1).requires_grad_()
    words, masks = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)
    token, pixel = attention_losses(maps, words, masks)
    assert float(token.detach()) == pytest.approx(3)  # one for each map
    (slope,) = torch.autograd.grad(token, maps, retain_graph=True)
    assert float(slope.abs().max()) == 0
    (slope,) = torch.autograd.grad(pixel, maps)
    assert float(slope.min()) > 0  # less attention everywhere


def test_attention_losses_against_finite_differences():
    words = torch.tensor([[True, False, True], [False, True, False]])
    masks = field(3, 2, 3, 3) > 0

    def total(x):
        token, pixel = attention_losses(x.softmax(-1) * 0.4, words, masks)
        return (token + pixel).double()

    x = field(4, 2, 2, 3, 3, 3).requires_grad_()
    (slope,) = torch.autograd.grad(total(x), x)
    with torch.no_grad():
        for place in ((0, 0, 1, 2, 0), (1, 1, 0, 0, 2), (1, 0, 2, 1, 1)):
            step = torch.zeros_like(x)
            step[place] = 1e-2
            rate = (total(x + step) - total(x - step)) / 2e-2
            assert float(rate) == pytest.approx(float(slope[place]), rel=2e-2, abs=2e-5)


def test_masks_at_a_smaller_side_touch_every_cell():
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 9, 20] = True
    small = mask_at(mask, 8)
    assert small.shape == (1, 8, 8) and bool(small[0, 1, 2])
    assert not mask_at(torch.zeros_like(mask), 8).any() and mask_at(torch.ones_like(mask), 8).all()


def test_nothing_is_looked_at():
    """A token without any attention counts as outside, and gives no NaN."""
    maps = torch.zeros(1, 1, 2, 2, 1, requires_grad=True)
    token, _ = attention_losses(
        maps, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool)
    )
    assert float(token.detach()) == 1
    token.backward()
    assert torch.isfinite(maps.grad).all()
