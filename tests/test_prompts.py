"""Files of prompts: every format, and what people's files have in them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from align_cli.errors import UserError
from align_cli.evaluation.prompts import PromptRow, PromptSet, read_prompts


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_every_format_gives_the_same_prompts(tmp_path: Path):
    texts = ["a red circle", 'a sign that says "stop, now"', "\u5706"]
    rows = [{"prompt": t, "Category": c} for t, c in zip(texts, "AAB", strict=True)]
    files = {
        "a.txt": "\n".join(texts),
        "a.json": json.dumps(texts),
        "a.jsonl": "\n".join(json.dumps(t) for t in texts) + "\n",
        "b.json": json.dumps(rows),
        "b.jsonl": "\n".join(json.dumps(r) for r in rows),
        "b.tsv": "Prompt\tCategory\n" + "\n".join(f"{r['prompt']}\t{r['Category']}" for r in rows) + "\n",
        "b.csv": 'Category,PROMPT\nA,a red circle\nA,"a sign that says ""stop, now"""\nB,\u5706\n',
    }
    for name, text in files.items():
        found = read_prompts(write(tmp_path / name, text))
        assert found.texts == texts, name
        assert [row.id for row in found.rows] == ["0", "1", "2"]
        assert found.notes == ()
        groups = [dict(row.groups) for row in found.rows]
        assert groups == ([{}] * 3 if name[0] == "a" else [{"Category": c} for c in "AAB"]), name
    fingerprints = {read_prompts(tmp_path / name).fingerprint for name in files}
    assert len(fingerprints) == 2  # with groups and without


@pytest.mark.parametrize("name", ["p.txt", "p.tsv", "p.csv", "p.jsonl"])
def test_byte_order_mark_crlf_blank_lines_and_duplicates(tmp_path: Path, name: str):
    lines = ["a red circle", "", "a red circle", "two blue squares", ""]
    if name == "p.jsonl":
        lines = [json.dumps(line) if line else "" for line in lines]
    elif name != "p.txt":
        lines = ["prompt", *lines]
    found = read_prompts(write(tmp_path / name, b"\xef\xbb\xbf" + "\r\n".join(lines).encode()))
    assert found.texts == ["a red circle", "a red circle", "two blue squares"]
    assert [row.id for row in found.rows] == ["0", "1", "2"]
    assert len(found.notes) == 1 and "1 of 3 prompts repeat an earlier one" in found.notes[0]


def test_tables_keep_quotes_in_tsv_and_blanks_around_prompts(tmp_path: Path):
    text = 'Prompt\tCategory\tNote\n"G I G" on a wall\tArts\tx\n a  red circle \tArts\t\n\tArts\tempty\n'
    found = read_prompts(write(tmp_path / "p.tsv", text))
    assert found.texts == ['"G I G" on a wall', " a  red circle "]
    assert found.rows[0].extra == {"Note": "x"}
    assert found.notes == (f"{tmp_path / 'p.tsv'}: 1 rows without a prompt are left out",)
    quoted = read_prompts(write(tmp_path / "p.csv", 'id,prompt\nx,"one\ntwo"\ny,three\n'))
    assert quoted.texts == ["one\ntwo", "three"]
    assert [row.id for row in quoted.rows] == ["x", "y"]


def test_rows_without_an_id_have_their_numbers(tmp_path: Path):
    """A trailing comma makes a column without a name; it holds no ids. Nor does pandas' own index."""
    for name, text in {
        "a.csv": "prompt,category,\na cat,x,\na dog,y,\n",
        "b.tsv": "prompt\tcategory\t\na cat\tx\t\na dog\ty\t\n",
        "c.csv": ",prompt\n7,a cat\n8,a dog\n",
        "d.csv": "id,prompt\n,a cat\n,a dog\n",
        "e.json": '[{"prompt": "a cat", "id": null}, {"prompt": "a dog", "id": ""}]',
    }.items():
        assert [row.id for row in read_prompts(write(tmp_path / name, text)).rows] == ["0", "1"], name
    path = write(tmp_path / "f.csv", "id,prompt\n1,a cat\n,a dog\n")
    with pytest.raises(UserError, match="two prompts have the id '1'"):
        read_prompts(path)


@pytest.mark.parametrize("name", ["p.txt", "p.tsv", "p.csv", "p.json"])
def test_a_prompt_of_ten_thousand_words(tmp_path: Path, name: str):
    long = "a red circle and " * 15_000  # more characters than the csv module takes by itself
    before = csv.field_size_limit()
    text = json.dumps([long]) if name == "p.json" else long if name == "p.txt" else f"prompt\n{long}\n"
    assert read_prompts(write(tmp_path / name, text)).texts[0].split() == long.split()
    assert csv.field_size_limit() == before


def test_the_column_can_be_named(tmp_path: Path):
    path = write(tmp_path / "p.tsv", "what\tstyle\na red circle\tphoto\n")
    assert read_prompts(path, column="what").rows[0].groups == {"style": "photo"}
    with pytest.raises(
        UserError, match=r"no 'prompt' or 'text' or 'caption' or 'captions' among 'what', 'style'"
    ):
        read_prompts(path)
    with pytest.raises(UserError, match="no 'words' among 'what', 'style'"):
        read_prompts(path, column="words")


def test_lists_of_layoutllm_t2i(tmp_path: Path):
    """COCO-NSS1K names the prompt captions; the boxes are kept beside it."""
    entry = {
        "img_id": 3,
        "name": "a.jpg",
        "bbox": [[0.5, 0.5, 1.0, 1.0]],
        "label": ["cat"],
        "captions": "a cat",
    }
    (row,) = read_prompts(write(tmp_path / "p.json", json.dumps([entry]))).rows
    assert row.text == "a cat" and row.extra["bbox"] == entry["bbox"] and row.groups == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.yaml", "a", "ends in .txt, .csv, .tsv, .json, .jsonl"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"a\nb\xe9\n", "line 2: not UTF-8 text"),
        ("p.tsv", b"prompt\na\0\n", "line 2: a zero byte"),
        ("p.tsv", "prompt\n", "holds no prompt"),
        ("p.tsv", "", "holds no prompt"),
        ("p.tsv", "prompt\tid\na\t1\nb\t1\n", "two prompts have the id '1'"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns are called 'prompt'"),
        ("p.csv", "prompt\na red circle, left\n", "line 2: 2 cells but the header has 1; put a"),
        ("p.csv", 'prompt\n"a red circle\n', "line 2: unexpected end of data"),
        ("p.json", "{", "not valid JSON"),
        ("p.json", "[" * 100_000, "not valid JSON"),
        ("p.json", '{"prompt": "a"}', "is no list"),
        ("p.json", "[1]", "entry 1: neither a text nor an object"),
        ("p.jsonl", '"a"\n{"b": 1}\n', "line 2: no 'prompt' or 'text' or 'caption' or 'captions' among 'b'"),
        ("p.json", '["a", "b \\ud83d"]', "entry 2: the prompt holds '\\ud83d', half of a character"),
        ("p.jsonl", '{"prompt": "\\ude00 b"}', "line 1: the prompt holds '\\ude00', half of a character"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1: the prompt is no text but 3"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: str | bytes, message: str):
    with pytest.raises(UserError) as error:
        read_prompts(write(tmp_path / name, content))
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_folders(tmp_path: Path):
    with pytest.raises(UserError, match=r"no prompt file .*none\.txt"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_prompts(tmp_path / "folder.txt")


def test_limit_spreads_over_the_groups_in_file_order():
    sizes = {"a": 10, "b": 3, "c": 1}
    rows = [PromptRow(f"{g}{i}", f"{g}{i}", {"G": g}) for g, n in sizes.items() for i in range(n)]
    whole = PromptSet("x", "x", tuple(rows))
    assert whole.limited(8).texts == ["a1", "a3", "a6", "a8", "b0", "b1", "b2", "c0"]
    assert whole.limited(8) == whole.limited(8)
    assert whole.limited(2).texts == ["a5", "b1"]
    assert whole.limited(14) is whole and whole.limited(None) is whole
    assert len({whole.limited(n).fingerprint for n in range(1, 15)}) == 14
    plain = PromptSet("x", "x", tuple(PromptRow(str(i), str(i)) for i in range(9)))
    assert plain.limited(3).texts == ["1", "4", "7"]
    with pytest.raises(UserError, match="at least one prompt, got 0"):
        plain.limited(0)
