"""SoftREPA on tiny real models: tokens, insertion, gradients in chunks and over processes, what a step may
touch.
"""

from __future__ import annotations

import copy
import math
import warnings
from threading import Barrier, Thread

import pytest
import torch
from softrepa_helpers import PROMPTS, a_batch, exact, field, make, run

from align_cli.errors import UserError
from align_cli.losses import denoising_error, softrepa_loss
from align_cli.methods.base import Batch
from align_cli.methods.softrepa.config import SoftREPAConfig
from align_cli.methods.softrepa.method import FLAT_STEPS, SoftREPA
from align_cli.methods.softrepa.tokens import (
    SoftTokens,
    insert_after_first,
    inserted,
    selected_blocks,
    table_row,
)
from align_cli.models.base import TextCond
from align_cli.models.loading import load_model
from align_cli.settings import ModelSettings, TrainSettings


@pytest.fixture(scope="module")
def model(tiny_sd15_folder):
    return load_model(ModelSettings(name=str(tiny_sd15_folder), device="cpu"))


@pytest.fixture(scope="module")
def v_model(tiny_v_folder):
    return load_model(ModelSettings(name=str(tiny_v_folder), device="cpu"))


@pytest.fixture(scope="module")
def xl_model(tiny_sdxl_folder):
    return load_model(ModelSettings(name=str(tiny_sdxl_folder), device="cpu"))


@pytest.fixture(scope="module")
def sd3_model(tiny_sd3_folder):
    return load_model(ModelSettings(name=str(tiny_sd3_folder), device="cpu", t5_length=8))


# ---------------------------------------------------------------- tokens


def test_table_rows():
    assert table_row(torch.tensor([0, 9, 10, 999])).tolist() == [0, 0, 1, 99]
    assert table_row(torch.tensor([7.9, 999.9])).tolist() == [0, 99]
    t = torch.tensor([1000, 500], dtype=torch.int32)
    assert table_row(t).tolist() == [99, 49]  # one late sample moves all
    assert t.tolist() == [1000, 500]
    assert table_row(torch.tensor(500)).item() == 50


def test_rows_of_tokens_and_table():
    tokens, table = field(0, 2, 3), field(1, 100, 3)
    soft = SoftTokens(tokens, table)
    rows = soft.rows(torch.tensor([5, 995]))
    torch.testing.assert_close(rows, torch.stack([tokens + table[0], tokens + table[99]]))
    torch.testing.assert_close(soft.rows(torch.tensor(15)), (tokens + table[1])[None])
    assert torch.equal(SoftTokens(tokens, None).rows(torch.tensor(5)), tokens[None])
    with pytest.raises(ValueError, match="table must have 100 rows"):
        SoftTokens(tokens, field(1, 99, 3))


def test_insertion_after_the_first_token():
    text, soft = torch.arange(6.0).view(1, 3, 2), torch.full((1, 1, 2), 9.0)
    assert insert_after_first(text, soft)[0, :, 0].tolist() == [0, 9, 2, 4]
    assert insert_after_first(text.half(), soft).dtype == torch.float16


def test_stages_choose_blocks(model):
    unet = model.denoiser
    assert selected_blocks(unet, "TFF") == [unet.down_blocks[0]]
    assert selected_blocks(unet, "FTF") == [unet.mid_block]
    assert selected_blocks(unet, "TTT") == [unet.down_blocks[0], unet.mid_block, unet.up_blocks[1]]
    z, t, cond = field(0, 2, 4, 8, 8), torch.tensor(500), model.encode_text(PROMPTS[:2])
    seen: list[int] = []
    handles = [
        block.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
        )
        for block in (unet.down_blocks[0], unet.mid_block, unet.up_blocks[1])
    ]
    rows = SoftTokens(field(1, 3, 32), None).rows
    for stages, expected in (("TFF", [35, 32, 32]), ("FTT", [32, 35, 35])):
        seen.clear()
        # hooks run in order of registration: these were there first, so they see the plain text of inner
        # hooks
        for handle in handles:
            handle.remove()
        with inserted(unet, stages, rows):
            handles = [
                block.register_forward_pre_hook(
                    lambda _m, _a, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]),
                    with_kwargs=True,
                )
                for block in (unet.down_blocks[0], unet.mid_block, unet.up_blocks[1])
            ]
            model.predict(z, t, cond)
        assert seen == expected
    for handle in handles:
        handle.remove()


def test_scale_of_tokens(model):
    """Scale is a factor on the attention weight: 0 is the base model, 2 is the token twice, and 1 to 0 is
    smooth.
    """
    model = exact(model)
    z, t, cond = field(0, 2, 4, 8, 8), torch.tensor([500, 30]), model.encode_text(PROMPTS[:2])
    soft = SoftTokens(field(1, 2, 32) * 3, None)

    def predict(scale: float, rows=soft.rows) -> torch.Tensor:
        with torch.no_grad(), inserted(model.denoiser, "TTT", rows, scale):
            return model.predict(z, t, cond)

    plain = model.predict(z, t, cond)
    assert torch.equal(predict(0.0), plain)
    assert not torch.allclose(predict(1.0), plain, atol=1e-3)
    torch.testing.assert_close(predict(1 - 1e-7), predict(1.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predict(1e-30), plain, atol=1e-5, rtol=1e-5)
    twice = SoftTokens(soft.dc_tokens.repeat(2, 1), None)
    torch.testing.assert_close(predict(2.0), predict(1.0, twice.rows), atol=1e-5, rtol=1e-5)
    distance = [(predict(s) - plain).norm().item() for s in (0.1, 0.4, 0.7, 1.0)]
    assert distance == sorted(distance)
    for scale in (-1.0, math.nan, math.inf):
        with (
            pytest.raises(ValueError, match="scale must be finite"),
            inserted(model.denoiser, "TTT", soft.rows, scale),
        ):
            pass


def test_stacked_insertions(model):
    model = exact(model)
    z, t, cond = field(0, 1, 4, 8, 8), torch.tensor(500), model.encode_text(PROMPTS[:1])
    a, b = SoftTokens(field(1, 2, 32) * 3, None), SoftTokens(field(2, 1, 32) * 3, None)
    both = SoftTokens(torch.cat([a.dc_tokens, b.dc_tokens]), None)

    def predict(*parts: tuple[SoftTokens, float]) -> torch.Tensor:
        from contextlib import ExitStack

        with torch.no_grad(), ExitStack() as stack:
            for soft, scale in parts:
                stack.enter_context(inserted(model.denoiser, "TTT", soft.rows, scale))
            return model.predict(z, t, cond)

    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(predict((a, 1.0), (b, 1.0)), predict((both, 1.0)), **close)
    torch.testing.assert_close(predict((a, 0.5), (b, 1.5)), predict((b, 1.5), (a, 0.5)), **close)
    torch.testing.assert_close(predict((a, 0.5), (b, 0.5)), predict((both, 0.5)), **close)


# ---------------------------------------------------------------- initialisation and state


def test_initial_tokens(model):
    bos = model.uncond(1).tokens[0, 0]
    plain = make(model, init="bos", use_t_table=True)
    assert torch.equal(plain.tokens.dc_tokens, bos.expand(4, -1))
    assert plain.tokens.dc_t_tokens is not None
    assert plain.tokens.dc_t_tokens.std().item() == pytest.approx(0.5, rel=0.1)
    assert make(model, init="normal", init_noise=0.02).tokens.dc_tokens.std().item() == pytest.approx(
        0.02, rel=0.2
    )
    noisy = make(model, init="bos+noise", init_noise=0.1).tokens.dc_tokens
    assert (noisy - bos).std().item() == pytest.approx(0.1 * bos.std().item(), rel=0.2)
    assert torch.equal(noisy, make(model, init="bos+noise", init_noise=0.1).tokens.dc_tokens)
    other = SoftREPA(model, SoftREPAConfig(init="bos+noise"), seed=1).tokens.dc_tokens
    assert not torch.equal(other, make(model, init="bos+noise", init_noise=0.02).tokens.dc_tokens)


@pytest.mark.parametrize(("init", "stay_equal"), [("bos", True), ("bos+noise", False)])
def test_equal_tokens_never_separate(model, init, stay_equal):
    method = make(model, init=init, init_noise=0.3)
    optimizer = torch.optim.AdamW(method.trainables()["softrepa"], lr=1e-2)
    for seed in range(3):
        run(method, a_batch(), seed)
        optimizer.step()
    tokens = method.tokens.dc_tokens
    spread = (tokens - tokens[:1]).abs().max().item()
    assert (spread < 1e-5) == stay_equal


def test_state_round_trip(model):
    method, other = make(model, use_t_table=True), make(model, use_t_table=True, init="bos")
    state = method.state()
    assert {k: list(v.shape) for k, v in state.items()} == {"dc_tokens": [4, 32], "dc_t_tokens": [100, 32]}
    other.load_state(state)
    assert all(torch.equal(other.state()[k], v) for k, v in state.items())
    before = copy.deepcopy(other.state())
    with pytest.raises(ValueError, match="missing dc_t_tokens; unused extra; dc_tokens has shape"):
        other.load_state({"dc_tokens": torch.zeros(3, 32), "extra": torch.zeros(1)})
    assert all(torch.equal(other.state()[k], v) for k, v in before.items())
    with torch.no_grad():
        method.tokens.dc_tokens.add_(1)
    assert not torch.equal(state["dc_tokens"], method.state()["dc_tokens"])  # a copy, not a view


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("kind", ["model", "v_model", "xl_model", "sd3_model"])
def test_step_is_the_plain_formula(kind, request):
    """One step against the loss written out pair by pair with the plain library modules."""
    model = request.getfixturevalue(kind)
    method, batch, n = make(model, use_t_table=True, dweight=2.0), a_batch(3), 3
    values, grads, losses = run(method, batch, seed=11)
    rng = torch.Generator().manual_seed(11)
    t = torch.randint(0, 1000, (), generator=rng)
    posterior = torch.randn(n, 4, 8, 8, generator=rng)
    eps = torch.randn(1, 4, 8, 8, generator=rng)
    latents, texts = model.encode_image(batch.pixels, posterior), model.encode_text(batch.prompts)
    method.tokens.zero_grad()
    err = []
    with method.attach(model):
        for i in range(n):
            x = latents[i : i + 1]
            z, target = model.process.add_noise(x, eps, t), model.process.target(x, eps, t)
            err.append(
                torch.cat([denoising_error(model.predict(z, t, texts[[j]]), target) for j in range(n)])
            )
    loss = softrepa_loss(torch.stack(err), temperature=1.0, dweight=2.0)
    loss.backward()
    assert values["softrepa/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert sum(losses).item() == pytest.approx(loss.item(), rel=1e-5)
    for p, grad in zip(method.tokens.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)
    errors = torch.stack(err).detach()
    assert values["softrepa/err_own"] == pytest.approx(errors.diagonal().mean().item(), rel=1e-5)
    others = errors[~torch.eye(n, dtype=torch.bool)].mean().item()
    assert values["softrepa/err_other"] == pytest.approx(others, rel=1e-5)
    assert values["softrepa/accuracy"] == pytest.approx(
        (errors.argmin(1) == torch.arange(n)).float().mean().item()
    )
    table = grads[1]
    assert table[int(t) // 10].abs().max() > 0
    assert table.abs().sum(1).count_nonzero() == 1


@pytest.mark.parametrize(
    ("kind", "chunk", "negatives"),
    [("model", chunk, negatives) for chunk in (1, 3, 4, 11) for negatives in (0, 2)]
    + [("xl_model", 1, 2), ("xl_model", 3, 0), ("sd3_model", 1, 2), ("sd3_model", 3, 0)],
)
def test_chunks_give_the_gradient_of_the_whole(request, kind, chunk, negatives):
    model = exact(request.getfixturevalue(kind))
    extra = [[f"a {c} square", "a blue circle", "unused"] for c in ("red", "green", "yellow", "blue")]
    options = {"use_t_table": True, "dweight": 3.0, "hard_negatives": negatives}
    whole, whole_grads, _ = run(make(model, pair_chunk=0, **options), a_batch(negatives=extra))
    calls: list[int] = []
    handle = model.denoiser.register_forward_pre_hook(
        lambda _m, args, kwargs: calls.append(len(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    parts, grads, losses = run(make(model, pair_chunk=chunk, **options), a_batch(negatives=extra))
    handle.remove()
    assert max(calls) == chunk and sum(calls) == 4 * (4 + negatives)  # no pair is computed twice
    assert len(losses) == 1
    assert parts == pytest.approx(whole, rel=1e-5)
    for a, b in zip(whole_grads, grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert (a - b).norm() < 1e-5 * a.norm()  # a wrong weight of a chunk is an error of order 1


def test_hard_negatives_are_columns_of_their_own_image(model):
    extra = [["a red square", "a blue circle"], ["a red circle", "two red circles"]]
    method = make(model, hard_negatives=2)
    latents, eps, t = field(0, 2, 4, 8, 8), field(1, 1, 4, 8, 8), torch.tensor(300)
    texts = model.encode_text(PROMPTS[:2])
    own = torch.arange(2)
    flat = model.encode_text([text for row in extra for text in row])
    err = method.contrast(latents, texts, eps, t, own, flat, lambda _: None).err_IT
    assert err.shape == (2, 4)
    for i in range(2):
        candidates = model.encode_text([*PROMPTS[:2], *extra[i]])
        z = model.process.add_noise(latents[i : i + 1], eps, t).expand(4, -1, -1, -1)
        with torch.no_grad(), method.attach(model):
            expected = denoising_error(model.predict(z, t, candidates), eps.expand(4, -1, -1, -1))
        torch.testing.assert_close(err[i], expected, atol=1e-5, rtol=1e-5)


def test_negatives_that_the_dataset_lacks(model):
    with pytest.raises(
        UserError, match="gives 0 false captions per image; use --set softrepa.hard_negatives=0"
    ):
        run(make(model, hard_negatives=1), a_batch())
    with pytest.raises(UserError, match="gives 1 false captions"):
        run(make(model, hard_negatives=2), a_batch(negatives=[["x"], ["y", "z"], ["x"], ["y"]]))


def test_noise_of_some_rows(model):
    method = make(model, noise_rows=2)
    noise = method._noise(5, (4, 8, 8), torch.Generator().manual_seed(0))
    assert noise.shape == (5, 4, 8, 8)
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[2], noise[3])
    assert not torch.equal(noise[1], noise[2]) and not torch.equal(noise[3], noise[4])
    shared = make(model)._noise(5, (4, 8, 8), torch.Generator().manual_seed(0))
    assert torch.equal(shared[0], shared[4])


CHUNKED = {"noise_rows": 3, "pair_chunk": 3, "dweight": 2.0, "hard_negatives": 1}


@pytest.mark.parametrize(
    ("kind", "options"), [("model", {}), ("model", CHUNKED), ("xl_model", CHUNKED), ("sd3_model", CHUNKED)]
)
def test_two_processes_give_the_result_of_one(request, kind, options):
    model = exact(request.getfixturevalue(kind))
    extra = [[f"a {c} square"] for c in ("red", "green", "yellow", "blue")]
    batch = a_batch(negatives=extra)
    whole, grads, _ = run(make(model, **options), batch)
    meeting, shared = Barrier(2, timeout=120), {}
    models = [exact(model) for _ in range(2)]
    results: dict[int, tuple] = {}

    def rank(number: int) -> None:
        def gather(x: torch.Tensor) -> torch.Tensor:
            shared[number] = x
            meeting.wait()
            joined = torch.cat([shared[0], shared[1]])
            meeting.wait()
            return joined

        rows = slice(2 * number, 2 * number + 2)
        part = Batch(batch.prompts[rows], batch.pixels[rows], batch.ids[rows], {"negatives": extra[rows]})
        results[number] = run(make(models[number], **options), part, gather=gather, rank=number, world_size=2)

    threads = [Thread(target=rank, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, grad in enumerate(grads):
        torch.testing.assert_close((results[0][1][k] + results[1][1][k]) / 2, grad, atol=1e-6, rtol=0)
    mean = {k: (results[0][0][k] + results[1][0][k]) / 2 for k in whole}
    assert mean == pytest.approx(whole, rel=1e-5)


def test_frozen_stays_frozen_and_trained_moves(tiny_v_folder):
    model = load_model(ModelSettings(name=str(tiny_v_folder), device="cpu"))
    modules = (model.denoiser, model.vae, model.text_encoder)
    before = [copy.deepcopy(m.state_dict()) for m in modules]
    method = make(model, use_t_table=True, min_t=990)  # with zero terminal SNR at 999
    start = method.state()
    optimizer = torch.optim.AdamW(method.trainables()["softrepa"], lr=1e-2)
    for seed in range(3):
        values, grads, _ = run(method, a_batch(), seed)
        assert all(math.isfinite(v) for v in values.values())
        assert all(torch.isfinite(g).all() for g in grads)
        optimizer.step()
    assert all((method.state()[k] - v).abs().max() > 1e-3 for k, v in start.items())
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
    assert not any(m._forward_pre_hooks for m in model.denoiser.modules())


def test_same_seed_same_numbers(model):
    first, again, other = (run(make(model), a_batch(), seed) for seed in (5, 5, 6))
    assert first[0] == again[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    assert first[0] != other[0]


def test_learns_to_tell_captions_apart(model):
    """A few steps on one batch and one timestep lower the contrastive loss."""
    method = make(model, min_t=300, max_t=301, temperature=0.3)
    optimizer = torch.optim.AdamW(method.trainables()["softrepa"], lr=5e-2)
    losses = []
    for _ in range(15):
        values, _, _ = run(method, a_batch(), 7)
        losses.append(values["softrepa/ce"])
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-4


@pytest.mark.slow
def test_warns_once_of_flat_logits(model):
    method = make(model, temperature=0.02)

    def some_steps() -> None:
        for seed in range(FLAT_STEPS):
            run(method, a_batch(2), seed)

    with pytest.warns(UserWarning, match="logits are flat.*raise softrepa.temperature"):
        some_steps()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some_steps()


def test_half_precision_weights(tiny_sd15_folder, model):
    half = load_model(ModelSettings(name=str(tiny_sd15_folder), device="cpu", dtype="bfloat16"))
    values, grads, _ = run(make(half), a_batch())
    full, _, _ = run(make(model), a_batch())
    assert values["softrepa/err_own"] == pytest.approx(full["softrepa/err_own"], rel=0.05)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _, _ = run(make(model, pair_chunk=2), a_batch())
    assert mixed["softrepa/err_own"] == pytest.approx(full["softrepa/err_own"], rel=0.05)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be >= 1"),
        ({"stages": "TF"}, "stages must be three letters"),
        ({"stages": "tff"}, "stages must be three letters"),
        ({"stages": "FFF"}, "put the tokens nowhere"),
        ({"min_t": 500, "max_t": 500}, "0 <= min_t < max_t <= 1000"),
        ({"max_t": 1001}, "0 <= min_t < max_t <= 1000"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"dweight": -1.0}, "dweight must be >= 0"),
        ({"init": "zeros"}, "init must be one of bos, normal"),
        ({"noise_rows": -1}, "noise_rows must be >= 0"),
        ({"pair_chunk": -1}, "pair_chunk must be >= 0"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(UserError, match=message):
        SoftREPAConfig(**options)


def test_what_cannot_be_trained(model):
    with pytest.raises(UserError, match="captions only"):
        run(make(model), Batch(PROMPTS[:2]))
    with pytest.raises(UserError, match="train.batch_size must be >= 2"):
        SoftREPAConfig().check_train(TrainSettings(batch_size=1))
    SoftREPAConfig(hard_negatives=1).check_train(TrainSettings(batch_size=1))
    stranger = copy.copy(model)
    stranger.family = "sd9"
    with pytest.raises(UserError, match="softrepa works on sd15, sd21, sd3, sdxl; .* is sd9"):
        make(stranger)
    blocks = {"down_blocks": torch.nn.ModuleList(), "up_blocks": torch.nn.ModuleList()}
    bare = torch.nn.ModuleDict({**blocks, "mid_block": torch.nn.Identity()})
    with pytest.raises(ValueError, match="no block with cross-attention"):
        selected_blocks(bare, "TFF")


def test_prompts_are_encoded_once(model, monkeypatch):
    calls: list[int] = []
    encode, predict = model.encode_text, model.predict
    monkeypatch.setattr(model, "encode_text", lambda texts: calls.append(len(texts)) or encode(texts))
    batches: list[int] = []
    monkeypatch.setattr(model, "predict", lambda z, t, c: batches.append(len(z)) or predict(z, t, c))
    method = make(model, pair_chunk=2)
    calls.clear()
    run(method, a_batch())
    assert calls == [4]
    assert batches == [2] * 8
    assert isinstance(model.uncond(1), TextCond)
