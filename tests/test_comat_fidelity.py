"""CoMat's discriminator: which real latents it sees, and under which text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from comat_helpers import PROMPTS, Counted, Halves, Words2, make, numbers, run, stir
from model_helpers import field, load

from align_cli.errors import UserError
from align_cli.methods.base import Batch
from align_cli.methods.comat.config import CoMatConfig
from align_cli.methods.comat.method import CoMat
from align_cli.models.base import Posterior
from align_cli.settings import TrainSettings


def test_stored_latents_reach_the_discriminator(sd15):
    method = make(sd15, real="stored")
    batch = Batch(list(PROMPTS), latents=Posterior(field(3, 3, 4, 8, 8), None, 1.0))
    first = run(method, batch=batch)
    other = Batch(list(PROMPTS), latents=Posterior(field(4, 3, 4, 8, 8) * 3, None, 1.0))
    second = run(method, batch=other)
    assert first["loss"] == second["loss"] and first["discriminator/loss"] != second["discriminator/loss"]


def test_real_latents_that_are_drawn_are_those_of_the_original_model(unet_or_sd3):
    drawn = []
    for method in (make(unet_or_sd3), stir(make(unet_or_sd3))):
        noises = iter([field(k, 3, 4, 8, 8) for k in range(6)])
        drawn.append(method._real(Batch(list(PROMPTS)), lambda left=noises: next(left)))
    assert torch.equal(*drawn)


def test_what_the_discriminator_is_asked_under(sd15):
    """The sampler's last timestep, which is 1 of 50 steps, and the empty prompt. Spec (e)."""
    discriminator = make(sd15, steps=50, grad_steps=5).discriminator
    assert discriminator.timestep == 1
    assert torch.equal(discriminator.empty.tokens, sd15.encode_text([""]).tokens)


def test_what_the_discriminator_is_asked_under_on_sd3(tiny_sd3_folder):
    """The last time of its own path; the shared transformer, on both of whose streams its LoRA is."""
    model = load(tiny_sd3_folder)
    discriminator = make(model).discriminator
    assert discriminator.timestep == float(model.process.timesteps(5)[-1]) and discriminator.timestep > 0
    assert discriminator.model is model
    assert torch.equal(discriminator.empty.tokens, model.encode_text([""]).tokens)


def test_the_layers_of_sd3(tiny_sd3_folder, tiny_sd3_no_t5_folder):
    """Both streams of every block, and the second attention of SD3.5; not the text's queries of the last
    block, whose answers nobody reads.
    """
    for folder, second in ((tiny_sd3_folder, 0), (tiny_sd3_no_t5_folder, 2)):
        layers = list(make(load(folder)).lora.layers)
        own = {"to_q", "to_k", "to_v", "to_out.0"}
        text = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
        for block in range(3):
            first = f"transformer_blocks.{block}.attn."
            found = {name.removeprefix(first) for name in layers if name.startswith(first)}
            assert found == own | (text if block < 2 else {"add_k_proj", "add_v_proj"})
        assert sum(".attn2." in name for name in layers) == 4 * second


def test_the_discriminator_of_sd3_is_no_unet(tiny_sd3_folder, tiny_sd15_folder):
    model = load(tiny_sd3_folder)
    config = CoMatConfig(lora_rank=2, discriminator=str(tiny_sd15_folder), attention_steps=0, real="drawn")
    with pytest.raises(UserError, match=r"it must be a transformer for latents of 4 .* \(families sd3\)"):
        CoMat(model, config).check(TrainSettings())


def test_without_stored_latents(sd15):
    with pytest.raises(UserError, match="t2ialign encode --for comat, or give --set comat.real=drawn"):
        run(make(sd15, real="stored"))


def test_stored_latents_of_another_size(sd15):
    batch = Batch(list(PROMPTS), latents=Posterior(field(3, 3, 4, 16, 16), None, 1.0))
    with pytest.raises(UserError, match=r"shape \[4, 16, 16\], training pictures \[4, 8, 8\]"):
        run(make(sd15, real="stored"), batch=batch)


def test_the_discriminator_may_be_another_models(sd15, tiny_sdxl_folder):
    """SD1.5's, for SDXL, as in the official script."""
    model = load(tiny_sdxl_folder)
    method = make(model, fidelity_weight=0)
    method = CoMat(model, replace(method.config, fidelity_weight=1.0), seed=1)
    method.use_rewards({"tiny-blip": Counted()})
    method.look_for_nouns(Words2(), Halves())
    method.discriminate(sd15)
    before = numbers(sd15.denoiser)
    values = run(method)
    assert math.isfinite(values["discriminator/loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, numbers(sd15.denoiser), strict=True))
