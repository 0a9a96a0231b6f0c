"""Losses of DPT: numbers worked out by hand, limits, gradient checks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from align_cli.grounding.matching import Match, costs
from align_cli.grounding.targets import Targets
from align_cli.losses import (
    align_loss,
    box_losses,
    cardinality_error,
    matching_logits,
    matching_loss,
    snr_weighted_error,
    soft_token_loss,
)


def matched(*pairs: list[tuple[int, int]]) -> list[Match]:
    return [Match(*torch.tensor(own, dtype=torch.int64).reshape(-1, 2).T) for own in pairs]


def targets(boxes: list[list[float]], counts: list[int], classes: list[list[int]]) -> Targets:
    named = torch.tensor(classes).reshape(len(boxes), -1)
    return Targets(torch.tensor(boxes).reshape(-1, 4), counts, named.float(), named.bool())


NONE = Targets(torch.zeros(0, 4), [0, 0], torch.zeros(0, 3), torch.zeros(0, 5, dtype=torch.bool))


# ---------------------------------------------------------------- matching


def test_the_query_that_fits_best():
    texts = torch.tensor([[[2.0, 0.0], [0.0, 0.5]]])
    embeddings = torch.tensor([[[[3.0, 4.0], [-1.0, 0.0]], [[1.0, -1.0], [1.0, 1.0]]]]).requires_grad_()
    found = matching_logits(embeddings, texts)
    torch.testing.assert_close(found, torch.tensor([[0.6, math.sqrt(0.5)]]))
    found.sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad[0].abs().sum(-1).gt(0).tolist() == [[True, False], [False, True]]
    one = matching_logits(embeddings, texts[:, :1])
    torch.testing.assert_close(one, matching_logits(embeddings, texts[:, :1].expand(1, 2, 2)))
    torch.testing.assert_close(matching_logits(7 * embeddings, 3 * texts), found)
    assert matching_logits(embeddings.half(), texts.half()).dtype == torch.float32


def test_queries_that_fit_alike_share_no_gradient():
    embeddings = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]]]).requires_grad_()
    matching_logits(embeddings, torch.tensor([[[1.0, 0.0]]])).sum().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum(-1).gt(0).sum() == 1


def test_matching_loss_by_hand_and_its_limits():
    log_scale = torch.tensor(math.log(2.0))
    logits = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.5]])
    by_hand = (math.log(1 + 2 / math.e) + math.log(1 + 2 * math.e)) / 2
    assert matching_loss(logits, log_scale).item() == pytest.approx(by_hand)
    assert matching_loss(torch.full((4, 3), 0.2), log_scale).item() == pytest.approx(math.log(3))
    sure = torch.tensor([[1.0, -1.0, -1.0]])
    assert matching_loss(sure, torch.tensor(5.0)).item() == pytest.approx(0)


def test_matching_gradient():
    rng = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 3, 4, 5, generator=rng).requires_grad_()
    texts, log_scale = torch.randn(2, 3, 5, generator=rng), torch.tensor(1.0)
    check(lambda x: matching_loss(matching_logits(x, texts), log_scale), embeddings)
    logits = matching_logits(embeddings, texts).detach()
    check(lambda x: matching_loss(logits, x), log_scale.requires_grad_())


def check(loss, x: Tensor, step: float = 1e-2, tolerance: float = 2e-3) -> None:
    """The gradient against differences of the loss, for losses that compute in float32."""
    (gradient,) = torch.autograd.grad(loss(x), x)
    found = torch.zeros_like(x).flatten()
    with torch.no_grad():
        for i in range(x.numel()):
            change = torch.zeros_like(found)
            change[i] = step
            change = change.reshape(x.shape)
            found[i] = (loss(x + change) - loss(x - change)) / (2 * step)
    torch.testing.assert_close(gradient, found.reshape(x.shape), atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- grounding


def test_soft_token_loss_by_hand():
    logits = torch.log(torch.tensor([[[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]]]))
    wanted = targets([[0.5] * 4], [1], [[1, 1, 0]])
    # query 1 has the box: both tokens of its phrase count whole; query 0: no object, a tenth
    by_hand = -math.log(0.6) - math.log(0.1) - 0.1 * math.log(0.5)
    pairs = matched([(1, 0)])
    assert soft_token_loss(logits, pairs, wanted, 1.0).item() == pytest.approx(by_hand)
    assert soft_token_loss(logits, pairs, wanted, 4.0).item() == pytest.approx(by_hand / 4)
    by_hand += 0.1 * math.log(0.5)
    assert soft_token_loss(logits, pairs, wanted, 1.0, 0.0).item() == pytest.approx(by_hand)
    sure = torch.tensor([[[0.0, 0.0, 50.0]] * 2] * 2)
    assert soft_token_loss(sure, matched([], []), NONE, 1.0).item() == pytest.approx(0, abs=1e-6)
    check(lambda x: soft_token_loss(x, pairs, wanted, 2.0), logits.requires_grad_())


def test_box_losses_by_hand():
    wanted = targets([[0.5, 0.5, 1.0, 1.0], [0.3, 0.3, 0.2, 0.2]], [1, 1], [[1], [1]])
    found = torch.tensor([[[0.9, 0.9, 0.1, 0.1], [0.25, 0.5, 0.5, 1.0]], [[0.3, 0.3, 0.2, 0.2]] * 2])
    l1, apart = box_losses(found, matched([(1, 0)], [(0, 0)]), wanted, 2.0)
    assert (l1.item(), apart.item()) == (pytest.approx(0.375), pytest.approx(0.25))
    l1, apart = box_losses(found, matched([], []), NONE, 1.0)
    assert l1.item() == apart.item() == 0
    pairs = matched([(0, 0), (1, 1)])
    boxes = torch.tensor([[[0.5, 0.4, 0.3, 0.3], [0.3, 0.7, 0.2, 0.4]]]).requires_grad_()
    near = targets([[0.57, 0.45, 0.4, 0.2], [0.4, 0.6, 0.3, 0.3]], [2], [[1], [1]])
    check(lambda x: sum(box_losses(x, pairs, near, 2.0)), boxes, 1e-3, 5e-3)


def test_a_picture_without_boxes_leaves_a_zero_gradient():
    boxes = torch.rand(2, 3, 4, requires_grad=True)
    sum(box_losses(boxes, matched([], []), NONE, 1.0)).backward()
    assert boxes.grad is not None and not boxes.grad.any()


def test_align_loss_by_hand():
    queries, tokens = torch.eye(2)[None], torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    wanted = targets([[0.5] * 4], [1], [[1, 1, 0]])
    pairs = matched([(0, 0)])
    to_tokens = math.log(2 * math.e + 1) - 1
    to_queries = 2 * (math.log(math.e + 1) - 1)
    found = align_loss(queries, tokens, pairs, wanted, 1.0, 1.0)
    assert found.item() == pytest.approx((to_tokens + to_queries) / 2, abs=1e-5)
    assert align_loss(queries, tokens, pairs, wanted, 4.0, 1.0).item() == pytest.approx(found.item() / 4)
    # all similarities equal: log of the number of candidates, each way
    alike = align_loss(torch.ones(1, 2, 2), torch.ones(1, 3, 2), pairs, wanted, 1.0)
    assert alike.item() == pytest.approx((math.log(3) + 2 * math.log(2)) / 2, abs=1e-3)
    assert align_loss(torch.rand(2, 4, 2), torch.rand(2, 5, 2), matched([], []), NONE, 1.0).item() == 0
    with pytest.raises(ValueError, match="temperature must be > 0"):
        align_loss(queries, tokens, pairs, wanted, 1.0, 0.0)


def test_align_gradient():
    rng = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 3, 4, generator=rng).requires_grad_()
    tokens = torch.randn(1, 5, 4, generator=rng).requires_grad_()
    wanted = targets([[0.5] * 4] * 2, [2], [[1, 1, 0, 0, 0], [0, 1, 0, 1, 0]])
    pairs = matched([(0, 1), (2, 0)])
    check(lambda x: align_loss(x, tokens, pairs, wanted, 2.0, 1.0), queries)
    check(lambda x: align_loss(queries, x, pairs, wanted, 2.0, 1.0), tokens)


def test_autocast_changes_nothing():
    rng = torch.Generator().manual_seed(0)
    queries, tokens = torch.randn(1, 3, 4, generator=rng), torch.randn(1, 5, 4, generator=rng)
    wanted = targets([[0.5] * 4] * 2, [2], [[1, 1, 0, 0, 0], [0, 1, 0, 1, 0]])
    logits, boxes = torch.randn(1, 3, 5, generator=rng), torch.rand(1, 3, 4, generator=rng)
    log_scale, pairs = torch.tensor(2.0), matched([(0, 1), (2, 0)])

    def values() -> list[Tensor]:
        found = [align_loss(queries, tokens, pairs, wanted, 2.0), *costs(logits, boxes, wanted)]
        found += [soft_token_loss(logits, pairs, wanted, 2.0), *box_losses(boxes, pairs, wanted, 2.0)]
        return [*found, matching_loss(matching_logits(queries[None], tokens[:, :1]), log_scale)]

    plain = values()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, values(), strict=True))


def test_cardinality_error_by_hand():
    last, first = [0.0, 1.0], [1.0, 0.0]
    logits = torch.tensor([[last, last, first], [first, first, first]])
    wanted = targets([[0.5] * 4] * 2, [2, 0], [[1, 0]] * 2)
    assert cardinality_error(logits, wanted).item() == pytest.approx((1 + 3) / 2)


# ---------------------------------------------------------------- denoising


def test_snr_weighted_error_by_hand():
    pred, target = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    snr = torch.tensor([20.0, 5.0, 0.0])
    assert snr_weighted_error(pred, target, snr, 0.0).item() == pytest.approx(14 / 3)
    assert snr_weighted_error(pred, target, snr, 5.0).item() == pytest.approx((0.25 + 4 + 9) / 3)
    assert snr_weighted_error(pred.half(), target.half(), snr, 5.0).dtype == torch.float32
    with pytest.raises(ValueError, match="gamma must be >= 0"):
        snr_weighted_error(pred, target, snr, -1.0)
    check(lambda x: snr_weighted_error(x, target, snr, 5.0), pred.requires_grad_())
