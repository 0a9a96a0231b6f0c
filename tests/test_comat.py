"""CoMat: a training step on every family, its three losses, what a step draws at random, bad input."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from model_helpers import field, load
from torch import nn

from align_cli.errors import UserError
from align_cli.grounding.entities import Entity
from align_cli.methods.base import Batch, StepContext
from align_cli.methods.comat.concentration import Words
from align_cli.methods.comat.config import CoMatConfig
from align_cli.methods.comat.matching import ConceptMatching
from align_cli.methods.comat.method import CoMat, Plan
from align_cli.models.base import Posterior
from align_cli.models.states import LORA_B
from align_cli.rewards.captioning import Captioner
from align_cli.settings import TrainSettings

PROMPTS = ["a red circle left of a blue square", "two green triangles", "a yellow square"]


class Counted(Captioner):
    """Scores the brightness of a picture for every token of its prompt: what it wants is known."""

    def __init__(self) -> None:
        super().__init__(name="tiny-blip", version="", source="", preprocessing="", scale="")
        self.seen: list[torch.Tensor] = []

    def token_counts(self, prompts):
        return torch.tensor([float(len(p.split())) for p in prompts])

    def token_losses(self, images, prompts):
        self.seen.append(images.detach())
        counts = self.token_counts(prompts)
        return counts * (1 - images.flatten(1).mean(1)), counts


class Words2:
    """Nouns by a fixed rule: the word after each colour."""

    def entities(self, prompt):
        words = prompt.split()
        colors = {"red", "green", "blue", "yellow"}
        return [
            Entity(words[i + 1], (i + 1, i + 2), (word, words[i + 1]))
            for i, word in enumerate(words)
            if word in colors
        ]


class Halves:
    """The first noun is in the left half, the second in the right one, a third nowhere; a picture without
    nouns, or with one that is "gone", is left out or empty.
    """

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def masks(self, images, nouns):
        self.seen.append(images)
        found = []
        for image, own in zip(images, nouns, strict=True):
            masks = torch.zeros(len(own), *image.shape[-2:], dtype=torch.bool)
            half = image.shape[-1] // 2
            for n, mask in enumerate(masks[:2]):
                mask[:, slice(0, half) if n == 0 else slice(half, None)] = True
            found.append(masks)
        return found


@pytest.fixture(params=["sd15", "sdxl", "sd3", "sd35"])
def model(request, tiny_sd15_folder, tiny_sdxl_folder, tiny_sd3_folder, tiny_sd3_no_t5_folder):
    folders = {"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}
    return load((folders | {"sd35": tiny_sd3_no_t5_folder})[request.param])


@pytest.fixture(params=["sd15", "sd3"])
def unet_or_sd3(request, tiny_sd15_folder, tiny_sd3_folder):
    """A UNet, and a transformer on the path of a flow."""
    return load({"sd15": tiny_sd15_folder, "sd3": tiny_sd3_folder}[request.param])


@pytest.fixture
def sd15(tiny_sd15_folder):
    return load(tiny_sd15_folder)


def make(model, *, reader=None, masker=None, **options) -> CoMat:
    settings = {
        "rewards": {"tiny-blip": 1.0},
        "lora_rank": 2,
        "steps": 5,
        "grad_steps": 2,
        "real": "drawn",
        "token_weight": 0.1,
        "pixel_weight": 0.05,
    }
    method = CoMat(model, CoMatConfig(**{**settings, **options}), seed=1)
    if method.config.concept:
        method.use_rewards({"tiny-blip": Counted()})
    if method.config.concentration:
        method.look_for_nouns(reader or Words2(), masker or Halves())
    if method.config.fidelity_weight:
        method.discriminate(model)
    return method


def stir(method: CoMat, size: float = 0.05) -> CoMat:
    """LoRA that does something."""
    rng = torch.Generator().manual_seed(9)
    loras = [method.lora] + ([method.discriminator.lora] if method.discriminator else [])
    with torch.no_grad():
        for lora in loras:
            for name, p in lora.weights.items():
                if name.endswith(LORA_B):
                    p.copy_(torch.randn(p.shape, generator=rng) * size)
    return method


def run(method: CoMat, *, batch: Batch | None = None, seed: int = 0, scale: float = 1.0) -> dict[str, float]:
    """One step; gradients stay in the parameters."""
    groups = method.trainables()
    for group in groups.values():
        for p in group:
            p.grad = None

    def backward(loss, group=None):
        torch.autograd.backward(loss * scale, inputs=groups[group])

    rng = torch.Generator().manual_seed(seed)
    ctx = StepContext(step=0, rng=rng, backward=backward, loss_scale=scale)
    return method.step(batch or Batch(list(PROMPTS)), ctx)


def gradient(method: CoMat, group: str) -> torch.Tensor:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in method.trainables()[group]]
    return torch.cat([g.flatten() for g in found])


def numbers(module: nn.Module) -> list[torch.Tensor]:
    return [x.clone() for x in module.state_dict().values()]


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


# ---------------------------------------------------------------- real latents


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


# ---------------------------------------------------------------- words


def test_words_of_a_batch():
    told = [
        [Entity("circle", (2, 3), ("red", "circle")), Entity("square", (7, 8), ("blue", "square"))],
        [],
        [Entity("dog", (4,), ("dog",))],
    ]
    words = Words.of(told, torch.device("cpu"))
    assert words.positions.tolist() == [[2, 3, 7, 8], [0, 0, 0, 0], [4, 0, 0, 0]]
    assert [own.int().tolist() for own in words.own] == [[[1, 1, 0, 0], [0, 0, 1, 1]], [], [[1, 0, 0, 0]]]
    assert words.nouns == [["circle", "square"], [], ["dog"]] and words.count == 3


class Nothing:
    def entities(self, prompt):
        return []


def test_prompts_without_nouns(sd15):
    """The other losses go on; those of attention are none, which counts in their means."""
    values = run(make(sd15, reader=Nothing()))
    assert values["loss/token"] == 0 == values["words/nouns"] and math.isfinite(values["loss"])


def test_prompts_without_nouns_and_nothing_else_to_learn(sd15):
    method = make(sd15, reader=Nothing(), rewards={}, fidelity_weight=0)
    values = run(method)
    assert values["loss"] == 0 and float(gradient(method, "generator").abs().max()) == 0


class LeftOut:
    def masks(self, images, nouns):
        return [None] * len(images)


def test_pictures_of_which_nothing_can_be_said(sd15):
    values = run(make(sd15, masker=LeftOut()))
    assert values["loss/token"] == 0 and values["words/found"] == 0


# ---------------------------------------------------------------- settings


def test_a_rank_beyond_the_layers(sd15):
    with pytest.raises(UserError, match=r"comat.lora_rank must be at most \d+"):
        CoMat(sd15, CoMatConfig(lora_rank=4096))
    with pytest.raises(UserError, match=r"comat.discriminator_rank must be at most \d+"):
        make(sd15, discriminator_rank=4096)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 4, "grad_steps": 5}, "comat.grad_steps must be at most comat.steps"),
        ({"real": "imagined"}, "comat.real must be one of stored, drawn"),
        ({"attention_layers": ("up16",)}, "mid_8 or up_16"),
        ({"rewards": {}, "fidelity_weight": 0, "attention_steps": 0}, "nothing is asked of the pictures"),
        ({"rewards": {"shapes": 1.0}}, "without a gradient"),
        ({"norm_grad": True}, "comat.decode_chunk=0"),
        ({"reward_weights": {"clip": "x"}}, "comat.reward_weights names clip"),
        ({"box_threshold": 1.5}, "comat.box_threshold must be >= 0 and < 1"),
        ({"guidance": -1.0}, "comat.guidance must be >= 0"),
    ],
)
def test_bad_settings(options, said):
    with pytest.raises(UserError, match=said):
        CoMatConfig(**options)


def test_the_discriminator_has_its_own_optimiser(sd15):
    options = make(sd15, lr_discriminator=3e-5).group_options()
    assert options == {"discriminator": {"adam_beta1": 0.0, "max_grad_norm": 1.0, "lr": 3e-5}}
    assert make(sd15, fidelity_weight=0).group_options() == {}


def test_settings_without_effect_are_told(sd15):
    config = CoMatConfig(
        lora_rank=2, rewards={}, real="drawn", attention_steps=0, masker="shapes", crop=False, steps=5
    )
    method = CoMat(sd15, config)
    with pytest.warns(UserWarning, match="no effect") as told:
        method.check(TrainSettings())
    texts = " ".join(str(one.message) for one in told)
    assert "comat.masker" in texts and "comat.crop" in texts


def test_more_steps_than_timesteps(sd15):
    method = CoMat(sd15, CoMatConfig(lora_rank=2, steps=1001, fidelity_weight=0, attention_steps=0))
    with pytest.raises(UserError, match=r"comat.steps must be at most 1000 .*, got 1001"):
        method.check(TrainSettings())


def test_the_dtype_of_the_rewards_is_also_that_of_the_masks():
    """So it has an effect without rewards, too."""
    plain = {"rewards": {}, "reward_dtype": "bfloat16"}
    assert "comat.reward_dtype" not in CoMatConfig(**plain).idle()
    assert "comat.reward_dtype" in CoMatConfig(**plain, attention_steps=0).idle()


def test_another_discriminator_saves_memory_as_the_model_does(sd15, tiny_sd15_folder):
    config = CoMatConfig(lora_rank=2, discriminator=str(tiny_sd15_folder), rewards={}, attention_steps=0)
    for saving in (True, False):
        method = CoMat(sd15, config)
        method.check(TrainSettings(gradient_checkpointing=saving))
        assert method.discriminator.model is not sd15
        assert method.discriminator.model.denoiser.is_gradient_checkpointing == saving


# ---------------------------------------------------------------- the artefact


def test_the_state_holds_the_lora_alone(sd15):
    method = stir(make(sd15))
    state = method.state()
    assert all(key.startswith("unet.") for key in state)
    other = make(sd15, fidelity_weight=0)
    other.load_state(state)
    assert all(torch.equal(x, other.state()[key]) for key, x in state.items())
    with pytest.raises(ValueError, match="unused text"):
        other.load_state({**state, "text.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="missing"):
        other.load_state(dict(list(state.items())[1:]))


def test_attach_moves_the_unet_and_takes_it_back(sd15):
    method = stir(make(sd15))
    z, t, text = field(0, 3, 4, 8, 8), torch.tensor(300), sd15.encode_text(PROMPTS)
    before = sd15.predict(z, t, text)
    with method.attach(sd15):
        assert not torch.allclose(sd15.predict(z, t, text), before, atol=1e-4)
    with method.attach(sd15, 0.0):
        assert torch.equal(sd15.predict(z, t, text), before)
    assert torch.equal(sd15.predict(z, t, text), before)
