"""The shapes world with boxes and false pictures, and which methods get which table of datasets."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cli_helpers import ok, refused
from torch import nn
from training_helpers import trace

from align_cli import registry
from align_cli.data.base import collate
from align_cli.data.grounded import Grounded
from align_cli.errors import UserError
from align_cli.settings import DataSettings, MethodConfig
from align_cli.shapes.captions import parse
from align_cli.shapes.dataset import ShapesDataset
from align_cli.shapes.grounded import GroundedShapes
from align_cli.shapes.oracle import find, judge
from align_cli.shapes.world import KINDS, scene_split

N = 300


@pytest.fixture(scope="module")
def dataset() -> GroundedShapes:
    return GroundedShapes(DataSettings(num_examples=N), seed=3)


@pytest.fixture(scope="module")
def examples(dataset):
    return [dataset.get(i, np.random.default_rng([7, i])) for i in range(N)]


def grounded_of(examples) -> list[Grounded]:
    return [e.extra["grounded"] for e in examples]


def true(pixels, prompts) -> np.ndarray:
    """(N,) whether every fact of a caption holds in its picture, as the oracle sees it."""
    return judge((torch.stack(pixels) + 1) / 2, [parse(p) for p in prompts])["all"] == 1


def test_examples_have_the_shapes_that_a_batch_needs(examples):
    batch = collate(examples[:8])
    assert batch.pixels.shape == (8, 3, 32, 32)
    for g in batch.extra["grounded"]:
        for pixels in (g.hard_pixels, g.random_pixels):
            assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
            assert -1 <= pixels.min() < pixels.max() <= 1
        assert g.boxes.ndim == 2 and g.boxes.shape[1] == 4 and g.boxes.dtype == torch.float32
        assert len(g.spans) == len(g.boxes) and g.size == (32, 32)


@pytest.mark.slow
def test_captions_are_true_of_their_own_picture_and_false_of_the_others(examples):
    own, found = [e.pixels for e in examples], grounded_of(examples)
    prompts, hard = [e.prompt for e in examples], [g.hard_prompt for g in found]
    other = [g.random_prompt for g in found]
    hard_pixels, other_pixels = [g.hard_pixels for g in found], [g.random_pixels for g in found]
    for pixels, texts in ((own, prompts), (hard_pixels, hard), (other_pixels, other)):
        assert true(pixels, texts).all()
    for pixels, texts in ((own, hard), (own, other), (hard_pixels, prompts), (other_pixels, prompts)):
        assert not true(pixels, texts).any()


def test_an_expression_names_all_its_boxes_and_nothing_else(dataset, examples):
    numbers = set()
    for scene, g in zip(dataset.scenes, grounded_of(examples), strict=True):
        spec = parse(g.expression)
        kinds = [t.kind for t in scene.things]
        assert set(spec.objects) == {spec.objects[0]} and len(spec.objects) == len(g.boxes)
        assert kinds.count(spec.objects[0]) == len(g.boxes)
        assert all(g.expression[a:b] == g.expression for spans in g.spans for a, b in spans)
        numbers.add(len(g.boxes))
    assert numbers == {1, 2, 3}


def test_boxes_lie_around_the_objects_that_the_oracle_finds(examples):
    blobs = find((torch.stack([e.pixels for e in examples]) + 1) / 2)
    for i, g in enumerate(grounded_of(examples)):
        assert (g.boxes > 0).all() and (g.boxes < 1).all()
        wanted = parse(g.expression).objects[0]
        rows = np.flatnonzero(blobs.image == i)
        there = [
            (blobs.x[k], blobs.y[k])
            for k in rows
            if KINDS.index(wanted) == blobs.color[k] * 3 + blobs.shape[k]
        ]
        centres = sorted((32 * g.boxes[:, :2]).tolist())
        np.testing.assert_allclose(centres, sorted(there), atol=1.2)


def test_boxes_are_centres_and_sizes_by_hand(dataset):
    index = next(i for i, s in enumerate(dataset.scenes) if s.kind == "single")
    (thing,) = dataset.scenes[index].things
    x0, y0, x1, y1 = thing.box
    found = dataset.get(index, np.random.default_rng(0)).extra["grounded"].boxes
    wanted = [[thing.x / 32, thing.y / 32, (x1 - x0) / 32, (y1 - y0) / 32]]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_training_never_meets_a_held_out_composition(examples):
    for e, g in zip(examples, grounded_of(examples), strict=True):
        for text in (e.prompt, g.hard_prompt, g.random_prompt, g.expression):
            assert scene_split(parse(text).objects) == "train"


def test_scenes_and_captions_are_those_of_the_plain_dataset(dataset, examples):
    plain = ShapesDataset(DataSettings(num_examples=N), seed=3)
    for i in range(5):
        other = plain.get(i, np.random.default_rng([7, i]))
        assert other.prompt == examples[i].prompt and torch.equal(other.pixels, examples[i].pixels)
    assert dataset.fingerprint() != plain.fingerprint()
    again = GroundedShapes(DataSettings(num_examples=N), seed=3).get(4, np.random.default_rng([7, 4]))
    a, b = again.extra["grounded"], examples[4].extra["grounded"]
    assert (a.expression, a.hard_prompt, a.random_prompt) == (b.expression, b.hard_prompt, b.random_prompt)
    assert torch.equal(a.random_pixels, b.random_pixels) and torch.equal(a.hard_pixels, b.hard_pixels)


def test_captions_alone_are_the_same(dataset, examples):
    alone = GroundedShapes(DataSettings(num_examples=N), seed=3, pictures=False)
    for i in range(9):
        found = alone.get(i, np.random.default_rng([7, i]))
        assert (found.prompt, found.pixels, found.extra) == (examples[i].prompt, None, {})
    assert alone.fingerprint() == dataset.fingerprint()


def test_long_captions_are_long_on_every_side():
    dataset = GroundedShapes(DataSettings(num_examples=20, mixture="long"), seed=1)
    for i in range(20):
        e = dataset.get(i, np.random.default_rng(i))
        g = e.extra["grounded"]
        assert all(text.endswith(".") for text in (e.prompt, g.hard_prompt, g.random_prompt))


def test_scenes_that_are_all_the_same_are_refused():
    dataset = GroundedShapes(DataSettings(num_examples=1))
    with pytest.raises(UserError, match=r"all 1 scenes .*data\.num_examples=N"):
        dataset.get(0, np.random.default_rng(0))


# ------------------------------------------------------------------ which table a method gets


def test_the_table_of_a_dataset():
    assert registry.dataset_table("shapes") is registry.DATASETS
    assert registry.dataset_table("shapes", grounded=True) is registry.GROUNDED
    with pytest.raises(UserError, match=r"no boxes .*--data \(refcoco, shapes\)"):
        registry.dataset_table("coco", grounded=True)
    with pytest.raises(
        UserError, match=r"refcoco dataset is for methods that .*\(captions, coco, latents, prom"
    ):
        registry.dataset_table("refcoco")
    with pytest.raises(UserError, match=r"unknown dataset 'refcocoo'; did you mean 'refcoco'\? \(known: ref"):
        registry.dataset_table("refcocoo", grounded=True)


@dataclass(frozen=True, kw_only=True)
class TellingConfig(MethodConfig):
    """No settings."""

    @property
    def grounded(self) -> bool:
        return True


class Telling:
    """Where is the first box, and which picture is the right one? Linear in the pixels."""

    name = "telling"
    config_class = TellingConfig
    families = frozenset({"sd15"})

    def __init__(self, model, config, *, seed: int = 0) -> None:
        self.model = model
        self.weight = nn.Parameter(torch.zeros(3 * 32 * 32, 5))

    def check(self, settings) -> None: ...

    def trainables(self):
        return {"map": [self.weight]}

    def group_options(self):
        return {}

    def step(self, batch, ctx):
        found = batch.extra["grounded"]
        pictures = [
            batch.pixels,
            *(torch.stack([getattr(g, f"{k}_pixels") for g in found]) for k in KINDS_OF),
        ]
        out = [p.flatten(1) @ self.weight for p in pictures]
        boxes = torch.stack([g.boxes[0] for g in found])
        scores = torch.stack([o[:, 4] for o in out], dim=1)
        loss = ((out[0][:, :4] - boxes) ** 2).mean()
        loss = loss + nn.functional.cross_entropy(scores, torch.zeros(len(found), dtype=torch.long))
        ctx.backward(loss)
        return {"loss": float(loss.detach())}

    def state(self):
        return {"weight": self.weight.detach().cpu().clone()}

    def load_state(self, state):
        with torch.no_grad():
            self.weight.copy_(state["weight"])

    @contextmanager
    def attach(self, model, scale: float = 1.0):
        yield


KINDS_OF = ("hard", "random")


@pytest.fixture
def telling(monkeypatch, tiny_sd15_folder) -> list[str]:
    """A run of seconds of a method that learns from such examples."""
    monkeypatch.setitem(registry.METHODS, "telling", f"{__name__}:Telling")
    monkeypatch.setitem(registry.METHOD_CONFIGS, "telling", f"{__name__}:TellingConfig")
    sets = {"data.num_examples": 16, "train.log_every": 1, "sample.steps": 1, "sample.guidance": 1.0}
    words = ["train", "telling", "--model", str(tiny_sd15_folder), "--preset", "none", "--steps", "4"]
    words += ["--batch-size", "4", "--lr", "0.01", "--no-eval"]
    return words + [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_method_that_wants_them_gets_them(tmp_path, telling):
    one, two = tmp_path / "one", tmp_path / "two"
    ok(*telling, "--out", one, "--set", "data.num_workers=0")
    ok(*telling, "--out", two, "--set", "data.num_workers=2", "--set", "train.grid_every=4")
    assert len(trace(one)) == 4 and trace(one) == trace(two)
    assert (two / "grids").is_dir() or list(two.rglob("*.png"))


def test_other_datasets_and_encodings_are_refused(tmp_path, telling):
    out = tmp_path / "run"
    assert "the coco dataset has no boxes" in refused(*telling, "--out", out, "--data", "coco")
    assert "unknown dataset 'shape'; did you mean 'shapes'" in refused(
        *telling, "--dry-run", "--no-costs", "--data", "shape"
    )
    assert "encodings hold none: leave --cache" in refused(*telling, "--out", out, "--cache", tmp_path)
    plain = ["softrepa", *telling[2:], "--out", out]
    assert "refcoco dataset is for methods" in refused("train", *plain, "--data", "refcoco")
    assert "refcoco dataset is for methods" in refused("encode", "--data", "refcoco", "--out", out)
    assert not out.exists()
