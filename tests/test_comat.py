"""CoMat: a training step on every family, its three losses, what a step draws at random."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from comat_helpers import PROMPTS, Halves, gradient, make, numbers, run, stir
from model_helpers import field, load

from align_cli.methods.base import StepContext
from align_cli.methods.comat.matching import ConceptMatching
from align_cli.methods.comat.method import Plan
from align_cli.models.states import LORA_B


@pytest.fixture(params=["sd15", "sdxl", "sd3", "sd35"])
def model(request, tiny_sd15_folder, tiny_sdxl_folder, tiny_sd3_folder, tiny_sd3_no_t5_folder):
    folders = {"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}
    return load((folders | {"sd35": tiny_sd3_no_t5_folder})[request.param])


# ---------------------------------------------------------------- a step


def test_a_step_trains_both_groups_and_nothing_else(model):
    frozen = [numbers(m) for m in (model.denoiser, model.vae, *model.encoders)]
    method = make(model)
    groups = method.trainables()
    assert list(groups) == ["generator", "discriminator"]
    values = run(method)
    assert all(math.isfinite(v) for v in values.values())
    expected = (
        -values["reward/tiny-blip"]
        + values["loss/fidelity"]
        + 0.1 * values["loss/token"]
        + 0.05 * values["loss/pixel"]
    )
    assert values["loss"] == pytest.approx(expected, rel=1e-5)
    for group in groups:
        assert float(gradient(method, group).abs().max()) > 0
    after = [numbers(m) for m in (model.denoiser, model.vae, *model.encoders)]
    for old, new in zip(frozen, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    for module in (model.denoiser, model.vae, *model.encoders):
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
    assert values["words/nouns"] == pytest.approx(4 / 3) and values["words/found"] == 1


def test_the_gradient_of_the_generator_against_finite_differences(unet_or_sd3):
    """All three losses at once, where every sampling step carries gradient."""
    method = stir(make(unet_or_sd3, steps=3, grad_steps=3, guidance=2.0))
    run(method)
    slopes = {k: p.grad.clone() for k, p in method.lora.weights.items()}
    key = max(slopes, key=lambda k: float(slopes[k].abs().max()))
    place = tuple(int(x) for x in (slopes[key].abs() == slopes[key].abs().max()).nonzero()[0])
    parameter, values = method.lora.weights[key], []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[place] += sign * 2e-3
        values.append(run(method)["loss"])
        with torch.no_grad():
            parameter[place] -= sign * 2e-3
    rate = (values[0] - values[1]) / 4e-3
    assert rate == pytest.approx(float(slopes[key][place]), rel=0.02)


def test_merged_and_attached_loras_draw_alike(unet_or_sd3):
    """Steps without gradient take merged weights in float32."""
    method = stir(make(unet_or_sd3, guidance=1.5))
    noises = [field(k, 3, 4, 8, 8) for k in range(6)]

    def drawn(plan):
        left = iter(noises[1:])
        return method.draw(list(PROMPTS), noises[0], lambda: next(left), plan).latents.detach()

    left = iter(noises[1:])
    original = method.draw(list(PROMPTS), noises[0], lambda: next(left), original=True).latents
    assert not torch.allclose(drawn(None), original, atol=1e-3)
    torch.testing.assert_close(drawn(None), drawn(Plan((0, 1, 2, 3, 4))), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({"fidelity_weight": 0, "attention_steps": 0}, {"reward/tiny-blip", "reward/gradient_norm"}),
        ({"rewards": {}, "fidelity_weight": 0}, {"loss/token", "loss/pixel", "words/nouns", "words/found"}),
        (
            {"rewards": {}, "attention_steps": 0},
            {"loss/fidelity", "discriminator/loss", "discriminator/right"},
        ),
    ],
    ids=["concept", "concentration", "fidelity"],
)
def test_each_loss_alone(sd15, options, terms):
    method = make(sd15, **options)
    assert set(run(method)) == {"loss"} | terms
    assert float(gradient(method, "generator").abs().max()) > 0


def test_the_gradient_is_the_sum_of_those_of_the_losses(unet_or_sd3):
    """Of the same noise and the same random steps."""
    alone = [
        {"fidelity_weight": 0, "token_weight": 0, "pixel_weight": 0},
        {"rewards": {}, "fidelity_weight": 0, "pixel_weight": 0},
        {"rewards": {}, "fidelity_weight": 0, "token_weight": 0},
        {"rewards": {}, "token_weight": 0, "pixel_weight": 0},
    ]
    plan, noises = Plan((1, 3), frozenset({3})), [field(k, 3, 4, 8, 8) for k in range(6)]

    def slope(**options):
        method = stir(make(unet_or_sd3, **options))
        groups = method.trainables()
        left = iter(noises[1:])
        ctx = StepContext(
            step=0,
            rng=torch.Generator(),
            backward=lambda loss, group: torch.autograd.backward(loss, inputs=groups[group]),
        )
        real = field(9, 3, 4, 8, 8) if method.discriminator else None
        own = plan if method.reader else replace(plan, attention=frozenset())
        method.learn(list(PROMPTS), noises[0], lambda: next(left), own, real, ctx)
        return gradient(method, "generator")

    whole, parts = slope(), [slope(**options) for options in alone]
    assert all(float(part.abs().max()) > 0 for part in parts)
    torch.testing.assert_close(whole, sum(parts), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_of_pictures_give_the_same_gradient(sd15, chunk):
    whole, parts = (stir(make(sd15, decode_chunk=n)) for n in (0, chunk))
    first, second = run(whole), run(parts)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["reward/gradient_norm"] == pytest.approx(second["reward/gradient_norm"], rel=1e-4)
    torch.testing.assert_close(
        gradient(whole, "generator"), gradient(parts, "generator"), atol=1e-6, rtol=1e-3
    )


@pytest.mark.parametrize("saving", ["unet", "vae"])
def test_computing_activations_again_gives_the_same_gradient(model, saving):
    """Also of the discriminator, whose LoRA takes turns with the generator's on the same UNet."""
    plain = stir(make(model))
    run(plain)
    again = stir(make(model, checkpoint_vae=saving == "vae"))
    if saving == "unet":
        model.denoiser.enable_gradient_checkpointing()
    try:
        run(again)
    finally:
        model.denoiser.disable_gradient_checkpointing()
    for group in plain.trainables():
        torch.testing.assert_close(gradient(plain, group), gradient(again, group), atol=1e-6, rtol=1e-3)


def test_half_precision_scales_all_gradients_alike(sd15):
    plain, scaled = stir(make(sd15)), stir(make(sd15))
    run(plain)
    run(scaled, scale=256.0)
    for group in plain.trainables():
        torch.testing.assert_close(
            gradient(plain, group), gradient(scaled, group) / 256, atol=1e-6, rtol=1e-3
        )


def test_the_caption_loss_is_the_mean_over_all_tokens(sd15):
    """Not over pictures first: a long prompt counts more."""
    method = make(sd15, fidelity_weight=0, attention_steps=0)
    value = run(method)["reward/tiny-blip"]
    images = torch.cat(method.rewards.rewards["tiny-blip"].seen)
    counts = torch.tensor([8.0, 3.0, 3.0])
    losses = counts * (1 - images.flatten(1).mean(1))
    assert value == pytest.approx(-float(losses.sum() / counts.sum()), rel=1e-5)


def test_pictures_are_not_clamped_for_the_captioner_but_for_the_masks(sd15):
    masker = Halves()
    method = make(sd15, masker=masker)
    run(method)
    seen = torch.cat(method.rewards.rewards["tiny-blip"].seen)
    assert float(seen.min()) < 0 or float(seen.max()) > 1
    assert float(masker.seen[0].min()) >= 0 and float(masker.seen[0].max()) <= 1


def test_the_official_range_of_sdxl(sd15):
    """The bug: [-1, 1] for captioner and masks."""
    both = []
    for official in (False, True):
        masker = Halves()
        method = make(sd15, masker=masker, official_range=official)
        run(method)
        both.append((torch.cat(method.rewards.rewards["tiny-blip"].seen), masker.seen[0]))
    torch.testing.assert_close(both[1][0], both[0][0] * 2 - 1, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[1][1], (both[0][0] * 2 - 1).clamp(0, 1), atol=1e-5, rtol=1e-4)


def test_norm_grad(sd15):
    plain = make(sd15, fidelity_weight=0, attention_steps=0, decode_chunk=0)
    norm = run(plain)["reward/gradient_norm"]
    normed = make(sd15, fidelity_weight=0, attention_steps=0, decode_chunk=0, norm_grad=True)
    run(normed)
    torch.testing.assert_close(
        gradient(normed, "generator"), gradient(plain, "generator") * 1e4 / norm, atol=1e-3, rtol=1e-3
    )


# ---------------------------------------------------------------- what is drawn at random


def test_gradient_steps_are_equally_spaced_from_a_random_start(sd15):
    method = make(sd15, steps=50, grad_steps=5, attention_steps=2)
    plans = [method.plan(torch.Generator().manual_seed(k)) for k in range(300)]
    for plan in plans:
        first = plan.gradient[0]
        assert plan.gradient == tuple(first + 10 * k for k in range(5))
        assert 1 <= len(plan.attention) <= 2 and plan.attention <= set(plan.gradient)
    starts = Counter(plan.gradient[0] for plan in plans)
    assert sorted(starts) == list(range(10))
    once = sum(len(plan.attention) == 1 for plan in plans)
    assert 30 <= once <= 95  # drawn with replacement: one in five
    assert all(plan.crop is None for plan in plans)  # 32 pixels are below 224


def test_exactly_k_steps_carry_gradient_where_k_does_not_divide(sd15):
    method = make(sd15, steps=50, grad_steps=4)
    for k in range(60):
        plan = method.plan(torch.Generator().manual_seed(k))
        assert len(plan.gradient) == 4 and 0 <= plan.gradient[0] <= 13 and plan.gradient[-1] < 50


def test_attention_is_looked_at_in_the_drawn_steps_alone(unet_or_sd3):
    method = make(unet_or_sd3)
    for attention, count in ((frozenset({3}), 1), (frozenset({1, 3}), 2)):
        noises = iter([field(k, 3, 4, 8, 8) for k in range(6)])
        drawn = method.draw(
            list(PROMPTS), next(noises), lambda left=noises: next(left), Plan((1, 3), attention)
        )
        assert len(drawn.kept) == count


def test_loras_start_as_the_official_ones(sd15):
    """Down of standard deviation 1 / rank, up 0; the discriminator's rank is its own. Spec (b)."""
    method = make(sd15, lora_rank=4, discriminator_rank=8)
    for lora, rank in ((method.lora, 4), (method.discriminator.lora, 8)):
        down = [x for key, x in lora.weights.items() if not key.endswith(LORA_B)]
        assert {len(x) for x in down} == {rank} and lora.factor == 1
        assert float(torch.cat([x.detach().flatten() for x in down]).std()) == pytest.approx(
            1 / rank, rel=0.05
        )
        assert not any(x.detach().any() for key, x in lora.weights.items() if key.endswith(LORA_B))


def test_crops_of_512_pixels(sd15):
    method = make(sd15, image_size=512)
    crops = {method.plan(torch.Generator().manual_seed(k)).crop for k in range(200)}
    assert crops == {(row, column) for row in range(3) for column in range(3)}
    method = make(sd15, image_size=512, crop=False)
    assert method.plan(torch.Generator().manual_seed(0)).crop is None


def test_the_captioner_sees_the_crop(sd15):
    method = make(sd15)
    images = field(0, 1, 3, 512, 512)
    matching = ConceptMatching(sd15, method.config, method.rewards)
    matching._judged(images, ["x"], (1, 2), {"tiny-blip": 1.0}, 1)
    assert torch.equal(method.rewards.rewards["tiny-blip"].seen[0], images[:, :, 1:511, 2:512])


@pytest.mark.slow
def test_the_step_depends_on_its_seed_alone(sd15):
    first, again, other = run(make(sd15), seed=3), run(make(sd15), seed=3), run(make(sd15), seed=4)
    assert first == again and first != other


def test_sdxl_trains_with_the_encoded_empty_prompt(tiny_sdxl_folder):
    """Drawing takes zeros there; official training encodes the empty string."""
    model = load(tiny_sdxl_folder)
    method, asked = make(model), []  # its discriminator has the empty prompt already
    plain = model.plain_text
    model.plain_text = lambda prompts: asked.append(list(prompts)) or plain(prompts)
    run(method)
    assert asked == [PROMPTS, [""]] * 2  # the pictures, and those of the original model
