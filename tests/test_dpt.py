"""DPT: a training step of both stages, what it starts from, processes, self-correction, bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from model_helpers import load

from align_cli import sampling
from align_cli.adapters import attach, load_adapter, restore, save_adapter
from align_cli.data.base import collate
from align_cli.errors import UserError
from align_cli.losses import matching_logits
from align_cli.methods.base import Batch, StepContext
from align_cli.methods.dpt.config import DPTConfig
from align_cli.methods.dpt.method import DPT, GROUND, POSITIVE
from align_cli.models.lora import LORA_B
from align_cli.settings import DataSettings, SampleSettings, TrainSettings
from align_cli.shapes.grounded import GroundedShapes

SMALL = {
    "hidden_dim": 16, "num_heads": 4, "feedforward_dim": 24, "num_matching_queries": 3,
    "num_grounding_queries": 5, "phrase_dim": 8, "phrase_encoder": "embedded:tiny-roberta", "lora_rank": 2,
}  # fmt: skip


@pytest.fixture(params=["sd15", "sdxl", "sd3", "sd35"])
def model(request, tiny_sd15_folder, tiny_sdxl_folder, tiny_sd3_folder, tiny_sd3_no_t5_folder):
    """A fresh model of every family; SD3.5 without T5."""
    folders = {"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}
    return load((folders | {"sd35": tiny_sd3_no_t5_folder})[request.param])


@pytest.fixture(scope="module")
def examples():
    data = GroundedShapes(DataSettings(num_examples=16), seed=3)
    return [data.get(i, np.random.default_rng(i)) for i in range(4)]


def make(model, stage: str = "probe", **options) -> DPT:
    method = DPT(model, DPTConfig(stage=stage, **{**SMALL, **options}), seed=1)
    method.check(TrainSettings())
    return method


def context(seed: int = 0, **options) -> StepContext:
    rng = torch.Generator().manual_seed(seed)
    return StepContext(step=0, rng=rng, backward=lambda loss: loss.backward(), **options)


def run(method: DPT, batch: Batch, ctx: StepContext | None = None) -> dict[str, float]:
    """One step; gradients stay in the parameters."""
    for p in trained(method):
        p.grad = None
    torch.manual_seed(7)
    return method.step(batch, ctx or context())


def trained(method: DPT) -> list[torch.nn.Parameter]:
    (group,) = method.trainables().values()
    return group


def gradients(method: DPT) -> torch.Tensor:
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained(method)]
    )


def moved(method: DPT, seed: int = 3) -> DPT:
    """The same method with something in its LoRA."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in method.lora.weights.items():
            if name.endswith(LORA_B):
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return method


def saved(method: DPT, folder) -> str:
    config = {"method": "dpt", "dpt": vars(method.config)}
    save_adapter(folder, method, config, {}, stage=method.config.stage)
    return str(folder)


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("stage", ["probe", "tune"])
def test_a_step_trains_what_the_stage_says_and_nothing_else(model, examples, stage):
    modules = (model.denoiser, model.vae, *model.encoders)
    frozen = [[x.clone() for x in m.state_dict().values()] for m in modules]
    method = make(model, stage)
    values = run(method, collate(examples))
    assert all(math.isfinite(v) for v in values.values())
    terms = {"class", "box", "giou", "align", "i2t", "t2i"} | ({"denoise"} if stage == "tune" else set())
    assert {key.removeprefix("loss/") for key in values if key.startswith("loss/")} == terms
    weights = {"box": 5.0, "giou": 2.0}
    total = sum(weights.get(name, 1.0) * values[f"loss/{name}"] for name in terms)
    assert values["loss"] == pytest.approx(total, rel=1e-5)
    names = dict(method.discriminator.named_parameters())
    still = {name for name, p in names.items() if p.grad is None or not p.grad.abs().max()}
    # the first decoder layer attends to zeros: until its biases have moved, it says the same of all queries
    first = "transformer.decoder.layers.0"
    assert still == {
        f"{first}.self_attn.in_proj_weight",
        f"{first}.self_attn.out_proj.weight",
        f"{first}.norm1.weight",
    }
    if stage == "tune":
        ups = [p.grad for name, p in method.lora.weights.items() if name.endswith(LORA_B)]
        assert all(float(g.abs().max()) > 0 for g in ups)
    after = [[x.clone() for x in m.state_dict().values()] for m in modules]
    assert all(
        torch.equal(a, b) for x, y in zip(frozen, after, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert all(p.grad is None for m in modules for p in m.parameters())


def test_two_halves_are_one_whole(unet_or_sd3, examples):
    """Dropout, noise and the number of boxes do not depend on who computes what."""
    method = make(unet_or_sd3, "tune", dropout=0.3)
    run(method, collate(examples))
    whole = gradients(method)
    counts = torch.tensor([float(len(e.extra["grounded"].boxes)) for e in examples])
    total = torch.zeros_like(whole)
    for rank in range(2):

        def gather(x: torch.Tensor) -> torch.Tensor:
            return torch.stack([counts[:2].sum(), counts[2:].sum()]) if x.shape == (1,) and x else x

        half = collate(examples[2 * rank : 2 * rank + 2])
        run(method, half, context(rank=rank, world_size=2, gather=gather))
        total += gradients(method) / 2
    torch.testing.assert_close(total, whole, atol=2e-5, rtol=1e-4)


def test_terms_without_weight_cost_no_pass(sd15, examples):
    off = dict.fromkeys(("class", "box", "giou", "align", "t2i"), 0.0)
    method = make(sd15, weights=off)
    assert GROUND not in method.passes and len(method.passes) == 3
    values = run(method, collate(examples))
    assert {key for key in values if key.startswith("loss/")} == {"loss/i2t"}
    alone = make(sd15, "tune", weights={**off, "i2t": 0.0})
    assert alone.passes == (POSITIVE,)
    assert set(run(alone, collate(examples))) == {"loss", "loss/denoise"}


def test_a_step_without_the_shared_call_has_the_same_losses(unet_or_sd3, examples):
    """Every pass by itself, with whole calls of the UNet, gives the same scores and prediction."""
    method = moved(make(unet_or_sd3, "tune", dropout=0.0))
    g = torch.Generator().manual_seed(2)
    side = unet_or_sd3.image_size // unet_or_sd3.vae_factor
    latents = torch.randn(2, 3, unet_or_sd3.latent_channels, side, side, generator=g)
    eps, t = torch.randn(2, *latents.shape[2:], generator=g), torch.tensor([100, 700])
    texts = ["a red circle", "a red circle and a blue square", "a blue circle", "two green squares"]
    cond, _ = unet_or_sd3.summarised(texts * 2)
    with torch.no_grad(), method.lora.attached():
        states, prediction = method.look(latents, t, eps, cond)
        places = {"own": 0, "hard": 1, "random": 2}
        words = {"expression": 0, "caption": 1, "hard": 2, "random": 3}
        for one in method.passes:
            noisy = unet_or_sd3.process.add_noise(latents[:, places[one.picture]], eps, t)
            found = method.matching(noisy, t, [texts[words[one.text]]] * 2)
            torch.testing.assert_close(
                method.discriminator.matching(method.of(states, one))[0], found, atol=1e-5, rtol=1e-4
            )
        noisy = unet_or_sd3.process.add_noise(latents[:, 0], eps, t)
        alone = unet_or_sd3.predict(noisy, t, cond[[1, 5]])
    torch.testing.assert_close(prediction, alone, atol=1e-5, rtol=1e-4)


def test_a_fixed_timestep_is_the_only_one(sd15, examples, monkeypatch):
    method = make(sd15, fixed_timestep=321)
    seen = []
    own = method.look
    monkeypatch.setattr(method, "look", lambda z, t, *rest: seen.append(t) or own(z, t, *rest))
    run(method, collate(examples))
    assert seen[0].tolist() == [321] * 4


def test_only_lora_leaves_the_discriminator(sd15, examples):
    method = make(sd15, "tune", only_lora=True)
    assert len(trained(method)) == len(method.lora.weights)
    run(method, collate(examples))
    assert all(p.grad is None for p in method.discriminator.parameters())


def test_noise_offset_moves_whole_channels(sd15, examples, monkeypatch):
    noises = {}
    for offset in (0.0, 0.5):
        method = make(sd15, noise_offset=offset)
        own = method.look

        def look(z, t, eps, cond, own=own, offset=offset):
            noises[offset] = eps
            return own(z, t, eps, cond)

        monkeypatch.setattr(method, "look", look)
        run(method, collate(examples))
    added = noises[0.5] - noises[0.0]
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added))
    assert float(added.abs().max()) > 0


# ---------------------------------------------------------------- what it stands on


def test_tune_goes_on_from_a_probe(unet_or_sd3, examples, tmp_path):
    probe = make(unet_or_sd3)
    with torch.no_grad():
        probe.discriminator.logit_scale.fill_(1.5)
    place = saved(probe, tmp_path / "probe")
    tune = make(unet_or_sd3, "tune", from_adapter=place)
    for key, value in probe.state().items():
        assert torch.equal(tune.state()[key], value)  # logit_scale, too
    again = make(unet_or_sd3, "tune", from_adapter=saved(moved(tune), tmp_path / "tune"))
    assert all(torch.equal(x, again.state()[key]) for key, x in tune.state().items())
    with pytest.raises(UserError, match="it holds LoRA, which stage probe has no use for"):
        make(unet_or_sd3, from_adapter=str(tmp_path / "tune"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"num_heads": 2},
            r"was trained with dpt.num_heads 4, and this run has 2; give --set dpt.num_heads=4",
        ),
        ({"feature": "mid"}, "was trained with dpt.feature 'up[01]', and this run has 'mid'"),
    ],
)
def test_a_probe_of_another_make_is_refused(sd15, tmp_path, option, message):
    place = saved(make(sd15), tmp_path / "probe")
    with pytest.raises(UserError, match=message):
        make(sd15, "tune", from_adapter=place, **option)


def test_saved_and_restored_it_says_the_same(model, examples, tmp_path):
    method = moved(make(model, "tune"))
    place = saved(method, tmp_path / "tune")
    again = restore(load_adapter(place), model)
    z = torch.randn(2, model.latent_channels, 4, 4)
    t = torch.tensor([400, 500])
    with torch.no_grad(), method.attach(model):
        said = method.matching(z, t, ["a red circle", "b"]), *method.ground(z, t, ["a red circle", "b"])
    with torch.no_grad(), again.attach(model):
        told = again.matching(z, t, ["a red circle", "b"]), *again.ground(z, t, ["a red circle", "b"])
    assert all(torch.equal(a, b) for a, b in zip(said, told, strict=True))
    assert model.summarised(["a", "b"])[1].shape == (2, said[0].shape[-1])
    assert not model.critics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "lora" not in k}, "missing unet"),
        (
            lambda s: {k: v for k, v in s.items() if "query_embed" not in k},
            "discriminator: missing query_embed",
        ),
        (lambda s: s | {"more.x": torch.zeros(1)}, "more: unused"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("discriminator")},
            "missing discriminator",
        ),
    ],
)
def test_tensors_that_do_not_fit(sd15, change, message):
    method = make(sd15, "tune")
    with pytest.raises(ValueError, match=message):
        method.load_state(change(method.state()))


def test_the_feature_may_be_named_by_whoever_goes_on(sd15, tmp_path):
    probe = make(sd15)
    make(sd15, "tune", from_adapter=saved(probe, tmp_path / "probe"), feature=probe.feature)


# ---------------------------------------------------------------- self-correction

DRAW = SampleSettings(steps=4, guidance=3.0, spacing="leading")


def rollout_times(model) -> list[float]:
    return model.process.timesteps(4, None if model.family == "sd3" else "leading").tolist()


def draw_settings(model) -> SampleSettings:
    """SD3 has one path of its own."""
    return replace(DRAW, sampler="euler") if model.family == "sd3" else DRAW


def test_a_step_up_the_score_raises_it(unet_or_sd3):
    method = make(unet_or_sd3)
    z, t = torch.randn(2, unet_or_sd3.latent_channels, 4, 4), torch.tensor(500)
    prompts = ["a red circle", "two blue squares"]
    climb = method.judge(prompts)
    score, slope = climb(z, t)
    direct = matching_logits(
        method.matching(z, t.expand(2), prompts)[:, None], unet_or_sd3.summarised(prompts)[1][:, None]
    )
    torch.testing.assert_close(score, direct[:, 0].detach())
    after, _ = climb(z + 0.05 * slope / slope.square().mean().sqrt(), t)
    assert bool((after > score).all())
    alone = method.judge(prompts[1:])(z[1:], t)
    torch.testing.assert_close(alone[1], slope[1:], atol=1e-6, rtol=1e-4)


def test_pictures_move_with_the_scale_and_not_without_an_adapter(unet_or_sd3, tmp_path):
    draw = draw_settings(unet_or_sd3)
    place = saved(moved(make(unet_or_sd3, "tune")), tmp_path / "tune")
    prompts, seeds = ["a red circle", "two blue squares"], [1, 2]
    base = sampling.sample(unet_or_sd3, prompts, draw, seeds)
    assert torch.equal(sampling.sample(unet_or_sd3, prompts, replace(draw, self_correct=500.0), seeds), base)
    with attach(unet_or_sd3, [place]):
        plain = sampling.sample(unet_or_sd3, prompts, draw, seeds)
        drawn = {
            way: sampling.sample(
                unet_or_sd3, prompts, replace(draw, self_correct=500.0, correction=way), seeds
            )
            for way in ("eps", "latent", "official")
        }
        one_by_one = replace(draw, self_correct=500.0, correction="official", batch_size=1)
        alone = sampling.sample(unet_or_sd3, prompts, one_by_one, seeds)
        weaker = sampling.sample(unet_or_sd3, prompts, replace(draw, self_correct=5.0), seeds)
    assert not torch.allclose(plain, base)
    for way, picture in drawn.items():
        assert not torch.allclose(picture, plain, atol=1e-4), way
    assert not torch.allclose(drawn["eps"], drawn["latent"], atol=1e-4)
    torch.testing.assert_close(alone, drawn["official"], atol=1e-4, rtol=1e-4)  # dropout by the own seed
    assert float((weaker - plain).abs().mean()) < float((drawn["eps"] - plain).abs().mean())
    assert torch.equal(sampling.sample(unet_or_sd3, prompts, draw, seeds), base)


def test_the_official_way_leaves_out_the_last_step(unet_or_sd3, tmp_path, monkeypatch):
    draw = draw_settings(unet_or_sd3)
    place = saved(make(unet_or_sd3), tmp_path / "probe")
    calls = []
    own = unet_or_sd3.predict
    monkeypatch.setattr(
        unet_or_sd3, "predict", lambda z, t, cond: calls.append(int(t.reshape(-1)[0])) or own(z, t, cond)
    )
    with attach(unet_or_sd3, [place]):
        settings = replace(draw, self_correct=0.5, correction="official")
        sampling.sample(unet_or_sd3, ["a red circle"], settings, [1])
    times = [int(t) for t in rollout_times(unet_or_sd3)]
    assert calls == [t for t in times[:-1] for _ in range(2)]


def test_a_scale_that_no_latent_survives(unet_or_sd3, tmp_path):
    draw = draw_settings(unet_or_sd3)
    place = saved(make(unet_or_sd3), tmp_path / "probe")
    with (
        attach(unet_or_sd3, [place]),
        pytest.raises(UserError, match=r"--self-correct 1e\+38 drives the latents"),
    ):
        sampling.sample(unet_or_sd3, ["a red circle"], replace(draw, self_correct=1e38), [1])


# ---------------------------------------------------------------- bad input


def test_a_rank_that_no_layer_has(sd15):
    with pytest.raises(UserError, match=r"dpt.lora_rank must be at most \d+, the smaller side"):
        make(sd15, "tune", lora_rank=4096)


def test_a_block_that_the_unet_does_not_have(sd15):
    with pytest.raises(UserError, match="dpt.feature: the UNet of .* has no block up7"):
        make(sd15, feature="up7")


def test_tune_without_a_probe_is_told(sd15):
    with pytest.warns(UserWarning, match="stage tune without --from starts from a random discriminator"):
        make(sd15, "tune")


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("probe", {"only_lora": True}, "dpt.only_lora has no effect in stage probe"),
        ("probe", {"weights": {"denoise": 2.0}}, "dpt.weights: denoise has no effect in stage probe"),
        (
            "tune",
            {"weights": {"denoise": 0.0}, "snr_gamma": 5.0},
            "dpt.snr_gamma has no effect without the loss",
        ),
        (
            "probe",
            {"weights": dict.fromkeys(("class", "box", "giou", "align"), 0.0), "match_box": 1.0},
            "dpt.match_box has no effect without the losses class, box, giou and align",
        ),
    ],
)
def test_idle_settings_are_told(sd15, stage, options, message):
    with pytest.warns(UserWarning, match=message):
        make(sd15, stage, **options)


def test_gradient_checkpointing_changes_no_gradient(unet_or_sd3, examples):
    """The rows that share a computation share it neither in the forward nor in the backward pass."""
    method = moved(make(unet_or_sd3, "tune"))
    run(method, collate(examples))
    plain = gradients(method)
    unet_or_sd3.denoiser.enable_gradient_checkpointing()
    run(method, collate(examples))
    torch.testing.assert_close(gradients(method), plain, atol=2e-5, rtol=1e-4)
    with pytest.warns(UserWarning, match="train.gradient_checkpointing has no effect in stage probe"):
        DPT(unet_or_sd3, DPTConfig(**SMALL), seed=1).check(TrainSettings(gradient_checkpointing=True))


def test_gradient_checkpointing_without_a_prediction(unet_or_sd3, examples):
    """The call stops at the feature, inside what is computed again."""
    method = moved(make(unet_or_sd3, "tune", weights={"denoise": 0.0}))
    run(method, collate(examples))
    plain = gradients(method)
    unet_or_sd3.denoiser.enable_gradient_checkpointing()
    run(method, collate(examples))
    torch.testing.assert_close(gradients(method), plain, atol=2e-5, rtol=1e-4)


def test_the_denoising_loss_of_sd3_is_that_of_the_velocity(tiny_sd3_folder, examples, monkeypatch):
    model = load(tiny_sd3_folder)
    method, seen = make(model, "tune"), []
    look = method.look
    monkeypatch.setattr(method, "look", lambda *given: seen.append(given) or look(*given))
    said = run(method, collate(examples))
    latents, t, eps, cond = seen[0]
    sigma = (t / 1000).view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents[:, 0] + sigma * eps
    with torch.no_grad():
        found = model.predict(noisy, t, cond[list(range(1, 16, 4))])
    assert said["loss/denoise"] == pytest.approx(
        float((found - (eps - latents[:, 0])).square().mean()), rel=1e-4
    )


def test_settings_that_sd3_has_no_use_for(tiny_sd3_folder):
    model = load(tiny_sd3_folder)
    with pytest.raises(UserError, match="dpt.snr_gamma is for noise schedules .* is a flow"):
        make(model, "tune", snr_gamma=5.0)
    config = DPTConfig(stage="tune", **SMALL, detach_after="block0")
    with pytest.raises(UserError, match="dpt.detach_after does not go with train.gradient_checkpointing"):
        DPT(model, config).check(TrainSettings(gradient_checkpointing=True))
    DPT(model, config).check(TrainSettings())


def test_boxes_that_are_no_numbers_stop_the_run(sd15, examples):
    method = make(sd15)
    with torch.no_grad():
        method.discriminator.bbox_embed.layers[2].bias.fill_(math.nan)
    with pytest.raises(UserError, match="cannot be matched: .* try a lower --lr"):
        run(method, collate(examples))
