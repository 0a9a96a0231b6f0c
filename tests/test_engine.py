"""Drawing into a store: stopped and resumed, and shared by two processes, with the bits of one whole run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from softrepa_helpers import save_random_adapter
from typer.testing import CliRunner

from align_cli.cli.main import app
from align_cli.evaluation.drawing import my_share
from align_cli.evaluation.engine import peak_memory
from align_cli.evaluation.scoring import BATCH

DRAWING = ("--steps", "3", "--guidance", "2", "--batch-size", "4", "--device", "cpu")
NUM = 14
"""Prompts: three batches of four, and one of two."""
CHANGING = ("seconds", "memory", "created", "command")


@pytest.fixture(scope="module")
def adapter(tiny_sd15_folder, tmp_path_factory) -> Path:
    return save_random_adapter(tmp_path_factory.mktemp("a") / "adapter", tiny_sd15_folder)


@pytest.fixture(scope="module")
def words(adapter, tmp_path_factory) -> list[str]:
    """The command line, without --out."""
    prompts = tmp_path_factory.mktemp("p") / "words.txt"
    prompts.write_text("".join(f"a red circle and a blue square, number {i}\n" for i in range(NUM)))
    arms = ["--adapter", str(adapter), "--arm", f"half={adapter}@0.5"]
    return ["eval", str(prompts), *arms, "--scorers", "tiny-clip", *DRAWING]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "e"
    finish(words, out)
    return out


def finish(words: list[str], out: Path, *more: str) -> str:
    """Run to the end, in this process; what was said on stderr."""
    done = CliRunner().invoke(app, [*words, "--out", str(out), *more])
    assert done.exit_code == 0, done.output
    return done.stderr


def start(words: list[str], out: Path, *more: str, **env: str) -> subprocess.Popen:
    """The real command, in a process of its own."""
    command = [sys.executable, "-m", "align_cli", *words, "--out", str(out), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | env, **pipes)


def content(folder: Path) -> dict[str, bytes]:
    """All pictures and scores."""
    files = [p for part in ("images", "scores") for p in (folder / part).rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def results(folder: Path) -> dict:
    raw = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in raw.items() if key not in CHANGING}


def assert_same(folder: Path, whole: Path) -> None:
    assert content(folder) == content(whole)
    assert results(folder) == results(whole)
    assert (folder / "results.csv").read_text() == (whole / "results.csv").read_text()


def test_a_whole_run(whole):
    pictures = [name for name in content(whole) if name.endswith(".png")]
    assert len(pictures) == 3 * NUM
    raw = results(whole)
    assert [arm["name"] for arm in raw["arms"]] == ["base", "aligned", "half"]
    assert raw["arms"][2]["adapters"][0].endswith("@0.5") and len(raw["arms"][2]["hashes"][0]) == 64
    assert len(raw["items"]) == NUM and {row["arm"] for row in raw["comparisons"]} == {"aligned", "half"}
    assert raw["drift"][0]["feature_of"] == "tiny-clip" and raw["drift"][0]["feature_distance"] > 0
    assert [entry["name"] for entry in raw["audit"]] == ["text_encoder", "tiny-clip"]
    assert (whole / "report.html").stat().st_size > 10000
    assert json.loads((whole / "eval.json").read_text())["identity"]["weights"]["denoiser"]


@pytest.mark.slow
def test_kill_9_and_run_again(words, whole, tmp_path):
    """Killed while drawing, then while scoring; every picture is written once, and the bits are the same."""
    out = tmp_path / "e"
    times: dict[str, int] = {}
    for glob, count in (("images/aligned/*.png", 6), ("scores/base/*.jsonl", 1)):
        process = start(words, out, *(["--resume"] if times else []))
        while process.poll() is None and len(list(out.glob(glob))) < count:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in out.glob("images/*/*.png"):
            assert times.setdefault(str(path), path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    finish(words, out, "--resume")
    assert all(Path(path).stat().st_mtime_ns == when for path, when in times.items())
    assert_same(out, whole)
    assert f"0 of {3 * NUM} pictures to draw" in finish(words, out, "--resume")
    assert_same(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_how_to_go_on(words, tmp_path, number):
    out = tmp_path / "e"
    process = start([*words, "--steps", "50"], out)
    while process.poll() is None and not list(out.glob("images/base/*.png")):
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 128 + number, said
    again = shlex.join(["t2ialign", *words, "--steps", "50", "--out", str(out), "--resume"])
    assert said.splitlines()[-1] == f"stopped; what is finished is kept, go on with: {again}"
    assert not list(out.rglob("*.part"))


def two_processes(words: list[str], out: Path) -> tuple[list[int | None], list[tuple[str, str]]]:
    """Return codes, and what was said on stdout and stderr, of the command shared by two."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    both = [
        start(
            words, out, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1",
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=600) for process in both]
    return [process.returncode for process in both], said


@pytest.mark.slow
def test_two_processes_share_the_work(words, whole, tmp_path):
    codes, said = two_processes(words, tmp_path / "e")
    assert codes == [0, 0], said
    assert "tiny-clip" in said[0][0] and said[1][0] == ""
    assert_same(tmp_path / "e", whole)


@pytest.mark.slow
def test_a_mistake_that_one_of_two_processes_meets_is_one_line_of_both(tiny_sd15_folder, tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("a red circle\n" * BATCH + "a photo of a bench\n")  # which the other process scores
    words = ["eval", str(file), "--model", str(tiny_sd15_folder), "--scorers", "shapes", *DRAWING]
    codes, said = two_processes(words, tmp_path / "e")
    assert codes == [2, 2], said
    for _, stderr in said:
        assert "Traceback" not in stderr
        assert "error: shapes cannot judge the prompt 'a photo of a bench'" in stderr


def test_what_is_missing_is_made_again(words, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "e")
    for name in ("images/base/00001.png", "images/aligned/00013.png", "images/half/00006.png"):
        (out / name).unlink()
    kept = out / "images" / "base" / "00000.png"
    before = kept.stat().st_mtime_ns
    for path in (out / "scores" / "aligned").iterdir():
        path.write_text("".join(path.read_text().splitlines(True)[:5]))
    assert f"3 of {3 * NUM} pictures to draw" in finish(words, out, "--resume")
    assert kept.stat().st_mtime_ns == before
    assert_same(out, whole)


def test_every_process_does_every_other_batch():
    class Rank:
        def __init__(self, rank):
            self.rank, self.world_size = rank, 2

    missing = [0, 1, 5, 9, 10, 13]  # batches 0, 1, 2, 3 of four
    assert [my_share(missing, 4, Rank(r)) for r in range(2)] == [[0, 2], [1, 3]]
    assert [my_share([13], 4, Rank(r)) for r in range(2)] == [[3], []]


def test_peak_memory_is_in_bytes():
    process, gpu = peak_memory()
    assert 50 * 2**20 < process < 2**40
    assert gpu >= 0
