"""Boxes: conversions and overlaps worked out by hand, their limits, their gradient."""

from __future__ import annotations

import pytest
import torch

from align_cli.grounding.boxes import area, giou, iou, paired_giou, to_centres, to_corners


def test_conversions_by_hand():
    centres = torch.tensor([[[0.5, 0.25, 0.2, 0.5]], [[3.0, 4.0, 2.0, 0.0]]])
    corners = torch.tensor([[[0.4, 0.0, 0.6, 0.5]], [[2.0, 4.0, 4.0, 4.0]]])
    torch.testing.assert_close(to_corners(centres), corners)
    torch.testing.assert_close(to_centres(corners), centres)
    torch.testing.assert_close(area(corners), torch.tensor([[0.1], [0.0]]))


def test_overlaps_by_hand():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0], [3.0, 0.0, 4.0, 1.0]])
    overlap, union = iou(a, b)
    torch.testing.assert_close(union, torch.tensor([[7.0, 4.0, 5.0], [5.0, 4.0, 2.0]]))
    torch.testing.assert_close(overlap, torch.tensor([[1 / 7, 1.0, 0.0], [0.0, 0.25, 0.0]]))
    # hulls 9, 4, 8 and 9, 4, 4
    wanted = torch.tensor([[1 / 7 - 2 / 9, 1.0, -3 / 8], [-4 / 9, 0.25, -2 / 4]])
    torch.testing.assert_close(giou(a, b), wanted)
    torch.testing.assert_close(paired_giou(a, b[:2]), wanted.diag()[:2])


def test_limits():
    unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert giou(unit, unit + 1e6).item() == pytest.approx(-1, abs=1e-5)
    assert giou(unit, unit).item() == 1
    assert iou(unit, unit + torch.tensor([1.0, 0.0, 1.0, 0.0]))[0].item() == 0  # they touch
    assert iou(unit[:0], unit)[0].shape == (0, 1) and giou(unit, unit[:0]).shape == (1, 0)


def test_boxes_without_area_are_no_numbers_only_among_themselves():
    point, line = torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([[0.5, 0.0, 0.5, 1.0]])
    unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    for a in (point, line):
        assert iou(a, point)[0].isnan().all() and giou(a, point).isnan().all()
        assert iou(a, unit)[0].item() == 0 and giou(a, unit).item() == 0


def test_gradient_of_giou():
    a = to_corners(torch.tensor([[0.4, 0.4, 0.3, 0.3], [0.2, 0.8, 0.2, 0.1]], dtype=torch.float64))
    b = to_corners(torch.tensor([[0.5, 0.3, 0.25, 0.4], [0.7, 0.3, 0.1, 0.3]], dtype=torch.float64))
    assert torch.autograd.gradcheck(paired_giou, (a.requires_grad_(), b))


def test_one_pair_without_area_spoils_no_other_gradient():
    a = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3]], requires_grad=True)
    paired_giou(a, torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.3, 0.3, 0.6, 0.6]])).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()
