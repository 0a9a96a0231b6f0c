"""Which example comes when; random numbers by position; batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_helpers import Points

from align_cli.data.base import Example, collate
from align_cli.errors import UserError
from align_cli.training.order import SliceOrder, batches, epoch_order, item_rng, step_seed


def order(**changes) -> SliceOrder:
    return SliceOrder(**{"n": 10, "batch_size": 4, "seed": 1, "start": 0, "stop": 5, **changes})


def test_every_epoch_is_one_permutation_without_its_rest():
    slices = list(order())
    assert [len(s) for s in slices] == [4] * 5
    assert [e for s in slices for e, _ in s] == [0] * 8 + [1] * 8 + [2] * 4
    first = [i for s in slices[:2] for _, i in s]
    assert len(set(first)) == 8 and set(first) <= set(range(10))
    assert first != [i for s in slices[2:4] for _, i in s]
    assert first == epoch_order(1, 0, 10)[:8].tolist()


def test_starting_later_gives_the_rest_of_the_same_stream():
    whole = list(order())
    for start in range(6):
        assert list(order(start=start)) == whole[start:]
    assert len(order(start=2)) == 3


def test_ranks_share_the_global_batch_in_order():
    whole = list(order())
    halves = [list(order(rank=r, world_size=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_another_seed_is_another_order():
    assert list(order()) != list(order(seed=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"n": 3}, "3 examples, fewer than one batch of 4"), ({"world_size": 3}, "cannot be split over 3")],
)
def test_impossible_batches_are_user_errors(changes, words):
    with pytest.raises(UserError, match=words):
        order(**changes)


def test_step_seeds_differ_and_are_fixed():
    seeds = [step_seed(s, t, k) for s in range(3) for t in range(20) for k in range(3)]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    torch.Generator().manual_seed(max(seeds))
    assert step_seed(42, 7, 0) == step_seed(42, 7, 0)
    assert item_rng(1, 0, 3).integers(1 << 30) == item_rng(1, 0, 3).integers(1 << 30)
    assert item_rng(1, 0, 3).integers(1 << 30) != item_rng(1, 1, 3).integers(1 << 30)


def test_worker_processes_change_nothing():
    alone = list(batches(Points(10), order()))
    shared = list(batches(Points(10), order(), num_workers=2))
    assert [b.prompts for b in alone] == [b.prompts for b in shared]
    assert [b.extra for b in alone] == [b.extra for b in shared]
    for a, b in zip(alone, shared, strict=True):
        torch.testing.assert_close(a.pixels, b.pixels, rtol=0, atol=0)
        assert a.pixels.shape == (4, 3, 2, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_example_is_one_line_also_from_a_worker(workers):
    broken = order().__iter__().__next__()[2][1]
    with pytest.raises(UserError) as caught:
        list(batches(Points(10, broken=broken), order(), num_workers=workers))
    assert str(caught.value) == f"image {broken}.jpg is broken"


def test_collate():
    pictures = [torch.full((3, 2, 2), float(i)) for i in range(2)]
    batch = collate([Example("a", pictures[0], 7, {"k": 1}), Example("b", pictures[1], 9, {"k": 2})])
    assert batch.prompts == ["a", "b"] and batch.ids == [7, 9] and batch.extra == {"k": [1, 2]}
    assert batch.pixels is not None and batch.pixels[1].unique().tolist() == [1.0]
    assert collate([Example("a"), Example("b")]).pixels is None


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ([], "at least one"),
        ([Example("a", torch.zeros(3, 2, 2)), Example("b")], "some have none"),
        ([Example("a", torch.zeros(3, 2, 2)), Example("b", torch.zeros(3, 4, 4))], "differ in size"),
        ([Example("a", extra={"x": 1}), Example("b")], "different keys"),
    ],
)
def test_collate_refuses_what_does_not_stack(examples, words):
    with pytest.raises(ValueError, match=words):
        collate(examples)


def test_numbers_of_items_do_not_depend_on_their_place():
    by_id: dict[tuple[int, int], set[str]] = {}
    for start in (0, 1, 2):
        o = order(start=start, stop=2)
        for keys, batch in zip(list(o), batches(Points(10), o), strict=True):
            for key, prompt in zip(keys, batch.prompts, strict=True):
                by_id.setdefault(key, set()).add(prompt)
    assert all(len(prompts) == 1 for prompts in by_id.values())
    assert isinstance(item_rng(0, 0, 0), np.random.Generator)
