"""The real commands in two processes (--num-processes, torchrun, accelerate launch) against one process."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import free_port, ok

from align_cli.training.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
STEPS, NUM = 4, 5

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*have no caption")]


STARTS: dict[str, Callable[[], list[str]]] = {
    "num-processes": lambda: ["-m", "align_cli"],
    "torchrun": lambda: [
        "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_port", free_port(), "-m", "align_cli",
    ],
    "accelerate": lambda: accelerate("--multi_gpu"),
    "fsdp": lambda: accelerate("--use_fsdp", "--fsdp_version", "2"),
}  # fmt: skip


def accelerate(*kind: str) -> list[str]:
    words = [*kind, "--num_processes", "2", "--main_process_port", free_port()]
    return ["-m", "accelerate.commands.launch", *words, "-m", "align_cli"]


def start(how: str, words: list[str]) -> subprocess.Popen:
    """The command in two processes."""
    more = ["--num-processes", "2"] if how == "num-processes" else []
    command = [sys.executable, *STARTS[how](), *words, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)


def run(how: str, words: list[str]) -> str:
    """To its end; what was said on stdout."""
    process = start(how, words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def commands(tiny_sd15_folder, tiny_coco, tmp_path_factory) -> dict[str, list[str]]:
    """What is run, without --out."""
    prompts = tmp_path_factory.mktemp("p") / "words.txt"
    prompts.write_text("".join(f"a red circle and a blue square, number {i}\n" for i in range(NUM)))
    model = ["--model", str(tiny_sd15_folder), "--device", "cpu"]
    drawing = ["--steps", "2", "--guidance", "2", "--batch-size", "2", "--prompts", str(prompts)]
    sets = ["data.num_workers=0", "data.num_examples=16", "train.log_every=1", "softrepa.temperature=0.3"]
    found = {
        "train": ["softrepa", "--preset", "none", "--steps", str(STEPS), "--batch-size", "4", "--no-eval"],
        "encode": ["--data", "coco", "--data-path", tiny_coco.path, "--image-size", "32", "--captions", "all",
                   "--batch-size", "2", "--shard-items", "2"],
        "eval": [str(prompts), "--scorers", "tiny-clip", *drawing[:-2], "--limit", "4"],
        "sample": drawing,
    }  # fmt: skip
    found["train"] += [word for value in sets for word in ("--set", value)]
    return {name: [name, *words, *model] for name, words in found.items()}


@pytest.fixture(scope="module")
def alone(commands, tmp_path_factory) -> Callable[[str], Path]:
    """Folder of a command that was run in this process."""
    done: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp("one") / name
            ok(*commands[name], "--out", done[name])
        return done[name]

    return folder


def content(folder: Path, pattern: str) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob(pattern) if p.is_file()}
    assert found
    return found


def assert_same_losses(one: Path, two: Path) -> None:
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert len(first) == len(second) == STEPS
    for a, b in zip(first, second, strict=True):
        for key in ("softrepa/loss", "softrepa/err_own"):
            assert b[key] == pytest.approx(a[key], rel=1e-5)
    assert second[0]["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-5)


# One launcher for each command: what they hand to a process is the same for all; tests/test_sharding.py has
# `accelerate launch` with FSDP of train.


def test_train(commands, alone, tmp_path):
    said = run("torchrun", [*commands["train"], "--out", str(tmp_path / "two")])
    assert said.count("adapter: ") == 1
    assert_same_losses(alone("train"), tmp_path / "two")


def test_encode(commands, alone, tmp_path):
    run("accelerate", [*commands["encode"], "--out", str(tmp_path / "two")])
    assert content(alone("encode"), "*.safetensors") == content(tmp_path / "two", "*.safetensors")
    assert content(alone("encode"), "items.json") == content(tmp_path / "two", "items.json")


def test_eval(commands, alone, tmp_path):
    """Under accelerate's FSDP, of which a training alone takes something: every process loads everything."""
    run("fsdp", [*commands["eval"], "--out", str(tmp_path / "two")])
    one, two = (json.loads((p / "results.json").read_text()) for p in (alone("eval"), tmp_path / "two"))
    assert len(one["items"]) == 4 and one["items"] == two["items"] and one["arms"] == two["arms"]
    assert content(alone("eval"), "*.png") == content(tmp_path / "two", "*.png")


def test_sample(commands, alone, tmp_path):
    """Three batches of two: one process has two of them."""
    said = run("num-processes", [*commands["sample"], "--out", str(tmp_path / "two")])
    assert said.splitlines()[0] == f"{NUM} pictures in {tmp_path / 'two'}"
    assert content(alone("sample"), "*.png") == content(tmp_path / "two", "*.png")


def test_ctrl_c_once_saves_once_and_one_process_goes_on(commands, alone, tmp_path):
    """Begun with two processes, stopped, gone on with by one: the losses of a run that never stopped."""
    out = tmp_path / "two"
    words = [*commands["train"], "--out", str(out)]
    process = start("num-processes", [*words, "--set", "train.save_every=100", "--steps", "100000"])
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.count("stopping: this step is finished and saved first") == 1 and "Traceback" not in err
    hint = f"go on with: t2ialign train softrepa --resume --out {out} --num-processes 2"
    assert said.splitlines()[-1] == hint
    done = int(sorted(p.name for p in (out / "checkpoints").iterdir())[-1].removeprefix("step-"))
    if done < STEPS:
        again = shlex.split(hint.partition("t2ialign ")[2].removesuffix(" --num-processes 2"))
        ok(*again, "--steps", STEPS, "--no-eval")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:STEPS]))
    assert_same_losses(alone("train"), out)


def test_a_batch_that_cannot_be_split_is_told_once(commands, tmp_path):
    words = [*commands["train"], "--batch-size", "5", "--out", str(tmp_path / "two")]
    process = start("num-processes", words)
    said, err = process.communicate(timeout=200)
    assert process.returncode == 2 and said == ""
    assert err.count("error: ") == 1 and "train.batch_size 5 cannot be split over 2 processes" in err
    assert not (tmp_path / "two").exists()


def test_a_mistake_that_one_process_meets_ends_all(tiny_sd15_folder, tmp_path):
    """A picture that cannot be scored, which the second process meets."""
    file = tmp_path / "words.txt"
    file.write_text("a red circle\n" * 32 + "a photo of a bench\n")
    words = ["eval", str(file), "--model", str(tiny_sd15_folder), "--scorers", "shapes", "--device", "cpu"]
    words += ["--steps", "1", "--guidance", "1", "--batch-size", "16", "--out", str(tmp_path / "e")]
    process = start("num-processes", words)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert err.count("error: ") == 1 and "shapes cannot judge the prompt 'a photo of a bench'" in err
