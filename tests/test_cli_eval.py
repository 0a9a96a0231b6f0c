"""`t2ialign eval`: the command on tiny models, and the one line that answers a mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from softrepa_helpers import save_random_adapter
from typer.testing import CliRunner

from align_cli.cli.main import app
from align_cli.evaluation.benchmarks import ShapesBenchmark
from align_cli.evaluation.sets import SetOptions, load_set
from align_cli.models.loading import load_model
from align_cli.pictures import read_metadata, to_uint8
from align_cli.sampling import picture_seeds, sample
from align_cli.settings import ModelSettings, SampleSettings

QUICK = ("--steps", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def adapter(tiny_sd15_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return save_random_adapter(folder, tiny_sd15_folder, "sample.guidance=2.5", "sample.batch_size=8")


def call(*args: object):
    return CliRunner().invoke(app, ["eval", *(str(a) for a in args)])


def ok(*args: object):
    result = call(*args)
    assert result.exit_code == 0, result.output
    return result


def assert_one_line(result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    said = re.sub(r"^loading .* \.\.\.\n", "", result.stderr)
    assert said.startswith("error: ") and said.count("\n") == 1, said
    for part in parts:
        assert part in said


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def words(tmp_path: Path, n: int = 5) -> Path:
    path = tmp_path / "words.csv"
    path.write_text("prompt,style\n" + "".join(f"a red circle number {i},{'ab'[i % 2]}\n" for i in range(n)))
    return path


@pytest.mark.slow
def test_shapes_alone(tiny_sd15_folder, tmp_path):
    args = ("shapes", "--model", tiny_sd15_folder, "--n", 12, *QUICK)
    result = ok(*args, "--out", "e")
    assert "* all" in result.stdout and "floor" in result.stdout and "peak memory" in result.stdout
    raw = read(tmp_path / "e")
    means = {row["metric"]: row for row in raw["means"] if row["group"] is None}
    assert means["shapes/all"]["n"] == 12 and raw["floor"]["shapes/all"] is not None
    assert raw["interval"] == "t" and raw["comparisons"] == []
    # the numbers are those of the oracle on pictures that sample() draws in one go
    prompts = load_set("shapes", SetOptions(num=12)).scenes
    drawing = SampleSettings(**raw["sample"])
    model = load_model(ModelSettings(name=str(tiny_sd15_folder), device="cpu"))
    drawn = to_uint8(sample(model, [p.text for p in prompts], drawing, picture_seeds(0, 12)))
    for i, picture in enumerate(drawn):
        saved = Image.open(tmp_path / "e" / "images" / "base" / f"{i:05d}.png")
        assert np.array_equal(np.asarray(saved), picture)
    judged = ShapesBenchmark().judge(drawn, list(prompts))
    for key, x in judged.items():
        assert means[f"shapes/{key}"]["mean"] == (None if np.isnan(x).all() else pytest.approx(np.nanmean(x)))
    assert_one_line(call(*args, "--out", "e"), "already holds an evaluation", "--resume", "--overwrite")


@pytest.mark.slow
def test_without_out_the_same_command_goes_on(tiny_sd15_folder, tmp_path):
    args = ("shapes", "--model", tiny_sd15_folder, "--n", 4, *QUICK)
    first = json.loads(ok(*args, "--json").stdout)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"eval-shapes-[0-9a-f]{8}", folder.name)
    again = ok(*args, "--json")
    assert "0 of 4 pictures to draw" in again.stderr
    changing = ("seconds", "memory", "created", "command")
    second = json.loads(again.stdout)
    assert {k: v for k, v in first.items() if k not in changing} == {
        k: v for k, v in second.items() if k not in changing
    }
    ok(*args, "--seed", 1)
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.slow
def test_base_and_aligned_on_shapes(adapter):
    result = ok("shapes", "--adapter", adapter, "--n", 12, *QUICK)
    lines = result.stdout.splitlines()
    head = next(line for line in lines if line.strip().startswith("metric"))
    for name in ("base", "aligned", "difference", "95 % CI", "n"):
        assert name in head
    for name in ("object", "color", "shape", "count", "relation", "background"):
        assert any(line.strip().startswith(name) for line in lines), name
    for name in ("* all", "Kind: pair", "Kind: triple", "Kind: long"):
        assert any(line.strip().startswith(name) for line in lines), name
    assert max(map(len, lines)) <= 110 and "\u2026" not in result.stdout
    assert "drawing aligned 12/12" in result.stderr


@pytest.mark.slow
def test_arms_of_a_file(adapter, tmp_path):
    args = (words(tmp_path), "--adapter", adapter, "--arm", f"half={adapter}@0.5", "--scorers", "tiny-clip")
    ok(*args, "--vs", "half", "--per-prompt", 2, "--trained-on", "clip", *QUICK, "--out", "e")
    raw = read(tmp_path / "e")
    assert [arm["name"] for arm in raw["arms"]] == ["base", "aligned", "half"] and raw["baseline"] == "half"
    assert {row["arm"] for row in raw["comparisons"]} == {"base", "aligned"}
    assert raw["benchmark"]["group_names"] == ["style"] and len(raw["items"]) == 10
    assert raw["drift"][0]["diversity"] is not None
    facts = read_metadata(tmp_path / "e" / "images" / "half" / "00003-1.png")
    assert facts["prompt"] == "a red circle number 3" and "@0.5 sha256:" in facts["adapter"]
    first, second = (Image.open(tmp_path / "e" / "images" / "base" / f"00003-{k}.png") for k in (0, 1))
    assert not np.array_equal(np.asarray(first), np.asarray(second))
    assert_one_line(
        call(*args, "--vs", "half", "--per-prompt", 2, *QUICK, "--steps", 3, "--out", "e", "--resume"),
        "sample.steps: 2 -> 3",
    )


@pytest.mark.slow
def test_more_scorers_of_the_same_pictures(tiny_sd15_folder, tmp_path):
    args = ("shapes", "--model", tiny_sd15_folder, "--n", 4, *QUICK, "--out", "e")
    ok(*args, "--scorers", "none")
    assert read(tmp_path / "e")["scorers"] == []
    result = ok(*args, "--scorers", "shapes,tiny-clip", "--resume")
    assert "0 of 4 pictures to draw" in result.stderr
    assert [s["name"] for s in read(tmp_path / "e")["scorers"]] == ["shapes", "tiny-clip"]


@pytest.mark.slow
def test_pictures_that_are_given(adapter, tmp_path):
    file = words(tmp_path)
    ok(file, "--adapter", adapter, "--scorers", "tiny-clip", *QUICK, "--out", "e")
    made = tmp_path / "e" / "images"
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(made / "base", before)
    shutil.copytree(made / "aligned", after)
    args = (file, "--images", before, "--images", f"new={after}", "--scorers", "tiny-clip", "--device", "cpu")
    ok(*args, "--out", "g")
    drawn, given = read(tmp_path / "e"), read(tmp_path / "g")
    assert [arm["name"] for arm in given["arms"]] == ["before", "new"] and given["sample"] == {}
    for one, other in zip(drawn["items"], given["items"], strict=True):
        assert list(one["scores"]["tiny-clip"].values()) == list(other["scores"]["tiny-clip"].values())
        assert (tmp_path / "g" / other["images"]["new"]).resolve().parent == after
    (after / "00002.png").unlink()
    assert_one_line(call(*args, "--out", "h"), "1 of 5 pictures are missing", "00002", "--allow-missing")
    ok(*args, "--out", "h", "--allow-missing")
    row = read(tmp_path / "h")["comparisons"][0]
    assert row["n"] == 4 and "1 of 5 pictures are missing" in read(tmp_path / "h")["notes"][-1]
    assert_one_line(call(*args, "--model", "tiny-sd15"), "--model is for drawing")
    assert_one_line(call(file, "--allow-missing"), "--images")


@pytest.mark.slow
def test_a_picture_that_is_damaged_is_drawn_again(tiny_sd15_folder, tmp_path):
    args = ("shapes", "--model", tiny_sd15_folder, "--n", 4, *QUICK, "--out", "e")
    ok(*args)
    path = tmp_path / "e" / "images" / "base" / "00002.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    result = ok(*args, "--resume")
    assert "1 of 4 pictures to draw" in result.stderr and path.read_bytes() == whole
    path.write_bytes((path.parent / "00001.png").read_bytes())
    assert_one_line(call(*args, "--resume"), "00002.png is no picture of this run")


def test_other_weights_are_another_run(tiny_sd15_folder, tmp_path):
    model = shutil.copytree(tiny_sd15_folder, tmp_path / "model")
    args = ("shapes", "--model", model, "--n", 2, *QUICK, "--out", "e")
    ok(*args)
    (weights,) = (model / "unet").glob("*.safetensors")
    state = load_file(weights)
    save_file({name: x * 1.01 for name, x in state.items()}, weights)
    assert_one_line(call(*args, "--resume"), "holds another evaluation", "weights.denoiser")


@pytest.mark.slow
def test_bad_input(tiny_sd15_folder, adapter, tmp_path):
    base = ("--model", tiny_sd15_folder, *QUICK)
    (tmp_path / "thesis.tex").write_text("")
    for args, parts in (
        (("shape", *base), ("shapes",)),
        (("nowhere.txt", *base), ("nowhere.txt",)),
        (("shapes", *base, "--split", "tests"), ("test",)),
        (("shapes", *base, "--n", "0"), ("'--n'",)),
        (("shapes", *base, "--interval", "z"), ("bootstrap",)),
        (("shapes", *base, "--scorers", "clap"), ("unknown reward 'clap'", "clip")),
        (("shapes", *base, "--scorers", "shapes,shapes"), ("twice",)),
        (("shapes", *base, "--scorers", "shapes:textcraftor"), ("textcraftor",)),
        (("shapes", *base, "--weights", "clip=x"), ("not among the scorers",)),
        (("shapes", *base, "--weights", "clip"), ("NAME=PATH",)),
        (("shapes", *base, "--trained-on", "hpsv3"), ("hpsv3",)),
        (("shapes", *base, "--vs", "half"), ("unknown arm 'half'",)),
        (("shapes", *base, "--arm", f"base={adapter}"), ("base",)),
        (("shapes", *base, "--adapter", "nowhere"), ("nowhere",)),
        (("shapes", *base, "--geneval-results", "x"), ("geneval",)),
        (("shapes", *base, "--out", tmp_path), ("holds no evaluation", "--overwrite")),
        (("shapes", *base, "--resume", "--out", "e"), ("no evaluation to resume",)),
        (("shapes", *base, "--resume", "--overwrite", "--out", "e"), ("one of them",)),
        (("shapes", *base, "--images", "nowhere"), ("for drawing",)),
        (("shapes", "--images", "nowhere"), ("does not exist",)),
        (("shapes", *base, "--prompts", "x.txt"), ("--prompts",)),
        (("shapes", *base, "--reference"), ("--scorers hpsv2 or hpsv2.1",)),
        (("shapes", *base, "--protocol", "textcraftor"), ("of the benchmark parti",)),
        (("shapes", *base, "--scorers", ","), ("names no scorer", "none")),
        (("shapes", *base, "--weights", "shapes=a", "--weights", "shapes=b"), ("names shapes twice",)),
        (("shapes", "--images", ".", "--guidance", "0"), ("--guidance is for drawing",)),
        (("shapes", "--images", ".", "--dtype", "float16"), ("--dtype is for drawing",)),
        (("shapes", *base, "--out", "/proc/none/e"), ("cannot write to /proc/none/e",)),
        (("parti", "--protocol", "textcraftor", "--seed", "1"), ("--seed does not go with --protocol",)),
        (("parti", "--protocol", "textcraftor", "--guidance", "0"), ("--guidance does not go with",)),
        (("parti", *base, "--protocol", "textcraftor"), ("--steps does not go with --protocol textcraftor",)),
    ):
        assert_one_line(call(*args), *parts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


@pytest.mark.slow
def test_what_needs_no_model_is_refused_before_one_is_loaded(tiny_sd15_folder, adapter, tmp_path):
    args = (words(tmp_path), "--model", tiny_sd15_folder, "--scorers", "tiny-clip", *QUICK)
    ok(*args, "--out", "e")
    for more, part in (
        (("--steps", 3), "sample.steps: 2 -> 3"),
        (("--seed", 1), "seed: 0 -> 1"),
        (("--per-prompt", 2), "per_prompt: 1 -> 2"),
        (("--adapter", adapter), "sample.guidance: 7.0 -> 2.5"),
        (("--arm", f"x={adapter}", "--guidance", 7, "--batch-size", 4), "arms.x: 'not set' -> "),
    ):
        result = call(*args, *more, "--out", "e", "--resume")
        assert_one_line(result, "e holds another evaluation", part)
        assert "loading" not in result.stderr
    for more, part in (
        (("--geneval-results", "x"), "for t2ialign eval geneval"),
        (("--out", "/proc/none"), "/proc"),
    ):
        result = call(*args, *more)
        assert_one_line(result, part)
        assert "loading" not in result.stderr
    (tmp_path / "words.csv").write_text("prompt\nanother\n")
    assert_one_line(call(*args, "--out", "e", "--resume"), "benchmark.prompts: 5 -> 1")


def test_given_pictures_of_another_size_in_the_shapes_world(tmp_path):
    for i in range(6):
        Image.new("RGB", (40, 40 + i % 2), (i, 9, 9)).save(tmp_path / f"{i:05d}.png")
    args = ("--images", tmp_path, "--n", 6, "--device", "cpu", "--out", "e")
    ok("shapes", *args, "--scorers", "tiny-clip")
    assert read(tmp_path / "e")["floor"] == {}
    assert_one_line(
        call("geneval-shapes", *args, "--overwrite"), "judges 32 x 32 pictures", "00000.png is 40 x 40"
    )


@pytest.mark.slow
def test_geneval_goes_to_its_evaluator_and_comes_back(tiny_sd15_folder, tmp_path):
    prompts = [("single_object", "a photo of a bench"), ("counting", "a photo of two cats")]
    records = [{"tag": tag, "include": [], "prompt": text} for tag, text in prompts]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    args = ("geneval", "--prompts", "m.jsonl", "--model", tiny_sd15_folder, "--scorers", "none", *QUICK)
    args = (*args, "--out", "e")
    result = ok(*args)
    assert "for GenEval's evaluator: e/geneval/base" in result.stdout
    samples = tmp_path / "e" / "geneval" / "base" / "00001" / "samples"
    assert sorted(p.name for p in samples.iterdir()) == [f"000{k}.png" for k in range(4)]
    lines = [
        {"filename": f"x/{i:05d}/samples/{k:04d}.png", "correct": k < i + 1, **records[i]}
        for i in range(2)
        for k in range(4)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ok(*args, "--resume", "--geneval-results", "r.jsonl")
    raw = read(tmp_path / "e")
    assert [s["headline"] for s in raw["scorers"]] == ["geneval/correct"]
    official = {row["label"]: row["value"] for row in raw["official"]}
    assert (official["single_object"], official["counting"], official["Overall"]) == (0.25, 0.5, 0.375)
    assert_one_line(call(*args, "--resume", "--geneval-results", "x=r.jsonl"), "unknown arm 'x'")
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    refused = call(*args, "--resume", "--geneval-results", "r.jsonl")
    assert refused.exit_code == 2 and "says nothing about" in refused.stderr


@pytest.mark.slow
def test_results_with_other_scorers_are_not_replaced_in_silence(tiny_sd15_folder, tmp_path):
    given = ["shapes", "--model", tiny_sd15_folder, "--n", 2, "--out", tmp_path / "r", *QUICK]
    ok(*given)
    again = ok(*given, "--scorers", "none", "--resume")
    assert "is written anew without shapes" in again.stderr
