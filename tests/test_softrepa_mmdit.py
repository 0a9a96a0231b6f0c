"""SoftREPA on the MMDiT: which rows each block sees, both widths of tokens, strength, stacking, gradients.

Letters: N soft tokens, L text rows, Y blocks with tokens.
"""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from softrepa_helpers import PROMPTS, a_batch, field, make, run

from align_cli.errors import UserError
from align_cli.methods.softrepa.config import SoftREPAConfig
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.methods.softrepa.mmdit import BiasedJointAttention, block_tokens, inserted_per_block
from align_cli.methods.softrepa.tokens import SoftTokens
from align_cli.models.loading import load_model
from align_cli.settings import ModelSettings, TrainSettings

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
STREAM, TEXT = 32, 48
"""Widths of the tiny transformer's text stream, and of its text."""


@pytest.fixture(scope="module")
def model(tiny_sd3_folder):
    """Three blocks; 32 CLIP rows and 8 of T5."""
    return load_model(ModelSettings(name=str(tiny_sd3_folder), device="cpu", t5_length=8))


@pytest.fixture(scope="module")
def dual_model(tiny_sd3_no_t5_folder):
    """The layout of SD3.5 medium: a second attention in two blocks, normalised queries and keys."""
    with pytest.warns(UserWarning, match="T5"):
        return load_model(ModelSettings(name=str(tiny_sd3_no_t5_folder), device="cpu", t5_length=8))


def inputs(model, t=(500.0, 30.0)):
    return field(0, 2, model.latent_channels, 8, 8), torch.tensor(t), model.encode_text(PROMPTS[:2])


def soft(layers: int = 3, num: int = 2, *, width: int = STREAM, table: bool = False, seed: int = 1):
    tokens = field(seed, layers, num, width) * 3
    return SoftTokens(tokens, field(seed + 100, 100, layers * STREAM) if table else None)


def at_work(transformer, tokens, projected: bool = True, scale: float = 1.0):
    soft_at = partial(block_tokens, transformer, tokens, projected=projected)
    return inserted_per_block(transformer, soft_at, len(tokens.dc_tokens), scale)


def predict(model, *parts: tuple[SoftTokens, float], t=(500.0, 30.0), projected: bool = True):
    with torch.no_grad(), ExitStack() as stack:
        for tokens, scale in parts:
            stack.enter_context(at_work(model.denoiser, tokens, projected, scale))
        return model.predict(*inputs(model, t))


# ---------------------------------------------------------------- what the blocks see


def test_rows_of_each_block(model):
    """Block 0 reads [its tokens ; text], and after the last tokenised block the text is L rows long again."""
    soft_tokens = soft(2, table=True)
    z, t, cond = inputs(model, (507.0, 995.0))
    text = model.denoiser.context_embedder(cond.tokens)
    blocks = model.denoiser.transformer_blocks
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(at_work(model.denoiser, soft_tokens))
        for block in blocks:  # registered last, so they see what the blocks see

            def see(_block, _args, kwargs, output):
                seen.append((kwargs["encoder_hidden_states"], output[0]))

            stack.callback(block.register_forward_hook(see, with_kwargs=True).remove)
        model.predict(z, t, cond)
    rows = text.shape[1]
    assert [entered.shape[1] for entered, _ in seen] == [rows + 2, rows + 2, rows]
    assert [None if left is None else left.shape[1] for _, left in seen] == [rows, rows, None]
    torch.testing.assert_close(seen[0][0][:, 2:], text, **CLOSE)
    for layer in range(2):
        columns = slice(layer * STREAM, (layer + 1) * STREAM)
        for sample, row in enumerate((50, 99)):
            expected = soft_tokens.dc_tokens[layer] + soft_tokens.dc_t_tokens[row, columns]
            torch.testing.assert_close(seen[layer][0][sample, :2], expected)


def test_tokens_by_hand():
    """(Y, B, N, P): W k + b for wide tokens, then the columns of the block from the row of the timestep."""
    tiny = torch.nn.Module()
    tiny.context_embedder = torch.nn.Linear(3, 2)
    with torch.no_grad():
        tiny.context_embedder.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
        tiny.context_embedder.bias.copy_(torch.tensor([10.0, 20.0]))
    table = torch.zeros(100, 4)
    table[50] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    tokens = SoftTokens(torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 1.0, 0.0]]]), table)
    wide = block_tokens(tiny, tokens, torch.tensor([505, 0]), projected=False)
    assert wide.tolist() == [[[[18, 24]], [[17, 22]]], [[[13, 25]], [[10, 21]]]]
    flat = SoftTokens(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), table)
    assert block_tokens(tiny, flat, torch.tensor(500), projected=True).tolist() == [[[[2, 4]]], [[[6, 8]]]]
    none = SoftTokens(torch.tensor([[[1.0, 2.0]]]), None)
    assert block_tokens(tiny, none, torch.tensor([1, 2]), projected=True).tolist() == [[[[1, 2]]]]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_plain_algorithm(model, layers):
    """Every block written out: keep the last L rows, put the block's tokens in front, go on."""
    soft_tokens, transformer = soft(layers), model.denoiser
    z, t, cond = inputs(model)
    with torch.no_grad():
        picture = transformer.pos_embed(z).contiguous()
        temb = transformer.time_text_embed(t, cond.pooled)
        text = transformer.context_embedder(cond.tokens)
        rows = text.shape[1]
        for index, block in enumerate(transformer.transformer_blocks):
            text = text[:, -rows:]
            if index < layers:
                text = torch.cat([soft_tokens.dc_tokens[index].expand(2, -1, -1), text], dim=1)
            text, picture = block(hidden_states=picture, encoder_hidden_states=text, temb=temb)
        patches = transformer.proj_out(transformer.norm_out(picture, temb))
        expected = torch.einsum("nhwpqc->nchpwq", patches.view(2, 4, 4, 2, 2, 4)).reshape(2, 4, 8, 8)
    torch.testing.assert_close(predict(model, (soft_tokens, 1.0)), expected, **CLOSE)


def test_both_widths_are_one(model):
    """Wide tokens act as their projections do; the table is added behind the projection."""
    wide = soft(2, width=TEXT, table=True)
    narrow = SoftTokens(model.denoiser.context_embedder(wide.dc_tokens), wide.dc_t_tokens)
    torch.testing.assert_close(
        predict(model, (wide, 1.0), projected=False), predict(model, (narrow, 1.0)), **CLOSE
    )


def test_timesteps_of_every_kind(model):
    tokens = soft(table=True)
    as_float, as_int = predict(model, (tokens, 1.0)), predict(model, (tokens, 1.0), t=(500, 30))
    assert torch.equal(as_float, as_int)
    torch.testing.assert_close(
        predict(model, (tokens, 1.0), t=700)[:1], predict(model, (tokens, 1.0), t=(700.0, 1.0))[:1], **CLOSE
    )
    # at 1000 every sample looks one timestep earlier: 500 finds row 49, not 50
    moved = SoftTokens(tokens.dc_tokens, tokens.dc_t_tokens)
    with torch.no_grad():
        moved.dc_t_tokens[50] = 9.0
    late = {"t": (1000.0, 500.0)}
    assert torch.equal(predict(model, (moved, 1.0), **late), predict(model, (tokens, 1.0), **late))
    with torch.no_grad():
        moved.dc_t_tokens[49] = 9.0
    assert not torch.allclose(
        predict(model, (moved, 1.0), **late)[1], predict(model, (tokens, 1.0), **late)[1]
    )


# ---------------------------------------------------------------- strength and stacking


@pytest.mark.parametrize("kind", ["model", "dual_model"])
def test_scale_of_tokens(request, kind):
    """Scale is a factor on the attention weight: 0 is the base model, 2 is every token twice."""
    model = request.getfixturevalue(kind)
    tokens, plain = soft(table=True), predict(request.getfixturevalue(kind))
    trained = predict(model, (tokens, 1.0))
    assert torch.equal(predict(model, (tokens, 0.0)), plain)
    assert not torch.allclose(trained, plain, atol=1e-3)
    torch.testing.assert_close(predict(model, (tokens, 1 - 1e-7)), trained, **CLOSE)
    torch.testing.assert_close(predict(model, (tokens, 1e-30)), plain, **CLOSE)
    twice = SoftTokens(tokens.dc_tokens.repeat(1, 2, 1), tokens.dc_t_tokens)
    torch.testing.assert_close(predict(model, (tokens, 2.0)), predict(model, (twice, 1.0)), **CLOSE)
    distance = [(predict(model, (tokens, s)) - plain).norm().item() for s in (0.1, 0.4, 0.7, 1.0)]
    assert distance == sorted(distance)
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be finite"):
            predict(model, (tokens, scale))


@pytest.mark.parametrize("kind", ["model", "dual_model"])
def test_stacked_insertions(request, kind):
    model = request.getfixturevalue(kind)
    a, b = soft(num=2), soft(num=1, seed=2)
    both = SoftTokens(torch.cat([a.dc_tokens, b.dc_tokens], 1), None)
    torch.testing.assert_close(predict(model, (a, 1.0), (b, 1.0)), predict(model, (both, 1.0)), **CLOSE)
    torch.testing.assert_close(predict(model, (a, 0.5), (b, 0.5)), predict(model, (both, 0.5)), **CLOSE)
    for first, second in ((0.5, 1.5), (1.0, 0.3), (0.3, 1.0)):
        torch.testing.assert_close(
            predict(model, (a, first), (b, second)), predict(model, (b, second), (a, first)), **CLOSE
        )
    torch.testing.assert_close(predict(model, (a, 1.0), (b, 0.0)), predict(model, (a, 1.0)), **CLOSE)
    short, long = soft(1, num=2), soft(3, num=3, seed=2)  # other numbers of blocks and of tokens
    torch.testing.assert_close(
        predict(model, (short, 1.0), (long, 2.0)), predict(model, (long, 2.0), (short, 1.0)), **CLOSE
    )


def test_biased_attention_is_the_original(model, dual_model):
    """Without a bias, and with a bias of nothing; with one on a key, the softmax written out."""
    for block in (*model.denoiser.transformer_blocks, *dual_model.denoiser.transformer_blocks):
        attention, width = block.attn, STREAM
        picture, text = field(0, 2, 5, width), field(1, 2, 3, width)
        with torch.no_grad():
            expected = attention(picture, encoder_hidden_states=text)
            for bias in (None, torch.zeros(3)):
                found = BiasedJointAttention()(attention, picture, text, bias)
                torch.testing.assert_close(found, expected, **CLOSE)
            gone = BiasedJointAttention()(attention, picture, text, torch.tensor([-1e9, 0.0, 0.0]))
            without = attention(picture, encoder_hidden_states=text[:, 1:])
        torch.testing.assert_close(gone[0], without[0], **CLOSE)


def test_nothing_stays_behind(model):
    """Hooks and attention processors are gone afterwards, also if something broke inside."""
    blocks = model.denoiser.transformer_blocks
    before = [block.attn.processor for block in blocks]
    plain = predict(model)

    def broken() -> None:
        with at_work(model.denoiser, soft(2), scale=0.5):
            assert isinstance(blocks[1].attn.processor, BiasedJointAttention)
            assert blocks[2].attn.processor is before[2]
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        broken()
    assert all(block.attn.processor is p for block, p in zip(blocks, before, strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.denoiser.modules())
    assert torch.equal(predict(model), plain)
    blocks[0].attn.set_processor(object())
    with pytest.raises(ValueError, match="a scale other than 0 and 1 does not work with a object"):
        predict(model, (soft(), 0.5))
    blocks[0].attn.set_processor(before[0])


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("projected", "table", "scale"), [(True, True, 1.0), (False, True, 1.0), (False, False, 0.7)]
)
def test_gradient_by_finite_differences(model, projected, table, scale):
    """In float64: error of a prediction with respect to every soft token and table entry in use."""
    transformer = copy.deepcopy(model.denoiser).double()
    z, t, cond = inputs(model, (500.0, 506.0))
    soft_tokens = soft(2, 1, width=STREAM if projected else TEXT, table=table).double()
    target = field(5, *z.shape).double()

    def error(tokens: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        held = torch.nn.Module()
        held.dc_tokens = tokens
        held.offsets = lambda t: row.expand(len(t), -1) if table else None
        with at_work(transformer, held, projected, scale):
            found = transformer(
                z.double(), cond.tokens.double(), cond.pooled.double(), timestep=t, return_dict=False
            )[0]
        return (found - target).square().mean()

    tokens = soft_tokens.dc_tokens.detach().requires_grad_()
    row = field(9, 2 * STREAM).double().requires_grad_()
    assert torch.autograd.gradcheck(error, (tokens, row), fast_mode=True)
    loss = error(tokens, row)
    loss.backward()
    assert tokens.grad.abs().amax((1, 2)).min() > 0  # both blocks
    assert (row.grad is None) != table


def test_checkpointed_blocks_give_the_same_gradient(model):
    """Recomputed blocks see the tokens again."""
    options = {"use_t_table": True, "dweight": 2.0, "pair_chunk": 3}
    values, grads, _ = run(make(model, **options), a_batch())
    model.denoiser.enable_gradient_checkpointing()
    try:
        again, recomputed, _ = run(make(model, **options), a_batch())
    finally:
        model.denoiser.disable_gradient_checkpointing()
    assert again == pytest.approx(values, rel=1e-6)
    for a, b in zip(grads, recomputed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


# ---------------------------------------------------------------- the method


def test_shapes_and_start(model):
    wide = make(model, use_t_table=True, num_tokens=4, num_layers=2, init_noise=0.02)
    assert {k: list(v.shape) for k, v in wide.state().items()} == {
        "dc_tokens": [2, 4, TEXT],
        "dc_t_tokens": [100, 2 * STREAM],
    }
    assert wide.tokens.dc_tokens.std().item() == pytest.approx(0.02, rel=0.2)
    assert wide.tokens.dc_t_tokens.std().item() == pytest.approx(0.02, rel=0.05)
    narrow = make(model, token_space="projected")
    assert list(narrow.state()["dc_tokens"].shape) == [3, 4, STREAM]
    first = model.encode_text([""]).tokens[0, 0]
    copies = make(model, init="bos").tokens.dc_tokens
    assert torch.equal(copies, first.expand(3, 4, -1))
    projected = make(model, init="bos", token_space="projected").tokens.dc_tokens
    torch.testing.assert_close(projected, model.denoiser.context_embedder(first).expand(3, 4, -1))


def test_number_of_trained_values():
    """The official setting on the real SD3: 81,920 + 768,000 (spec b), from the shapes alone."""
    from diffusers import SD3Transformer2DModel

    from align_cli.methods.softrepa.placement import MMDiTPlacement

    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, joint_attention_dim=4096
        )
    for space, tokens in (("text", 81_920), ("projected", 30_720)):
        found = MMDiTPlacement(transformer, SoftREPAConfig(token_space=space))
        assert math.prod(found.token_shape) == tokens
        assert 100 * found.table_width == 768_000


@pytest.mark.parametrize("space", ["text", "projected"])
def test_frozen_stays_frozen_and_trained_moves(tiny_sd3_folder, space):
    model = load_model(ModelSettings(name=str(tiny_sd3_folder), device="cpu", t5_length=4))
    modules = (model.denoiser, model.vae, *model.encoders)
    before = [copy.deepcopy(m.state_dict()) for m in modules]
    method = make(model, use_t_table=True, token_space=space, min_t=990)
    start = method.state()
    optimizer = torch.optim.AdamW(method.trainables()["softrepa"], lr=1e-2)
    for seed in range(2):
        values, grads, _ = run(method, a_batch(2), seed)
        assert all(math.isfinite(v) for v in values.values())
        assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in grads)
        optimizer.step()
    assert all((method.state()[k] - v).abs().max() > 1e-3 for k, v in start.items())
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.denoiser.modules())


def test_half_precision_weights(tiny_sd3_folder, model):
    """Wide float32 tokens pass a half-precision projection, with and without autocast."""
    settings = ModelSettings(name=str(tiny_sd3_folder), device="cpu", t5_length=8, dtype="bfloat16")
    half, full = load_model(settings), run(make(model, use_t_table=True), a_batch())[0]
    for method in (make(half, use_t_table=True), make(half, use_t_table=True, token_space="projected")):
        values, grads, _ = run(method, a_batch())
        assert values["softrepa/err_own"] == pytest.approx(full["softrepa/err_own"], rel=0.1)
        assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)
        with torch.autocast("cpu", torch.bfloat16):
            mixed, _, _ = run(method, a_batch())
        assert mixed["softrepa/err_own"] == pytest.approx(full["softrepa/err_own"], rel=0.1)
    with torch.no_grad(), make(half).attach(half, 0.5):
        assert torch.isfinite(half.predict(*inputs(half))).all()


def test_settings_that_do_not_fit(model):
    with pytest.raises(UserError, match="num_layers is 5, but this transformer has 3 blocks; give 1 to 3"):
        SoftREPA(model, SoftREPAConfig(init="normal"))
    for options, message in (
        ({"num_layers": 0}, "num_layers must be >= 1, or -1 for all"),
        ({"token_space": "image"}, "token_space must be one of text, projected"),
    ):
        with pytest.raises(UserError, match=message):
            SoftREPAConfig(**options)
    with pytest.warns(UserWarning, match="softrepa.stages has no effect on sd3"):
        make(model, stages="TTF").check(TrainSettings())
