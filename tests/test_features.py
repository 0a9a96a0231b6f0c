"""Activations of a UNet's blocks: the same as those of a whole call, and the rows that go on to the end."""

from __future__ import annotations

import pytest
import torch
from model_helpers import load

from align_cli.errors import UserError
from align_cli.models.features import (
    alike_at_first,
    block_channels,
    blocks,
    check_blocks,
    observe,
    own_feature,
)


@pytest.fixture(params=["sd15", "sdxl", "sd3", "sd35"])
def model(request, tiny_sd15_folder, tiny_sdxl_folder, tiny_sd3_folder, tiny_sd3_no_t5_folder):
    return load(
        {
            "sd15": tiny_sd15_folder,
            "sdxl": tiny_sdxl_folder,
            "sd3": tiny_sd3_folder,
            "sd35": tiny_sd3_no_t5_folder,
        }[request.param]
    )


def in_the_middle(model) -> str:
    return "block1" if model.family == "sd3" else "mid"


def as_map(out, z: torch.Tensor) -> torch.Tensor:
    """What a block gives, (R, C, h, w); a joint block gives text and picture, row by row."""
    if torch.is_tensor(out):
        return out
    if torch.is_tensor(out[1]):
        return out[1].reshape(len(z), z.shape[-2] // 2, z.shape[-1] // 2, -1).permute(0, 3, 1, 2)
    return out[0]


@pytest.fixture
def asked(model):
    """Noisy latents of four rows, their timesteps, and texts."""
    g = torch.Generator().manual_seed(0)
    side = model.image_size // model.vae_factor
    z = torch.randn(4, model.latent_channels, side, side, generator=g)
    return z, torch.tensor([10, 200, 500, 900]), model.encode_text(["a red circle", "b", "c d", ""])


def test_rows_that_go_to_the_end_are_those_of_a_whole_call(model, asked):
    z, t, cond = asked
    whole = model.predict(z, t, cond)
    outputs = {}
    hooks = [
        block.register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: as_map(out, z)}))
        for name, block in blocks(model.denoiser).items()
    ]
    model.predict(z, t, cond)
    for hook in hooks:
        hook.remove()
    for name in blocks(model.denoiser):
        seen, some = observe(
            model.denoiser, [name], lambda: model.predict(z, t, cond), to_end=slice(1, None, 2)
        )
        torch.testing.assert_close(seen[name], outputs[name])
        torch.testing.assert_close(some, whole[1::2])
        seen, nothing = observe(model.denoiser, [name], lambda: model.predict(z, t, cond))
        torch.testing.assert_close(seen[name], outputs[name])
        assert nothing is None
    torch.testing.assert_close(model.predict(z, t, cond), whole)  # no hook is left


def test_gradients_of_the_rows_are_those_of_separate_calls(model, asked):
    z, t, cond = asked
    name = list(blocks(model.denoiser))[-2]

    def gradient(work) -> torch.Tensor:
        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(work(leaf), leaf)[0]

    def together(leaf):
        seen, some = observe(
            model.denoiser, [name], lambda: model.predict(leaf, t, cond), to_end=slice(0, None, 4)
        )
        return seen[name].square().sum() + some.square().sum()

    def apart(leaf):
        seen, _ = observe(model.denoiser, [name], lambda: model.predict(leaf, t, cond))
        return seen[name].square().sum() + model.predict(leaf[:1], t[:1], cond[:1]).square().sum()

    torch.testing.assert_close(gradient(together), gradient(apart), atol=1e-4, rtol=1e-3)


def test_detached_after_a_block_the_prediction_sends_nothing_back_through_it(model, asked):
    z, t, cond = asked
    names = list(blocks(model.denoiser))
    middle = in_the_middle(model)
    layer = "attn.to_q.weight" if model.family == "sd3" else "resnets.0.conv1.weight"
    weight = blocks(model.denoiser)[middle].get_parameter(layer).requires_grad_()

    def gradients(detach_after: str, what: str) -> torch.Tensor | None:
        seen, some = observe(
            model.denoiser,
            [names[-1]],
            lambda: model.predict(z, t, cond),
            to_end=slice(0, None, 2),
            detach_after=detach_after,
        )
        told = some if what == "prediction" else seen[names[-1]][1::2]
        return torch.autograd.grad(told.square().sum(), weight, allow_unused=True)[0]

    assert float(gradients("", "prediction").abs().max()) > 0
    stopped = gradients(middle, "prediction")
    assert stopped is None or float(stopped.abs().max()) == 0
    torch.testing.assert_close(gradients(middle, "others"), gradients("", "others"))


def test_a_wide_latent_is_seen_as_wide(model):
    """Rows and columns are not exchanged, and are of the patches of SD3."""
    z = torch.randn(1, model.latent_channels, 4, 8, generator=torch.Generator().manual_seed(0))
    name = in_the_middle(model)
    told = model.encode_text(["a red circle"])
    seen, _ = observe(model.denoiser, [name], lambda: model.predict(z, torch.tensor([500]), told))
    height, width = seen[name].shape[-2:]
    assert width == 2 * height and (model.family != "sd3" or width == 4)
    outputs = []
    hook = blocks(model.denoiser)[name].register_forward_hook(
        lambda _m, _i, out: outputs.append(as_map(out, z))
    )
    model.predict(z, torch.tensor([500]), told)
    hook.remove()
    torch.testing.assert_close(seen[name], outputs[0])


def test_channels_and_own_features(model):
    there = blocks(model.denoiser)
    z = torch.zeros(1, model.latent_channels, 8, 8)
    told = model.encode_text(["x"])
    seen, _ = observe(model.denoiser, list(there), lambda: model.predict(z, torch.tensor([1]), told))
    assert {name: x.shape[1] for name, x in seen.items()} == block_channels(model.denoiser)
    assert own_feature(model.denoiser) == ("block1" if model.family == "sd3" else "up0")


def test_the_feature_of_the_published_sd3():
    """After 16 of 24 blocks; of SD3.5 large after 25 of 38."""
    for count, name in ((24, "block15"), (38, "block24"), (1, "block0"), (2, "block0")):
        net = torch.nn.Module()
        net.transformer_blocks = torch.nn.ModuleList([torch.nn.Identity() for _ in range(count)])
        assert own_feature(net) == name


def test_an_unknown_block_is_told(model):
    first = next(iter(blocks(model.denoiser)))
    with pytest.raises(UserError, match=rf"dpt.feature: the \w+ of .* has no block up7 \(it has {first}, "):
        check_blocks(model.denoiser, ["up7"], "dpt.feature", model.model_id)


def test_rows_of_the_same_latent_share_what_comes_before_the_text(tiny_sd15_folder):
    model = load(tiny_sd15_folder)
    side = model.image_size // model.vae_factor
    latents = torch.randn(2, model.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
    again = torch.tensor([0, 0, 1, 0, 1])
    z, t = latents[again], torch.tensor([30, 700])[again]
    cond = model.encode_text(["a red circle", "b", "c d", "", "e"])
    sizes = []
    hook = model.denoiser.conv_in.register_forward_hook(lambda _m, args, _o: sizes.append(len(args[0])))
    whole = model.predict(z, t, cond)
    with alike_at_first(model.denoiser, torch.tensor([0, 2]), again):
        shared = model.predict(z, t, cond)
    hook.remove()
    assert sizes == [5, 2]
    torch.testing.assert_close(shared, whole, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.predict(z, t, cond), whole)
