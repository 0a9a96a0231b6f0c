"""Targets of a batch and their assignment to queries: by hand, against all assignments, and bad input."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import RobertaTokenizerFast

from align_cli.grounding.matching import Match, costs, joined, match, matched_tokens
from align_cli.grounding.targets import Targets, make_targets, token_spans

GOLDEN = Path(__file__).parent / "golden" / "dpt"
TEXTS = ["two zebras near water", "small dog"]


@pytest.fixture(scope="module")
def encoding():
    words = RobertaTokenizerFast.from_pretrained(GOLDEN / "tokenizer")
    return words(TEXTS, padding="longest", return_tensors="pt")


def told(encoding, row: int, *spans: tuple[int, int]) -> str:
    """The characters of the tokens that a range touches."""
    found = token_spans(encoding, row, spans, encoding["input_ids"].shape[1])
    ranges = [encoding.token_to_chars(row, int(i)) for i in found.nonzero()]
    return "".join(TEXTS[row][r.start : r.end] for r in ranges)


def test_tokens_of_a_phrase(encoding):
    assert told(encoding, 0, (0, 10)) == "twozebras"
    assert told(encoding, 0, (4, 10), (16, 21)) == "zebraswater"
    assert told(encoding, 0) == ""
    # a blank at either end; the second expression has its blank elsewhere
    assert told(encoding, 0, (3, 11)) == "zebras"
    assert told(encoding, 1, (5, 9)) == "dog" and told(encoding, 1, (0, 6)) == "small"
    # beyond the text
    assert told(encoding, 1, (6, 40)) == "" and told(encoding, 1, (9, 12)) == ""
    assert not token_spans(encoding, 1, [(0, 0)], 9).any()


def test_targets_of_a_batch(encoding):
    boxes = [torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 2), torch.tensor([[0.1, 0.1, 0.1, 0.1]])]
    found = make_targets(encoding, boxes, [[[(0, 3)], [(4, 10)]], [[(0, 9)]]], slots=4)
    assert found.boxes.shape == (3, 4) and found.counts == [2, 1]
    assert found.tokens.shape == (3, encoding["input_ids"].shape[1])
    assert found.tokens[0].nonzero().flatten().tolist() == [1, 2]
    # the last of the four slots means no object, whatever the phrase has there
    assert torch.equal(found.classes[:, :3], found.tokens[:, :3].float()) and not found.classes[:, 3].any()
    assert found.tokens[2, 3:].any()
    assert found.to("cpu").counts == [2, 1]
    empty = make_targets(encoding, [torch.zeros(0, 4)] * 2, [[], []])
    assert empty.boxes.shape == (0, 4) and empty.classes.shape == (0, 256)
    with pytest.raises(ValueError, match="each box its spans"):
        make_targets(encoding, boxes, [[[(0, 3)]], [[(0, 9)]]])
    with pytest.raises(ValueError, match="each expression needs its boxes"):
        make_targets(encoding, boxes[:1], [[[(0, 3)], [(4, 10)]]])


def batch(
    counts: list[int], queries: int, slots: int = 5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    rng = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=rng)  # noqa: E731
    total = sum(counts)
    classes = (rand(total, slots) > 0.5).float()
    targets = Targets(rand(total, 4) * 0.5 + 0.1, counts, classes, classes.bool())
    return rand(len(counts), queries, slots) * 4, rand(len(counts), queries, 4) * 0.5 + 0.1, targets


def test_a_cost_by_hand():
    box = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 1.0]]])
    logits = torch.log(torch.tensor([[[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]]))
    one = torch.tensor([[1.0, 1.0, 0.0]])
    targets = Targets(torch.tensor([[0.5, 0.5, 1.0, 1.0]]), [1], one, one.bool())
    (found,) = costs(logits, box, targets)
    torch.testing.assert_close(found, torch.tensor([[-0.5 - 2.0], [5 * 0.75 - 0.9 - 2 * 0.5]]))
    (found,) = costs(logits, box, targets, class_weight=0, box_weight=1, giou_weight=0)
    torch.testing.assert_close(found, torch.tensor([[0.0], [0.75]]))
    assert match(logits, box, targets)[0].queries.tolist() == [0]


def test_the_cheapest_of_all_assignments():
    counts, queries = [1, 3, 0, 6], 4
    logits, boxes, targets = batch(counts, queries)
    found = match(logits.requires_grad_(), boxes, targets)
    for cost, pairs, n in zip(costs(logits, boxes, targets), found, counts, strict=True):
        assert pairs.queries.dtype == pairs.targets.dtype == torch.int64 and not cost.requires_grad
        assert len(pairs.queries) == len(pairs.targets) == min(queries, n)
        assert pairs.queries.tolist() == sorted(pairs.queries.tolist())
        small, large = (cost, cost.T) if n > queries else (cost.T, cost)
        best = min(
            sum(small[i, j].item() for i, j in enumerate(one))
            for one in permutations(range(len(large)), len(small))
        )
        assert cost[pairs.queries, pairs.targets].sum().item() == pytest.approx(best, abs=1e-5)


def test_pictures_do_not_see_each_other():
    logits, boxes, targets = batch([2, 3], 4)
    later = Targets(targets.boxes[2:], [3], targets.classes[2:], targets.tokens[2:])
    alone = costs(logits[1:], boxes[1:], later)[0]
    torch.testing.assert_close(costs(logits, boxes, targets)[1], alone)


def test_costs_that_are_no_numbers():
    logits, boxes, targets = batch([1, 2], 3)
    point = torch.tensor([0.3, 0.3, 0.0, 0.0])
    targets.boxes[2] = point
    match(logits, boxes, targets)  # a target without area alone is no harm
    boxes[1, 0] = point
    with pytest.raises(ValueError, match="picture 1 of the batch cannot be matched"):
        match(logits, boxes, targets)
    boxes[0, 2] = float("nan")
    with pytest.raises(ValueError, match="picture 0 of the batch"):
        match(logits, boxes, targets)
    with pytest.raises(ValueError, match="1 pictures of queries, but targets of 2"):
        costs(logits[:1], boxes[:1], targets)


def test_all_pairs_of_a_batch():
    pairs = [Match(torch.tensor([1, 3]), torch.tensor([1, 0])), *[Match(*torch.zeros(2, 0).long())] * 2]
    pairs.append(Match(torch.tensor([0]), torch.tensor([0])))
    picture, query, target = joined(pairs, [2, 0, 0, 1])
    assert (picture.tolist(), query.tolist(), target.tolist()) == ([0, 0, 3], [1, 3, 0], [1, 0, 2])
    tokens = torch.tensor([[True, False, False], [False, True, True], [False, False, True]])
    targets = Targets(torch.rand(3, 4), [2, 0, 0, 1], tokens.float(), tokens)
    found = matched_tokens(pairs, targets, 5)
    assert found.shape == (4, 5, 3) and found.sum() == 4
    assert found[0, 1].tolist() == [False, True, True] and found[0, 3].tolist() == [True, False, False]
    assert found[3, 0].tolist() == [False, False, True]
