"""The shapes world: renders, captions, oracle, splits: properties over random scenes, and hand-made cases."""

from itertools import combinations

import numpy as np
import pytest

from align_cli.errors import UserError
from align_cli.settings import DataSettings
from align_cli.shapes import captions, world
from align_cli.shapes.captions import Spec, hard_negative, parse, recaption
from align_cli.shapes.dataset import ShapesDataset, eval_prompts
from align_cli.shapes.oracle import find, judge, relation_holds
from align_cli.shapes.world import (
    KINDS,
    SHAPES,
    Scene,
    Thing,
    coverage,
    masks,
    pair_split,
    render,
    sample_scenes,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return sample_scenes(600, np.random.default_rng(0))


@pytest.fixture(scope="module")
def prompts(scenes):
    rng = np.random.default_rng(1)
    return [recaption(scene, rng, long_rate=0.3) for scene in scenes]


def scene(*things: Thing, background: str = "white", kind: str = "pair") -> Scene:
    return Scene(kind, things, background)


def test_true_captions_are_judged_true(scenes, prompts):
    judged = judge(render(scenes), [p.spec for p in prompts])
    for name, values in judged.items():
        assert np.nanmin(values) == 1.0, name


def test_true_captions_survive_pixel_noise(scenes, prompts):
    noise = np.random.default_rng(2).normal(0, 15, (len(scenes), 32, 32, 3))
    noisy = np.clip(render(scenes) + noise, 0, 255).astype(np.uint8)
    assert judge(noisy, [p.spec for p in prompts])["all"].mean() > 0.995


def test_hard_negatives_are_judged_false(scenes, prompts):
    rng = np.random.default_rng(3)
    judged = judge(render(scenes), [hard_negative(p, rng).spec for p in prompts])
    assert judged["all"].max() == 0.0


def test_hard_negative_keeps_the_form_of_its_caption(prompts):
    rng = np.random.default_rng(4)
    for prompt in prompts:
        false = hard_negative(prompt, rng)
        assert false.kind == prompt.kind and false.text != prompt.text
        if prompt.kind != "count":
            assert len(false.text.split()) == len(prompt.text.split())


def test_shuffled_specs_are_the_chance_floor(scenes, prompts):
    shifted = [p.spec for p in prompts[1:] + prompts[:1]]
    assert judge(render(scenes), shifted)["all"].mean() < 0.03


def test_pictures_as_floats_are_judged_alike(scenes, prompts):
    images, specs = render(scenes[:50]), [p.spec for p in prompts[:50]]
    floats = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    for name, values in judge(images, specs).items():
        np.testing.assert_array_equal(values, judge(floats, specs)[name])


def test_judge_of_a_half_right_picture_by_hand():
    picture = render([scene(Thing("red", "circle", 8, 16, 5), Thing("blue", "square", 24, 16, 5))])
    spec = Spec((("red", "circle"), ("blue", "triangle")), ((0, "left of", 1),), "black")
    got = {k: float(v[0]) for k, v in judge(picture, [spec]).items()}
    assert got["object"] == 0.5 and got["color"] == 1.0 and got["shape"] == 0.5
    assert got["count"] == 1.0 and got["relation"] == 0.0 and got["background"] == 0.0 and got["all"] == 0.0
    assert got["facts"] == pytest.approx(
        2 / 5
    )  # first object and count, of: 2 objects, count, relation, background


def test_swapped_colours_have_all_words_but_no_object():
    picture = render([scene(Thing("red", "square", 8, 16, 5), Thing("blue", "circle", 24, 16, 5))])
    got = judge(picture, [Spec((("red", "circle"), ("blue", "square")))])
    assert got["color"][0] == 1.0 and got["shape"][0] == 1.0 and got["object"][0] == 0.0


def test_metrics_not_asked_for_are_nan():
    picture = render([scene(Thing("red", "circle", 16, 16, 5), kind="single")])
    got = judge(picture, [Spec((("red", "circle"),))])
    assert np.isnan(got["relation"][0]) and np.isnan(got["background"][0]) and got["all"][0] == 1.0


def test_an_empty_picture_has_no_objects():
    blank = np.full((2, 32, 32, 3), 245, np.uint8)
    assert len(find(blank).image) == 0 and find(blank).background == ["white", "white"]
    got = judge(blank, [Spec((("red", "circle"),))] * 2)
    assert got["object"].tolist() == [0.0, 0.0] and got["count"].tolist() == [0.0, 0.0]


def test_oracle_finds_positions_to_a_third_of_a_pixel(scenes):
    blobs = find(render(scenes))
    for i, one in enumerate(scenes):
        mine = [(blobs.x[k], blobs.y[k]) for k in np.nonzero(blobs.image == i)[0]]
        for thing in one.things:
            assert min(np.hypot(thing.x - x, thing.y - y) for x, y in mine) < 0.34


@pytest.mark.parametrize(
    ("relation", "dx", "dy"), [("left of", -3, 2), ("right of", 3, 2), ("above", 1, -4), ("below", 1, 4)]
)
def test_relations_must_dominate(relation, dx, dy):
    assert relation_holds(relation, dx, dy)
    assert not relation_holds(relation, dy, dx)
    assert not relation_holds(captions.OPPOSITE[relation], dx, dy)


def test_coverage_of_each_shape_has_its_exact_area():
    areas = {"circle": np.pi * 25, "square": 81.0, "triangle": 0.5 * 11 * 10.5}
    for index, name in enumerate(SHAPES):
        got = coverage(np.array([index]), np.array([16.2]), np.array([15.7]), np.array([5.0])).sum()
        assert got == pytest.approx(areas[name], rel=0.02), name


def test_objects_keep_apart_and_inside(scenes):
    for one in scenes:
        for thing in one.things:
            x0, y0, x1, y1 = thing.box
            assert min(x0, y0) >= world.BORDER and max(x1, y1) <= world.SIZE - world.BORDER
        for a, b in combinations(one.things, 2):
            (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
            assert max(bx0 - ax1, ax0 - bx1, by0 - ay1, ay0 - by1) >= world.GAP - 1e-9


def test_masks_lie_inside_their_boxes():
    one = scene(Thing("red", "circle", 9, 9, 5), Thing("blue", "triangle", 23, 22, 4.5))
    for mask, (_, (x0, y0, x1, y1)) in zip(masks(one), one.boxes(), strict=True):
        rows, cols = np.nonzero(mask > 0.5)
        assert cols.min() + 1 >= x0 and cols.max() <= x1 and rows.min() + 1 >= y0 and rows.max() <= y1


def test_splits_are_disjoint_and_cover_every_attribute_in_training():
    pairs = {split: [p for p in combinations(KINDS, 2) if pair_split(*p) == split] for split in world.SPLITS}
    assert sum(map(len, pairs.values())) == 66 and len(pairs["test"]) >= 12 and len(pairs["val"]) >= 5
    assert {kind for pair in pairs["train"] for kind in pair} == set(KINDS)
    assert pair_split(*pairs["test"][0]) == pair_split(*reversed(pairs["test"][0]))


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_held_out_prompt_holds_an_unseen_pair(split):
    for prompt in eval_prompts(120, 0, split=split):
        found = {pair_split(a, b) for a, b in combinations(sorted(set(prompt.spec.objects)), 2)}
        assert split in found


def test_training_scenes_hold_no_held_out_pair():
    for one in sample_scenes(300, np.random.default_rng(0), kinds=("pair", "triple"), split="train"):
        assert {pair_split(a.kind, b.kind) for a, b in combinations(one.things, 2)} == {"train"}


def test_negatives_and_twins_of_training_scenes_hold_no_held_out_pair():
    rng = np.random.default_rng(0)
    for one in sample_scenes(400, rng, kinds=("pair", "triple"), split="train"):
        prompt = recaption(one, rng, long_rate=0.2)
        twin, caption = captions.counterfactual(one, prompt, rng, split="train")
        assert world.scene_split(caption.spec.objects) == "train"
        assert world.scene_split(tuple(t.kind for t in twin.things)) == "train"
    data = ShapesDataset(DataSettings(num_examples=100, mixture="pairs"), seed=0)
    for i in range(100):
        for text in data.get(i, rng).extra["negatives"]:
            assert world.scene_split(parse(text).objects) == "train"


@pytest.mark.slow
def test_counterfactual_is_true_of_its_own_picture_only(scenes, prompts):
    rng = np.random.default_rng(5)
    twins = [captions.counterfactual(s, p, rng) for s, p in zip(scenes, prompts, strict=True)]
    pictures = render([t[0] for t in twins])
    assert judge(pictures, [t[1].spec for t in twins])["all"].min() == 1.0
    assert judge(pictures, [p.spec for p in prompts])["all"].max() == 0.0


def test_eval_prompts_are_reproducible_and_mostly_distinct():
    first = eval_prompts(600, 0)
    assert first == eval_prompts(600, 0) and first != eval_prompts(600, 1) and len(first) == 600
    assert len({p.text for p in first}) == 600
    assert {p.kind for p in first} == {"pair", "triple", "long"}


def test_parse_understands_what_recaption_writes(scenes, prompts):
    pictures = render(scenes)
    parsed = [parse(p.text) for p in prompts]
    for prompt, spec in zip(prompts, parsed, strict=True):
        assert (
            sorted(spec.objects) == sorted(prompt.spec.objects) and spec.background == prompt.spec.background
        )
        named = {(p.objects[a], r, p.objects[b]) for p in (spec,) for a, r, b in p.relations}
        assert named == {
            (prompt.spec.objects[a], r, prompt.spec.objects[b]) for a, r, b in prompt.spec.relations
        }
    assert judge(pictures, parsed)["all"].min() == 1.0


@pytest.mark.parametrize(
    "text", ["", "a purple circle", "red circle", "four red circles", "a cat on a mat", "a red circle ."]
)
def test_parse_refuses_other_texts(text):
    with pytest.raises(UserError):
        parse(text)


def test_dataset_draws_new_true_captions_and_false_negatives():
    data = ShapesDataset(DataSettings(num_examples=40), seed=3)
    first, again = (data.get(5, np.random.default_rng(0)) for _ in range(2))
    assert first.prompt == again.prompt and first.pixels.shape == (3, 32, 32)
    assert first.pixels.min() >= -1 and first.pixels.max() <= 1
    texts = {data.get(5, np.random.default_rng(i)).prompt for i in range(40)}
    assert len(texts) > 3 or data.scenes[5].kind in ("single", "count")
    image = ((first.pixels + 1) / 2)[None]
    assert judge(image, [parse(first.prompt)])["all"][0] == 1.0
    for text in first.extra["negatives"]:
        assert judge(image, [parse(text)])["all"][0] == 0.0


def test_pairs_mixture_has_only_compositions():
    data = ShapesDataset(DataSettings(num_examples=30, mixture="pairs"), seed=0)
    assert {s.kind for s in data.scenes} <= {"pair", "triple"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_long_mixture_has_only_true_captions_of_five_sentences(split):
    data = ShapesDataset(DataSettings(num_examples=60, mixture="long"), seed=0, split=split)
    assert {s.kind for s in data.scenes} == {"pair", "triple"} and len(data) == len(data.scenes) == 60
    for i in range(60):
        found = data.get(i, np.random.default_rng(i))
        assert found.prompt.count(" .") == 5
        assert judge((found.pixels + 1)[None] / 2, [parse(found.prompt)])["all"][0] == 1.0
    other = ShapesDataset(DataSettings(num_examples=60, mixture="pairs"), seed=0, split=split)
    assert data.fingerprint() != other.fingerprint()


def test_captions_alone_are_those_of_the_pictures():
    both = [ShapesDataset(DataSettings(num_examples=20), seed=3, pictures=given) for given in (True, False)]
    for i in range(20):
        whole, alone = (data.get(i, np.random.default_rng(i)) for data in both)
        assert (whole.prompt, whole.extra) == (alone.prompt, alone.extra)
        assert whole.pixels is not None and alone.pixels is None
    assert "rendered" not in vars(both[1]) and both[0].fingerprint() == both[1].fingerprint()


def test_unknown_kind_and_split_are_user_errors():
    with pytest.raises(UserError, match="unknown kind of scene"):
        sample_scenes(1, np.random.default_rng(0), kinds=("quad",))
    with pytest.raises(UserError, match="unknown split"):
        sample_scenes(1, np.random.default_rng(0), split="dev")
