"""Probing as a benchmark: the measures by hand, what is asked of a discriminator, and one of DPT."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dpt_files import SMALL

from align_cli.data.base import Example
from align_cli.data.grounded import Grounded
from align_cli.errors import UserError
from align_cli.evaluation.probing import (
    ROWS,
    Item,
    Probed,
    Setting,
    chance,
    chosen,
    gallery_rows,
    measure,
    metrics,
    probe,
    ties,
)
from align_cli.evaluation.probing_outcome import GUESS, TRUE, with_boxes
from align_cli.losses import matching_logits
from align_cli.methods.dpt.config import DPTConfig
from align_cli.methods.dpt.method import DPT
from align_cli.models.base import TextCond
from align_cli.sampling import picture_seeds
from align_cli.settings import DataSettings
from align_cli.shapes.grounded import GroundedShapes

NAN = math.nan


def item(number: int, boxes: list[list[float]], caption: str = "", picture: str = "") -> Item:
    true = torch.tensor(boxes).view(-1, 4)
    return Item(number, caption or f"caption {number}", "it", picture or f"picture {number}", true)


def probed(items: list[Item], **given: object) -> Probed:
    n = len(items)
    held = {"scores": np.zeros((n, 5)), "galleries": [], "boxes": [torch.zeros(0, 4)] * n, "pictures": []}
    return Probed(items, **{**held, **given})


# ---------------------------------------------------------------- measures by hand


def test_matching_is_won_lost_or_a_tie():
    """Columns: the own pair, hard text, random text, hard picture, random picture."""
    scores = np.array(
        [[0.5, 0.4, 0.6, 0.5, 0.1], [0.5, 0.6, 0.1, 0.7, 0.1], [NAN] * 5, [0.2, 0.1, 0.1, 0.1, 0.2]]
    )
    of = probed([item(i, []) for i in range(4)], scores=scores)
    found = measure(of)
    for name, expected in (
        ("text", [1, 0, NAN, 1]), ("image", [0.5, 0, NAN, 1]), ("overall", [0.75, 0, NAN, 1]),
        ("random-text", [0, 1, NAN, 1]), ("random-image", [1, 1, NAN, 0.5]),
    ):  # fmt: skip
        np.testing.assert_array_equal(found[f"matching/{name}"], expected)
    assert ties(of) == 1
    assert not any(name.startswith("retrieval") for name in found)
    assert set(found) == {m.name for m in metrics(retrieval=False)}


def test_retrieval_within_galleries():
    """Rows are pictures, columns captions. In the second gallery both captions are one text, so that any is
    right; in the third one two candidates are equal. The last item is in no gallery.
    """
    captions = ["a", "b", "c", "c", "e", "f", "g"]
    galleries = [np.array([[3.0, 4], [1, 2]]), np.array([[1.0, 2], [0, 1]]), np.array([[1.0, 1], [0, 1]])]
    of = probed([item(i, [], c) for i, c in enumerate(captions)], galleries=galleries)
    found = measure(of)
    np.testing.assert_array_equal(found["retrieval/text-to-image"], [1, 0, 1, 1, 1, 0.5, NAN])
    np.testing.assert_array_equal(found["retrieval/image-to-text"], [0, 1, 1, 1, 0.5, 1, NAN])
    np.testing.assert_array_equal(found["retrieval/overall"], [0.5, 0.5, 1, 1, 0.75, 0.75, NAN])
    assert chance(of)["retrieval/overall"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    same = probed([item(i, [], picture="one") for i in range(2)], galleries=galleries[:1])
    np.testing.assert_array_equal(measure(same)["retrieval/overall"], [1, 1])


def test_boxes_are_found_by_their_overlap():
    """Half of a box has IoU and GIoU 0.5, which is enough; one shifted by half has IoU 1/3."""
    square = [0.5, 0.5, 0.5, 0.5]
    half, shifted = [0.5, 0.375, 0.5, 0.25], [0.75, 0.5, 0.5, 0.5]
    far = [0.1, 0.1, 0.1, 0.1]
    cases = [
        ([square], [square], [1, 1, 1, 1]),
        ([square], [half], [1, 1, 1, 1]),
        ([square], [shifted] + [far] * 3 + [half], [0, 0, 1, 1]),
        ([square], [shifted] + [far] * 8 + [half], [0, 0, 0, 1]),
        ([far, square], [square], [1, 1, 1, 1]),
        ([square], [shifted], [0, 0, 0, 0]),
        ([], [square], [NAN] * 4),
    ]
    of = probed(
        [item(i, true) for i, (true, _, _) in enumerate(cases)],
        boxes=[torch.tensor(boxes) for _, boxes, _ in cases],
    )
    found = measure(of)
    names = ("iou", "giou-at-1", "giou-at-5", "giou-at-10")
    rows = np.stack([found[f"grounding/{name}"] for name in names], axis=1)
    np.testing.assert_array_equal(rows, [expected for _, _, expected in cases])


def test_chance_of_boxes_is_that_of_other_items():
    """Four items: two have one box, so that each is found by one of three others; the rest by none."""
    a, b, c = [0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1]
    found = chance(probed([item(i, [box]) for i, box in enumerate((a, a, b, c))] + [item(4, [])]))
    assert found["grounding/iou"] == pytest.approx((1 / 3 + 1 / 3) / 4)
    assert found["grounding/giou-at-5"] == pytest.approx(2 * (1 - (2 / 3) ** 5) / 4)
    assert found["matching/text"] == 0.5
    assert math.isnan(chance(probed([item(0, [a])]))["grounding/iou"])


# ---------------------------------------------------------------- asking


class Fixed:
    """A dataset whose pictures are numbers: item i is the picture of value i / 10, captioned "i"."""

    def __len__(self) -> int:
        return 5

    def get(self, index: int, rng: np.random.Generator) -> Example:
        def picture(value: int) -> torch.Tensor:
            return torch.full((3, 2, 2), value / 10)

        matching = index != 4
        grounded = Grounded(
            expression=f"box {index}",
            boxes=torch.full((int(index != 3), 4), 0.1 * (index + 1)),
            spans=[],
            hard_prompt="9" if matching else "",
            random_prompt=str((index + 1) % 4) if matching else "",
            hard_pixels=picture(8),
            random_pixels=picture(index),
            size=(2, 2),
        )
        return Example(str(index), picture(index), index, {"grounded": grounded})


class Reader:
    """A discriminator that reads the number in a picture: its score is 1 under the same number, else 0; and
    finds "box i" at 0.1 (i + 1), of which it is surer than of others.
    """

    broken = False

    def matching(self, z_t: torch.Tensor, t: torch.Tensor, told: TextCond) -> torch.Tensor:
        assert len(z_t) == len(t) == len(told) <= 6 and t.unique().tolist() == [250]
        numbers = (z_t[:, 0, 0, 0] * 10).round().long()
        seen = torch.eye(10)[numbers]
        return torch.stack([-seen, seen / (0 if self.broken else 1)], dim=1)

    def ground(self, z_t, t, expressions):
        boxes = torch.rand(len(z_t), 12, 4)
        boxes[:, 3] = torch.tensor([[0.1 * (int(e.split()[1]) + 1)] for e in expressions])
        scores = torch.linspace(0, 0.5, 12).repeat(len(z_t), 1)
        scores[:, 3] = 0.9
        return boxes, scores


def summarised(prompts: list[str]) -> tuple[TextCond, torch.Tensor]:
    numbers = torch.eye(10)[[int(p) for p in prompts]]
    return TextCond(numbers), numbers


MODEL = SimpleNamespace(
    summarised=summarised,
    encode_image=lambda pixels: pixels[:, :1, :1, :1],
    process=SimpleNamespace(add_noise=lambda x, *_: x),
    device=torch.device("cpu"),
    model_id="numbers",
)


def test_what_is_asked():
    counted: dict[str, int] = {}

    def count(what: str, more: int) -> None:
        counted[what] = counted.get(what, 0) + more

    order = [2, 0, 4, 3, 1]
    setting = Setting(seed=0, timestep=250, gallery=2, batch_size=6, shown=2)
    found = probe(Reader(), MODEL, Fixed(), order, setting, count)
    assert [x.index for x in found.items] == order and [x.caption for x in found.items] == list("20431")
    # of equal pictures the true one wins against hard ones and ties with "random" ones of the same number
    expected = [[1, 0, 0, 0, 1]] * 2 + [[NAN] * 5] + [[1, 0, 0, 0, 1]] * 2
    np.testing.assert_array_equal(found.scores, expected)
    assert [len(x) for x in found.galleries] == [2, 2]
    assert all((x == np.eye(2)).all() for x in found.galleries)
    assert counted == {"probing": 5, "retrieval": 8} and gallery_rows(5, 2) == 8
    assert [len(x) for x in found.boxes] == [10, 10, 10, 0, 10]
    values = measure(found)
    np.testing.assert_array_equal(values["grounding/iou"], [1, 1, 1, NAN, 1])
    assert values["matching/overall"][0] == 1 and values["matching/random-image"][0] == 0.5
    assert [x.shape for x in found.pictures] == [(2, 2, 3)] * 2 and found.pictures[0][0, 0, 0] == 153
    assert len(ROWS) == found.scores.shape[1]


def test_no_gallery_is_larger_than_what_there_is():
    setting = Setting(seed=0, timestep=250, gallery=100, batch_size=5)
    found = probe(Reader(), MODEL, Fixed(), [0, 1, 2], setting, lambda *_: None)
    assert [x.shape for x in found.galleries] == [(3, 3)] and gallery_rows(3, 100) == 9
    assert probe(Reader(), MODEL, Fixed(), [0], Setting(0, 250, 0, 5), lambda *_: None).galleries == []
    assert gallery_rows(3, 0) == 0
    assert sorted(chosen(Fixed(), 99, 0)) == list(range(5)) and chosen(Fixed(), 3, 0) != chosen(Fixed(), 3, 1)


def test_scores_that_are_no_numbers():
    reader = Reader()
    reader.broken = True
    with pytest.raises(UserError, match=r"no finite numbers; try --dtype float32"):
        probe(reader, MODEL, Fixed(), [0, 1], Setting(0, 250, 0, 5), lambda *_: None)


def test_a_discriminator_of_dpt(tiny_models):
    """The scores are those of the method, with the item's own noise; the size of a batch changes nothing."""
    model = tiny_models["sd15"]
    method = DPT(model, DPTConfig(**{key: x for key, x in SMALL.items() if key != "lora_rank"}))
    data = GroundedShapes(DataSettings(num_examples=8), seed=3, split="test")
    runs = [
        probe(method, model, data, [5, 1, 7, 0], Setting(3, 400, 4, batch, 1), lambda *_: None)
        for batch in (64, 3)
    ]
    np.testing.assert_allclose(runs[0].scores, runs[1].scores, atol=1e-5)
    np.testing.assert_allclose(runs[0].galleries[0], runs[1].galleries[0], atol=1e-5)
    np.testing.assert_allclose(np.diag(runs[0].galleries[0]), runs[0].scores[:, 0], atol=1e-5)
    example = data.get(1, np.random.default_rng([3, 71, 1]))
    told = example.extra["grounded"]
    eps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(picture_seeds(3, 4)[1]))
    t = torch.tensor([400])
    with torch.no_grad():
        z = model.process.add_noise(model.encode_image(told.hard_pixels[None]), eps, t)
        seen = method.matching(z, t, [example.prompt])
        score = matching_logits(seen[:, None], model.summarised([example.prompt])[1][:, None])
        own = model.process.add_noise(model.encode_image(example.pixels[None]), eps, t)
        boxes, sure = method.ground(own, t, [told.expression])
    assert runs[0].scores[1, 3] == pytest.approx(float(score), abs=1e-5)
    torch.testing.assert_close(runs[0].boxes[1][0], boxes[0, sure[0].argmax()], atol=1e-5, rtol=0)
    assert len(runs[0].boxes[1]) == SMALL["num_grounding_queries"]


def test_boxes_on_a_picture():
    drawn = with_boxes(
        np.zeros((32, 32, 3), np.uint8),
        torch.tensor([[0.25, 0.25, 0.25, 0.25]]),
        torch.tensor([[0.75, 0.75, 0.25, 0.25]]),
    )
    assert drawn.shape == (128, 128, 3)
    assert tuple(drawn[16, 32]) == TRUE and tuple(drawn[80, 96]) == GUESS
    assert tuple(drawn[15, 32]) == (0, 0, 0) and drawn[40, 40].sum() == 0
