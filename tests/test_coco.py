"""The COCO dataset on a small folder made here."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import make_coco

from align_cli.data.coco import CocoDataset, square_pixels
from align_cli.errors import UserError
from align_cli.settings import DataSettings

UNCAPTIONED = "1 images have no caption"


def data_settings(path, **changes) -> DataSettings:
    return DataSettings(**{"name": "coco", "path": str(path), "image_size": 16, **changes})


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path / "data" / "coco")


@pytest.fixture
def dataset(coco):
    with pytest.warns(UserWarning, match=UNCAPTIONED):
        return CocoDataset(data_settings(coco.parent))


def test_sorted_ids_random_train_captions(dataset):
    assert dataset.ids == [2, 5, 7, 31] and len(dataset) == 4
    captions = {dataset.get(1, np.random.default_rng(s)).prompt for s in range(60)}
    assert captions == {f"image 5 text {k}" for k in range(5)}
    one = dataset.get(1, np.random.default_rng(3))
    again = dataset.get(1, np.random.default_rng(3))
    assert one.prompt == again.prompt and torch.equal(one.pixels, again.pixels)
    assert one.id == 1 and one.extra == {"image_id": 5}


def test_val_takes_the_first_caption_of_the_file(coco):
    with pytest.warns(UserWarning, match=UNCAPTIONED):
        val = CocoDataset(data_settings(coco), split="val")  # the folder itself works, too
    assert {val.get(0, np.random.default_rng(s)).prompt for s in range(9)} == {"image 2 text 4"}


def test_captions_alone_need_no_pictures(coco):
    with pytest.warns(UserWarning, match=UNCAPTIONED):
        whole = CocoDataset(data_settings(coco))
    examples = [whole.get(i, np.random.default_rng(i)) for i in range(4)]
    before = [(example.prompt, example.extra) for example in examples]
    shutil.rmtree(coco / "train2017")
    with pytest.warns(UserWarning, match=UNCAPTIONED):
        alone = CocoDataset(data_settings(coco), pictures=False)
    assert alone.fingerprint() == whole.fingerprint()
    for i in range(4):
        found = alone.get(i, np.random.default_rng(i))
        assert found.pixels is None
        assert (found.prompt, found.extra) == before[i]


def test_pixels(dataset, coco):
    for i in range(4):
        pixels = dataset.get(i, np.random.default_rng(0)).pixels
        assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
        assert -1 <= pixels.min() < pixels.max() <= 1
    gray = dataset.get(2, np.random.default_rng(0)).pixels
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])
    same_size = dataset.get(3, np.random.default_rng(0)).pixels  # 16 x 16: nothing is resampled
    with Image.open(coco / "train2017" / "000000000031.jpg") as file:
        raw = np.asarray(file.convert("RGB")).astype(np.float32)
    np.testing.assert_allclose(same_size.permute(1, 2, 0).numpy(), raw / 127.5 - 1, atol=1e-6)


def test_short_side_then_centre_crop_by_hand(tmp_path):
    """A 32 x 8 picture of four flat 8 x 8 tiles: at size 4 it becomes 16 x 4, of which 6..10 stays: half
    tile 1,
    half tile 2 (away from the resampled edge)."""
    tiles = np.repeat(np.array([0, 85, 170, 255], np.uint8), 8)
    picture = np.broadcast_to(tiles[None, :, None], (8, 32, 3))
    path = tmp_path / "x.png"
    Image.fromarray(np.ascontiguousarray(picture)).save(path)
    pixels = square_pixels(path, 4, "bilinear")
    assert pixels.shape == (3, 4, 4)
    row = (pixels[0, 1] * 127.5 + 127.5).round().tolist()
    assert row[0] == 85 and row[3] == 170 and 85 < row[1] < row[2] < 170
    tall = tmp_path / "y.png"
    Image.fromarray(np.ascontiguousarray(picture.transpose(1, 0, 2))).save(tall)
    torch.testing.assert_close(square_pixels(tall, 4, "bilinear"), pixels.transpose(1, 2))


def test_filters_differ_and_num_examples_cuts(coco):
    path = coco / "train2017" / "000000000005.jpg"
    pictures = [square_pixels(path, 16, name) for name in ("bicubic", "bilinear", "lanczos")]
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])
    with pytest.warns(UserWarning, match=UNCAPTIONED):
        few = CocoDataset(data_settings(coco, num_examples=2))
    assert few.ids == [2, 5]


def test_fingerprint_tells_data_apart(dataset, coco):
    with pytest.warns(UserWarning, match=UNCAPTIONED):
        same = CocoDataset(data_settings(coco))
    with pytest.warns(UserWarning, match=UNCAPTIONED):
        other = CocoDataset(data_settings(coco, image_size=24))
    assert dataset.fingerprint() == same.fingerprint() != other.fingerprint()


def _annotations(root, split="train"):
    return root / "annotations" / f"captions_{split}2017.json"


@pytest.mark.filterwarnings("ignore:.*no caption")
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda r: shutil.rmtree(r / "annotations"), "has no annotations folder"),
        (lambda r: _annotations(r).unlink(), "no annotation file"),
        (lambda r: _annotations(r).write_text("{"), "is not valid JSON"),
        (lambda r: _annotations(r).write_text('{"images": []}'), "lacks 'annotations'"),
        (lambda r: _annotations(r).write_text("[1]"), "not valid JSON of COCO captions"),
        (lambda r: _annotations(r).write_text('{"images": [], "annotations": []}'), "holds no captions"),
        (lambda r: shutil.rmtree(r / "train2017"), "no image folder"),
        (lambda r: (r / "train2017" / "000000000007.jpg").unlink(), "1 of 4 images are missing.*07.jpg"),
        (lambda r: shutil.rmtree(r), "has no annotations folder"),
        (lambda r: shutil.rmtree(r.parent), "does not exist"),
    ],
)
def test_bad_folders_are_one_line(coco, harm, words):
    harm(coco)
    with pytest.raises(UserError, match=words) as caught:
        CocoDataset(data_settings(coco.parent))
    assert "\n" not in str(caught.value)


def test_no_path_is_a_user_error():
    with pytest.raises(UserError, match="--data-path"):
        CocoDataset(data_settings(""))


@pytest.mark.parametrize("content", [b"", b"this is text", None])
def test_a_broken_image_is_named(dataset, coco, content):
    path = coco / "train2017" / "000000000005.jpg"
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    with pytest.raises(UserError, match="000000000005.jpg") as caught:
        dataset.get(1, np.random.default_rng(0))
    assert "\n" not in str(caught.value)
