"""`t2ialign train dpt` on a tiny random model: both stages, resume, drawing and measuring self-correction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import call, ok, refused
from PIL import Image
from refcoco_files import make_refcoco
from training_helpers import trace

from align_cli.adapters import load_adapter


@pytest.fixture
def options(tiny_sd15_folder) -> list[str]:
    """A run of seconds."""
    sets = {
        "data.num_workers": 0, "train.log_every": 1, "train.save_every": 1, "train.num_threads": 1,
        "sample.steps": 3, "sample.guidance": 2.0, "eval.num_prompts": 4, "dpt.hidden_dim": 16,
        "dpt.num_heads": 4, "dpt.feedforward_dim": 24, "dpt.num_matching_queries": 3,
        "dpt.num_grounding_queries": 5, "dpt.phrase_encoder": "embedded:tiny-roberta", "dpt.lora_rank": 2,
    }  # fmt: skip
    given = ["--model", str(tiny_sd15_folder), "--preset", "none", "--batch-size", "2", "--lr", "1e-2"]
    return given + [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]


SHAPES = ["--set", "data.num_examples=16"]


@pytest.fixture
def tuned(options, tmp_path) -> Path:
    """A run of stage tune on one of stage probe."""
    ok("train", "dpt", *options, *SHAPES, "--no-eval", "--steps", 2, "--out", tmp_path / "probe")
    tune = ["--stage", "tune", "--from", tmp_path / "probe", "--steps", 2, "--out", tmp_path / "tune"]
    ok("train", "dpt", *options, *SHAPES, *tune)
    return tmp_path / "tune"


@pytest.mark.slow
def test_sd3_from_probe_to_pictures(options, tiny_sd3_folder, tmp_path):
    given = ["--model", tiny_sd3_folder, *options[2:]]
    ok("train", "dpt", *given, *SHAPES, "--no-eval", "--steps", 1, "--out", tmp_path / "probe")
    ok("train", "dpt", *given, *SHAPES, "--no-eval", "--steps", 1, "--stage", "tune", "--from",
       tmp_path / "probe", "--out", tmp_path / "tune")  # fmt: skip
    groups = {key.partition(".")[0] for key in load_adapter(tmp_path / "tune").state}
    assert groups == {"discriminator", "transformer"}
    drawn = []
    for name, more in (("plain", []), ("eps", ["--self-correct", 800]),
                       ("latent", ["--self-correct", 800, "--correction", "latent"])):  # fmt: skip
        ok("sample", "--model", tiny_sd3_folder, "--adapter", tmp_path / "tune", "--steps", 3, "--prompt",
           "a red circle", *more, "--out", tmp_path / name)  # fmt: skip
        drawn += pixels(tmp_path / name)
    assert len(set(drawn)) == 3
    ok("eval", "dpt-probe", "--adapter", tmp_path / "tune", "--n", 10, "--out", tmp_path / "e")
    assert (tmp_path / "e" / "results.json").exists()


def pixels(folder: Path) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted(folder.glob("0*.png"))]


@pytest.mark.slow
def test_probe_then_tune_then_pictures_that_correct_themselves(tuned, options, tmp_path):
    assert [load_adapter(tmp_path / s).info.stage for s in ("probe", "tune")] == ["probe", "tune"]
    groups = {key.partition(".")[0] for key in load_adapter(tuned).state}
    assert groups == {"discriminator", "unet"}
    assert json.loads((tuned / "result.json").read_text())["evaluation"] is not None

    said: dict[str, str] = {}

    def drawn(name: str, *more: object) -> list[bytes]:
        given = ["--prompt", "a red circle", "--seed", 1, "--out", tmp_path / name]
        said[name] = ok("sample", "--model", options[1], *given, *more).stderr
        return pixels(tmp_path / name)

    plain = drawn("plain", "--adapter", tuned)
    found = [plain, drawn("corrected", "--adapter", tuned, "--self-correct", 800)]
    for way in ("latent", "official"):
        found.append(drawn(way, "--adapter", tuned, "--self-correct", 800, "--correction", way))
    found.append(drawn("by-the-probe", "--adapter", tmp_path / "probe", "--self-correct", 800))
    assert len({pictures[0] for pictures in found}) == 5
    assert "self-correction 800 (latent): one more pass" in said["latent"]
    assert "self-correct" not in said["plain"]
    probe = tmp_path / "probe"
    assert drawn("uncorrected", "--adapter", probe) == drawn("off", "--adapter", f"{probe}@0")
    assert "holds a discriminator alone, which changes no picture" in said["uncorrected"]
    facts = Image.open(next((tmp_path / "corrected").glob("0*.png"))).text
    assert "self_correct 800.0" in facts["sampling"]
    assert "self_correct" not in Image.open(next((tmp_path / "plain").glob("0*.png"))).text["sampling"]


def test_self_correction_is_an_arm_of_its_own(tuned, options, tmp_path):
    given = ["--model", options[1], "--n", 4, "--vs", "aligned", "--self-correct", 800]
    said = ok("eval", "shapes", "--adapter", tuned, *given, "--out", tmp_path / "eval").output
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    arms = [arm["name"] for arm in results["arms"]]
    assert arms == ["base", "aligned", "aligned-corrected"]
    assert "aligned-corrected: self-correction 800 (eps)" in " ".join(said.split())
    pictures = {arm: pixels(tmp_path / "eval" / "images" / arm) for arm in arms}
    assert all(len(found) == 4 for found in pictures.values())
    assert pictures["aligned"] != pictures["aligned-corrected"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(options, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = ["train", "dpt", *options, *SHAPES, "--stage", "tune", "--no-eval"]
    ok(*given, "--steps", 3, "--out", whole)
    ok(*given, "--steps", 1, "--out", parts)
    ok("train", "dpt", "--resume", "--steps", 3, "--out", parts)
    assert trace(whole) == trace(parts)
    one, two = load_adapter(whole).state, load_adapter(parts).state
    assert all(torch.equal(one[k], two[k]) for k in one | two)


@pytest.mark.slow
def test_refcoco_trains(options, tmp_path):
    root = make_refcoco(tmp_path / "data")
    more = ["--data", "refcoco", "--data-path", root, "--set", "data.image_size=32", "--no-eval"]
    result = ok("train", "dpt", *options, *more, "--steps", 2, "--out", tmp_path / "run")
    assert "Traceback" not in result.output
    assert load_adapter(tmp_path / "run").info.data_fingerprint


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stage", "final"], "dpt.stage must be one of probe, tune, got 'final'"),
        (
            ["--model", "tiny-sd3", "--preset", "none", "--set", "dpt.feature=up1"],
            "the transformer of tiny-sd3 has no block up1 (it has block0, ",
        ),
        (
            ["--model", "tiny-sd3", "--preset", "none", "--stage", "tune", "--set", "dpt.snr_gamma=5"],
            "dpt.snr_gamma is for noise schedules",
        ),
        (["--data", "coco", "--data-path", "."], "the coco dataset has no boxes"),
        (["--data", "refcoco"], "--data-path"),
        (["--set", "dpt.phrase_encoder=nowhere"], "no RoBERTa"),
        (["--stage", "tune", "--from", "nowhere"], "nowhere does not exist"),
        (["--set", "dpt.feature=up9"], "has no block up9 (it has bottom0, bottom1, mid, up0, up1)"),
        (["--cache", "somewhere"], "data.cache"),
    ],
)
def test_wrong_input(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused("train", "dpt", *args, "--no-eval")
    assert not list(Path().iterdir())


def test_self_correction_needs_a_discriminator(tmp_path):
    said = refused("sample", "--prompt", "a red circle", "--self-correct", 0.5, "--out", tmp_path / "out")
    assert "--self-correct follows the score of an adapter of dpt, and there is no --adapter" in said
    said = refused("eval", "shapes", "--n", 4, "--self-correct", 0.5, "--out", tmp_path / "out")
    assert "--self-correct needs an adapter of dpt" in said
    for command in (("sample", "--prompt", "a red circle"), ("eval", "shapes", "--n", 4)):
        said = refused(*command, "--correction", "latent", "--out", tmp_path / "out")
        assert "--correction says what self-correction moves; give its scale with --self-correct" in said
    said = refused("sample", "--prompt", "a", "--steps", 1, "--correction", "official", "--self-correct", 1)
    assert "sample.correction official leaves out the last step" in said
    assert call("sample", "--prompt", "a", "--self-correct", -1, "--out", tmp_path / "out").exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["probe", "tune"])
@pytest.mark.parametrize("model", ["sd14", "sd21-base", "sdxl", "tiny-sd15", "tiny-sdxl"])
def test_every_stage_has_its_preset(model, stage):
    result = ok("train", "dpt", "--model", model, "--stage", stage, "--dry-run", "--no-costs")
    assert f"preset dpt/{model}-{stage}" in result.stdout
