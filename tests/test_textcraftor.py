"""TextCraftor: a training step on every family, stages, LoRA, the split of the steps, bad input."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from model_helpers import load
from reward_helpers import save_clip, tiny_clip
from torch import nn

from align_cli import sampling
from align_cli.adapters import attach, save_adapter
from align_cli.errors import UserError
from align_cli.methods.base import Batch, StepContext
from align_cli.methods.textcraftor.config import TextCraftorConfig
from align_cli.methods.textcraftor.method import TextCraftor
from align_cli.models import loading
from align_cli.models.conditioning import StepText
from align_cli.rewards.base import Reward
from align_cli.settings import SampleSettings, TrainSettings

PROMPTS = ["a red circle left of a blue square", "two green triangles", "a yellow square"]
FAMILIES = ["sd15", "sdxl", "sd3"]


@pytest.fixture(params=FAMILIES)
def model(request, tiny_sd15_folder, tiny_sdxl_folder, tiny_sd3_folder):
    """A fresh model of every family."""
    folders = {"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}
    return load(folders[request.param])


class Brightness(Reward):
    """Mean of the picture, whatever the prompt: what it wants is known."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(
            name="brightness", version="", source="", preprocessing="", scale="mean of the values"
        )
        self.factor = factor

    def score(self, images, prompts):
        return images.flatten(1).mean(1) * self.factor


def make(model, *, reward: Reward | None = None, **options) -> TextCraftor:
    """A method of four sampling steps, two of them with gradient, on one reward."""
    settings = {
        "rewards": {"tiny-clip": 10.0},
        "reward_preprocessing": "official",
        "steps": 4,
        "grad_steps": 2,
    }
    method = TextCraftor(model, TextCraftorConfig(**{**settings, **options}), seed=1)
    if reward is not None:
        method.use_rewards(dict.fromkeys(method.config.rewards, reward))
    return method


def run(method: TextCraftor, prompts=PROMPTS, *, noise=None, seed: int = 0) -> dict[str, float]:
    """One step; gradients stay in the parameters."""
    for group in method.trainables().values():
        for p in group:
            p.grad = None
    ctx = StepContext(step=0, rng=torch.Generator().manual_seed(seed), backward=lambda loss: loss.backward())
    return (
        method.step(Batch(list(prompts)), ctx) if noise is None else method.climb(Batch(prompts), noise, ctx)
    )


def gradients(method: TextCraftor) -> torch.Tensor:
    found = [p.grad for group in method.trainables().values() for p in group if p.grad is not None]
    return torch.cat([g.flatten() for g in found])


def numbers(module: nn.Module) -> list[torch.Tensor]:
    return [x.clone() for x in module.state_dict().values()]


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["text", "unet", "joint"])
def test_a_step_trains_what_the_stage_says_and_nothing_else(model, stage, options):
    frozen = [numbers(m) for m in (model.denoiser, model.vae, *model.encoders)]
    method = make(model, stage=stage, **options)
    groups = method.trainables()
    assert list(groups) == {"text": ["text"], "unet": ["unet"], "joint": ["text", "unet"]}[stage]
    values = run(method)
    assert math.isfinite(values["loss"])
    assert values["loss"] == pytest.approx(-10 * values["reward/tiny-clip"], rel=1e-5)
    for group in groups.values():
        assert max(float(p.grad.abs().max()) for p in group if p.grad is not None) > 0
    after = [numbers(m) for m in (model.denoiser, model.vae, *model.encoders)]
    for old, new in zip(frozen, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    for module in (model.denoiser, model.vae, *model.encoders):
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())


def test_both_clip_towers_are_tuned_and_t5_is_not(model):
    method = make(model)
    wanted = {"sd15": ["text_encoder"]}.get(model.family, ["text_encoder", "text_encoder_2"])
    assert list(method.tunings) == wanted
    run(method)
    for tuning in method.tunings.values():
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tuning.parameters())
    one = make(model, encoders=("text_encoder",))
    assert list(one.tunings) == ["text_encoder"]


def test_an_encoder_that_is_not_there(sd15):
    with pytest.raises(UserError, match=r"has no text_encoder_2 \(it has text_encoder\)"):
        make(sd15, encoders=("text_encoder_2",))


@pytest.mark.slow
def test_steps_of_the_optimiser_raise_the_reward(sd15):
    """Brighter pictures: the same prompts and noise, before and after thirty steps."""
    method = make(sd15, reward=Brightness(), stage="joint", rewards={"clip": 1.0})
    optimizer = torch.optim.AdamW([p for g in method.trainables().values() for p in g], lr=3e-3)
    first = run(method)["reward/clip"]
    for _ in range(30):
        run(method)
        optimizer.step()
    assert run(method)["reward/clip"] > first + 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"decode_chunk": 0},
        {"decode_chunk": 2},
        {"kept_steps": 0},
        {"kept_steps": 2},
        {"checkpoint_vae": True},
    ],
)
def test_memory_settings_do_not_change_the_gradient(model, change):
    plain, other = make(model), make(model, **change)
    assert run(plain)["loss"] == pytest.approx(run(other)["loss"], rel=1e-5)
    torch.testing.assert_close(gradients(plain), gradients(other), rtol=1e-4, atol=1e-5)


def test_gradient_is_that_of_one_plain_graph(sd15):
    """Against the straightforward form: encode, loop over DDIM steps, decode, reward, backward."""
    method = make(sd15, stage="text", spacing="trailing", guidance=3.0)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    run(method, noise=noise)
    found = gradients(method)
    encoder = method.tunings["text_encoder"].module
    encoder.zero_grad()
    words = sd15.tokenizer(
        PROMPTS, padding="max_length", max_length=sd15.token_limit, truncation=True, return_tensors="pt"
    )["input_ids"]
    empty = sd15.tokenizer(
        [""], padding="max_length", max_length=sd15.token_limit, truncation=True, return_tensors="pt"
    )["input_ids"]

    def texts(tower) -> torch.Tensor:
        blank = tower(empty).last_hidden_state.expand(3, -1, -1)
        return torch.cat([blank, tower(words).last_hidden_state])

    z, abar = noise, sd15.process.alphas_cumprod
    for i, t in enumerate((999, 749, 499, 249)):
        with torch.set_grad_enabled(i >= 2):
            text = texts(encoder if i >= 2 else sd15.text_encoder)
            u, c = sd15.denoiser(torch.cat([z, z]), t, encoder_hidden_states=text).sample.chunk(2)
        eps = u + 3.0 * (c - u)
        x0 = (z - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        before = abar[t - 250] if t >= 250 else torch.tensor(sd15.process.final_alpha_cumprod)
        z = before.sqrt() * x0 + (1 - before).sqrt() * eps
    pictures = (sd15.vae.decode(z / sd15.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    (-10 * method.rewards.rewards["tiny-clip"].score(pictures, PROMPTS).mean()).backward()
    wanted = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_pickscore_over_the_whole_batch(sd15, tmp_path):
    """Mean over all prompts for every picture, as the released code has it."""
    folder = save_clip(tmp_path / "pick", tiny_clip())
    options = {
        "rewards": {"pickscore": 1.0},
        "reward_weights": {"pickscore": str(folder)},
        "reward_preprocessing": "textcraftor",  # no rounding to bytes, which differs between batch sizes
    }
    whole = make(sd15, pickscore_pairing="batch", **options)
    own = make(sd15, **options)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    first, second = run(whole, noise=noise), run(own, noise=noise)
    with torch.no_grad():
        text = sd15.encode_text(PROMPTS), sd15.uncond(3)
        z = own._draw(PROMPTS, noise, *text)
        matrix = own.rewards.rewards["pickscore"].matrix(sd15.decode(z), PROMPTS)
    assert first["reward/pickscore"] == pytest.approx(float(matrix.mean()), rel=1e-4)
    assert second["reward/pickscore"] == pytest.approx(float(matrix.diagonal().mean()), rel=1e-4)


def test_the_reward_of_a_picture_that_is_not_finite_stops_with_its_name(sd15):
    method = make(sd15, reward=Brightness(math.nan))
    with pytest.raises(UserError, match="the reward tiny-clip is nan for a picture of 'a red circle left of"):
        run(method)


# ---------------------------------------------------------------- the split of the steps


def test_the_split_of_the_steps():
    own, literal = TextCraftorConfig(), TextCraftorConfig(literal_split=True)
    assert own.first_tuned(25, 5) == literal.first_tuned(25, 5) == 20
    assert own.first_tuned(50, 15) == 35 and literal.first_tuned(50, 15) == 10
    assert own.first_tuned(10, 15) == 0


def test_drawing_uses_the_tuned_encoder_in_the_steps_it_is_for(sd15):
    method = make(sd15, test_grad_steps=3)
    moved(method)
    with method.attach(sd15):
        text = StepText(sd15, PROMPTS, 5)
        own = [torch.equal(text.cond(i).tokens, sd15.encode_text(PROMPTS).tokens) for i in range(5)]
        assert own == [True, True, False, False, False]
        assert not torch.equal(text.uncond(4).tokens, sd15.uncond(3).tokens)
    assert not sd15.text_changes


def moved(method: TextCraftor) -> TextCraftor:
    """The method with other numbers, as if it had been trained."""
    rng = torch.Generator().manual_seed(9)
    method.load_state({k: v + 0.1 * torch.randn(v.shape, generator=rng) for k, v in method.state().items()})
    return method


# ---------------------------------------------------------------- the artefact


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "lora_alpha": 4.0}], ids=["full", "lora"])
def test_an_adapter_draws_what_was_trained_and_leaves_no_trace(model, tmp_path, options):
    method = moved(make(model, stage="joint", **options))
    settings = SampleSettings(steps=4, guidance=3.0, sampler=sampling.samplers_of(model.process)[0])

    def draw():
        return sampling.sample(model, PROMPTS, settings, [1, 2, 3])

    base = draw()
    with method.attach(model):
        tuned = draw()
    assert not torch.equal(base, tuned)
    config = {"method": "textcraftor", "textcraftor": method_section(method)}
    save_adapter(tmp_path / "a", method, config, {}, stage="joint")
    with attach(model, [str(tmp_path / "a")]):
        assert torch.equal(draw(), tuned)
    with attach(model, [f"{tmp_path / 'a'}@0"]):
        assert torch.equal(draw(), base)
    with attach(model, [f"{tmp_path / 'a'}@0.5"]):
        assert not torch.equal(draw(), base)
    assert torch.equal(draw(), base)


def method_section(method: TextCraftor) -> dict[str, object]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in vars(method.config).items()
    }


def test_stage_unet_starts_from_a_tuned_encoder_and_carries_it(sd15, tmp_path):
    text = moved(make(sd15))
    config = {"method": "textcraftor", "textcraftor": method_section(text)}
    save_adapter(tmp_path / "text", text, config, {}, stage="text")
    second = make(sd15, stage="unet", from_adapter=str(tmp_path / "text"))
    second.check(TrainSettings())
    assert list(second.trainables()) == ["unet"]
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert run(second, noise=noise)["loss"] == pytest.approx(run(text, noise=noise)["loss"], rel=1e-5)
    state = second.state()
    assert {key.partition(".")[0] for key in state} == {"text_encoder", "unet"}
    again = make(sd15, stage="unet")
    again.load_state(state)
    assert all(torch.equal(state[k], v) for k, v in again.state().items())
    joint = make(sd15, stage="joint", from_adapter=str(tmp_path / "text"))
    joint.check(TrainSettings())
    key = next(k for k in state if k.startswith("text_encoder."))
    assert torch.equal(joint.state()[key], state[key])


def test_a_rank_beyond_every_layer_is_refused(sd15):
    with pytest.raises(
        UserError, match=r"lora_rank must be at most \d+, .* of the text_encoder of .*, got 100"
    ):
        make(sd15, lora_rank=100_000)


def test_the_denoiser_alone_under_the_models_own_text_is_told(sd15):
    with pytest.warns(UserWarning, match="stage unet without --from trains the unet under the model's own"):
        make(sd15, stage="unet").check(TrainSettings())


def test_a_start_that_does_not_fit(sd15, tmp_path):
    lora = make(sd15, lora_rank=2)
    config = {"method": "textcraftor", "textcraftor": method_section(lora)}
    save_adapter(tmp_path / "lora", lora, config, {}, stage="text")
    full = make(sd15, from_adapter=str(tmp_path / "lora"))
    with pytest.raises(UserError, match="does not fit.*lora_rank must be the same"):
        full.check(TrainSettings())
    with pytest.raises(UserError, match="does not exist"):
        make(sd15, from_adapter=str(tmp_path / "none")).check(TrainSettings())


def start(method: TextCraftor, folder, stage: str) -> str:
    """The method as an adapter that another one starts from."""
    config = {"method": "textcraftor", "textcraftor": method_section(method)}
    save_adapter(folder, method, config, {}, stage=stage)
    return str(folder)


def test_a_carried_encoder_is_frozen(sd15, tmp_path):
    second = make(sd15, stage="unet", from_adapter=start(moved(make(sd15)), tmp_path / "a", "text"))
    second.check(TrainSettings())
    run(second)
    assert not any(p.requires_grad or p.grad is not None for p in second.tunings["text_encoder"].parameters())


@pytest.mark.parametrize("stage", ["unet", "joint"])
def test_a_start_from_lora_of_another_alpha_is_the_same_start(sd15, tmp_path, stage):
    text = moved(make(sd15, lora_rank=2, lora_alpha=4.0))
    folder = start(text, tmp_path / "a", "text")
    second = make(sd15, stage=stage, lora_rank=2, from_adapter=folder)
    second.check(TrainSettings())
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = run(text, noise=noise)["loss"]
    assert run(second, noise=noise)["loss"] == pytest.approx(wanted, rel=1e-5)
    again = make(sd15, stage=stage, lora_rank=2)
    again.load_state(second.state())
    assert run(again, noise=noise)["loss"] == pytest.approx(wanted, rel=1e-5)


def test_an_encoder_that_is_not_chosen_is_carried(tiny_sdxl_folder, tmp_path):
    model = load(tiny_sdxl_folder)
    folder = start(moved(make(model)), tmp_path / "a", "text")
    second = make(model, encoders=("text_encoder",), from_adapter=folder)
    second.check(TrainSettings())
    trained = second.trainables()["text"]
    assert len(trained) == len(second.tunings["text_encoder"].parameters())
    again = make(model, encoders=("text_encoder",))
    again.load_state(second.state())
    assert all(torch.equal(again.state()[k], v) for k, v in second.state().items())


def test_stage_text_does_not_drop_a_tuned_denoiser(sd15, tmp_path):
    folder = start(make(sd15, stage="joint"), tmp_path / "a", "joint")
    with pytest.raises(UserError, match="it holds a tuned unet, which stage text has no use for"):
        make(sd15, from_adapter=folder).check(TrainSettings())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(next(iter(s))), "text_encoder: missing"),
        (lambda s: s.update(more=torch.zeros(1)), "unused more"),
        (lambda s: s.update({"unet.x": torch.zeros(1)}), "unused unet.x"),
    ],
)
def test_a_state_that_does_not_fit(sd15, change, words):
    method = make(sd15)
    state = method.state()
    change(state)
    with pytest.raises(ValueError, match=re.escape(words)):
        method.load_state(state)


def test_the_denoiser_has_a_rate_of_its_own(sd15):
    assert make(sd15, stage="joint", lr_unet=3e-5).group_options() == {"unet": {"lr": 3e-5}}
    assert make(sd15, stage="joint").group_options() == {}
    assert make(sd15, stage="unet", lr_unet=3e-5).group_options() == {}  # as the warning says


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rewards": {"hspv2": 1.0}}, "unknown reward 'hspv2'; did you mean 'hpsv2'"),
        ({"rewards": {"clip": 1.0, "hpsv2": -1.0}}, "sum above 0, got clip=1, hpsv2=-1"),
        ({"rewards": {}}, "sum above 0, got none"),
        ({"rewards": {"shapes": 1.0}}, "shapes judges pictures without a gradient"),
        ({"grad_steps": 26}, "grad_steps must be between 1 and 25 (the sampling steps), got 26"),
        ({"grad_steps": 0}, "grad_steps must be between 1 and 25"),
        ({"stage": "both"}, "textcraftor.stage must be one of text, unet, joint"),
        ({"steps": 10, "grad_steps": 5, "literal_split": True}, "leaves no step of 10 to the tuned encoder"),
        ({"reward_weights": {"clip": "x"}}, "reward_weights names clip, which is not among"),
    ],
)
def test_impossible_settings(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        TextCraftorConfig(**options)


def test_missing_weights_are_told_before_training(sd15, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    method = make(sd15, rewards={"hpsv2": 100.0})
    with pytest.raises(UserError, match="hpsv2"):
        method.check(TrainSettings())


def test_settings_without_effect_are_told(sd15, tiny_sd3_folder):
    with pytest.warns(UserWarning, match=r"textcraftor.lr_unet has no effect"):
        make(sd15, lr_unet=1e-5).check(TrainSettings())
    with pytest.warns(UserWarning, match=r"textcraftor.spacing has no effect on sd3"):
        make(load(tiny_sd3_folder), spacing="trailing").check(TrainSettings())

    with pytest.warns(UserWarning, match=r"textcraftor.lora_alpha has no effect without"):
        make(sd15, lora_alpha=4.0).check(TrainSettings())
    with pytest.warns(UserWarning, match=r"textcraftor.encoders has no effect: stage unet"):
        make(sd15, stage="unet", encoders=("text_encoder",)).check(TrainSettings())


# ---------------------------------------------------------------- devices, precision, processes


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("place", ["offload", "cpu"])
def test_what_is_trained_is_where_it_works(tiny_sdxl_folder, monkeypatch, place, options):
    """cuda:1 is the meta device; offloaded modules rest on the CPU and work there."""
    meta, real = torch.device("meta"), loading.pick_device
    monkeypatch.setattr(loading, "pick_device", lambda n, *a: meta if n == "cuda:1" else real(n, *a))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # meta knows none
    model = load(tiny_sdxl_folder, device="cuda:1", encoder_device=place)
    method = make(model, stage="joint", **options)
    groups = method.trainables()
    where = {"offload": "meta", "cpu": "cpu"}[place]
    assert {p.device.type for p in groups["text"]} == {where}
    assert {p.device.type for p in groups["unet"]} == {"meta"}
    with method._training():
        tokens = model.encode_text(PROMPTS).tokens
        assert tokens.device.type == "meta" and tokens.requires_grad
        if place == "offload":  # from the meta device there is no way back
            tokens.sum().backward()
            assert any(p.grad is not None and p.grad.device == meta for p in groups["text"])


@pytest.mark.parametrize("checkpoint_vae", [False, True])
def test_an_offloaded_autoencoder_stays_for_the_backward_pass(sd15, checkpoint_vae):
    """At work, copies without gradient stand in place of its parameters."""
    method = make(sd15, checkpoint_vae=checkpoint_vae)
    plain = run(method)
    wanted = gradients(method)
    sd15.offloaded = True
    layer, copied = sd15.vae.decoder.mid_block.resnets[0].conv1, []
    layer.register_forward_pre_hook(
        lambda layer, _: copied.append(not isinstance(layer._parameters["weight"], nn.Parameter))
    )
    assert run(method) == plain and torch.equal(gradients(method), wanted)
    assert copied == [True] * len(PROMPTS) * (1 + checkpoint_vae)
    assert isinstance(layer._parameters["weight"], nn.Parameter)


def test_frozen_text_is_not_under_autocast(sd15, monkeypatch):
    method, seen = make(sd15), []

    def noting(real):
        def call(given):
            seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return real(given)

        return call

    for name in ("encode_text", "uncond"):
        monkeypatch.setattr(sd15, name, noting(getattr(sd15, name)))
    with torch.autocast("cpu", torch.bfloat16):
        run(method)
    assert seen == [(False, False)] * 2 + [(True, True)] * 2


def test_all_text_encoders_can_have_lora(tiny_sd3_folder):
    model = load(tiny_sd3_folder)
    assert len(model.encoders) == 3
    method = make(model, encoders=("text_encoder_3",), lora_rank=2)
    run(method)
    assert max(float(p.grad.abs().max()) for p in method.trainables()["text"]) > 0


def test_a_reward_that_is_not_finite_on_another_process_stops_this_one(sd15):
    method, steps = make(sd15), []
    other = {"world_size": 2, "gather": lambda x: torch.cat([x, torch.ones_like(x)])}
    ctx = StepContext(step=0, rng=torch.Generator().manual_seed(0), backward=steps.append, **other)
    with pytest.raises(UserError, match="process 1 stopped, for the reason"):
        method.step(Batch(PROMPTS), ctx)
    assert not steps


def test_more_steps_than_the_path_has(sd15):
    method = make(sd15)
    method.config = replace(method.config, steps=1001, grad_steps=1)
    with pytest.raises(ValueError, match=r"must be in \[1, 1000\]"):
        run(method)
