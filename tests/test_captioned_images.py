"""Lists of pictures with captions, and JSON lists that are read entry by entry."""

from __future__ import annotations

import json
import random
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import trace
from typer.testing import CliRunner

from align_cli.cli.main import app
from align_cli.data import records
from align_cli.data.captioned_images import CaptionedImages
from align_cli.data.coco import square_pixels
from align_cli.data.prompt_lists import PromptDataset
from align_cli.errors import UserError
from align_cli.settings import DataSettings
from align_cli.training.order import SliceOrder, batches

RNG = np.random.default_rng(0)
CAPTIONS = ["A cat. It runs.", "one.\n\nTwo\nthree ", "", 'caf\u00e9, \u5706 "quoted"']
CLEAN = ["A cat. It runs.", "one.Two\nthree", "", 'caf\u00e9, \u5706 "quoted"']
NAMES = [f"part{i % 2}/{i}.png" for i in range(4)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four pictures in two folders."""
    rng = np.random.default_rng(1)
    for name in NAMES:
        path = tmp_path / "list" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 33, 3), dtype=np.uint8)).save(path)
    return tmp_path / "list"


def quoted(cells) -> str:
    return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)


def write(path: Path, pictures="path", captions="caption", names=NAMES) -> Path:
    """The list in the format that its name says."""
    rows = [
        {pictures: name, "source": "sam", captions: text} for name, text in zip(names, CAPTIONS, strict=True)
    ]
    if path.suffix == ".csv":
        lines = [quoted(rows[0]), *(quoted(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def dataset(path: object, pictures: bool = True, **settings) -> CaptionedImages:
    given = {"image_size": 16, "interpolation": "bilinear", "name": "captions"} | settings
    return CaptionedImages(DataSettings(path=str(path), **given), pictures=pictures)


def error(path: object, pictures: bool = True, **settings) -> str:
    with pytest.raises(UserError) as caught:
        dataset(path, pictures, **settings)
    return str(caught.value)


# ------------------------------------------------------------------ what it gives


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
@pytest.mark.parametrize(
    ("pictures", "captions"), [("path", "caption"), ("file_name", "text"), ("Image", "Prompt")]
)
def test_formats_and_names(folder, suffix, pictures, captions):
    data = dataset(write(folder / f"list.{suffix}", pictures, captions))
    assert len(data) == 4
    for i, name in enumerate(NAMES):
        found = data.get(i, RNG)
        assert (found.prompt, found.id, found.extra) == (CLEAN[i], i, {})
        assert torch.equal(found.pixels, square_pixels(folder / name, 16, "bilinear"))
        assert data.captions_of(i) == [CLEAN[i]]


def test_pictures_elsewhere(folder, tmp_path):
    path = write(tmp_path / "list.json")
    assert "entry 1: no picture" in error(path)
    found = dataset(path, images=str(folder)).get(2, RNG)
    assert torch.equal(found.pixels, square_pixels(folder / NAMES[2], 16, "bilinear"))
    absolute = write(tmp_path / "absolute.jsonl", names=[str(folder / name) for name in NAMES])
    assert torch.equal(dataset(absolute).get(2, RNG).pixels, found.pixels)


def test_captions_alone(folder, tmp_path):
    whole = dataset(write(folder / "list.jsonl"))
    path = shutil.copy(folder / "list.jsonl", tmp_path / "list.jsonl")
    alone = dataset(path, pictures=False)
    for i in range(4):
        assert alone.get(i, RNG).prompt == whole.get(i, RNG).prompt and alone.get(i, RNG).pixels is None
    assert alone.fingerprint() == whole.fingerprint()
    for name, text in {"p.jsonl": '{"caption": "a"}\n', "p.csv": "caption\na\n"}.items():
        (tmp_path / name).write_text(text)
        assert dataset(tmp_path / name, pictures=False).get(0, RNG).prompt == "a"
        assert "no 'path' or 'file_name' or 'image' among 'caption'" in error(tmp_path / name)


def test_which_of_several_names(tmp_path, folder):
    rows = [{"path": NAMES[0], "image": "none.png", "prompt": "p", "caption": "c", "long": "l"}]
    (folder / "l.json").write_text(json.dumps(rows))
    assert dataset(folder / "l.json").get(0, RNG).prompt == "c"
    named = dataset(folder / "l.json", column="long")
    assert named.get(0, RNG).prompt == "l"
    assert named.fingerprint() != dataset(folder / "l.json").fingerprint()


def test_the_first_n(folder):
    for suffix in ("json", "jsonl", "csv"):
        path = write(folder / f"list.{suffix}")
        two, all_of_them = dataset(path, num_examples=2), dataset(path, num_examples=9)
        assert (len(two), len(all_of_them)) == (2, 4)
        prints = {dataset(path, num_examples=n).fingerprint() for n in (0, 4, 9)}
        assert len(prints) == 1 and two.fingerprint() not in prints
        assert dataset(path, image_size=32).fingerprint() not in prints
    for name in NAMES[2:]:
        (folder / name).unlink()
    assert len(dataset(folder / "list.json", num_examples=2)) == 2
    assert "entry 3: no picture" in error(folder / "list.json", num_examples=3)


def test_loader_processes(folder):
    data = dataset(write(folder / "list.json"))
    order = SliceOrder(len(data), batch_size=2, seed=1, start=0, stop=4)
    alone, together = (list(batches(data, order, num_workers=n)) for n in (0, 2))
    assert [b.prompts for b in together] == [b.prompts for b in alone]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(alone, together, strict=True))


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.json", "[]", "holds no caption"),
        ("l.json", '{"a": 1}', "is no list"),
        ("l.json", "", "not valid JSON: it is empty"),
        ("l.json", '["a red circle"]', "entry 1: no object; write {"),
        ("l.json", '[{"path": "part0/0.png"}]', "entry 1: no 'caption' or 'text' or 'prompt' among 'path'"),
        ("l.json", '[{"caption": "a"}]', "entry 1: no 'path' or 'file_name' or 'image' among 'caption'"),
        ("l.json", '[{"path": 3, "caption": "a"}]', "entry 1: the picture is no name of a file but 3"),
        ("l.json", '[{"path": " ", "caption": "a"}]', "entry 1: the picture is no name of a file but ' '"),
        ("l.json", '[{"path": "part0/0.png", "caption": null}]', "entry 1: the caption is no text but None"),
        ("l.jsonl", '\n{"path": "part0/0.png", "caption": "\\ud800"}', "line 2: the prompt holds '\\ud800'"),
        ("l.jsonl", '{"path": "part0/9.png", "caption": "a"}\n', "line 1: no picture "),
        ("l.csv", "path,caption\npart0/0.png,a,b\n", "line 2: 3 cells but the header has 2"),
        ("l.csv", "path,path,caption\na,b,c\n", "two columns are called 'path'"),
        ("l.csv", "path,words\na,b\n", "header: no 'caption' or 'text' or 'prompt' among 'path', 'words'"),
        ("l.csv", "path,caption\n,b\n", "line 2: the picture is no name of a file but ''"),
        ("l.txt", "a", "wants a file that ends in .csv, .tsv, .json, .jsonl"),
    ],
)  # fmt: skip
def test_bad_lists_are_one_line(folder, name, content, message):
    (folder / name).write_text(content)
    said = error(folder / name)
    assert message in said and str(folder / name) in said and "\n" not in said


def test_missing_pictures_are_counted(folder):
    path = write(folder / "list.csv")
    for name in NAMES[1:3]:
        (folder / name).unlink()
    said = error(path)
    assert f"line 3: no picture {folder / NAMES[1]}; 2 of the 4 pictures of the list are missing" in said
    assert "data.images=FOLDER" in said
    assert "data.images: no folder" in error(path, images=str(folder / "none"))
    assert "all of a list of captions is for training" in said_of_val(path)
    assert "no list of captions is named; --data-path of the captions dataset" in error("")


def said_of_val(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        CaptionedImages(DataSettings(name="captions", path=str(path)), split="val")
    return str(caught.value)


def test_a_picture_that_goes_or_breaks_later_is_named(folder):
    data = dataset(write(folder / "list.json"))
    (folder / NAMES[0]).write_bytes(b"none")
    with pytest.raises(UserError, match=r"part0/0\.png is no image"):
        data.get(0, RNG)
    (folder / NAMES[1]).unlink()
    with pytest.raises(UserError, match=r"part1/1\.png cannot be read \(No such file"):
        data.get(1, RNG)


# ------------------------------------------------------------------ JSON lists


def test_json_lists_as_the_json_module_reads_them(tmp_path, monkeypatch):
    rng, alphabet = (
        random.Random(3),
        ['"', "\\", "\n", "[", "]", ",", "{", "a", "\u00e9", "\u5706", "\U0001f600"],
    )
    for number in range(60):
        monkeypatch.setattr(records, "BLOCK", rng.choice([1, 2, 7, 64, 1 << 16]))
        texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 9))) for _ in range(rng.randint(1, 9))]
        entries = [t if rng.random() < 0.5 else {"n": [1, {"x": t}], "text": t} for t in texts]
        text = json.dumps(entries, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2]))
        path = tmp_path / f"{number}.json"
        mark = rng.choice(["", "\ufeff"])
        path.write_text(f"{mark}{rng.choice(['', ' ', chr(10)])}{text}{chr(10)}", encoding="utf-8")
        data = PromptDataset(DataSettings(name="prompts", path=str(path)))
        assert [data.get(i, RNG).prompt for i in range(len(data))] == texts


@pytest.mark.parametrize("block", [1, 5, 1 << 16])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["a" "b"]', "entry 1: not valid JSON: ',' or ']' expected behind it"),
        ('["a",]', "entry 2: not valid JSON"),
        ('["a", "b', "entry 2: not valid JSON"),
        ('["a"', "entry 1: not valid JSON: the list does not end"),
        ('["a"] "b"', "entry 1: not valid JSON: the list ends behind it, and more follows"),
        ("[" * 5000, "entry 1: not valid JSON"),
        ('["a", 12]', "entry 2: neither a text nor an object"),
        (b'["a",\n\n"\xff"]', "line 3: not UTF-8 text (byte 0xff)"),
        (b'["a",\n"\xe2\x82', "line 2: not UTF-8 text (byte 0xe2)"),
    ],
)
def test_broken_json_lists(tmp_path, monkeypatch, block, content, message):
    monkeypatch.setattr(records, "BLOCK", block)
    path = tmp_path / "l.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        PromptDataset(DataSettings(name="prompts", path=str(path)))
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_an_entry_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 1 << 17)
    path = tmp_path / "l.json"
    path.write_text(json.dumps(["x" * 200_000, "y"]))
    with pytest.raises(UserError, match="entry 1: not valid JSON: .*, or it is longer than"):
        PromptDataset(DataSettings(name="prompts", path=str(path)))
    path.write_text(json.dumps(["x" * 100_000, "y"]))
    assert len(PromptDataset(DataSettings(name="prompts", path=str(path)))) == 2


def test_memory_does_not_grow_with_the_list(tmp_path):
    path = tmp_path / "l.json"
    rows = [{"path": f"{i}.jpg", "caption": f"{i} " + "x" * 4000} for i in range(5_000)]
    path.write_text(json.dumps(rows))
    del rows
    tracemalloc.start()
    data = dataset(path, pictures=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000 and data.ends.nbytes == 40_008
    assert data.get(4_999, RNG).prompt.startswith("4999 ")


# ------------------------------------------------------------------ commands


def ok(*args: object):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.slow
def test_encode_and_train(folder, tmp_path, tiny_sd15_folder):
    path = write(folder / "list.json")
    data = ["--model", tiny_sd15_folder, "--data", "captions", "--data-path", path, "--device", "cpu"]
    out = tmp_path / "encoded"
    said = ok(
        "encode", *data, "--image-size", 32, "--captions", "all", "--batch-size", 2, "--seed", 3, "--out", out
    )
    assert f"--data captions --cache {out}" in said.stdout
    sets = {"data.image_size": 32, "data.num_workers": 0, "train.log_every": 1, "train.num_threads": 1}
    train = [
        "train",
        "softrepa",
        *data[:2],
        "--preset",
        "none",
        "--device",
        "cpu",
        "--seed",
        3,
        "--batch-size",
        2,
    ]
    train += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    train += ["--steps", 3, "--no-eval", "--data", "captions"]
    ok(*train, "--data-path", path, "--out", tmp_path / "plain")
    ok(*train, "--cache", out, "--out", tmp_path / "cached")
    assert trace(tmp_path / "plain") == trace(tmp_path / "cached")


def test_a_missing_picture_ends_the_command(folder, tmp_path, tiny_sd15_folder):
    path = write(folder / "list.jsonl")
    (folder / NAMES[3]).unlink()
    out = tmp_path / "run"
    for command in (["train", "softrepa", "--preset", "none"], ["encode"]):
        given = ["--model", tiny_sd15_folder, "--data", "captions", "--data-path", path, "--out", out]
        result = CliRunner().invoke(app, [str(a) for a in (*command, *given)])
        said = re.sub(r"^loading .* \.\.\.\n", "", result.stderr)
        assert result.exit_code == 2 and said.count("\n") == 1 and "line 4: no picture" in said
        assert not out.exists()
