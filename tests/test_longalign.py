"""LongAlign: a training step of every stage, what a stage stands on, dropout, rewards, bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from model_helpers import load

from align_cli import sampling
from align_cli.adapters import attach, load_adapter, restore, save_adapter
from align_cli.errors import UserError
from align_cli.methods.base import Batch, StepContext
from align_cli.methods.longalign.config import STAGES, WITH_PICTURES, LongAlignConfig
from align_cli.methods.longalign.method import OWN, LongAlign
from align_cli.rewards import clip
from align_cli.rewards.aesthetic import Aesthetic
from align_cli.rewards.loading import load_reward
from align_cli.settings import SampleSettings, TrainSettings

PROMPTS = [
    "in this picture there is a red circle . the whole background is plainly black .",
    "a red circle left of a blue square",
    "two green triangles",
    "",
]
FEW = {"reward-lcm": {"steps": 2, "grad_stride": 1}, "reward": {"steps": 4, "grad_stride": 2}}


@pytest.fixture(params=["sd15", "sdxl"])
def model(request, tiny_sd15_folder, tiny_sdxl_folder):
    """A fresh model of every family."""
    return load({"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder}[request.param])


def make(model, stage: str = "align", **options) -> LongAlign:
    settings = {
        "t5": "embedded:tiny-t5",
        "token_length": 40,
        "adapter_width": 24,
        "lora_rank": 2,
        "rewards": {"tiny-clip": 1.0},
        "reward_preprocessing": "official",
        **FEW.get(stage, {}),
    }
    return LongAlign(model, LongAlignConfig(stage=stage, **{**settings, **options}), seed=1)


def batch_of(model, prompts=PROMPTS) -> Batch:
    side = model.image_size
    pixels = torch.rand(len(prompts), 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return Batch(list(prompts), pixels)


def context(seed: int = 0, **options) -> StepContext:
    rng = torch.Generator().manual_seed(seed)
    return StepContext(step=0, rng=rng, backward=lambda loss: loss.backward(), **options)


def run(method: LongAlign, batch: Batch | None = None, ctx: StepContext | None = None) -> dict[str, float]:
    """One step; gradients stay in the parameters."""
    for group in method.trainables().values():
        for p in group:
            p.grad = None
    return method.step(batch or batch_of(method.model), ctx or context())


def gradients(method: LongAlign) -> torch.Tensor:
    found = [p.grad for group in method.trainables().values() for p in group]
    return torch.cat([torch.zeros(0) if g is None else g.flatten() for g in found])


def moved(method: LongAlign, seed: int = 3) -> LongAlign:
    """The same method with something in its LoRA."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in method.loras[OWN].parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.05)
    return method


def saved(method: LongAlign, folder) -> str:
    config = {"method": "longalign", "longalign": vars(method.config)}
    save_adapter(folder, method, config, {}, stage=method.config.stage)
    return str(folder)


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_trains_what_the_stage_says_and_nothing_else(model, stage):
    modules = (model.denoiser, model.vae, *model.encoders)
    frozen = [[x.clone() for x in m.state_dict().values()] for m in modules]
    method = make(model, stage)
    groups = method.trainables()
    assert list(groups) == [stage]
    values = run(method)
    assert all(math.isfinite(v) for v in values.values())
    ups = [p for name, p in method.loras[OWN].weights.items() if "lora_B" in name]
    assert max(float(p.grad.abs().max()) for p in ups) > 0
    trained = [p for p in method.adapter.parameters() if p.requires_grad]
    if stage == "align":
        assert trained and all(p.grad is not None for p in trained)
        assert {id(p) for p in groups[stage]} >= {id(p) for p in trained}
    else:
        assert not trained and all(p.grad is None for p in method.adapter.parameters())
    for module, before in zip(modules, frozen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before, strict=True))
        assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
    assert model.reader is None and not method.adapter.training


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_step(sd15, stage):
    method = make(sd15, stage)
    first = run(method), gradients(method)
    again = run(method), gradients(method)
    other = run(method, ctx=context(1))
    assert first[0] == again[0] and torch.equal(first[1], again[1]) and other != first[0]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_do_what_one_does(sd15, stage):
    """Each with half the prompts, their gradients averaged; with dropout in the LoRA and in the adapter."""
    method = moved(make(sd15, stage, adapter_dropout=0.5, lora_dropout=0.5, caption_dropout=0.0))
    whole_batch = batch_of(sd15)
    whole, wanted = run(method, whole_batch), gradients(method)
    texts = load_reward("tiny-clip").text_vectors(whole_batch.prompts)

    def gather(x):  # of the vectors that all processes have, and of their flags of errors
        return texts if x.ndim == 2 else torch.cat([x, x])

    halves, total = [], 0
    for rank in range(2):
        rows = slice(2 * rank, 2 * rank + 2)
        half = Batch(whole_batch.prompts[rows], whole_batch.pixels[rows])
        halves.append(run(method, half, context(rank=rank, world_size=2, gather=gather)))
        total = total + gradients(method) / 2
    assert sum(h["loss"] for h in halves) / 2 == pytest.approx(whole["loss"], abs=1e-5)
    assert float((total - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()) + 1e-8


def test_captions_are_dropped_by_their_share(sd15):
    method = make(sd15, caption_dropout=0.5)
    prompts = ["x"] * 1000
    kept = method._dropped(prompts, context()).count("x")
    assert 440 < kept < 560
    assert make(sd15, caption_dropout=0.0)._dropped(prompts, context()) == prompts
    halves = [method._dropped(["x"] * 500, context(rank=r, world_size=2)) for r in range(2)]
    assert halves[0] + halves[1] == method._dropped(prompts, context())


def test_dropping_captions_trains_the_unconditional_text(model):
    """Of SDXL that is zeros, of the others what the empty caption says."""
    method = make(model)
    with method._reading(model):
        told, empty = method._told(["a red circle", ""]), method._untold(1)
        assert torch.allclose(told.tokens[1], empty.tokens[0], atol=1e-5) and told.tokens[0].abs().max() > 0
        assert bool(told.tokens[1].any()) != model.zeros_for_empty
        if told.pooled is not None:
            assert torch.equal(told.pooled[1], empty.pooled[0]) and told.pooled[0].any()


def test_text_is_read_in_its_own_precision(sd15):
    """As for drawing, whatever the precision of the step."""
    method = make(sd15)
    with method._reading(sd15):
        wanted = sd15.encode_text(PROMPTS[:2]).tokens
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(method._told(PROMPTS[:2]).tokens, wanted)


def test_velocity_models_regress_their_own_target(tiny_v_folder):
    model = load(tiny_v_folder)
    assert model.process.prediction_type == "v_prediction"
    method = make(model, t5="", lora_dropout=0.0)
    latents, eps = torch.randn(2, 2, *model.encode_image(batch_of(model).pixels).shape[1:])
    t = torch.tensor([3, 700])
    with method._training(2, context()):
        cond = model.encode_text(PROMPTS[:2])
        loss = method.align(PROMPTS[:2], latents, t, eps, context())["loss"]
        said = model.predict(model.process.add_noise(latents, eps, t), t, cond)
    wanted = (said - model.process.target(latents, eps, t)).square().mean()
    assert loss == pytest.approx(float(wanted), rel=1e-5)


# ---------------------------------------------------------------- rewards


def test_omega_takes_away_what_all_texts_share(sd15):
    """With omega 0 and one prompt alone nothing is left: its own direction is the common one."""
    method = make(sd15, "reward", omega=0.0)
    values = run(method, Batch(["a red circle"]))
    assert values["relevant/tiny-clip"] == pytest.approx(0, abs=1e-6)
    assert float(gradients(method).abs().max()) < 1e-6
    plain = make(sd15, "reward", omega=1.0, lora_dropout=0.0)
    values = run(plain, Batch(["a red circle"]))
    assert values["loss"] == pytest.approx(0.5 * (1 - values["reward/tiny-clip"]), abs=1e-6)
    assert float(gradients(plain).abs().max()) > 1e-5


@pytest.mark.parametrize("chunk", [1, 3])
def test_pictures_at_a_time_change_nothing(sd15, chunk):
    wanted, got = (moved(make(sd15, "reward", decode_chunk=c)) for c in (0, chunk))
    assert run(got)["loss"] == pytest.approx(run(wanted)["loss"], abs=1e-6)
    gap = (gradients(got) - gradients(wanted)).abs().max()
    assert float(gap) <= 1e-5 * float(gradients(wanted).abs().max())


def test_weights_of_rewards_scale_the_loss(sd15):
    one, two = (make(sd15, "reward", rewards={"tiny-clip": w}) for w in (1.0, 2.0))
    assert run(two)["loss"] == pytest.approx(2 * run(one)["loss"], rel=1e-5)
    assert torch.allclose(gradients(two), 2 * gradients(one), rtol=1e-4, atol=1e-9)


def test_the_crop_is_one_for_all_and_moves(sd15):
    method = make(sd15, "reward", reward_preprocessing="longalign")
    z = torch.zeros(2, 4, 520 // sd15.vae_factor, 520 // sd15.vae_factor)
    picture = torch.arange(520.0).expand(2, 3, 520, 520)
    corners = {float(method._crop(z, context(seed))(picture)[0, 0, 0, 0]) for seed in range(20)}
    assert len(corners) > 5 and min(corners) >= 0 and max(corners) <= 16
    assert method._crop(z, context())(picture).shape[-2:] == (504, 504)
    assert method._crop(z[..., :4, :4], context())(picture[..., :32, :32]).shape[-2:] == (32, 32)


def test_every_clip_like_reward_sees_pictures_as_officially(sd15):
    """The crop is the default of the method: whatever reward can be named takes it."""
    assert all(LongAlignConfig().reward_preprocessing in kind.ways for kind in clip.KINDS.values())
    method = make(sd15, "reward", reward_preprocessing="longalign")
    method.check(TrainSettings())
    assert method.rewards.rewards["tiny-clip"].facts()["preprocessing"].startswith("longalign")


def test_a_reward_without_text_vectors_is_refused(sd15):
    method = make(sd15, "reward")
    with pytest.raises(UserError, match="aesthetic has no text vectors to decompose; take denscore"):
        method.use_rewards({"aesthetic": Aesthetic.__new__(Aesthetic)})


def test_a_reward_that_is_not_finite_stops(sd15, monkeypatch):
    method = make(sd15, "reward")
    reward = method.rewards.rewards["tiny-clip"]
    width = reward.text_vectors(["x"]).shape[1]
    monkeypatch.setattr(reward, "image_vectors", lambda images: images.flatten(1)[:, :width] * math.nan)
    with pytest.raises(UserError, match=r"a reward \(tiny-clip\) is not finite for a picture of 'in this"):
        run(method)


# ---------------------------------------------------------------- stages that stand on others


@pytest.mark.slow
def test_every_stage_stands_on_the_ones_before(sd15, tmp_path):
    align = moved(make(sd15))
    run(align)
    place = saved(align, tmp_path / "align")
    for stage in ("reward", "lcm"):
        method = make(sd15, stage, from_adapter=place, adapter_width=99)
        method.check(TrainSettings())
        assert list(method.loras) == ["align", OWN]
        mine = align.state()
        theirs = method.state()
        assert all(torch.equal(theirs[k.replace("unet.", "align.", 1)], v) for k, v in mine.items())
        run(method)
        assert {k.partition(".")[0] for k in theirs} == {"adapter", "align", "unet"}
        again = restore(load_adapter(saved(moved(method), tmp_path / stage)), sd15)
        assert all(torch.equal(again.state()[k], v) for k, v in method.state().items())
    last = make(sd15, "reward-lcm", from_adapter=str(tmp_path / "lcm"))
    last.check(TrainSettings())
    assert list(last.loras) == ["align", "lcm", OWN]
    distilled = make(sd15, "lcm", from_adapter=str(tmp_path / "reward"))
    distilled.check(TrainSettings())
    assert list(distilled.loras) == ["align", "reward", OWN]


def test_a_fresh_stage_starts_where_the_one_before_ended(sd15, tmp_path):
    place = saved(moved(make(sd15)), tmp_path / "align")
    fresh = make(sd15, "reward", from_adapter=place)
    fresh.check(TrainSettings())
    settings, seeds = SampleSettings(steps=3, guidance=2.0), [1, 2]
    with attach(sd15, [place]):
        wanted = sampling.sample(sd15, PROMPTS[:2], settings, seeds)
    with fresh.attach(sd15):
        got = sampling.sample(sd15, PROMPTS[:2], settings, seeds)
    assert torch.allclose(got, wanted, atol=1e-5)
    plain = sampling.sample(sd15, PROMPTS[:2], settings, seeds)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    with attach(sd15, [f"{place}@0"]):
        assert torch.equal(sampling.sample(sd15, PROMPTS[:2], settings, seeds), plain)


def test_the_teacher_goes_without_the_stages_own_lora(sd15, tmp_path):
    """Guidance 1 and a LoRA of zeros: student and target differ by the step alone, teacher is the student."""
    place = saved(moved(make(sd15)), tmp_path / "align")
    method = make(sd15, "lcm", from_adapter=place, lora_dropout=0.0, guidance=1.0, caption_dropout=0.0)
    method.check(TrainSettings())
    calls, real = [], sd15.predict
    sd15.predict = lambda z, t, cond: calls.append(real(z, t, cond)) or calls[-1]
    run(method)
    before = calls[0].detach()
    calls.clear()
    run(moved(method))
    assert torch.equal(calls[0].detach(), before) and len(calls) == 3


@pytest.mark.parametrize(
    ("stage", "before", "words"),
    [
        ("reward", "lcm", "an adapter of stage lcm; stage reward stands on one of align"),
        ("reward-lcm", "align", "an adapter of stage align; stage reward-lcm stands on one of lcm"),
        ("lcm", "lcm", "an adapter of stage lcm; stage lcm stands on one of align, reward"),
    ],
)
def test_stages_in_the_wrong_order(sd15, tmp_path, stage, before, words):
    place = saved(make(sd15, before, from_adapter="" if before == "align" else "x"), tmp_path / before)
    with pytest.raises(UserError, match=words):
        make(sd15, stage, from_adapter=place).check(TrainSettings())


def test_starts_that_do_not_fit(sd15, tmp_path, tiny_sdxl_folder):
    place = saved(make(sd15), tmp_path / "align")
    without = saved(make(sd15, t5=""), tmp_path / "clip-only")
    with pytest.raises(
        UserError, match="it has no text adapter, and longalign.t5 'embedded:tiny-t5' goes with a"
    ):
        make(sd15, "reward", from_adapter=without).check(TrainSettings())
    with pytest.raises(UserError, match="it has a text adapter, and longalign.t5 '' goes with no"):
        make(sd15, "reward", from_adapter=place, t5="").check(TrainSettings())
    with pytest.raises(
        UserError, match="for the family sd15; training starts from one of longalign for sdxl"
    ):
        make(load(tiny_sdxl_folder), "reward", from_adapter=place).check(TrainSettings())
    make(sd15, "reward", from_adapter=without, t5="").check(TrainSettings())


@pytest.mark.parametrize(("key", "value"), [("token_length", 24), ("splitter", "sentences")])
def test_a_stage_reads_as_the_one_before(sd15, tmp_path, key, value):
    place = saved(make(sd15, **{key: value}), tmp_path / "align")
    with pytest.raises(UserError, match=rf"was trained with .*give --set longalign\.{key}={value}"):
        make(sd15, "reward", from_adapter=place).check(TrainSettings())
    make(sd15, "reward", from_adapter=place, **{key: value}).check(TrainSettings())


@pytest.mark.parametrize(
    ("stage", "key", "words"),
    [("lcm", "first_timestep", "must be below the 1000 timesteps"), ("reward", "steps", "must be at most")],
)
def test_more_steps_than_there_are(sd15, stage, key, words):
    with pytest.raises(UserError, match=words):
        make(sd15, stage, **{key: 5000}).check(TrainSettings())


def test_one_caption_has_nothing_of_its_own(sd15):
    with pytest.warns(UserWarning, match="no text-relevant part is left"):
        make(sd15, "reward").check(TrainSettings(batch_size=1))


def test_training_starts_from_a_given_text_adapter(sd15, tmp_path):
    first = make(sd15)
    with torch.no_grad():
        for p in first.adapter.parameters():
            p.add_(0.1)
    first.adapter.to_folder(tmp_path / "official")
    second = make(sd15, text_adapter=str(tmp_path / "official"), adapter_width=99)
    second.check(TrainSettings())
    assert second.adapter.int_dim == 24
    wanted = first.adapter.state_dict()
    assert all(torch.equal(wanted[k], v) for k, v in second.adapter.state_dict().items())
    assert all(p.requires_grad for p in second.adapter.parameters())
    place = saved(second, tmp_path / "align")
    with pytest.warns(UserWarning, match="text_adapter has no effect: stage reward takes that of --from"):
        make(sd15, "reward", from_adapter=place, text_adapter="x").check(TrainSettings(batch_size=4))
    with pytest.raises(UserError, match="is no folder of a text adapter"):
        make(sd15, text_adapter=str(tmp_path)).check(TrainSettings())


@pytest.mark.parametrize("drop", ["unet.", "adapter.norm1", "adapter."])
def test_states_that_do_not_fit(sd15, drop):
    method = make(sd15)
    state = {k: v for k, v in method.state().items() if not k.startswith(drop)}
    with pytest.raises(ValueError, match="missing|text adapter"):
        make(sd15).load_state(state)
    with pytest.raises(ValueError, match="unused stray"):
        make(sd15).load_state(method.state() | {"stray.x": torch.zeros(1)})


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stage": "both"}, "longalign.stage must be one of align, reward, lcm, reward-lcm"),
        ({"splitter": "words"}, "longalign.splitter must be one of official, sentences"),
        ({"omega": 1.5}, r"longalign.omega must be in \[0, 1\]"),
        ({"stage": "reward", "grad_stride": 60}, "grad_stride must be at most longalign.steps"),
        ({"lora_rank": 0}, "lora_rank must be >= 1"),
        ({"caption_dropout": 1.0}, r"caption_dropout must be in \[0, 1\)"),
        ({"rewards": {"denscore": 0.0}}, "sum above 0"),
        ({"stage": "reward", "rewards": {"shapes": 1.0}}, "shapes"),
        ({"rewards": {"nothing": 1.0}}, "unknown reward 'nothing'"),
        ({"reward_weights": {"clip": "x"}}, "names clip, which is not among longalign.rewards"),
    ],
)
def test_impossible_settings(options, words):
    with pytest.raises(UserError, match=words):
        LongAlignConfig(**options)


def test_what_a_stage_needs_is_told_before_anything_is_loaded():
    for stage in STAGES[1:]:
        with pytest.raises(
            UserError, match=f"stage {stage} stands on an earlier one: give its adapter with --from"
        ):
            LongAlignConfig(stage=stage, rewards={"clip": 1.0}).check_train(TrainSettings())
        LongAlignConfig(stage=stage, t5="", rewards={"clip": 1.0}).check_train(TrainSettings())
    with pytest.raises(UserError, match="stage reward climbs a reward: name one, --reward denscore=1"):
        LongAlignConfig(stage="reward", from_adapter="x").check_train(TrainSettings())
    with pytest.raises(UserError, match="stage align stands on no other"):
        LongAlignConfig(from_adapter="x").check_train(TrainSettings())


def test_stages_that_need_pictures_say_so(sd15):
    assert [LongAlignConfig(stage=s).pictures for s in STAGES] == [s in WITH_PICTURES for s in STAGES]
    with pytest.raises(UserError, match="trains on images with captions, but the dataset has captions only"):
        run(make(sd15), Batch(PROMPTS))


def test_more_steps_than_the_path_has(sd15):
    method = make(sd15, "reward")
    method.config = replace(method.config, steps=1001)
    with pytest.raises(ValueError, match=r"must be in \[1, 1000\]"):
        run(method)
