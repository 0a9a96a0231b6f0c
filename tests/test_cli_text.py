"""--text segments in the real commands: sample, edit, eval, train and encode."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cache_helpers import SEED, encode
from cli_helpers import ok, refused
from softrepa_helpers import save_random_adapter

from align_cli.data.cache import MANIFEST
from align_cli.data.cached import CachedDataset
from align_cli.errors import UserError
from align_cli.models.segments import SegmentReader
from align_cli.pictures import read_metadata
from align_cli.settings import DataSettings
from align_cli.shapes.captions import parse
from align_cli.training import run_folder

QUICK = ("--steps", "2", "--device", "cpu")
LONG = (
    "A large red circle is left of a small blue square. A green triangle is above the red circle. "
    "The background is white. There are two yellow circles in the picture."
)


@pytest.mark.slow
def test_sample(tiny_sd15_folder, tmp_path):
    one = ("sample", "--model", tiny_sd15_folder, *QUICK, "--prompt", LONG, "--prompt", "a red circle")
    plain = ok(*one, "--out", tmp_path / "a")
    assert "its end is not seen" in plain.stderr
    result = ok(*one, "--out", tmp_path / "b", "--text", "segments")
    assert "text by segments" in result.stderr and result.stderr.count("note: ") == 1
    assert (
        "read as a whole it would lose '" in result.stderr and "by sentence it loses nothing" in result.stderr
    )
    pictures = [sorted((tmp_path / name).glob("001*.png"))[0] for name in "ab"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    assert read_metadata(pictures[1])["text"] == "segments" and "text" not in read_metadata(pictures[0])
    sentence = ok(*one_prompt(tiny_sd15_folder, "red circle " * 2500), "--out", tmp_path / "c")
    assert "; by sentence it loses 'red circle red circle" in sentence.stderr


def one_prompt(folder, prompt: str) -> tuple[object, ...]:
    return ("sample", "--model", folder, *QUICK, "--text", "segments", "--prompt", prompt)


@pytest.mark.parametrize("prompt", ["...", "?!;", "\U0001f431 \U0001f436!", "a"])
def test_bad_prompts_are_drawn(tiny_sd15_folder, tmp_path, prompt):
    ok(*one_prompt(tiny_sd15_folder, prompt), "--out", tmp_path / "a")


def test_refusals(tiny_sd3_folder, tiny_sd15_folder, tmp_path):
    assert "does not apply to" in refused(*one_prompt(tiny_sd3_folder, "a"), "--out", tmp_path / "a")
    said = refused("sample", "--model", tiny_sd15_folder, "--text", "long", "--prompt", "a")
    assert "model.text must be one of plain, segments, got 'long'" in said


@pytest.mark.slow
def test_an_adapter_brings_its_way_of_reading(tiny_sd15_folder, tmp_path):
    folder = save_random_adapter(
        tmp_path / "run", tiny_sd15_folder, "model.text=segments", "model.segment_length=90"
    )
    one = ("sample", *QUICK, "--prompt", LONG, "--adapter", folder)
    for i, more in enumerate(((), ("--model", tiny_sd15_folder))):
        result = ok(*one, *more, "--out", tmp_path / str(i))
        assert "text by segments" in result.stderr and "was trained with" not in result.stderr
        picture = next((tmp_path / str(i)).glob("001*.png"))
        assert read_metadata(picture)["segment_length"] == "90"
    with pytest.warns(
        UserWarning, match="trained with model.text segments and is used with plain; give --text"
    ):
        ok(*one, "--text", "plain", "--out", tmp_path / "plain")
    other = save_random_adapter(tmp_path / "other", tiny_sd15_folder)
    with pytest.warns(UserWarning, match="trained with model.text plain and is used with segments"):
        ok(*one, "--adapter", other, "--out", tmp_path / "both")


def test_eval_and_its_token_audit(tiny_sd15_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{LONG}\na red circle\n" + "red " * 60 + "\n", encoding="utf-8")
    one = ("eval", prompts, "--model", tiny_sd15_folder, *QUICK, "--scorers", "none", "--out", tmp_path / "e")
    result = ok(*one, "--text", "segments")
    found = json.loads((tmp_path / "e" / "results.json").read_text())["audit"]
    assert [(e["what"], e["limit"], e["cut"]) for e in found] == [
        ("plain text encoder (not used)", 32, 2),
        ("text encoder, by sentence", 240, 1),
    ]
    assert "alone would read 32 tokens and cut 2 of 3" in result.stdout.replace("\n", " ")
    report = (tmp_path / "e" / "report.html").read_text()
    assert "plain text encoder (not used)" in report
    said = refused(*one, "--resume")
    assert "holds another evaluation" in said and "text" in said


def test_edit(tiny_sd15_folder, tmp_path):
    one = (
        "edit",
        "--model",
        tiny_sd15_folder,
        "--steps",
        4,
        "--n-start",
        2,
        "--device",
        "cpu",
        "--text",
        "segments",
    )
    one += ("--src-prompt", LONG, "--tgt-prompt", "a red circle", "--out", tmp_path / "e")
    ok(*one)
    assert read_metadata(next((tmp_path / "e").glob("*-edited.png")))["splitter"] == "official"
    ok(*one, "--resume")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["softrepa", "textcraftor"])
def test_train_and_resume(tiny_sd15_folder, tmp_path, method):
    sets = {"data.num_workers": 0, "data.num_examples": 16, "train.save_every": 1, "sample.steps": 2,
            "eval.num_prompts": 4, "train.num_threads": 1, "model.segment_length": 60}  # fmt: skip
    if method == "textcraftor":
        sets |= {"textcraftor.steps": 2, "textcraftor.grad_steps": 1, "textcraftor.test_grad_steps": 1}
    one = [
        "train",
        method,
        "--model",
        tiny_sd15_folder,
        "--preset",
        "none",
        "--batch-size",
        2,
        "--device",
        "cpu",
    ]
    one += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    one += ["--reward", "tiny-clip=10"] if method == "textcraftor" else []
    out = tmp_path / "run"
    ok(*one, "--text", "segments", "--steps", 1, "--out", out)
    about = json.loads((out / "adapter" / "adapter.json").read_text())["config"]["model"]
    assert (about["text"], about["segment_length"]) == ("segments", 60)
    audit = json.loads((out / "eval" / "results.json").read_text())["audit"]
    assert audit[0]["what"] == "plain text encoder (not used)"
    ok(*one, "--text", "segments", "--steps", 2, "--out", out, "--resume")
    with pytest.warns(UserWarning, match="has no effect"):
        said = refused(*one, "--steps", 2, "--out", out, "--resume")
    assert "was begun with other settings: model.text: 'segments' -> 'plain'" in said
    with pytest.warns(UserWarning, match="model.segment_length .* has no effect: model.text is plain"):
        ok(*one, "--dry-run", "--no-costs")


def test_a_caption_without_objects_is_none_of_the_shapes_world():
    for text in ("...", "the whole background is plainly white ."):
        with pytest.raises(UserError, match="names no object"):
            parse(text)


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its settings do not name what came later: that is at its default."""
    saved = {"method": "x", "model": {"name": "a"}, "data": {}}
    now = {"method": "x", "model": {"name": "a", "text": "plain", "segment_length": 240}, "data": {}}
    run_folder.check_same(saved, now, "", "", tmp_path)
    now["model"]["text"] = "segments"
    with pytest.raises(UserError, match="was begun with other settings: model.text: 'plain' -> "):
        run_folder.check_same(saved, now, "", "", tmp_path)


def test_the_cache_is_of_one_way_of_reading(tiny_models, tmp_path):
    model, data = tiny_models["sd15"], DataSettings(num_examples=4)

    def opened(name: str) -> CachedDataset:
        return CachedDataset(replace(data, cache=str(tmp_path / name)), seed=SEED)

    reader = SegmentReader(model, length=50)
    encode(tmp_path / "plain", model, data, captions="first")
    encode(tmp_path / "pictures", model, data, captions="first", layout="captions")
    with model.reading(reader):
        encode(tmp_path / "segments", model, data, captions="first")
        opened("segments").check_model(model)
        opened("pictures").check_model(model)
        with pytest.raises(UserError, match="model.text 'plain', now it is 'segments, 50 tokens"):
            opened("plain").check_model(model)
    opened("plain").check_model(model)
    with pytest.raises(
        UserError, match="model.text 'segments, 50 tokens, splitter official', now it is 'plain'"
    ):
        opened("segments").check_model(model)
    with model.reading(SegmentReader(model, length=50, splitter="sentences")), pytest.raises(UserError):
        opened("segments").check_model(model)
    older = tmp_path / "plain" / MANIFEST  # of a version that knew no other way
    about = json.loads(older.read_text())
    assert about.pop("text") == "plain"
    older.write_text(json.dumps(about))
    opened("plain").check_model(model)


def test_encode_and_train_from_it(tiny_sd15_folder, tmp_path):
    out = tmp_path / "c"
    one = (
        "encode",
        "--model",
        tiny_sd15_folder,
        "--preset",
        "none",
        "--limit",
        4,
        "--device",
        "cpu",
        "--out",
        out,
    )
    result = ok(*one, "--text", "segments")
    assert "up to rounding" in result.stdout + result.stderr
    assert "model.text=segments" in result.stdout
    assert "with the same bits" in ok("encode", "--verify", "--out", out, "--device", "cpu").stdout
    train = (
        "train",
        "softrepa",
        "--model",
        tiny_sd15_folder,
        "--preset",
        "none",
        "--cache",
        out,
        "--steps",
        1,
    )
    train += ("--no-eval", "--device", "cpu", "--set", "data.num_workers=0")
    assert "model.text" in refused(*train, "--out", tmp_path / "a")
    ok(*train, "--text", "segments", "--out", tmp_path / "b")
