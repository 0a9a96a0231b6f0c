"""Activations of a UNet's blocks: the same as those of a whole call, and the rows that go on to the end."""

from __future__ import annotations

import pytest
import torch
from model_helpers import load

from align_cli.errors import UserError
from align_cli.models.features import blocks, check_blocks, observe


@pytest.fixture(params=["sd15", "sdxl"])
def model(request, tiny_sd15_folder, tiny_sdxl_folder):
    return load({"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder}[request.param])


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
        block.register_forward_hook(
            lambda _m, _i, out, name=name: outputs.update({name: out if torch.is_tensor(out) else out[0]})
        )
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
    name = "up0"

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
    weight = blocks(model.denoiser)["mid"].get_parameter("resnets.0.conv1.weight").requires_grad_()

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
    stopped = gradients("mid", "prediction")
    assert stopped is None or float(stopped.abs().max()) == 0
    torch.testing.assert_close(gradients("mid", "others"), gradients("", "others"))


def test_an_unknown_block_is_told(model):
    with pytest.raises(UserError, match=r"dpt.feature: the UNet of .* has no block up7 \(it has bottom0, "):
        check_blocks(model.denoiser, ["up7"], "dpt.feature", model.model_id)
