"""`t2ialign encode`: write, stop, resume, repair, look over; several processes; bad input; training."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cache_helpers import full_disk
from training_helpers import trace
from typer.testing import CliRunner

from align_cli.cli.main import app
from align_cli.data import filling
from align_cli.data.cache import Cache
from align_cli.data.encoding import Encoder

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.filterwarnings("ignore:.*have no caption")


@pytest.fixture
def coco(tiny_coco) -> Path:
    return Path(tiny_coco.path)


@pytest.fixture
def options(tiny_sd15_folder, coco) -> list[str]:
    """Four pictures with five captions: one shard of pictures, three of captions."""
    given = {
        "--model": tiny_sd15_folder, "--data": "coco", "--data-path": coco, "--image-size": 32,
        "--captions": "all", "--batch-size": 2, "--shard-items": 8, "--seed": 3, "--device": "cpu",
    }  # fmt: skip
    return [str(word) for pair in given.items() for word in pair]


SHARDS = [f"captions-0000{k}.safetensors" for k in range(3)] + ["images-00000.safetensors"]
ALL = sorted([*SHARDS, ".lock", "items.json", "manifest.json"])


def call(*args: object, command: str = "encode"):
    return CliRunner().invoke(app, [command, *map(str, args)])


def ok(*args: object, command: str = "encode"):
    result = call(*args, command=command)
    assert result.exit_code == 0, result.output
    return result


def refused(*args: object, command: str = "encode") -> str:
    """The one line of a user error."""
    result = call(*args, command=command)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error: ") == 1, result.stderr
    return result.stderr


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SHARDS}


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory) -> Path:
    """Where the encodings without a stop are put, by whoever needs them first."""
    return tmp_path_factory.mktemp("whole") / "c"


@pytest.fixture
def whole(whole_folder, options) -> Path:
    """Do not write into it."""
    if not whole_folder.exists():
        ok(*options, "--out", whole_folder)
    return whole_folder


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copied")


# ------------------------------------------------------------------ the course of it


def test_encode_says_how_many_bytes_and_where(tmp_path, options):
    out = tmp_path / "c"
    result = ok(*options, "--out", out)
    assert names(out) == ALL
    size = sum((out / name).stat().st_size for name in [*SHARDS, "items.json"])
    assert f"in all {size:,} bytes" in result.stdout
    assert (
        "mean 4x8x8 float32, std 4x8x8 float32" in result.stdout and "tokens 32x32 float32" in result.stdout
    )
    assert "captions 20/20" in result.stderr and "images 4/4" in result.stderr
    assert f"--cache {out}" in result.stdout
    before = contents(out)
    assert "complete; nothing to do" in ok(*options, "--out", out).stdout
    assert "complete; nothing to do" in ok("--resume", "--out", out).stdout
    assert contents(out) == before


def test_what_is_promised_of_the_loss(tmp_path, options):
    def notes(*more: object) -> str:
        return ok(*options, *more, "--dry-run", "--no-costs", "--out", tmp_path / "c").stdout

    promise = "the loss has the bits of encoding on the fly at the same batch size"
    assert f"{promise}\n" in notes()
    assert f"{promise} in the first epoch, and later" in notes("--captions", "random")
    assert f"{promise}, were the first caption" in notes("--captions", "first")
    assert promise not in notes("--posterior", "sample")  # a draw that training does not make


def test_one_row_per_call(tmp_path, options):
    """For processes that have a row each. SoftREPA trains on no such batch alone, so none is recommended."""
    out = tmp_path / "c"
    line = ok(*options, "--batch-size", 1, "--out", out).stdout.splitlines()[-1]
    assert "train softrepa" in line and "--batch-size" not in line
    assert Cache.read(out).about["batch_size"] == 1


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_other_families_without_the_weights_of_their_denoisers(
    tmp_path, options, tiny_sdxl_folder, tiny_sd3_folder, name
):
    model = tmp_path / "model"
    shutil.copytree({"sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}[name], model)
    (model / ("unet" if name == "sdxl" else "transformer") / "diffusion_pytorch_model.safetensors").unlink()
    ok(*options, "--model", model, "--dtype", "bfloat16", "--captions", "first", "--out", tmp_path / "c")
    result = ok("--verify", "--out", tmp_path / "c", "--device", "cpu")
    assert "2 of 2 shards are whole" in result.stdout and "8 rows, all with the same bits" in result.stdout


def test_training_needs_no_pictures_and_gives_the_same_trace(
    tmp_path, options, whole, tiny_sd15_folder, coco
):
    sets = {
        "data.image_size": 32, "data.num_workers": 0, "train.log_every": 1, "softrepa.temperature": 0.3,
        "train.num_threads": 1,
    }  # fmt: skip
    common = [
        "softrepa",
        "--model",
        tiny_sd15_folder,
        "--preset",
        "none",
        "--data",
        "coco",
        "--device",
        "cpu",
        "--seed",
        3,
    ]
    common += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    common += ["--batch-size", 2, "--steps", 5, "--no-eval"]
    ok(*common, "--data-path", coco, "--out", tmp_path / "plain", command="train")
    ok(*common, "--cache", whole, "--out", tmp_path / "cached", command="train")
    assert trace(tmp_path / "cached") == trace(tmp_path / "plain")


def test_the_command_that_is_printed_trains(tmp_path, options):
    """All that it needs to fit the encodings is in it."""
    given = ("--dtype", "bfloat16", "--captions", "first")
    printed = ok(*options, *given, "--out", tmp_path / "my encodings").stdout
    command = shlex.split(printed.partition("train from them: ")[2])
    assert command[:3] == ["t2ialign", "train", "softrepa"]
    ok(*command[2:], "--steps", 1, "--no-eval", "--device", "cpu", "--out", tmp_path / "run", command="train")
    saved = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (saved["train"]["batch_size"], saved["train"]["seed"]) == (2, 3)


def test_dry_run_needs_no_weights_and_touches_nothing(tmp_path, coco, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ok("--model", "sd3", "--data", "coco", "--data-path", coco, "--dry-run", "--no-costs").stdout
    assert re.search(r"mean 16x64x64 float16, std 16x64x64 float16 +262,144 ", text)
    assert re.search(
        r"clip 77x2048 float16, t5 512x4096 float16, pooled 2048 float16 +4,513,792 +4 +1 +18.1 MB", text
    )
    assert "output folder: encodings/coco-sd3-512" in text
    rendered = ok("--model", "sd15", "--data", "shapes", "--limit", 4, "--dry-run", "--no-costs").stdout
    assert "mean 4x4x4 float16" in rendered, "the shapes world has its own size, whatever the preset says"
    odd = ("--model", "sd3", "--data", "coco", "--data-path", coco, "--dry-run", "--no-costs", "--image-size")
    assert "--image-size must be a multiple of 16 pixels for sd3, got 520; try 512" in refused(*odd, 520)
    small = ok(
        "--model", "sd3", "--data", "coco", "--data-path", coco, "--dry-run", "--no-costs",
        "--posterior", "sample", "--layout", "captions",
    ).stdout  # fmt: skip
    assert re.search("sample 16x64x64 float16 +131,072 ", small) and "t5 512" not in small
    assert list(tmp_path.iterdir()) == []


def test_the_preset_of_the_model_decides_where_nothing_is_said(tmp_path):
    out = tmp_path / "c"
    ok("--model", "tiny-sd15", "--limit", 4, "--out", out, "--device", "cpu", "--layout", "captions")
    about = Cache.read(out).about
    assert about["data"] == "shapes" and about["mixture"] == "pairs" and about["batch_size"] == 8
    assert about["seed"] == 42 and about["num_examples"] == 4


# ------------------------------------------------------------------ stop and go on


def test_ctrl_c_keeps_what_is_finished(tmp_path, options, whole, monkeypatch):
    out, real = tmp_path / "c", Encoder.rows

    def rows(self, kind, numbers, report=None):
        if numbers[0] == 8:
            raise KeyboardInterrupt
        return real(self, kind, numbers, report)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "rows", rows)
        result = call(*options, "--out", out)
    assert result.exit_code == 130
    assert (
        f"stopped: 2 of 4 shards are finished and kept; go on with: t2ialign encode --resume --out {out}"
        in (result.stderr)
    )
    assert "unfinished encodings (2 of 4 shards); go on with --resume" in refused(*options, "--out", out)
    training = ("softrepa", "--data", "coco", "--cache", out, "--set", "data.image_size=32")
    assert "not finished (2 of 4 shards)" in refused(*training, command="train")
    done = ok("--resume", "--out", out, "--device", "cpu")
    assert "writing 2 of 4 shards, 49,376 bytes" in done.stdout and "captions 20/20" in done.stderr
    assert contents(out) == contents(whole)


def test_a_full_disk(tmp_path, options, whole, monkeypatch):
    out = tmp_path / "c"
    with monkeypatch.context() as patch:
        full_disk(patch, 5000, "captions-00002")
        error = refused(*options, "--out", out)
    assert "the disk is full; 3 of 4 shards are finished and kept; make room" in error and "--resume" in error
    assert names(out) == [name for name in ALL if name != "captions-00002.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(filling, "free_bytes", lambda _: 0)
        error = refused("--resume", "--out", out, "--device", "cpu")
    assert "has 0 bytes free; 3 of 4 shards are finished and kept; make room" in error
    ok("--resume", "--out", out, "--device", "cpu")
    assert contents(out) == contents(whole)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


KILL = """
import os, signal, sys
from align_cli.cli.main import main
from align_cli.data import shards
real = shards.open_part
class Dying:
    def __init__(self, file): self.file, self.size = file, 0
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def write(self, data):
        self.size += self.file.write(data)
        if self.size > 2000:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
def open_part(path):
    return Dying(real(path)) if "captions-00001" in path.name else real(path)
shards.open_part = open_part
main()
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_shard(tmp_path, options, whole):
    out = tmp_path / "c"
    command = [sys.executable, "-c", KILL, "encode", *options, "--out", str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    part = out / ".captions-00001.safetensors.part"
    assert part.stat().st_size > 2000 and not (out / "captions-00001.safetensors").exists()
    before = (out / "captions-00000.safetensors").stat().st_mtime_ns
    ok("--resume", "--out", out, "--device", "cpu")
    assert names(out) == ALL and contents(out) == contents(whole)
    assert (out / "captions-00000.safetensors").stat().st_mtime_ns == before


TOGETHER = """
import os, sys, time
from pathlib import Path
from align_cli.cli.main import main
from align_cli.data import filling
here = Path(sys.argv.pop(1))
real = filling.write_shard
def write_shard(path, fields, tensors):
    with (here / f"{os.getpid()}.log").open("a") as file:
        file.write(path.name + "\\n")
    (here / f"{os.getpid()}").touch()
    deadline = time.monotonic() + 300
    while len([p for p in here.iterdir() if not p.suffix]) < 2:  # until the other has a shard in hand, too
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return real(path, fields, tensors)
filling.write_shard = write_shard
main()
"""


@pytest.mark.slow
def test_two_processes_at_once(tmp_path, options, whole):
    """Each shard is written once, by one of them; both end well, and the result is that of one."""
    out, here = tmp_path / "c", tmp_path / "here"
    here.mkdir()
    command = [sys.executable, "-c", TOGETHER, str(here), "encode", *options, "--out", str(out)]
    both = [
        subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    written = [path.read_text().split() for path in here.glob("*.log")]
    assert len(written) == 2 and sorted(written[0] + written[1]) == SHARDS
    assert sum("together with other processes" in out for out, _ in outputs) == 1
    assert names(out) == ALL and contents(out) == contents(whole)
    assert Cache.read(out).complete


# ------------------------------------------------------------------ damage


def test_a_truncated_shard_is_named_and_only_it_is_repaired(copied, whole):
    shard = copied / "captions-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    times = {name: (copied / name).stat().st_mtime_ns for name in SHARDS}
    result = call("--verify", "--out", copied, "--device", "cpu")
    assert result.exit_code == 1
    assert f"BAD   shard {shard} is cut off (31,880 of 32,880 bytes)" in result.stdout
    assert "3 of 4 shards are whole" in result.stdout and "all with the same bits" in result.stdout
    assert f"repair with: t2ialign encode --resume --verify --out {copied}" in result.stdout
    done = ok("--resume", "--out", copied, "--device", "cpu")
    assert f"shard {shard} is cut off" in done.stderr and "writing 1 of 4 shards" in done.stdout
    assert contents(copied) == contents(whole)
    changed = [name for name in SHARDS if (copied / name).stat().st_mtime_ns != times[name]]
    assert changed == [shard.name]


def test_a_changed_byte_is_found_by_its_hash(copied, whole):
    shard = copied / "captions-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    result = call("--verify", "--samples", 0, "--out", copied)
    assert result.exit_code == 1 and f"BAD   shard {shard} has another content (sha256)" in result.stdout
    assert "nothing to do" in ok("--resume", "--out", copied, "--device", "cpu").stdout  # sizes are right
    done = ok("--resume", "--verify", "--out", copied, "--device", "cpu")
    assert f"{shard} has another content (sha256): encoding it again" in done.stderr
    assert contents(copied) == contents(whole)
    manifest = (copied / "manifest.json").read_text()
    (copied / "manifest.json").write_text(json.dumps({**json.loads(manifest), "settings": {}}))
    assert "settings that cannot be read" in refused("--verify", "--out", copied)
    (copied / "manifest.json").write_text(manifest)
    (copied / "items.json").write_text("{}")
    assert "items.json is damaged" in refused("--verify", "--samples", 0, "--out", copied)
    ok("--resume", "--out", copied, "--device", "cpu")
    assert "whole" in ok("--verify", "--samples", 0, "--out", copied).stdout


def test_verify_of_what_is_whole(whole):
    result = ok("--verify", "--out", whole, "--device", "cpu", "--samples", 3)
    assert "4 of 4 shards are whole (sha256)" in result.stdout
    assert "encoded again: 6 rows, all with the same bits" in result.stdout


# ------------------------------------------------------------------ bad input


@pytest.mark.slow
def test_foreign_encodings_are_refused_with_the_reason(
    options, copied, make_tiny_sd15, tmp_path, tiny_sd3_folder, tiny_sd15_folder, monkeypatch
):
    def why(*more: object) -> str:
        return refused(*options, "--out", copied, *more)

    before = contents(copied)
    assert "model.dtype 'float32', now it is 'bfloat16'" in why("--dtype", "bfloat16")
    assert "size of the pictures in pixels 32, now it is 64" in why("--image-size", 64)
    assert "captions 'all', now it is 'first'" in why("--captions", "first")
    assert "batch_size 2, now it is 3" in why("--batch-size", 3)
    assert "number of items 4, now it is 3" in why("--limit", 3)
    assert "the dataset 'coco', now it is 'shapes'" in why("--data", "shapes", "--captions", "first")
    assert "family of the model 'sd15', now it is 'sd3'" in why("--model", tiny_sd3_folder)
    other = make_tiny_sd15(tmp_path / "other", seed=5)
    assert "other weights of the vae" in why("--model", other)
    assert "other weights of the vae" in refused("--verify", "--out", copied, "--model", other)
    training = ["softrepa", "--preset", "none", "--data", "coco", "--set", "data.image_size=32", "--no-eval"]
    run = [*training, "--out", tmp_path / "run", "--cache", copied, "--device", "cpu"]
    assert "other weights of the vae" in refused(*run, "--model", other, command="train")
    error = refused(*run, "--model", tiny_sd15_folder, "--set", "data.image_size=64", command="train")
    assert (
        "do not fit this run: they were made with the size of the pictures in pixels 32, now it is 64"
        in error
    )
    assert not (tmp_path / "run").exists()
    assert contents(copied) == before
    same = shutil.copytree(tiny_sd15_folder, tmp_path / "the-same-weights")
    assert "nothing to do" in ok(*options, "--out", copied, "--model", same).stdout
    with monkeypatch.context() as patch:
        patch.setattr(filling, "free_bytes", lambda _: 0)
        assert "kB free without the encodings that are to be replaced" in why(
            "--image-size", 64, "--overwrite"
        )
    assert contents(copied) == before and Cache.read(copied).complete
    ok(*options, "--out", copied, "--captions", "first", "--overwrite")
    assert [n for n in names(copied) if n.startswith("captions")] == ["captions-00000.safetensors"]


@pytest.mark.slow
def test_what_cannot_be_encoded(tmp_path, options, coco, monkeypatch, tiny_sd3_folder):
    out = tmp_path / "c"

    def error(*more: object) -> str:
        text = refused(*options, "--out", out, *more)
        assert not out.exists()
        return text

    assert "--layout must be one of exact, captions, got 'tiny'" in error("--layout", "tiny")
    assert "--captions must be one of first, random, all" in error("--captions", "some")
    assert "--shard-items must be >= 1" in error("--shard-items", 0)
    assert "--image-size must be a multiple of 4 pixels" in error("--image-size", 30)
    assert "unknown dataset" in error("--data", "cocoo")
    assert "draws its captions afresh" in error("--data", "shapes")
    assert "holds no encodings" in error("--resume")
    assert "give one of them" in error("--resume", "--overwrite")
    assert "holds no encodings" in error("--verify")
    usage = filling.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(filling.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert re.search(r"9\d\.\d kB are to be written to .* its disk has 1.0 kB free", error())
        patch.setenv("WORLD_SIZE", "2")
        assert "--overwrite is for one process" in error("--overwrite")
    assert "at most 128 pixels" in error("--model", tiny_sd3_folder, "--image-size", 136)
    before = names(coco)
    foreign = "is not empty and holds no encodings (but annotations); choose another folder with --out"
    assert foreign in refused(*options, "--out", coco)
    assert names(coco) == before
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in refused(*options, "--out", tmp_path / "file" / "c")
    if not torch.cuda.is_available():
        assert "device cuda is not there" in error("--device", "cuda")


def test_a_broken_picture_is_named(tmp_path, options, coco):
    root = shutil.copytree(coco, tmp_path / "coco")
    (root / "train2017" / "000000000031.jpg").write_bytes(b"no image")
    out = tmp_path / "c"
    assert "000000000031.jpg is no image" in refused(*options, "--data-path", root, "--out", out)
    assert json.loads((out / "manifest.json").read_text())["shards"] == {}
    shutil.copy(coco / "train2017" / "000000000031.jpg", root / "train2017")
    ok("--resume", "--out", out, "--device", "cpu")
    assert names(out) == ALL
