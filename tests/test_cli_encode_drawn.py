"""`t2ialign encode --for comat`: draw, stop, resume, look over; bad input; who may train from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_helpers import full_disk
from cli_helpers import call, ok, refused

from align_cli import config
from align_cli.cli.encode_drawn import DrawnWork
from align_cli.data import filling
from align_cli.data.cache import Cache
from align_cli.data.drawn import Drawer, DrawRequest
from align_cli.data.training import open_data
from align_cli.methods.textcraftor.config import TextCraftorConfig
from align_cli.settings import DataSettings, ModelSettings

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["a red circle", "a dog", "a red circle", "two blue squares", "a cat"]
SHARDS = [f"images-0000{k}.safetensors" for k in range(3)]
ALL = sorted([*SHARDS, ".lock", "items.json", "manifest.json"])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "list.txt"
    path.write_text("\n   \n".join(f" {text} " for text in TEXTS) + "\n\n")
    return path


@pytest.fixture(scope="module")
def options(tiny_sd15_folder, prompts) -> list[str]:
    """Five prompts in three shards."""
    given = {
        "--for": "comat", "--model": tiny_sd15_folder, "--data": "prompts", "--data-path": prompts,
        "--steps": 2, "--batch-size": 2, "--shard-items": 2, "--seed": 3, "--device": "cpu",
    }  # fmt: skip
    return [str(word) for pair in given.items() for word in pair]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, options) -> Path:
    """Do not write into it."""
    out = tmp_path_factory.mktemp("whole") / "c"
    ok("encode", *options, "--out", out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SHARDS}


# ------------------------------------------------------------------ the course of it


@pytest.mark.slow
def test_it_says_what_it_draws_and_how_to_train(tmp_path, options, tiny_sd15_folder):
    out = tmp_path / "c"
    result = ok("encode", *options, "--out", out)
    assert f"prompts, drawn by {tiny_sd15_folder} for comat: ddpm, 2 steps, guidance 7.5" in result.stdout
    assert re.search(r"images +sample 4x8x8 float32 +1,024 +5 +3 ", result.stdout)
    assert "images 5/5" in result.stderr
    command = f"t2ialign train comat --model {tiny_sd15_folder} --data prompts --cache {out} --preset none"
    assert f"train from them: {command}\n" in result.stdout
    assert sorted(p.name for p in out.iterdir()) == ALL
    items = json.loads((out / "items.json").read_text())
    assert [items["captions"][i] for (i,) in items["items"]] == TEXTS
    before = contents(out)
    assert "complete; nothing to do" in ok("encode", *options, "--out", out).stdout
    assert "complete; nothing to do" in ok("encode", "--resume", "--out", out).stdout
    assert contents(out) == before


@pytest.mark.slow
def test_settings_that_are_not_said_are_the_official_ones(tmp_path, prompts):
    given = ("--data", "prompts", "--data-path", prompts, "--limit", 2, "--device", "cpu")
    ok("encode", "--for", "comat", *given, "--steps", 1, "--out", tmp_path / "c")
    about = Cache.read(tmp_path / "c").about
    assert (about["sampler"], about["guidance"], about["image_size"]) == ("ddpm", 7.5, 32)
    assert (about["batch_size"], about["shard_items"], about["num_examples"]) == (8, 64, 2)
    text = ok("encode", "--for", "comat", *given, "--dry-run", "--no-costs").stdout
    assert "tiny-sd15 for comat: ddpm, 50 steps" in text and "encodings/comat-prompts-tiny-sd15" in text
    flags = ("--guidance", 3, "--sampler", "ddim", "--set", "sample.eta=0.5")
    assert "comat: ddim, 50 steps, guidance 3\n" in ok(
        "encode", "--for", "comat", *given, *flags, "--dry-run", "--no-costs"
    ).stdout  # fmt: skip


def test_a_list_is_drawn_whole_whatever_the_preset_says_of_its_own_data(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("a dog\n" * 5000)  # the preset of tiny-sd15 has 4,096 pictures of the shapes world
    text = ok(
        "encode", "--for", "comat", "--data", "prompts", "--data-path", path, "--dry-run", "--no-costs"
    ).stdout
    assert re.search(r"float32 +1,024 +5,000 ", text)


def test_dry_run_of_published_models_needs_no_files(tmp_path, prompts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = (
        "encode",
        "--for",
        "comat",
        "--data",
        "prompts",
        "--data-path",
        prompts,
        "--dry-run",
        "--no-costs",
    )
    for model in ("sd15", "sdxl"):
        text = ok(*given, "--model", model).stdout
        assert re.search(r"sample 4x64x64 float32 +65,536 +5 ", text)
        assert f"encodings/comat-prompts-{model}," in text
    assert "4x128x128" in ok(*given, "--model", "sdxl", "--image-size", 1024).stdout
    assert list(tmp_path.iterdir()) == []


def test_captions_of_pictures_are_drawn_without_reading_one(tmp_path, tiny_coco, tiny_sd15_folder):
    root = tmp_path / "coco"
    notes = Path(tiny_coco.path) / "annotations" / "captions_train2017.json"
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / notes.name).write_bytes(notes.read_bytes())
    given = ("--data", "coco", "--data-path", root, "--model", tiny_sd15_folder, "--device", "cpu")
    with pytest.warns(UserWarning, match="no caption"):
        ok("encode", "--for", "comat", *given, "--steps", 1, "--captions", "first", "--out", tmp_path / "c")
    cache = Cache.read(tmp_path / "c")
    assert cache.complete and len(cache.index.ids) == 4


def test_a_tuned_denoiser_draws(tmp_path, options, whole, make_tiny_sd15):
    unet = make_tiny_sd15(tmp_path / "tuned", seed=5) / "unet"
    result = ok("encode", *options, "--unet", unet, "--out", tmp_path / "c")
    assert f", unet {unet}," in result.stdout and f"--unet {unet}" in result.stdout.splitlines()[-1]
    assert contents(tmp_path / "c") != contents(whole)
    said = refused("encode", *options, "--unet", unet, "--out", whole)
    assert "other weights of the denoiser" in said


# ------------------------------------------------------------------ stop and go on


def test_stopped_and_resumed_it_has_the_same_bits(tmp_path, options, whole, monkeypatch):
    out, real = tmp_path / "c", Drawer.rows

    def rows(self, kind, numbers, report=None):
        if numbers[0] == 2:
            raise KeyboardInterrupt
        return real(self, kind, numbers, report)

    with monkeypatch.context() as patch:
        patch.setattr(Drawer, "rows", rows)
        result = call("encode", *options, "--out", out)
    assert result.exit_code == 130 and "1 of 3 shards are finished and kept; go on with" in result.stderr
    assert "unfinished encodings (1 of 3 shards)" in refused("encode", *options, "--out", out)
    done = ok("encode", "--resume", "--out", out, "--device", "cpu")
    assert "writing 2 of 3 shards" in done.stdout and contents(out) == contents(whole)


def test_no_room(tmp_path, options, monkeypatch):
    out = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(filling, "free_bytes", lambda _: 1000)
        said = refused("encode", *options, "--out", out)
    assert "1.0 kB free; make room, name another disk with --out, or write less: --limit N" in said
    assert not out.exists()
    with monkeypatch.context() as patch:
        full_disk(patch, 500, "images-00001")
        said = refused("encode", *options, "--out", out)
    assert "the disk is full; 1 of 3 shards are finished and kept" in said
    assert not (out / "images-00001.safetensors").exists()


def test_verify_draws_some_again(whole):
    result = ok("encode", "--verify", "--samples", 3, "--out", whole, "--device", "cpu")
    assert "3 of 3 shards are whole" in result.stdout and "3 rows, all with the same bits" in result.stdout


@pytest.mark.slow
def test_two_processes_fill_one_folder(tmp_path, options, whole):
    out = tmp_path / "c"
    command = [sys.executable, "-m", "align_cli", "encode", *options, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert contents(out) == contents(whole)


# ------------------------------------------------------------------ bad input


def test_what_is_refused(tmp_path, options, whole, tiny_sd3_folder, prompts):
    out = ("--out", tmp_path / "c")
    assert "--for must be one of pictures, comat, got 'komat'" in refused("encode", "--for", "komat")
    for flag, value in {"--layout": "exact", "--posterior": "sample"}.items():
        assert f"{flag} is for pictures that are encoded" in refused("encode", *options, flag, value, *out)
    assert "--steps says how the model draws; give --for comat" in refused("encode", "--steps", 3, *out)
    assert "take --captions first or random" in refused("encode", *options, "--captions", "all", *out)
    assert "sample.steps must be >= 1" in refused("encode", *options, "--steps", 0, *out)
    assert "must be a multiple of 4 pixels" in refused("encode", *options, "--image-size", 30, *out)
    flow = refused("encode", *options, "--model", tiny_sd3_folder, "--sampler", "ddpm", *out)
    assert "ddpm is not for flow-matching models" in flow
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    assert "holds no prompt" in refused("encode", *options, "--data-path", empty, *out)
    assert not (tmp_path / "c").exists()


def test_other_contents_are_not_mixed(tmp_path, options, whole, tiny_sd15_folder):
    before = contents(whole)
    assert "made with steps 2, now it is 3" in refused("encode", *options, "--steps", 3, "--out", whole)
    assert "made with guidance 7.5, now it is 1" in refused(
        "encode", "--resume", "--guidance", 1, "--out", whole, "--device", "cpu"
    )
    assert "was made with --for comat, now it is pictures" in refused(
        "encode", "--for", "pictures", "--resume", "--out", whole
    )
    shapes = ("--model", tiny_sd15_folder, "--limit", 4, "--device", "cpu", "--out", whole)
    assert "the pictures 'drawn by the model', now it is 'those of the" in refused("encode", *shapes)
    assert contents(whole) == before


# ------------------------------------------------------------------ who trains from it


def test_methods_that_learn_from_no_drawn_latents_are_refused(tmp_path, whole, tiny_sd15_folder):
    common = ("--preset", "none", "--model", tiny_sd15_folder, "--cache", whole, "--out", tmp_path / "run")
    said = refused("train", "textcraftor", *common, "--data", "prompts")
    assert "were drawn by a model" in said and "textcraftor does not; encode pictures with" in said
    drawn = tmp_path / "shapes"
    options = ("--model", tiny_sd15_folder, "--limit", 8, "--steps", 1, "--device", "cpu", "--out", drawn)
    ok("encode", "--for", "comat", *options)
    shapes = ("--preset", "none", "--model", tiny_sd15_folder, "--cache", drawn, "--out", tmp_path / "run")
    assert "softrepa does not; encode pictures" in refused("train", "softrepa", *shapes)
    assert not (tmp_path / "run").exists()


def test_methods_that_do_get_them(tmp_path, whole, tiny_sd15_folder, monkeypatch, capsys):
    monkeypatch.setattr(TextCraftorConfig, "latents", True)
    flags = {"data.name": "prompts", "data.cache": whole, "data.num_examples": 0}
    dataset = open_data(config.resolve("textcraftor", flags=flags))
    assert dataset.get(0, np.random.default_rng(0)).latents is not None
    assert capsys.readouterr().err == ""
    real = tmp_path / "pictures"
    given = ("--model", tiny_sd15_folder, "--limit", 4, "--device", "cpu", "--out", real)
    ok("encode", *given)
    flags = {"data.name": "shapes", "data.cache": real, "data.num_examples": 4}
    dataset = open_data(config.resolve("textcraftor", preset="none", flags=flags))
    assert dataset.get(0, np.random.default_rng(0)).latents.std is not None
    assert f"note: {real} holds encodings of pictures; textcraftor takes them" in capsys.readouterr().err


def test_the_command_to_train_with_takes_the_latents(monkeypatch, tmp_path, tiny_sd15_folder, whole):
    """Also where the preset draws them in every step; without that, what to give is said."""
    work = DrawnWork(DrawRequest(model=ModelSettings(name="tiny-sd15"), data=DataSettings(), purpose="comat"))
    assert "--set comat.real=stored" in work.train_command(whole)
    monkeypatch.chdir(tmp_path)
    train = ["train", "comat", "--data", "prompts", "--cache", whole, "--model", tiny_sd15_folder]
    said = "--set comat.real=stored and a comat.fidelity_weight above 0"
    for wrong in ("comat.real=drawn", "comat.fidelity_weight=0"):
        assert said in refused(*train, "--preset", "none", "--set", wrong)
