"""A disk that is full, read-only or unplugged: one line, exit code 2, the last good state, and on again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from cli_helpers import call, ok, refused
from fault_helpers import SmallDisk, leftovers, read_only
from PIL import Image
from safetensors.torch import load_file, save_file
from training_helpers import make_coco, trace

from align_cli import adapters
from align_cli.training import checkpoint, log

FULL = "the disk is full"
STEPS = 6


@pytest.fixture
def disk(tmp_path):
    with SmallDisk(tmp_path / "disk") as small:
        yield small


@pytest.fixture
def training(tiny_sd15_folder) -> list[object]:
    sets = {
        "data.num_workers": 0, "data.num_examples": 16, "train.log_every": 1, "train.save_every": 2,
        "sample.steps": 1, "sample.guidance": 1.0, "eval.num_prompts": 4, "softrepa.temperature": 0.3,
        "train.num_threads": 1, "softrepa.use_t_table": "true",
    }  # fmt: skip
    given = ["--model", tiny_sd15_folder, "--preset", "none", "--steps", STEPS, "--batch-size", 2]
    return ["train", "softrepa", *given, *(w for k, v in sets.items() for w in ("--set", f"{k}={v}"))]


@pytest.fixture
def whole(training, tmp_path) -> Path:
    ok(*training, "--out", tmp_path / "whole", "--no-eval")
    return tmp_path / "whole"


def at_call(monkeypatch, owner, name: str, when, work) -> None:
    """Do `work` once, just before the first call of owner.name for whose list of arguments `when` is true."""
    real, done = getattr(owner, name), []

    def spy(*args, **kwargs):
        if not done and when(args):
            done.append(1)
            work()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)


def last_line(*args: object) -> str:
    """The line of the error of a command that says other things before it."""
    result = call(*args)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.stderr.rstrip().splitlines()[-1] == lines[0], result.stderr
    return lines[0]


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter.safetensors").read_bytes()


def pictures(folder: Path) -> dict[str, str]:
    found = {
        p.relative_to(folder).as_posix(): sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.png")
    }
    assert found
    return found


# ------------------------------------------------------------------ training


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "when", "room", "words"),
    [
        (
            checkpoint, "_write", lambda args: args[1] == 4, 8192,
            "cannot write checkpoint {out}/checkpoints/step-00000004: {full}; the last good checkpoint is "
            "{out}/checkpoints/step-00000002; make room, then go on with --resume",
        ),
        (
            log.MetricsFile, "append", lambda args: args[1]["step"] == 3, 0,
            "metrics.jsonl: {full}; make room, then go on with --resume",
        ),
        (
            adapters, "_write", bool, 0, "cannot write the adapter to {out}/adapter: {full}; make room",
        ),
    ],
    ids=["checkpoint", "metrics", "adapter"],
)  # fmt: skip
def test_training_on_a_full_disk(disk, training, whole, monkeypatch, owner, name, when, room, words):
    out = disk.folder / "run"
    with monkeypatch.context() as patch:
        if name == "append":  # a line is small: it fits into the page of the lines before it

            def stuff() -> None:
                with (out / "metrics.jsonl").open("a") as file:
                    file.write("{" * (4096 - file.tell() % 4096))
                disk.fill()

            at_call(patch, owner, name, when, stuff)
        else:
            at_call(patch, owner, name, when, lambda: disk.fill(room))
        said = last_line(*training, "--out", out, "--no-eval")
    assert words.format(out=out, full=disk.reason) in said
    assert leftovers(out) == []
    for step in (out / "checkpoints").iterdir():
        checkpoint.read_step(step)
    disk.empty()
    ok(*training, "--out", out, "--no-eval", "--resume")
    assert trace(out) == trace(whole) and adapter_bytes(out) == adapter_bytes(whole)
    assert leftovers(out) == []


@pytest.mark.slow
def test_no_room_for_the_lines_of_a_new_metrics_file_keeps_the_old_one(disk, training, whole):
    out = disk.folder / "run"
    ok(*training, "--out", out, "--no-eval", "--steps", 4)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    disk.fill()
    said = last_line(*training, "--out", out, "--no-eval", "--resume")
    assert FULL in said or disk.reason in said
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    disk.empty()
    ok(*training, "--out", out, "--no-eval", "--resume")
    assert trace(out) == trace(whole) and adapter_bytes(out) == adapter_bytes(whole)


@pytest.mark.slow
def test_the_evaluation_at_the_end_of_a_training_on_a_full_disk(disk, training, whole, monkeypatch):
    from align_cli.evaluation import outcome

    out = disk.folder / "run"
    with monkeypatch.context() as patch:
        at_call(patch, outcome, "write_text", lambda args: args[0].name == "results.json", disk.fill)
        said = last_line(*training, "--out", out)
    assert f"{disk.reason}; make room, then go on with --resume" in said
    assert adapter_bytes(out) == adapter_bytes(whole)
    disk.empty()
    ok(*training, "--out", out, "--resume")
    assert json.loads((out / "result.json").read_text())["evaluation"]["means"]
    assert leftovers(out) == []


@pytest.mark.slow
def test_read_only_folders(training, tmp_path, tiny_sd15_folder):
    place = tmp_path / "locked"
    place.mkdir()
    drawing = ["--model", tiny_sd15_folder, "--steps", 1]
    words = {
        "train": training,
        "encode": ["encode", "--model", tiny_sd15_folder, "--preset", "none", "--limit", 4],
        "eval": ["eval", "shapes", *drawing, "--n", 2],
        "sample": ["sample", "--prompt", "a red circle", *drawing],
        "edit": ["edit", "--src-prompt", "a", "--tgt-prompt", "b", *drawing, "--n-start", 1],
    }
    with read_only(place):
        for name, given in words.items():
            said = refused(*given, "--out", place / "out")
            assert f"cannot write to {place / 'out'}" in said or f"cannot write {place / 'out'}" in said, name
            assert "choose another" in said, said
    assert list(place.iterdir()) == []


# ------------------------------------------------------------------ encode, eval, sample, edit, adapters


@pytest.mark.slow
def test_encoding_on_a_full_disk(disk, tiny_sd15_folder, tmp_path, monkeypatch):
    from align_cli.data import shards

    command = ["encode", "--model", tiny_sd15_folder, "--preset", "none", "--limit", 24, "--batch-size", 4]
    command += ["--shard-items", 8]
    ok(*command, "--out", tmp_path / "whole")
    out = disk.folder / "encodings"
    with monkeypatch.context() as patch:
        at_call(
            patch, shards, "open_part", lambda args: "images-00001" in args[0].name, lambda: disk.fill(4096)
        )
        said = last_line(*command, "--out", out)
    assert f"{disk.reason}; 1 of " in said and "shards are finished and kept; make room" in said
    assert leftovers(out) == [".lock"]
    disk.empty()
    ok(*command, "--out", out, "--resume")
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert (out / shard.name).read_bytes() == shard.read_bytes()
    ok("encode", "--verify", "--out", out, "--samples", 2)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["picture", "results.json", "scores"])
def test_an_evaluation_on_a_full_disk(disk, tiny_sd15_folder, tmp_path, monkeypatch, what):
    from align_cli import pictures as pictured
    from align_cli.evaluation import outcome, scoring

    command = ["eval", "shapes", "--model", tiny_sd15_folder, "--n", 8, "--steps", 1, "--guidance", 1]
    command += ["--batch-size", 2]
    ok(*command, "--out", tmp_path / "whole")
    out = disk.folder / "eval"
    with monkeypatch.context() as patch:
        if what == "picture":
            at_call(patch, pictured, "write_png", lambda args: "00003" in args[1].name, disk.fill)
        elif what == "scores":
            at_call(patch, scoring, "write_text", bool, disk.fill)
        else:
            at_call(patch, outcome, "write_text", lambda args: args[0].name == what, disk.fill)
        said = last_line(*command, "--out", out)
    assert f"{disk.reason}; make room" in said
    assert leftovers(out) == []
    disk.empty()
    ok(*command, "--out", out, "--resume")
    assert pictures(out / "images") == pictures(tmp_path / "whole" / "images")
    first, second = (json.loads((p / "results.json").read_text()) for p in (out, tmp_path / "whole"))
    assert first["items"] == second["items"] and first["means"] == second["means"]


@pytest.mark.slow
def test_drawing_and_editing_on_a_full_disk(disk, tiny_sd15_folder):
    drawing = ["--model", tiny_sd15_folder, "--steps", 2]
    commands = {
        "sample": ["sample", "--prompt", "a red circle", *drawing],
        "edit": ["edit", "--src-prompt", "a", "--tgt-prompt", "b", *drawing, "--n-start", 1],
    }
    for name, command in commands.items():
        disk.fill()
        said = last_line(*command, "--out", disk.folder / name)
        assert f"{disk.reason}; " in said
        assert leftovers(disk.folder) == []
        disk.empty()
        ok(*command, "--out", disk.folder / name, "--overwrite")
        assert pictures(disk.folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya", "official"])
def test_exporting_to_a_full_disk(disk, tmp_path, tiny_sd15_folder, form):
    sets = {
        "comat.token_weight": 0, "comat.pixel_weight": 0,
        "comat.fidelity_weight": 0, "comat.steps": 2, "comat.grad_steps": 1, "comat.lora_rank": 4,
        "comat.rewards": '{"tiny-blip" = 1.0}', "data.num_workers": 0, "data.num_examples": 8,
    }  # fmt: skip
    train = ["train", "comat", "--model", tiny_sd15_folder, "--preset", "none", "--steps", 1, "--no-eval"]
    train += ["--batch-size", 2, "--data", "shapes"]
    ok(*train, *(w for k, v in sets.items() for w in ("--set", f"{k}={v}")), "--out", tmp_path / "run")
    out = disk.folder / "out"
    command = ["adapters", "export", tmp_path / "run", "--to", form, "--out", out]
    disk.fill()
    said = last_line(*command)
    assert disk.reason in said and "cannot write" in said
    assert leftovers(disk.folder) == [] and not out.exists()
    disk.empty()
    ok(*command)
    umask = os.umask(0)
    os.umask(umask)
    for path in out.rglob("*.*"):
        assert path.is_dir() or path.stat().st_mode & 0o777 == 0o666 & ~umask, path


@pytest.mark.slow
def test_importing_to_a_full_disk(disk, tmp_path, tiny_sd15_folder):
    release = tmp_path / "tokens.safetensors"
    save_file({"dc_tokens": torch.randn(2, 32)}, release)
    out = disk.folder / "out"
    command = ["adapters", "import", "softrepa", tmp_path, "--model", tiny_sd15_folder, "--out", out]
    disk.fill()
    said = last_line(*command)
    assert f"cannot write the adapter to {out}: {disk.reason}; make room" in said
    assert leftovers(disk.folder) == [] and not out.exists()
    disk.empty()
    ok(*command)
    assert load_file(out / "adapter.safetensors")


# ------------------------------------------------------------------ what is damaged, what has gone


def flip(path: Path, share: float = 0.7) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.slow
def test_damaged_checkpoints(training, whole, tmp_path):
    steps = sorted((whole / "checkpoints").iterdir())
    assert len(steps) == 2
    for bad, said in (
        (steps[-1:], "resumed at step 4"),
        (steps, "holds no whole checkpoint yet: starting at step 0"),
    ):
        out = tmp_path / f"cut{len(bad)}"
        shutil.copytree(whole, out)
        for step in bad:
            flip(out / "checkpoints" / step.name / "state.pt")
        result = ok(*training, "--out", out, "--no-eval", "--resume")
        for step in bad:
            name = out / "checkpoints" / step.name
            assert f"warning: checkpoint {name} is damaged (state.pt has another sha256)" in result.stderr
        assert said in result.stderr
        assert trace(out) == trace(whole) and adapter_bytes(out) == adapter_bytes(whole)


@pytest.mark.slow
def test_damaged_shards_and_a_cache_that_has_gone(training, tiny_sd15_folder, tmp_path, monkeypatch):
    from align_cli.methods.softrepa.method import SoftREPA

    cache = tmp_path / "encodings"
    encode = ["encode", "--model", tiny_sd15_folder, "--preset", "none", "--limit", 16, "--batch-size", 2]
    ok(*encode, "--shard-items", 4, "--out", cache)
    good = {p.name: p.read_bytes() for p in cache.iterdir()}
    shard = cache / "images-00001.safetensors"
    using = [*training, "--cache", cache, "--no-eval"]
    shard.write_bytes(good[shard.name][:-9])
    assert f"shard {shard} is cut off" in refused(*using, "--out", tmp_path / "a")
    shard.unlink()
    assert f"shard {shard} cannot be read" in refused(*using, "--out", tmp_path / "a")
    ok("encode", "--resume", "--out", cache)
    assert shard.read_bytes() == good[shard.name]
    flip(shard)
    result = call("encode", "--verify", "--samples", 0, "--out", cache)
    assert result.exit_code == 1 and f"BAD   shard {shard} has another content (sha256)" in result.stdout
    ok("encode", "--resume", "--verify", "--out", cache)
    assert shard.read_bytes() == good[shard.name]
    out = tmp_path / "b"
    with monkeypatch.context() as patch:
        at_call(
            patch,
            SoftREPA,
            "step",
            lambda args: args[2].step == 0,
            lambda: cache.rename(tmp_path / "x"),
        )
        result = call(*using, "--out", out)
    assert result.exit_code == 2 and f"shard {cache}/images-0000" in result.stderr
    assert "cannot be read" in result.stderr and "Traceback" not in result.output
    assert f"--cache {cache} (data.cache) does not exist" in refused(*using, "--out", tmp_path / "c")
    (tmp_path / "x").rename(cache)
    ok(*using, "--out", out, "--resume")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*have no caption")
@pytest.mark.parametrize("fault", ["gone", "EIO"])
def test_pictures_that_vanish_while_a_training_runs(training, tmp_path, monkeypatch, fault):
    from align_cli.methods.softrepa.method import SoftREPA

    root = make_coco(tmp_path / "coco")
    coco = [*training, "--data", "coco", "--data-path", root, "--set", "data.image_size=32", "--no-eval"]
    coco += ["--set", "data.num_examples=0"]
    ok(*coco, "--out", tmp_path / "whole")
    out = tmp_path / "run"
    real = Image.open

    def unplug() -> None:
        if fault == "gone":
            root.rename(tmp_path / "elsewhere")
        else:
            monkeypatch.setattr(Image, "open", broken)

    def broken(file, *args, **kwargs):
        if "coco" in str(file):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return real(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        at_call(patch, SoftREPA, "step", lambda args: args[2].step == 4, unplug)
        said = last_line(*coco, "--out", out)
    assert str(root) in said and ".jpg" in said, said
    newest = out / "checkpoints" / "step-00000004"
    assert said.endswith(f"; stopped at step 6, the last good checkpoint is {newest}\n".rstrip()), said
    assert checkpoint.read_step(newest).step == 4
    if fault == "gone":
        assert f"--data-path {root} (data.path) does not exist" in refused(*coco, "--out", out, "--resume")
        (tmp_path / "elsewhere").rename(root)
    monkeypatch.setattr(Image, "open", real)
    ok(*coco, "--out", out, "--resume")
    assert trace(out) == trace(tmp_path / "whole")
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*have no caption")
def test_pictures_that_vanish_while_they_are_encoded(tiny_sd15_folder, tmp_path, monkeypatch):
    from align_cli.data import shards

    root = make_coco(tmp_path / "coco")
    command = [
        "encode",
        "--model",
        tiny_sd15_folder,
        "--preset",
        "none",
        "--data",
        "coco",
        "--data-path",
        root,
    ]
    command += ["--image-size", 32, "--batch-size", 1, "--shard-items", 1]
    ok(*command, "--out", tmp_path / "whole")
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        gone = lambda: root.rename(tmp_path / "elsewhere")  # noqa: E731
        at_call(patch, shards, "open_part", lambda args: "images-00001" in args[0].name, gone)
        said = last_line(*command, "--out", out)
    assert str(root) in said and ".jpg" in said
    (tmp_path / "elsewhere").rename(root)
    ok(*command, "--out", out, "--resume")
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert (out / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.slow
def test_a_broken_picture_of_an_evaluation_is_drawn_again(tiny_sd15_folder, tmp_path):
    command = ["eval", "shapes", "--model", tiny_sd15_folder, "--n", 4, "--steps", 1, "--out", tmp_path / "e"]
    ok(*command)
    first, path = pictures(tmp_path / "e" / "images"), tmp_path / "e" / "images" / "base" / "00002.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    ok(*command, "--resume")
    assert pictures(tmp_path / "e" / "images") == first
    path.write_bytes(whole[: len(whole) // 2])
    given = [
        "eval",
        "shapes",
        "--n",
        4,
        "--images",
        tmp_path / "e" / "images" / "base",
        "--out",
        tmp_path / "f",
    ]
    assert f"broken: {path} is no whole picture" in last_line(*given)


@pytest.mark.slow
def test_a_broken_adapter(training, whole, tiny_sd15_folder, tmp_path):
    path = whole / "adapter" / "adapter.safetensors"
    content = path.read_bytes()
    flip(path)
    given = ["--adapter", whole, "--model", tiny_sd15_folder, "--out", tmp_path / "x"]
    for command in (
        ["sample", "--prompt", "a"],
        ["eval", "shapes", "--n", 2],
        ["edit", "--src-prompt", "a", "--tgt-prompt", "b"],
    ):
        assert "is truncated or altered, its sha256 is not the one in adapter.json" in refused(
            *command, *given
        )
    path.write_bytes(content[:100])
    assert "adapter.safetensors (100 bytes) is truncated or altered" in refused(
        "sample", "--prompt", "a", *given
    )
    assert not (tmp_path / "x").exists()
    ok(*training, "--out", whole, "--no-eval", "--resume")
    assert path.read_bytes() == content


@pytest.mark.slow
def test_a_picture_that_no_memory_holds_is_one_line(tiny_sd15_folder, tmp_path):
    sets = {
        "comat.image_size": 1024000, "comat.lora_rank": 4, "comat.rewards": '{"tiny-blip" = 1.0}',
        "comat.token_weight": 0, "comat.pixel_weight": 0, "comat.fidelity_weight": 0, "comat.steps": 2,
        "comat.grad_steps": 1, "data.num_workers": 0, "data.num_examples": 8,
    }  # fmt: skip
    train = ["train", "comat", "--model", tiny_sd15_folder, "--preset", "none", "--steps", 1, "--no-eval"]
    given = [*train, "--batch-size", 2, *(w for k, v in sets.items() for w in ("--set", f"{k}={v}"))]
    said = last_line(*given, "--out", tmp_path / "run")
    assert "not enough memory (" in said and "--batch-size" in said
