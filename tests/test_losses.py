"""Losses: numbers worked out by hand, limits, gradient checks."""

from __future__ import annotations

import math

import pytest
import torch

from align_cli.losses import denoising_error, huber_loss, softrepa_logits, softrepa_loss, softrepa_terms


def test_denoising_error_by_hand():
    pred = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]])
    target = torch.tensor([[[[0.0, 4.0]]], [[[3.0, 0.0]]]])
    torch.testing.assert_close(denoising_error(pred, target), torch.tensor([2.5, 4.5]))
    assert denoising_error(pred.half(), target.half()).dtype == torch.float32


def test_huber_loss_by_hand():
    # differences 3 and 0, c = 4: (5 + 4) / 2 - 4
    pred, target = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0])
    assert huber_loss(pred, target, 4.0).item() == pytest.approx(0.5)
    assert huber_loss(pred, pred) == 0
    assert huber_loss(pred.half(), target.half()).dtype == torch.float32
    # far from c it is |d| - c, near to it d^2 / (2 c)
    far, near = torch.full((4,), 100.0), torch.full((4,), 1e-4)
    assert huber_loss(far, torch.zeros(4), 0.1).item() == pytest.approx(99.9, abs=1e-3)
    assert huber_loss(near.double(), torch.zeros(4), 0.1).item() == pytest.approx(5e-8, abs=2e-8)
    with pytest.raises(ValueError, match="c must be > 0"):
        huber_loss(pred, target, 0.0)


def test_huber_gradient():
    pred = torch.randn(7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    huber_loss(pred, torch.zeros(7), 0.5).backward()
    by_hand = pred.detach() / (pred.detach().square() + 0.25).sqrt() / 7
    torch.testing.assert_close(pred.grad, by_hand)


def test_two_pairs_by_hand():
    # tau log 2 and tau log 4 make the logits 2 and 1: 4 / 2 and 4 / 4
    tau = 0.07
    err = tau * torch.tensor([[math.log(2), math.log(4)], [math.log(4), math.log(2)]])
    torch.testing.assert_close(softrepa_logits(err), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    ce = math.log(1 + math.exp(-1))
    torch.testing.assert_close(softrepa_loss(err).item(), ce)
    torch.testing.assert_close(softrepa_loss(err, dweight=10).item(), ce + 10 * tau * math.log(2))
    swapped = softrepa_loss(err, torch.tensor([1, 0])).item()
    torch.testing.assert_close(swapped, math.log(1 + math.exp(1)))


def test_one_image_with_other_columns():
    err = torch.tensor([[0.0, 100.0, 100.0]])
    terms = softrepa_terms(err, torch.tensor([1]), temperature=1.0, logit_scale=4.0)
    torch.testing.assert_close(terms.own_I, torch.tensor([100.0]))
    torch.testing.assert_close(terms.ce_I.item(), math.log(math.exp(4) + 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [2, 4, 9])
def test_limits(n):
    torch.testing.assert_close(softrepa_loss(torch.full((n, n), 0.3)).item(), math.log(n))
    best = torch.full((n, n), 1e3)
    best.fill_diagonal_(0)
    torch.testing.assert_close(
        softrepa_loss(best).item(), math.log(1 + (n - 1) * math.exp(-4)), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        softrepa_loss(1e3 - best).item(), math.log(math.exp(4) * (n - 1) + 1), rtol=1e-4, atol=0
    )


def test_floor_of_the_paper():
    best = torch.full((4, 4), 1e3)
    best.fill_diagonal_(0)
    assert softrepa_loss(best).item() == pytest.approx(0.0535, abs=1e-4)


def test_gradient():
    err = (torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) * 0.2).double().requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        # softrepa_loss works in float32; the same formula in float64 for finite differences
        logits = 4 * torch.exp(-x / 0.07)
        return (logits.logsumexp(1) - logits.diagonal()).mean() + 10 * x.diagonal().mean()

    assert torch.autograd.gradcheck(loss, err)
    (expected,) = torch.autograd.grad(loss(err), err)
    single = err.detach().float().requires_grad_()
    (got,) = torch.autograd.grad(softrepa_loss(single, dweight=10), single)
    torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=1e-5)
    # a smaller own error, and larger errors of the others, lower the loss
    assert (got.diagonal() > 0).all()
    assert (got[~torch.eye(3, 5, dtype=torch.bool)] < 0).all()


def test_large_errors_are_flat():
    err = torch.full((3, 3), 1.0).fill_diagonal_(0.9).requires_grad_()
    softrepa_loss(err).backward()
    assert err.grad is not None and err.grad.abs().max() < 1e-4
    warm = torch.full((3, 3), 1.0).fill_diagonal_(0.9).requires_grad_()
    softrepa_loss(warm, temperature=1.0).backward()
    assert warm.grad is not None and warm.grad.abs().max() > 0.1


def test_nonsense():
    with pytest.raises(ValueError, match="must be a matrix"):
        softrepa_loss(torch.zeros(3))
    with pytest.raises(ValueError, match="give the own columns"):
        softrepa_loss(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="temperature must be > 0"):
        softrepa_loss(torch.zeros(2, 2), temperature=0)
