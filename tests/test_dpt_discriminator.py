"""DPT's discriminator against torch's own transformer layers, its codes of place, and fused features."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from align_cli.errors import UserError
from align_cli.methods.dpt.config import DPTConfig, feature_names, fused_shape
from align_cli.methods.dpt.discriminator import (
    Attention,
    Discriminator,
    EncoderLayer,
    LearnedPositions,
    SinePositions,
    TimestepCode,
)
from align_cli.models.dropout import RowDropout

SMALL = {
    "hidden_dim": 16, "num_heads": 4, "feedforward_dim": 24, "num_matching_queries": 3,
    "num_grounding_queries": 5, "phrase_dim": 8,
}  # fmt: skip


def made(channels=(6,), **options) -> Discriminator:
    return Discriminator(
        DPTConfig(**{**SMALL, **options}), channels=channels, text_dim=10, phrase_width=12, seed=1
    )


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_layer_without_codes_is_torchs_own(pre_norm):
    layer = EncoderLayer(DPTConfig(**SMALL, pre_norm=pre_norm))
    own = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=pre_norm).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    own.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(layer(x, torch.zeros(()), None), own(x))


def test_attention_with_a_code_is_torchs_own():
    ours, theirs = Attention(DPTConfig(**SMALL)), nn.MultiheadAttention(16, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x, code = torch.randn(2, 7, 16), torch.randn(7, 16)
    expected, _ = theirs(x + code, x + code, x)
    torch.testing.assert_close(ours(x + code, x + code, x, None), expected)
    torch.testing.assert_close(ours(x + code, x + code, x, lambda w: w), expected)


def test_sine_positions_by_hand():
    found = SinePositions(4)(2, 3)
    assert found.shape == (6, 8)
    y, x = 2 / (2 + 1e-6) * 2 * math.pi, 3 / (3 + 1e-6) * 2 * math.pi  # last row, last column
    wanted = [math.sin(y), math.cos(y), math.sin(y / 100), math.cos(y / 100)]
    wanted += [math.sin(x), math.cos(x), math.sin(x / 100), math.cos(x / 100)]
    torch.testing.assert_close(found[-1], torch.tensor(wanted), atol=1e-5, rtol=1e-5)


def test_learned_positions_have_the_column_first():
    code = LearnedPositions(4)
    found = code(2, 3)
    torch.testing.assert_close(found[4], torch.cat([code.col_embed.weight[1], code.row_embed.weight[1]]))
    assert code.row_embed.weight.detach().min() >= 0
    with pytest.raises(UserError, match="50 rows and columns, and dpt.feature is 51 x 2"):
        code(51, 2)


def test_the_timestep_code_has_cosines_first():
    code = TimestepCode(8)
    wave = []
    hook = code.time_embedding["linear_1"].register_forward_pre_hook(lambda _, args: wave.append(args[0]))
    code(torch.tensor([500]))
    hook.remove()
    angle = 500 * 10000 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(wave[0][0], torch.cat([angle.cos(), angle.sin()]), atol=1e-4, rtol=1e-4)


def test_the_number_of_parameters_is_the_published_one():
    """Specification, section c: SD 2.1 has 4,369,029 and SD 1.4 has 4,303,237."""
    for width, count in ((1024, 4_369_029), (768, 4_303_237)):
        with torch.device("meta"):
            found = Discriminator(DPTConfig(), channels=[1280], text_dim=width, phrase_width=768)
        assert sum(p.numel() for p in found.parameters()) == count


def test_what_it_says_has_the_shapes_it_should():
    found = made(num_decoder_layers=2)
    states = found(torch.randn(3, 6, 4, 5), torch.tensor([1, 500, 999]))
    assert states.shape == (2, 3, 8, 16) and found.matching(states).shape == (2, 3, 3, 10)
    said = found.grounding(states)
    assert (said.logits.shape, said.boxes.shape, said.queries.shape) == ((3, 5, 256), (3, 5, 4), (3, 5, 8))
    assert float(said.boxes.min()) > 0 and float(said.boxes.max()) < 1
    torch.testing.assert_close(said.queries.norm(dim=-1), torch.ones(3, 5))
    torch.testing.assert_close(said.scores, 1 - said.logits.softmax(-1)[..., 255])


def test_the_same_seed_starts_the_same_whatever_torch_drew_before():
    torch.manual_seed(8)
    first = made().state_dict()
    before = torch.random.get_rng_state()
    again = made().state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert float(first["logit_scale"]) == pytest.approx(math.log(1 / 0.07))


def test_dropout_is_at_work_inside_dropping_only():
    found, x, t = made(), torch.randn(2, 6, 4, 4), torch.tensor([3, 4])
    plain = found(x, t)
    with found.dropping(RowDropout(0.5, 2)):
        torch.manual_seed(0)
        dropped = found(x, t)
        torch.manual_seed(0)
        assert torch.equal(dropped, found(x, t))
    assert not torch.allclose(dropped, plain)
    assert torch.equal(found(x, t), plain)


def test_rows_drop_the_same_whoever_computes_them():
    found, x, t = made(), torch.randn(4, 6, 4, 4), torch.tensor([3, 4, 5, 6])

    def said(rows: slice, dropout: RowDropout) -> torch.Tensor:
        torch.manual_seed(0)
        with found.dropping(dropout):
            return found(x[rows], t[rows])

    both = said(slice(None), RowDropout(0.5, 4))
    halves = [said(slice(2 * r, 2 * r + 2), RowDropout(0.5, 2, r, 2)) for r in range(2)]
    torch.testing.assert_close(torch.cat(halves, 1), both)


def test_several_features_are_put_side_by_side_or_fused():
    seen = {"bottom1": torch.randn(2, 6, 4, 4), "up0": torch.randn(2, 9, 4, 4)}
    joined = made((6, 9), feature="bottom1_up0").features(seen)
    assert torch.equal(joined, torch.cat(list(seen.values()), 1))
    fused = made((6, 9), feature="all-7-2")
    maps = [seen["bottom1"][..., ::2, ::2], seen["up0"][..., ::2, ::2]]
    wanted = sum(project(x) for project, x in zip(fused.fusion_proj, maps, strict=True))
    torch.testing.assert_close(fused.features(seen), wanted)
    assert fused.input_proj.in_channels == 7


@pytest.mark.parametrize("feature", ["bottom1_up0", "all-7-2"])
def test_features_of_a_model_in_half_precision_are_taken_as_float32(feature):
    seen = {"bottom1": torch.randn(2, 6, 4, 4).half(), "up0": torch.randn(2, 9, 4, 4).half()}
    found = made((6, 9), feature=feature)
    whole = {name: x.float() for name, x in seen.items()}
    assert torch.equal(found.features(seen), found.features(whole))
    assert found(found.features(seen), torch.tensor([3, 4])).dtype == torch.float32


def test_features_of_different_sizes_are_not_joined():
    seen = {"bottom1": torch.randn(2, 6, 4, 4), "up0": torch.randn(2, 9, 8, 8)}
    with pytest.raises(UserError, match="different sizes: bottom1 is 4 x 4, up0 is 8 x 8; take others or"):
        made((6, 9), feature="bottom1_up0").features(seen)


def test_forms_of_features():
    assert feature_names("bottom2_bottom3_mid") == ["bottom2", "bottom3", "mid"]
    assert feature_names("all-1280-8") == [] and fused_shape("all-1280-8") == (1280, 8)
    for wrong in ("up", "middle", "up1,up2", "all-8", "all-0-8", "all-8-0", "all-8-1000", "up1_up1"):
        with pytest.raises(UserError, match="dpt.feature must be blocks like bottom0"):
            DPTConfig(feature=wrong)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"stage": "both"}, "dpt.stage must be one of probe, tune"),
        ({"hidden_dim": 30}, "dpt.hidden_dim must be a multiple of 4 and of dpt.num_heads"),
        ({"dropout": 1.0}, "dpt.dropout"),
        ({"weights": {"mse": 1.0}}, "dpt.weights must be one of class, box, giou, align, i2t, t2i, denoise"),
        ({"weights": {"box": -1.0}}, "dpt.weights: box must be >= 0"),
        ({"weights": dict.fromkeys(("class", "box", "giou", "align", "i2t", "t2i"), 0.0)}, "leaves no loss"),
        ({"fixed_timestep": 1000}, "dpt.fixed_timestep"),
        ({"num_grounding_queries": 0}, "dpt.num_grounding_queries must be >= 1"),
    ],
)
def test_settings_that_make_no_sense(setting, message):
    with pytest.raises(UserError, match=message):
        DPTConfig(**setting)
