"""SoftREPA where the text is more than tokens (SDXL, SD3): what goes along with a caption, start values,
adapters, released tokens.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from softrepa_helpers import PROMPTS, a_batch, field, make, run
from torch import nn

from align_cli import config, packaged
from align_cli.adapters import attach, import_official, load_adapter, save_adapter
from align_cli.cli.edit import edit_settings
from align_cli.diffusion.rollout import rollout
from align_cli.drawing import make_plan
from align_cli.errors import UserError
from align_cli.methods.base import Batch, StepContext
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.methods.softrepa.tokens import SoftTokens, inserted
from align_cli.models.base import TextCond
from align_cli.models.loading import load_model
from align_cli.settings import EditSettings, ModelSettings, TrainSettings

FAMILIES = ("xl_model", "sd3_model")


@pytest.fixture(scope="module")
def xl_model(tiny_sdxl_folder):
    return load_model(ModelSettings(name=str(tiny_sdxl_folder), device="cpu"))


@pytest.fixture(scope="module")
def sd3_model(tiny_sd3_folder):
    return load_model(ModelSettings(name=str(tiny_sd3_folder), device="cpu", t5_length=8))


def predict(model, t=(700, 20)) -> torch.Tensor:
    z = field(0, 2, model.latent_channels, 8, 8)
    with torch.no_grad():
        return model.predict(z, torch.tensor(t), model.encode_text(["a red circle", "two blue squares"]))


# ---------------------------------------------------------------- captions in the n x n batch


@pytest.mark.parametrize("kind", FAMILIES)
def test_pooled_text_goes_with_its_tokens(request, kind, monkeypatch):
    """Every image meets all captions and then its own negatives, in every field."""
    model = request.getfixturevalue(kind)
    negatives = [[f"a {c} square", f"two {c} circles"] for c in ("red", "green", "yellow")]
    seen: list[tuple[torch.Tensor, TextCond]] = []
    plain = model.predict
    monkeypatch.setattr(model, "predict", lambda z, t, c: seen.append((z, c)) or plain(z, t, c))
    method = make(model, pair_chunk=10, hard_negatives=2)
    run(method, a_batch(3, negatives=negatives))
    own = model.encode_text(PROMPTS[:3])
    first = seen[0]
    assert [len(z) for z, _ in seen] == [2 * 5, 5]
    images = torch.cat([z for z, _ in seen]).view(3, 5, *first[0].shape[1:])
    assert torch.equal(images, images[:, :1].expand_as(images))
    for field_name in ("tokens", "pooled"):
        found = torch.cat([getattr(cond, field_name) for _, cond in seen])
        for i in range(3):
            false = getattr(model.encode_text(negatives[i]), field_name)
            expected = torch.cat([getattr(own, field_name), false])
            torch.testing.assert_close(found[i * 5 : (i + 1) * 5], expected)
    assert first[1].time_ids is None  # the model fills in the size of the picture


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_field_is_gathered_over_ranks(request, kind, monkeypatch):
    """This is rank 1 of 2: its images meet the captions of rank 0 and its own, tokens and pooled text."""
    model = request.getfixturevalue(kind)
    theirs, mine = model.encode_text(PROMPTS[:2]), model.encode_text(PROMPTS[2:])
    others = {mine.tokens.shape[1:]: theirs.tokens, mine.pooled.shape[1:]: theirs.pooled}
    seen: list[TextCond] = []
    plain = model.predict
    monkeypatch.setattr(model, "predict", lambda z, t, c: seen.append(c) or plain(z, t, c))
    batch = Batch(PROMPTS[2:], field(0, 2, 3, 32, 32).clamp(-1, 1))
    options = {"gather": lambda x: torch.cat([others[x.shape[1:]], x]), "rank": 1, "world_size": 2}
    run(make(model, pair_chunk=4), batch, **options)
    for cond in seen:
        torch.testing.assert_close(cond.tokens, torch.cat([theirs.tokens, mine.tokens]))
        torch.testing.assert_close(cond.pooled, torch.cat([theirs.pooled, mine.pooled]))


def test_size_of_the_picture(xl_model, monkeypatch):
    """time_ids of a training batch are (8h, 8w, 0, 0, 8h, 8w) in the model's own factor."""
    seen: list[torch.Tensor] = []
    forward = xl_model.denoiser.forward

    def note(*args, **kwargs):
        seen.append(kwargs["added_cond_kwargs"]["time_ids"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(xl_model.denoiser, "forward", note)
    run(make(xl_model), Batch(PROMPTS[:2], field(0, 2, 3, 32, 48)))
    assert seen[0].tolist() == [[32, 48, 0, 0, 32, 48]] * 4


# ---------------------------------------------------------------- SDXL's UNet


def test_tokens_of_sdxl(xl_model):
    """As wide as both encoders together; bos is the empty prompt's encoding, not the zeros of guidance."""
    assert list(make(xl_model).state()["dc_tokens"].shape) == [4, 40]
    bos = make(xl_model, init="bos").tokens.dc_tokens
    assert torch.equal(bos[0], xl_model.encode_text([""]).tokens[0, 0]) and bos.abs().max() > 0
    assert not xl_model.uncond(1).tokens.any()


def test_scale_and_stacking_on_sdxl(xl_model):
    method, other = make(xl_model), make(xl_model, init_noise=1.0, stages="FTF")
    plain, close = predict(xl_model), {"atol": 1e-5, "rtol": 1e-5}

    def at(*parts):
        with torch.no_grad():
            if not parts:
                return predict(xl_model)
            with parts[0][0].attach(xl_model, parts[0][1]):
                return at(*parts[1:])

    assert torch.equal(at((method, 0.0)), plain)
    assert not torch.allclose(at((method, 1.0)), plain, atol=1e-3)
    twice = SoftTokens(method.tokens.dc_tokens.repeat(2, 1), None)
    with inserted(xl_model.denoiser, "TTT", twice.rows):
        doubled = predict(xl_model)
    torch.testing.assert_close(at((method, 2.0)), doubled, **close)
    torch.testing.assert_close(at((method, 0.5), (other, 1.5)), at((other, 1.5), (method, 0.5)), **close)


@pytest.mark.parametrize("stages", ["TFF", "FTT"])
def test_gradient_by_finite_differences_on_sdxl(xl_model, stages):
    """In float64, through every selected block and through the table."""
    unet = copy.deepcopy(xl_model.denoiser).double()
    z, t, cond = field(0, 2, 4, 8, 8).double(), torch.tensor([500, 507]), xl_model.encode_text(PROMPTS[:2])
    added = {"text_embeds": cond.pooled.double(), "time_ids": torch.full((2, 6), 32.0)}
    target = field(5, *z.shape).double()

    def error(tokens: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        with inserted(unet, stages, lambda _t: (tokens + row)[None]):
            found = unet(z, t, cond.tokens.double(), added_cond_kwargs=added, return_dict=False)[0]
        return (found - target).square().mean()

    tokens, row = (x.double().requires_grad_() for x in (field(1, 2, 40), field(2, 1, 40)))
    assert torch.autograd.gradcheck(error, (tokens, row), fast_mode=True)
    (found,) = torch.autograd.grad(error(tokens, row), tokens)
    assert found.abs().max() > 1e-6


def test_checkpointed_unet_gives_the_same_gradient(xl_model):
    values, grads, _ = run(make(xl_model, use_t_table=True), a_batch())
    xl_model.denoiser.enable_gradient_checkpointing()
    try:
        again, recomputed, _ = run(make(xl_model, use_t_table=True), a_batch())
    finally:
        xl_model.denoiser.disable_gradient_checkpointing()
    assert again == pytest.approx(values, rel=1e-6)
    for a, b in zip(grads, recomputed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_frozen_sdxl_stays_frozen(tiny_sdxl_folder):
    model = load_model(ModelSettings(name=str(tiny_sdxl_folder), device="cpu"))
    modules = (model.denoiser, model.vae, *model.encoders)
    before = [copy.deepcopy(m.state_dict()) for m in modules]
    method = make(model, use_t_table=True, min_t=500, max_t=501)
    start = method.state()
    optimizer = torch.optim.AdamW(method.trainables()["softrepa"], lr=1e-2)
    for seed in range(2):
        values, grads, _ = run(method, a_batch(2), seed)
        assert all(math.isfinite(v) for v in values.values())
        assert all(torch.isfinite(g).all() for g in grads)
        optimizer.step()
    assert all((method.state()[k] - v).abs().max() > 1e-3 for k, v in start.items())
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())


# ---------------------------------------------------------------- settings, sampling, adapters


def test_settings_of_another_family(xl_model):
    with pytest.raises(UserError, match="token_space projected is for SD3 alone"):
        make(xl_model, token_space="projected")
    with pytest.warns(UserWarning, match="softrepa.num_layers has no effect on sdxl"):
        make(xl_model, num_layers=3).check(TrainSettings())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(xl_model, stages="TTF").check(TrainSettings())


@pytest.mark.parametrize("kind", FAMILIES)
def test_guided_sampling_has_tokens_in_both_branches(request, kind):
    """u + s (c - u) with the tokens at work in u and in c, the pooled text of each with it."""
    model = request.getfixturevalue(kind)
    method, z = make(model), field(3, 2, model.latent_channels, 8, 8)
    cond, none = model.encode_text(PROMPTS[:2]), model.uncond(2)
    sampler = "euler" if kind == "sd3_model" else "ddim"
    with torch.no_grad(), method.attach(model):
        found = rollout(
            model.predict, model.process, z, steps=1, cond=cond, uncond=none, guidance=3.0, sampler=sampler
        )
        t = model.process.timesteps(1)[0]
        u, c = model.predict(z, t, none), model.predict(z, t, cond)
    g = u + 3 * (c - u)
    if kind == "sd3_model":
        expected = z - g  # one step from sigma 1 to 0
    else:
        before = torch.tensor(model.process.final_alpha_cumprod)
        x0, eps = model.process.to_x0_eps(g, z, t)
        expected = before.sqrt() * x0 + (1 - before).sqrt() * eps
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters(request, kind, tmp_path):
    """Saved, loaded, attached at a strength; another family is refused."""
    model = request.getfixturevalue(kind)
    flags = {"model.name": model.model_id, "softrepa.use_t_table": True, "softrepa.init": "normal"}
    flags |= {"softrepa.num_layers": 2} if kind == "sd3_model" else {"softrepa.stages": "TTF"}
    resolved = config.resolve("softrepa", preset="none", flags=flags)
    method = SoftREPA(model, resolved.method_config)
    with torch.no_grad():
        for p in method.tokens.parameters():
            p.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(tmp_path / "a", method, resolved.to_dict(), resolved.origin)
    plain = predict(model)
    with method.attach(model, 0.7):
        expected = predict(model)
    with attach(model, [f"{tmp_path / 'a'}@0.7"]):
        assert torch.equal(predict(model), expected)
    assert torch.equal(predict(model), plain) and not torch.allclose(expected, plain, atol=1e-3)
    with attach(model, [str(tmp_path / "a"), f"{tmp_path / 'a'}@0"]):
        stacked = predict(model)
    with attach(model, [str(tmp_path / "a")]):
        assert torch.equal(predict(model), stacked)
    other = request.getfixturevalue(next(name for name in FAMILIES if name != kind))
    with pytest.raises(UserError, match="does not fit"), attach(other, [str(tmp_path / "a")]):
        pass


# ---------------------------------------------------------------- released tokens


def release(folder: Path, *shape: int, table: int = 0) -> dict[str, torch.Tensor]:
    """Files as the official code writes them: a bare Parameter and a pickled Embedding module."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = nn.Parameter(field(0, *shape))
    torch.save(tokens, folder / "dc_tokens.pth")
    if not table:
        return {"dc_tokens": tokens.detach()}
    embedding = nn.Embedding(100, table)
    torch.save(embedding, folder / "dc_t_tokens.pth")
    return {"dc_tokens": tokens.detach(), "dc_t_tokens": embedding.weight.detach()}


@pytest.mark.parametrize(
    ("alias", "shape", "table", "expected"),
    [
        ("sdxl", (4, 2048), 0, {"stages": "TTF", "num_tokens": 4, "init": "normal"}),
        ("sd3", (5, 4, 1536), 7680, {"num_layers": 5, "num_tokens": 4, "token_space": "projected"}),
        ("sd3", (5, 4, 4096), 7680, {"num_layers": 5, "num_tokens": 4, "token_space": "text"}),
        ("sd35-medium", (3, 2, 1536), 4608, {"num_layers": 3, "num_tokens": 2, "init": "normal"}),
    ],
)
def test_import(tmp_path, alias, shape, table, expected):
    state = release(tmp_path / "official", *shape, table=table)
    import_official("softrepa", tmp_path / "official", alias, tmp_path / "out")
    adapter = load_adapter(tmp_path / "out")
    assert adapter.state.keys() == state.keys()
    assert all(torch.equal(adapter.state[k], v) for k, v in state.items())
    settings = config.Resolved.from_dict(adapter.info.config).method_config
    assert settings.use_t_table == bool(table)
    assert {k: getattr(settings, k) for k in expected} == expected
    assert (adapter.info.family, adapter.info.model_id) == ("sdxl" if alias == "sdxl" else "sd3", alias)
    assert adapter.info.origin["softrepa.num_tokens"] == "imported file"
    assert adapter.info.origin["softrepa.init"].startswith("official command")
    spec, wanted = str(tmp_path / "out"), alias if f"softrepa/{alias}" in packaged.list_presets() else None
    drawn = make_plan(None, [spec], {}, {})  # pictures are drawn and edited as the model's preset says
    if wanted is None:
        assert drawn.open_keys == {"sampler", "spacing"}  # the model's own
        assert edit_settings(drawn, {}) == (EditSettings(), "the defaults")
    else:
        preset = config.resolve("softrepa", preset=wanted)
        assert (drawn.sample, drawn.model) == (preset.sample, preset.model)
        where = f"preset softrepa/{wanted}" if wanted == "sd3" else "the defaults"
        assert edit_settings(drawn, {}) == (preset.edit, where)


@pytest.mark.parametrize(
    ("kind", "shape", "table"),
    [
        ("xl_model", (3, 40), 40),
        ("sd3_model", (2, 3, 32), 64),
        ("sd3_model", (3, 1, 48), 96),
        ("sd3_model", (1, 2, 32), 0),
    ],
)
def test_import_works_on_a_model(request, kind, shape, table, tmp_path):
    """Of a folder's model: its widths are read, its weights are not."""
    model = request.getfixturevalue(kind)
    bare = tmp_path / "without-weights"
    for file in ("model_index.json", "unet/config.json", "transformer/config.json"):
        if (Path(model.model_id) / file).is_file():
            (bare / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(model.model_id) / file, bare / file)
    release(tmp_path / "official", *shape, table=table)
    import_official("softrepa", tmp_path / "official", str(bare), tmp_path / "out")
    info = json.loads((tmp_path / "out" / "adapter.json").read_text())
    (tmp_path / "out" / "adapter.json").write_text(json.dumps({**info, "model_id": model.model_id}))
    plain = predict(model)
    with attach(model, [str(tmp_path / "out")]):
        assert not torch.allclose(predict(model), plain, atol=1e-3)
    assert torch.equal(predict(model), plain)


def test_import_refusals(tmp_path, sd3_model):
    def refused(message: str, model: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            import_official("softrepa", tmp_path / "official", model, tmp_path / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    release(tmp_path / "official", 5, 4, 1536, table=7680)
    refused(r"shape \[5, 4, 1536\] \(SD3\), but sdxl needs \[n, 2048\]", "sdxl")
    refused(r"but .* needs \[layers, n, 48\] or \[layers, n, 32\]", sd3_model.model_id)
    release(tmp_path / "official", 4, 2048)
    (tmp_path / "official" / "dc_t_tokens.pth").unlink()
    refused(r"\(SDXL\), but sd3 needs \[layers, n, 4096\] or \[layers, n, 1536\]", "sd3")
    release(tmp_path / "official", 4, 4, 1536, table=7680)
    refused(r"the table has shape \[100, 7680\], expected \[100, 6144\]", "sd3")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    refused("holds a FluxPipeline; soft tokens are for StableDiffusionPipeline", str(tmp_path / "odd"))
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (tmp_path / "odd" / "model_index.json").write_text(json.dumps(index))
    refused(r"no config.json in .*transformer", str(tmp_path / "odd"))
    (tmp_path / "odd" / "transformer").mkdir()
    (tmp_path / "odd" / "transformer" / "config.json").write_text('{"joint_attention_dim": 48}')
    refused("does not tell the width of its text", str(tmp_path / "odd"))


def test_released_layers_beyond_the_model(sd3_model, tmp_path):
    release(tmp_path / "official", 4, 2, 32)
    import_official("softrepa", tmp_path / "official", sd3_model.model_id, tmp_path / "out")
    with (
        pytest.raises(UserError, match="num_layers is 4, but this transformer has 3 blocks"),
        attach(sd3_model, [str(tmp_path / "out")]),
    ):
        pass


@pytest.mark.parametrize("scale", [1024.0, 65536.0])
@pytest.mark.parametrize(
    ("kind", "table", "dweight"),
    [("xl_model", True, 1.0), ("sd3_model", True, 0.0), ("sd3_model", False, 0.0)],
)
def test_gradient_in_float16(request, kind, table, dweight, scale):
    """Weights and autocast in float16, at the scales of a loss scaler: about the float32 gradient. (That of
    this SDXL's contrastive part alone is a difference of nearly equal numbers, in which float16 is 16 % off.)
    """
    model = request.getfixturevalue(kind)
    half = copy.copy(model)
    half.denoiser, half.dtype = copy.deepcopy(model.denoiser).half(), torch.float16
    options = {"use_t_table": table, "dweight": dweight, "min_t": 400, "max_t": 401, "pair_chunk": 5}
    _, expected, _ = run(make(model, **options), a_batch())
    method, batch = make(half, **options), a_batch()
    rng = torch.Generator().manual_seed(3)
    ctx = StepContext(step=0, rng=rng, backward=lambda loss: (loss * scale).backward(), loss_scale=scale)
    with torch.autocast("cpu", torch.float16):
        method.step(batch, ctx)
    for p, grad in zip(method.tokens.parameters(), expected, strict=True):
        assert (p.grad / scale - grad).norm() < 0.05 * grad.norm()
