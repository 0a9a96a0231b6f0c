"""RefCOCO with COCO captions and hard negatives, on a small folder of DPT's layout that is made here."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from cli_helpers import ok, refused
from PIL import Image
from refcoco_files import (
    CAPTIONS,
    HEIGHT,
    REC,
    TRAIN_NEGATIVES,
    VAL_NEGATIVES,
    WIDTH,
    make_refcoco,
    read_json,
    write_json,
    write_negatives_table,
)
from test_grounded import Telling, TellingConfig

from align_cli import registry
from align_cli.data.base import collate
from align_cli.data.expressions import read_expressions
from align_cli.data.negatives import open_negatives
from align_cli.data.refcoco import RefCoco
from align_cli.errors import UserError
from align_cli.settings import DataSettings
from align_cli.shapes.captions import parse
from align_cli.shapes.oracle import judge

SIDE = 32
TRAIN = REC / "finetune_refall_train.json"
pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Do not write into it."""
    return make_refcoco(tmp_path_factory.mktemp("data") / "dpt")


@pytest.fixture
def own(root, tmp_path):
    """A copy to be harmed."""
    return shutil.copytree(root, tmp_path / "own")


def settings(root, **changes) -> DataSettings:
    given = {"name": "refcoco", "path": str(root), "image_size": SIDE, "interpolation": "bilinear"}
    return DataSettings(**{**given, **changes})


def every(dataset, seed=0):
    return [dataset.get(i, np.random.default_rng([seed, i])) for i in range(len(dataset))]


def true(pixels, prompts) -> np.ndarray:
    return judge((torch.stack(pixels) + 1) / 2, [parse(p) for p in prompts])["all"] == 1


# ------------------------------------------------------------------ train


def test_every_expression_is_an_example_in_the_order_of_ids(root):
    dataset, raw = RefCoco(settings(root)), read_json(root / TRAIN)
    texts = {image["id"]: image["caption"] for image in raw["images"]}
    examples = every(dataset)
    assert [e.extra["grounded"].expression for e in examples] == [texts[i] for i in sorted(texts)]
    assert [e.id for e in examples] == list(range(len(texts)))
    assert len(collate(examples).extra["grounded"]) == len(texts)


def test_pixels_boxes_and_spans_by_hand(root):
    dataset, raw = RefCoco(settings(root)), read_json(root / TRAIN)
    image = next(i for i in raw["images"] if i["id"] == 3)
    notes = [n for n in raw["annotations"] if n["image_id"] == 3]
    example = dataset.get(3, np.random.default_rng(0))
    g = example.extra["grounded"]
    assert g.size == (HEIGHT, WIDTH) and g.for_grounding and g.for_matching
    wanted = [
        [(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT]
        for x, y, w, h in (n["bbox"] for n in notes)
    ]
    torch.testing.assert_close(g.boxes, torch.tensor(wanted))
    assert g.spans == [[(0, len(image["caption"]))]] * len(notes)
    with Image.open(root / "coco/images/train2014" / image["file_name"]) as file:
        small = np.asarray(file.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    expected = torch.from_numpy(small.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(example.pixels, expected, atol=1e-6, rtol=0)


def test_captions_are_true_of_their_picture_alone(root):
    examples = [e for seed in range(5) for e in every(RefCoco(settings(root)), seed)]
    found = [e.extra["grounded"] for e in examples]
    own, prompts = [e.pixels for e in examples], [e.prompt for e in examples]
    assert true(own, prompts).all()
    assert not true(own, [g.hard_prompt for g in found]).any()
    assert not true([g.hard_pixels for g in found], prompts).any()
    assert all(g.random_prompt != e.prompt for g, e in zip(found, examples, strict=True))
    assert not any(torch.equal(g.random_pixels, e.pixels) for g, e in zip(found, examples, strict=True))


def test_all_captions_and_negatives_of_a_picture_are_drawn(root):
    dataset = RefCoco(settings(root))
    records = open_negatives(root / TRAIN_NEGATIVES)
    drawn = [dataset.get(2, np.random.default_rng(s)) for s in range(400)]
    own = [records.record(n) for n in records.files[dataset.items[2].file]]
    assert {e.prompt for e in drawn} == {r.caption for r in own}
    for record in own:
        hard = {e.extra["grounded"].hard_prompt for e in drawn if e.prompt == record.caption}
        assert hard >= set(record.captions()) and len(own) == 2
    randoms = Counter(e.extra["grounded"].random_prompt for e in drawn)
    assert len(randoms) > 60 and max(randoms.values()) < 60  # 180 captions, some alike; the last one, too
    one, again = (dataset.get(2, np.random.default_rng(8)) for _ in range(2))
    assert one.prompt == again.prompt and torch.equal(
        one.extra["grounded"].random_pixels, again.extra["grounded"].random_pixels
    )


def test_a_table_serves_training_as_the_folder_does(root, tmp_path):
    folder = open_negatives(root / TRAIN_NEGATIVES)
    rows = []
    for file, numbers in folder.files.items():
        for n in numbers:
            r = folder.record(n)
            rows.append((file, r.caption, r.captions(), r.files(file)))
    write_negatives_table(tmp_path / "train.tsv", rows)
    table = open_negatives(tmp_path / "train.tsv")
    assert table.files.keys() == folder.files.keys() and len(table.numbers) == len(folder.numbers)
    dataset = RefCoco(settings(root, negatives=str(tmp_path / "{split}.tsv")))
    assert dataset.fingerprint() != RefCoco(settings(root)).fingerprint()
    assert true([e.pixels for e in every(dataset)], [e.prompt for e in every(dataset)]).all()


def test_quotes_and_commas_in_a_table(tmp_path):
    texts = ['a "big" dog, and\ta cat', "it's a dog", 'a dog\'s "toy"']
    write_negatives_table(tmp_path / "t.tsv", [("a.jpg", texts[0], texts[1:], ["b.jpg"])])
    record = open_negatives(tmp_path / "t.tsv").record(0)
    assert (
        record.caption == texts[0] and record.captions() == texts[1:] and record.files("a.jpg") == ["b.jpg"]
    )


def test_files_of_hard_negatives_are_read_when_they_are_wanted(own):
    for path in (own / TRAIN_NEGATIVES).glob("0*.json"):
        path.unlink()
    dataset = RefCoco(settings(own))
    with pytest.raises(UserError, match=r"no file .*\d{5}.json; imgname2txtid.json beside it names"):
        dataset.get(0, np.random.default_rng(0))


def test_captions_alone_need_no_pictures(own):
    whole = {split: every(RefCoco(settings(own), split=split)) for split in ("train", "val")}
    prints = {split: RefCoco(settings(own), split=split).fingerprint() for split in whole}
    shutil.rmtree(own / "coco" / "images")
    for split, examples in whole.items():
        alone = RefCoco(settings(own), split=split, pictures=False)
        assert [(e.prompt, e.pixels, e.extra) for e in every(alone)] == [
            (e.prompt, None, {}) for e in examples
        ]
        assert alone.fingerprint() == prints[split]


def test_fingerprint_tells_data_apart(root):
    made = [
        RefCoco(settings(root)), RefCoco(settings(root), split="val"), RefCoco(settings(root), split="test"),
        RefCoco(settings(root, num_examples=3)), RefCoco(settings(root, image_size=16)),
        RefCoco(settings(root, interpolation="bicubic")),
    ]  # fmt: skip
    assert len({d.fingerprint() for d in made}) == len(made)
    assert RefCoco(settings(root)).fingerprint() == made[0].fingerprint()
    assert len(made[3]) == 3


# ------------------------------------------------------------------ val and test


@pytest.mark.parametrize(("split", "parts"), [("val", 3), ("test", 5)])
def test_held_out_examples_match_or_ground_by_turns(root, split, parts):
    dataset = RefCoco(settings(root), split=split)
    examples = every(dataset)
    found = [e.extra["grounded"] for e in examples]
    assert all(g.for_grounding != g.for_matching for g in found)
    assert [g.for_matching for g in found[:40]] == [True, False] * 20
    files = list((root / REC).glob(f"*_{split}*.json"))
    assert len(files) == parts
    texts = [image["caption"] for path in files for image in read_json(path)["images"]]
    assert Counter(g.expression for g in found if g.for_grounding) == Counter(texts)
    rows = open_negatives(root / VAL_NEGATIVES)
    assert Counter(e.prompt for e in examples if e.extra["grounded"].for_matching) == Counter(
        rows.record(n).caption for n in rows.numbers
    )
    own, prompts = [e.pixels for e in examples], [e.prompt for e in examples]
    assert true(own, prompts).all()
    matching = [e for e in examples if e.extra["grounded"].for_matching]
    hard = [e.extra["grounded"] for e in matching]
    assert not true([e.pixels for e in matching], [g.hard_prompt for g in hard]).any()
    assert not true([g.hard_pixels for g in hard], [e.prompt for e in matching]).any()
    for e, g in zip(matching, hard, strict=True):
        assert g.boxes.shape == (0, 4) and g.spans == [] and g.expression == e.prompt
    alone = next(g for g in found if g.for_grounding)
    assert alone.random_prompt == "" and not alone.hard_pixels.any() and not alone.random_pixels.any()
    assert collate(examples).pixels.shape == (len(examples), 3, SIDE, SIDE)


def test_expressions_can_be_chosen(root, tmp_path):
    raw = read_json(root / REC / "finetune_refcocog_val.json")
    write_json(tmp_path / "mine_val.json", raw)
    place = str(tmp_path / "mine_{split}.json")
    named = [
        RefCoco(settings(root, expressions=name), split="val", pictures=False) for name in ("refcocog", place)
    ]
    assert named[0].content == named[1].content
    assert RefCoco(settings(root, expressions="refcoco")).content == RefCoco(settings(root)).content


# ------------------------------------------------------------------ records that are left out, aloud


def changed(path, change) -> None:
    raw = read_json(path)
    change(raw)
    write_json(path, raw)


def test_boxes_are_cut_at_the_edges_of_the_picture(own):
    changed(own / TRAIN, lambda raw: raw["annotations"][0].update(bbox=[-10, -4, WIDTH, HEIGHT + 20]))
    g = RefCoco(settings(own)).get(notes_image(own), np.random.default_rng(0)).extra["grounded"]
    w = (WIDTH - 10) / WIDTH
    torch.testing.assert_close(g.boxes[:1], torch.tensor([[w / 2, 0.5, w, 1.0]]))


def notes_image(own) -> int:
    """The example of the first annotation."""
    return read_json(own / TRAIN)["annotations"][0]["image_id"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iscrowd": 1}, "1 boxes of crowds"),
        ({"bbox": [5, 5, 0, 9]}, "1 boxes without area in their picture"),
        ({"bbox": [5, 5, 4, -2]}, "1 boxes without area in their picture"),
        ({"bbox": [WIDTH, 5, 9, 9]}, "1 boxes without area in their picture"),
        ({"tokens_positive": [[0, 500]]}, "1 phrases outside of their expression"),
        ({"tokens_positive": [[4, 4]]}, "1 boxes that no phrase names"),
        ({"tokens_positive": []}, "1 boxes that no phrase names"),
        ({"image_id": "next"}, "1 expressions without a box"),
    ],
)
def test_what_is_left_out_is_counted_once(own, change, words):
    raw = read_json(own / TRAIN)
    drawn = [note["image_id"] for note in raw["annotations"]]
    alone = next(note for note in raw["annotations"] if drawn.count(note["image_id"]) == 1)
    before = len(raw["images"])
    other = next(i["id"] for i in raw["images"] if i["id"] != alone["image_id"])
    alone.update({"image_id": other} if "image_id" in change else change)
    write_json(own / TRAIN, raw)
    with pytest.warns(UserWarning, match="left out are") as seen:
        dataset = RefCoco(settings(own))
    assert len(seen) == 1 and len(dataset) == before - 1
    said = str(seen[0].message)
    assert words in said and "1 expressions without a box" in said and "finetune_refall_train.json" in said
    assert "(the first: " in said and "\n" not in said


def test_a_phrase_that_is_partly_inside_stays(own):
    def change(raw):
        raw["annotations"][0]["tokens_positive"] = [[0, 1], [2, 5], [3, 999]]

    changed(own / TRAIN, change)
    with pytest.warns(UserWarning, match="1 phrases outside of their expression .the first: annotation 0"):
        dataset = RefCoco(settings(own))
    spans = dataset.get(notes_image(own), np.random.default_rng(0)).extra["grounded"].spans
    assert spans[0] == [(0, 1), (2, 5)]


def test_pictures_without_negatives_or_captions_are_left_out(own):
    dataset = RefCoco(settings(own))
    file = dataset.items[0].file
    fewer = sum(e.file == file for e in dataset.items)
    path = own / TRAIN_NEGATIVES / "imgname2txtid.json"
    names = read_json(path)
    names[file] = []
    write_json(path, names)
    words = f"{fewer} of {len(dataset)} expressions have a picture without hard negatives.*{file}"
    with pytest.warns(UserWarning, match=words):
        assert len(RefCoco(settings(own))) == len(dataset) - fewer
    write_json(path, {"another.jpg": [0]})
    with pytest.raises(UserError, match="so that none is left"):
        RefCoco(settings(own))
    val = next(i.file for i in RefCoco(settings(own), split="val").items if not hasattr(i, "number"))
    raw = read_json(own / CAPTIONS)
    (gone,) = (image["id"] for image in raw["images"] if image["file_name"] == val)
    for key, name in (("images", "id"), ("annotations", "image_id")):
        raw[key] = [row for row in raw[key] if row[name] != gone]
    write_json(own / CAPTIONS, raw)
    with pytest.warns(UserWarning, match="have a picture without captions"):
        RefCoco(settings(own), split="val")


# ------------------------------------------------------------------ bad input


def note(**change):
    return lambda root: changed(root / TRAIN, lambda raw: raw["annotations"][0].update(change))


def image(**change):
    return lambda root: changed(root / TRAIN, lambda raw: raw["images"][0].update(change))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda r: (r / TRAIN).unlink(), "no file of expressions .*refall_train.json"),
        (lambda r: (r / TRAIN).write_text("{"), "is not valid JSON"),
        (lambda r: (r / TRAIN).write_text('{"images": [1]}'), "has no list of images"),
        (lambda r: write_json(r / TRAIN, {"images": [], "annotations": []}), "holds no expression"),
        (note(bbox=[1, 2, 3]), "annotation 0: bbox must be x, y, width, height"),
        (note(bbox=[1, 2, 3, "4"]), "annotation 0: bbox must be"),
        (note(bbox=[1, 2, float("nan"), 4]), "annotation 0: bbox must be"),
        (note(tokens_positive="0, 4"), "annotation 0: tokens_positive must be a list"),
        (note(image_id=4444), "an annotation is of image 4444, which the file does not have"),
        (note(image_id=None), "an annotation: image_id must be a whole number"),
        (image(caption=" "), r"image \d+: caption must be a text that is not empty"),
        (image(file_name=None), r"image \d+: file_name must be a text"),
        (image(width=0), r"image \d+: width must be a whole number >= 1, got 0"),
        (lambda r: shutil.rmtree(r / TRAIN_NEGATIVES), "no hard negatives .*--set data.negatives=PATH"),
        (lambda r: (r / TRAIN_NEGATIVES / "imgname2txtid.json").unlink(), "no file .*imgname2txtid.json"),
        (lambda r: write_json(r / TRAIN_NEGATIVES / "imgname2txtid.json", [1]), "is no list of captions"),
        (lambda r: shutil.rmtree(r / "coco/images/train2014"), "no image folder"),
        (
            lambda r: next((r / "coco/images/train2014").glob("*000001.jpg")).unlink(),
            "1 of 6 images are missing",
        ),
        (lambda r: shutil.rmtree(r), "does not exist; --data-path wants"),
    ],
)
def test_bad_folders_are_one_line(own, harm, words):
    harm(own)
    with pytest.raises(UserError, match=words) as caught:
        RefCoco(settings(own))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda r: (r / VAL_NEGATIVES).unlink(), "no hard negatives .*val_hard_neg"),
        (lambda r: (r / VAL_NEGATIVES).write_text("filepath\ttitle\n"), "header: no 'neg_caption' among"),
        (lambda r: (r / VAL_NEGATIVES).write_text(HEADER), "holds no hard negative"),
        (lambda r: (r / VAL_NEGATIVES).write_text(f"{HEADER}\ta\t[]\t[]\n"), "line 2: filepath is empty"),
        (lambda r: (r / VAL_NEGATIVES).write_text(f"{HEADER}a.jpg\t \t[]\t[]\n"), "line 2: title must be a"),
        (lambda r: (r / CAPTIONS).unlink(), "no annotation file .*captions_train2014.json"),
        (lambda r: (r / REC / "finetune_refcoco+_val.json").unlink(), "no file of expressions"),
        (lambda r: shutil.rmtree(r / "coco/images/val2014"), "no image folder"),
    ],
)
def test_bad_held_out_files_are_one_line(own, harm, words):
    harm(own)
    with pytest.raises(UserError, match=words) as caught:
        RefCoco(settings(own), split="val")
    assert "\n" not in str(caught.value)


HEADER = "filepath\ttitle\tneg_caption\tneg_image\n"


def test_settings_that_cannot_be(root):
    for changes, split, words in [
        ({"path": ""}, "train", "needs --data-path: a folder with coco/images"),
        ({"expressions": "refcocoo"}, "train", "must be refall, refcoco, .* or a .json file, got 'refcocoo'"),
        ({"expressions": "a.json"}, "val", r"is for training; write \{split\} in its path"),
        ({"negatives": "a"}, "test", "data.negatives is a, which is for training"),
    ]:
        with pytest.raises(UserError, match=words):
            RefCoco(settings(root, **changes), split=split)
    with pytest.raises(ValueError, match="split must be"):
        RefCoco(settings(root), split="testA")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"neg_caption": "[]"}, "neg_caption names nothing but the caption's own"),
        ({"neg_caption": "['a dog"}, "neg_caption must hold a list of texts"),
        ({"neg_caption": "[1, 2]"}, "neg_caption must hold a list of texts"),
        ({"neg_caption": "__import__('os')"}, "neg_caption must hold a list of texts"),
        ({"neg_image": "['own.jpg']"}, "neg_image names nothing but"),
        ({"neg_image": "['gone.jpg']"}, "gone.jpg cannot be read \\(No such file"),
        ({"title": 4}, "title must be a caption, got 4"),
        (None, "a hard negative has title, neg_caption, neg_image"),
    ],
)
def test_a_bad_record_is_named(own, record, words):
    dataset = RefCoco(settings(own))
    item = dataset.items[0]
    for n in dataset.negatives.files[item.file]:
        path = own / TRAIN_NEGATIVES / f"{n:05d}.json"
        kept = read_json(path)
        kept.update(
            {
                k: v.replace("own.jpg", item.file) if isinstance(v, str) else v
                for k, v in (record or {}).items()
            }
        )
        write_json(path, kept if record else {"caption": "a"})
    with pytest.raises(UserError, match=words) as caught:
        dataset.get(0, np.random.default_rng(0))
    assert "\n" not in str(caught.value) and ("json" in str(caught.value) or "gone" in words)


def test_a_picture_of_another_size_is_refused(own):
    dataset = RefCoco(settings(own))
    path = own / "coco/images/train2014" / dataset.items[0].file
    with Image.open(path) as file:
        file.resize((20, 20)).save(path)
    with pytest.raises(UserError, match=f"has 20 x 20 pixels, .* in one of {WIDTH} x {HEIGHT}"):
        dataset.get(0, np.random.default_rng(0))


def test_one_picture_has_nothing_to_be_told_from(root):
    dataset = RefCoco(settings(root, num_examples=1))
    with pytest.raises(UserError, match="the 1 pictures of the refcoco dataset hold none of another picture"):
        dataset.get(0, np.random.default_rng(0))


def test_reading_expressions_keeps_the_order_of_ids(root):
    found, digest = read_expressions(root / TRAIN)
    raw = {image["id"]: image for image in read_json(root / TRAIN)["images"]}
    assert [e.file for e in found] == [raw[i]["file_name"] for i in sorted(raw)] and len(digest) == 64


# ------------------------------------------------------------------ the command line


def test_training_on_it(root, tmp_path, monkeypatch, tiny_sd15_folder):
    monkeypatch.setitem(registry.METHODS, "telling", f"{Telling.__module__}:Telling")
    monkeypatch.setitem(registry.METHOD_CONFIGS, "telling", f"{TellingConfig.__module__}:TellingConfig")
    words = ["train", "telling", "--model", tiny_sd15_folder, "--preset", "none", "--steps", 3, "--no-eval"]
    words += ["--batch-size", 2, "--lr", 0.01, "--data", "refcoco", "--data-path", root]
    words += ["--set", "data.num_workers=0", "--set", f"data.image_size={SIDE}", "--out", tmp_path / "run"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ok(*words, "--set", "data.interpolation=bilinear")
        assert "must be refall" in refused(*words, "--overwrite", "--set", "data.expressions=all")
    assert (tmp_path / "run" / "adapter").is_dir()
