"""Lists of prompts as training data: formats and their rules, bad files, the commands that take them."""

from __future__ import annotations

import csv
import errno
import io
import json
import pickle
import random
import re
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from align_cli import config
from align_cli.cli.main import app
from align_cli.data import records
from align_cli.data import training as training_data
from align_cli.data.base import collate
from align_cli.data.prompt_lists import PromptDataset
from align_cli.errors import UserError
from align_cli.evaluation import prompts as evaluation
from align_cli.settings import DataSettings
from align_cli.training.order import SliceOrder, batches

RNG = np.random.default_rng(0)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def dataset(path: Path, **more) -> PromptDataset:
    return PromptDataset(DataSettings(name="prompts", path=str(path), **more))


def prompts(path: Path, **more) -> list[str]:
    data = dataset(path, **more)
    examples = [data.get(i, RNG) for i in range(len(data))]
    assert [e.id for e in examples] == list(range(len(data)))
    assert all(e.pixels is None and e.extra == {} for e in examples)
    return [e.prompt for e in examples]


def error(path: Path, **more) -> str:
    with pytest.raises(UserError) as caught:
        dataset(path, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ formats

NAMED = "prompt,raw_data\n"
CASES = {
    "lines": ("p.txt", "a red circle\n\n \t \n  two blue squares \n# no comment", [
        "a red circle", "two blue squares", "# no comment"]),
    "official": ("openprompts.csv", NAMED + '"a, b","{""a"": ""x""}"\n,x\nlast,y', ["a, b", "", "last"]),
    "first column": ("p.csv", 'words,prompts\n"one\n\ntwo",x\n\n   \n"say ""hi""",y\n', [
        "one\n\ntwo", 'say "hi"']),
    "named column": ("p.csv", "id, Caption \n1,a red circle\n2,  blanks stay \n", [
        "a red circle", "  blanks stay "]),
    "prompt before caption": ("p.csv", "caption,text,PROMPT\na,b,c\n", ["c"]),
    "short rows": ("p.csv", "id,prompt\n1\n2,b\n", ["", "b"]),
    "empty prompts": ("p.csv", 'prompt\n""\n\n" "\nb\n', ["", " ", "b"]),
    "blank before header": ("p.csv", "\n  \nprompt\na\n", ["a"]),
    "inches": ("p.csv", 'size,prompt\n5" tall,a 3" screw\n6", "b" and ""c""\n', [
        'a 3" screw', ' "b" and ""c""']),
    "tabs": ("p.tsv", 'Prompt\tNote\n"G I G" on a wall\tx\n"open\ty\n\n  \n\tempty\n a, b \t', [
        '"G I G" on a wall', '"open', "", " a, b "]),
    "json lines": ("p.jsonl", '"a"\n\n{"text": "b", "caption": "c"}\n  \n{"Prompt": ""}\n"d\\ne"', [
        "a", "b", "", "d\ne"]),
    "json": ("p.json", '["a", {"caption": "b", "n": 1},\n "", {"prompt": "c"}]', ["a", "b", "", "c"]),
    "capitals": ("P.CSV", "prompt\na\n", ["a"]),
    "other line ends": ("p.txt", "a\x0bb\u2028c\x85d\n", ["a\x0bb\u2028c\x85d"]),
    "old Mac": ("p.txt", "a\rb\r\r\nc", ["a", "b", "c"]),
    "old Mac table": ("p.csv", 'prompt,x\ra,1\r"b\rc",2\r', ["a", "b\rc"]),
    "as pandas does": ("p.csv", "prompt,x\na\rb,1\n", ["a", "b"]),
    "in a cell": ("p.csv", 'prompt\na\u2028b\n"c\rd"\n', ["a\u2028b", "c\rd"]),
    "middle mark": ("p.txt", "a\n\ufeffb\n", ["a", "\ufeffb"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*no column prompt")
@pytest.mark.parametrize(("name", "content", "expected"), CASES.values(), ids=CASES.keys())
def test_formats(tmp_path, name, content, expected):
    assert prompts(write(tmp_path / name, content)) == expected


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("last", ["", "end"], ids=["open", "closed"])
@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl"])
def test_marks_and_line_ends(tmp_path, mark, end, last, suffix):
    texts = ["a red circle", "caf\u00e9 \u5706", "\U0001f600"]
    lines = [json.dumps(t, ensure_ascii=False) for t in texts] if suffix == "jsonl" else texts
    lines = lines if suffix in ("txt", "jsonl") else ["prompt", *lines]
    content = mark + end.join(lines).encode() + (end.encode() if last else b"")
    assert prompts(write(tmp_path / f"p.{suffix}", content)) == texts


def test_training_and_evaluation_read_the_same(tmp_path):
    """Where evaluation keeps empty prompts out, training has them; all else is equal."""
    rows = [["a red circle", "x"], ['say "hi", twice', ""], ["", "y"], [" two\nlines ", "z"], ["\u5706", "1"]]
    table = io.StringIO()
    csv.writer(table).writerows([["Prompt", "Note"], *rows])
    one_line = [[cell.replace("\n", " ") for cell in row] for row in rows]
    tabs = "\n".join("\t".join(row) for row in [["Prompt", "Note"], *one_line])
    objects = [{"text": text, "note": note} for text, note in rows]
    for name, content in {
        "p.csv": table.getvalue(), "p.tsv": tabs, "p.json": json.dumps(objects),
        "p.jsonl": "\n".join(map(json.dumps, objects)), "p.txt": "a\n\n b \r\nc",
    }.items():  # fmt: skip
        path = write(tmp_path / name, content)
        found = prompts(path)
        assert [text for text in found if text.strip()] == evaluation.read_prompts(path).texts
        assert ("" in found) == (name != "p.txt")


def test_against_the_csv_module(tmp_path):
    """Random tables with blank lines between their rows, written and read by csv.

    Its writer leaves a CR without quotes, and for its reader that ends the row: so does it here. In a table
    of one column every cell is quoted, else a cell of blanks would be a blank line.
    """
    rng = random.Random(7)
    alphabet = [*'ab", \t\r\n', '""', "\r\n", "\u00e9", "\u5706", "\u2028", "\U0001f600"]
    for _ in range(150):
        width, end = rng.randint(1, 3), rng.choice(["\n", "\r\n"])
        rows = [
            ["".join(rng.choices(alphabet, k=rng.choice([0, 1, 2, 5, 30]))) for _ in range(width)]
            for _ in range(rng.randint(1, 30))
        ]
        out = io.StringIO()
        quoting = csv.QUOTE_ALL if width == 1 or rng.random() < 0.3 else csv.QUOTE_MINIMAL
        writer = csv.writer(out, lineterminator=end, quoting=quoting)
        writer.writerow([f"c{i}" for i in range(width)])
        for row in rows:
            out.write(rng.choice(["", "", end, f" \t{end}"]))
            writer.writerow(row)
        text = out.getvalue().removesuffix(end if rng.random() < 0.3 else "nothing")
        path = write(tmp_path / "p.csv", text)
        place = rng.randrange(width)
        if quoting == csv.QUOTE_ALL:
            expected = [row[place] for row in rows]
        else:
            read = list(csv.reader(io.StringIO(text, newline=""), strict=True))[1:]
            full = [row for row in read if len(row) > 1 or "".join(row).strip(" \t")]
            expected = [row[place] if place < len(row) else "" for row in full]
        assert prompts(path, column=f"c{place}") == expected, text


def test_one_column_may_be_named(tmp_path):
    content = 'prompt,long\na,"b, c"\n'
    path = write(tmp_path / "p.csv", content)
    assert (prompts(path), prompts(path, column="long")) == (["a"], ["b, c"])
    lines = write(tmp_path / "p.jsonl", '{"prompt": "a", "long": "b"}\n"c"\n')
    assert prompts(lines, column="long") == ["b", "c"]
    assert "no 'Long' among 'prompt', 'long'" in error(path, column="Long")
    assert "line 1: no 'x' among 'prompt', 'long'" in error(lines, column="x")
    text = write(tmp_path / "p.txt", "a\n")
    assert "data.column is 'x', but" in error(text, column="x")


def layout_list() -> list[dict]:
    """Two entries as the files of LayoutLLM-T2I have them (COCO-NSS1K)."""
    return [
        {"img_id": 2021, "name": "COCO_val2014_000000002021.jpg", "width": 640, "height": 480,
         "bbox": [[0.5, 0.4, 0.2, 0.3], [0.1, 0.2, 0.1, 0.1]], "label": ["dog", "bench"],
         "captions": "A dog to the left of a bench."},
        {"img_id": 3, "name": "COCO_val2014_000000000003.jpg", "width": 500, "height": 375,
         "bbox": [[0.5, 0.5, 1.0, 1.0]], "label": ["cat"], "captions": "Two cats."},
    ]  # fmt: skip


def test_lists_of_layoutllm_t2i(tmp_path):
    wanted = ["A dog to the left of a bench.", "Two cats."]
    assert prompts(write(tmp_path / "five_category.json", json.dumps(layout_list()))) == wanted
    official = [{"caption": entry["captions"], **entry} for entry in layout_list()]  # the key of DPT's loader
    assert prompts(write(tmp_path / "both.json", json.dumps(official))) == wanted
    several = [{"captions": ["one", "two"]}]
    assert "entry 1: the prompt is no text but ['one'" in error(
        write(tmp_path / "c.json", json.dumps(several))
    )


def test_the_column_that_is_taken_by_position_is_told(tmp_path):
    path = write(tmp_path / "p.csv", "words,raw\na,b\n")
    with pytest.warns(
        UserWarning, match=r"p\.csv, header: no column prompt, text, caption, captions; .*'words'"
    ):
        assert prompts(path) == ["a"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts(path, column="raw")


def test_the_first_n(tmp_path):
    for name, content in {
        "p.txt": "a\nb\n\nc\n", "p.csv": "prompt,x\na,1\nb,2\n\nc,3\n", "p.json": '["a", "b", "c"]',
        "p.jsonl": '"a"\n"b"\n"c"\n',
    }.items():  # fmt: skip
        path = write(tmp_path / name, content)
        for n in (1, 2, 3, 4):
            assert prompts(path, num_examples=n) == ["a", "b", "c"][:n]
        assert prompts(path, num_examples=0) == ["a", "b", "c"]
    broken = write(tmp_path / "p.csv", "prompt\na\nb,c\n")
    assert prompts(broken, num_examples=1) == ["a"]  # what lies behind is not read
    assert "line 3: 2 cells" in error(broken)


def test_fingerprint(tmp_path):
    path = write(tmp_path / "p.csv", "prompt,long\na,b\nc,d\n")
    first = dataset(path).fingerprint()
    assert first == dataset(path).fingerprint() and re.fullmatch(r"[0-9a-f]{16}", first)
    copy = write(tmp_path / "other.csv", path.read_bytes())
    assert dataset(copy).fingerprint() == first == dataset(copy, num_examples=2).fingerprint()
    others = {dataset(path, num_examples=1).fingerprint(), dataset(path, column="long").fingerprint()}
    more = write(tmp_path / "more.csv", path.read_bytes() + b"e,f\n")
    others.add(dataset(more).fingerprint())
    assert dataset(more, num_examples=2).fingerprint() == first
    assert len(others | {first}) == 4
    lists = {
        dataset(write(tmp_path / "p.json", t), column=c).fingerprint()
        for t in ('[{"a": "x", "b": "y"}]', '[{"a": "x", "b": "z"}]')
        for c in "ab"
    }
    assert len(lists) == 4


# ------------------------------------------------------------------ bad files


@pytest.mark.filterwarnings("ignore:.*no column prompt")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "\n \r\n\t", "holds no prompt"),
        ("p.txt", b"a\nb\xe9\n", "line 2: not UTF-8 text (byte 0xe9)"),
        ("p.txt", b"a\nb\xe2\x82", "line 2: not UTF-8 text (byte 0xe2)"),
        ("p.txt", "a red circle".encode("utf-16"), "line 1: not UTF-8 text"),
        ("p.txt", b"a\n\nb\0\n", "line 3: a zero byte"),
        ("p.csv", "", "holds no prompt"),
        ("p.csv", "prompt\n", "holds no prompt"),
        ("p.csv", "prompt\n\n  \n", "holds no prompt"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns are called 'prompt'"),
        ("p.csv", "prompt\na red circle, left\n", "line 2: 2 cells but the header has 1; put a prompt with"),
        ("p.csv", 'prompt\na\n"b\nc\nd\n', "line 3: unexpected end of data; is a quote not closed"),
        ("p.csv", 'prompt\n"a\nb"\n"c" d\n', "line 4: ',' expected after '\"'; is a quote not closed"),
        ("p.csv", b'prompt\n"a\nb\xff"\n', "line 3: not UTF-8 text"),
        ("p.tsv", "prompt\tn\na\tb\tc\n", "line 2: 3 cells but the header has 2"),
        ("p.tsv", b"prompt\na\0\n", "line 2: a zero byte"),
        ("p.jsonl", '"a"\n\n{"b": 1}\n', "line 3: no 'prompt' or 'text' or 'caption' or 'captions' among"),
        ("p.jsonl", '"a"\n{"prompt": \n', "line 2: not valid JSON"),
        ("p.jsonl", '{"prompt": null}\n', "line 1: the prompt is no text but None"),
        ("p.jsonl", "3\n", "line 1: neither a text nor an object"),
        ("p.json", "[]", "holds no prompt"),
        ("p.json", '{"prompt": "a"}', "is no list"),
        ("p.json", '["a", 3]', "entry 2: neither a text nor an object"),
        ("p.json", "[", "not valid JSON"),
        ("p.yaml", "a", "the name does not tell the format; --data-path of the prompts dataset wants a file"),
        ("p", "a", "ends in .txt, .csv, .tsv, .json, .jsonl"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    said = error(path)
    assert message in said and str(path) in said


def test_missing_files_folders_and_names(tmp_path):
    for name in ("none.csv", "none.json"):
        assert f"no prompt file {tmp_path / name}; --data-path of the prompts" in error(tmp_path / name)
    for name in ("folder", "folder.csv", "folder.json"):
        (tmp_path / name).mkdir()
        assert "is a folder; --data-path of the prompts dataset wants a file" in error(tmp_path / name)
    with pytest.raises(UserError, match="no list of prompts is named; --data-path"):
        PromptDataset(DataSettings(name="prompts"))
    path = write(tmp_path / "p.txt", "a\n")
    with pytest.raises(UserError, match="all of a list of prompts is for training"):
        PromptDataset(DataSettings(name="prompts", path=str(path)), split="val")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_args):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = write(tmp_path / "p.txt", "a\n")
    monkeypatch.setattr(Path, "open", refuse)
    assert error(path) == f"cannot read prompt file {path}: Permission denied"


def test_a_quote_that_swallows_the_file(tmp_path, monkeypatch):
    """The row where it began is named, and memory has an end."""
    monkeypatch.setattr(records, "LONGEST", 1000)
    before = csv.field_size_limit()
    path = write(tmp_path / "p.csv", 'prompt\na\n"b\n' + "c, d\n" * 1000)
    assert "line 3: field larger than field limit (1000); is a quote not closed" in error(path)
    assert "line 1: longer than" in error(write(tmp_path / "p.txt", "a" * 1001))
    assert prompts(write(tmp_path / "p.txt", "a" * 1000)) == ["a" * 1000]
    assert csv.field_size_limit() == before


def test_a_long_cell(tmp_path):
    long = "a red circle and " * 15_000  # more characters than the csv module takes by itself
    before = csv.field_size_limit()
    data = dataset(write(tmp_path / "p.csv", f'prompt,raw\n"{long}",x\nb,"{long}"\n'))
    assert [data.get(i, RNG).prompt for i in range(2)] == [long, "b"]
    assert csv.field_size_limit() == before


def test_a_file_that_changes_is_refused(tmp_path):
    path = write(tmp_path / "p.txt", "a\nb\n")
    data = dataset(path)
    write(path, "other\nb\n")
    with pytest.raises(UserError, match="has changed since it was looked through"):
        data.get(1, RNG)
    path.unlink()
    with pytest.raises(UserError, match="no prompt file .* it was there when the command began"):
        data.get(0, RNG)


# ------------------------------------------------------------------ at work


@pytest.mark.parametrize("name", ["p.csv", "p.json"])
def test_loader_processes_give_what_the_file_holds(tmp_path, name):
    texts = [f"prompt {i}\nof \u5706 {i * i}" for i in range(40)]
    out = io.StringIO()
    csv.writer(out).writerows([["prompt"], *([t] for t in texts)])
    data = dataset(write(tmp_path / name, out.getvalue() if name == "p.csv" else json.dumps(texts)))
    data.get(3, RNG)  # whatever is open now must not be shared
    again = pickle.loads(pickle.dumps(data))
    assert [again.get(i, RNG).prompt for i in (39, 0)] == [texts[39], texts[0]]
    order = SliceOrder(len(data), batch_size=4, seed=1, start=0, stop=20)
    alone = list(batches(data, order))
    together = list(batches(data, order, num_workers=2))
    assert [b.prompts for b in together] == [b.prompts for b in alone]
    assert sorted(i for b in alone[:10] for i in b.ids) == list(range(40))
    assert all(b.pixels is None and b.prompts == [texts[i] for i in b.ids] for b in together)
    assert collate([data.get(0, RNG)]).pixels is None


def test_memory_does_not_grow_with_the_text(tmp_path):
    """20 MB of text in 5,000 rows: 40 kB of places, and no more than a few lines at a time."""
    path = tmp_path / "p.csv"
    with path.open("w") as file:
        file.write("prompt,raw_data\n")
        for i in range(5_000):
            file.write(f'prompt {i},"{"x" * 4000}""{i}"\n')
    tracemalloc.start()
    data = dataset(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000
    assert data.ends.nbytes == 8 * (len(data) + 1) == 40_008
    assert data.get(4_999, RNG).prompt == "prompt 4999"


def test_a_large_file_is_announced(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "p.txt", "a\n" * 600)
    for size, said in ((1201, ""), (1200, f"reading {path} (1.2 kB) ...\n")):
        monkeypatch.setattr(training_data, "LARGE_FILE", size)
        training_data.say_reading(str(path))
        assert capsys.readouterr().err == said
    monkeypatch.setenv("RANK", "1")
    for name in (str(path), str(tmp_path), "", "none.txt"):
        training_data.say_reading(name)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------ settings and commands


def call(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def refused(*args: object) -> str:
    result = call(*args)
    assert result.exit_code == 2 and result.stdout == "", result.output
    said = re.sub(r"^loading .* \.\.\.\n", "", result.stderr)
    assert said.startswith("error: ") and said.count("\n") == 1, result.stderr
    return said


@pytest.fixture
def no_model(monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("align_cli.models.loading.load_model", load)


def test_idle_settings(tmp_path):
    path = str(tmp_path / "p.txt")
    flags = {"data.name": "prompts", "data.path": path}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.resolve("textcraftor", flags=flags)
        config.resolve("textcraftor", flags=flags, sets=["data.column=words", "data.num_examples=3"])
    for key, value in {"image_size": 64, "interpolation": "lanczos", "mixture": "all"}.items():
        changed = [f"data.{key}={value}"]
        if key == "mixture":
            changed = ["data.mixture=pairs"]
        with pytest.warns(UserWarning, match=rf"data\.{key} \(from --set\) has no effect"):
            config.resolve("textcraftor", flags=flags, sets=changed)
    with pytest.warns(UserWarning, match=r"data\.column \(from --set\) has no effect: data.name is not"):
        config.resolve("textcraftor", sets=["data.column=words"])


def test_help_names_the_datasets():
    for command in ("train", "encode"):
        said = " ".join(call(command, "--help").stdout.split())
        assert "Dataset: captions, coco, latents, prompts, shapes." in said


def test_dry_run_reads_no_file(tmp_path):
    text = call(
        "train", "textcraftor", "--data", "prompts", "--data-path", "none.csv", "--dry-run", "--no-costs"
    )
    assert text.exit_code == 0
    row = next(line for line in text.stdout.splitlines() if line.startswith("data.path"))
    assert '"none.csv"' in row and "--data-path" in row


def test_lists_are_refused_before_a_model_is_loaded(tmp_path, no_model):
    out = tmp_path / "run"
    train = ("train", "textcraftor", "--data", "prompts", "--out", out)
    assert "no list of prompts is named; --data-path of the prompts" in refused(*train)
    for name, content, message in [
        ("none.csv", None, "(data.path) does not exist"),
        ("empty.txt", "\n", "holds no prompt"),
        ("p.yaml", "a", "the name does not tell the format"),
        ("p.csv", "prompt\na,b\n", "line 2: 2 cells but the header has 1"),
    ]:
        path = tmp_path / name
        if content is not None:
            write(path, content)
        assert message in refused(*train, "--data-path", path)
    assert "is a folder" in refused(*train, "--data-path", tmp_path)
    path = write(tmp_path / "p.csv", "prompt\na\n")
    assert "no 'x' among 'prompt'" in refused(*train, "--data-path", path, "--set", "data.column=x")
    assert not out.exists()


def test_methods_that_need_pictures_say_so_at_once(tmp_path, no_model):
    path = write(tmp_path / "p.txt", "a\n")
    given = ("--data", "prompts", "--data-path", path, "--out", tmp_path / "out")
    said = "the prompts dataset has captions only; name another with --data (captions, coco, shapes)"
    for more in (
        (),
        (
            "--dry-run",
            "--no-costs",
        ),
    ):
        text = refused("train", "softrepa", *given, *more)
        assert "softrepa trains on pictures with captions" in text and said in text
        text = refused("encode", *given, *more)
        assert "encode stores pictures with their captions" in text and said in text
    assert not (tmp_path / "out").exists()
