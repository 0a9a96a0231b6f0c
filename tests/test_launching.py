"""--num-processes: what the processes are given, signals, failures; with processes that take no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_helpers import ok, refused

from align_cli.cli import launching
from align_cli.launched import FOLDER

ROOT = Path(__file__).resolve().parent.parent

PARENT = """
import sys
import typer
from align_cli.cli import launching
launching.MODULE = ("-c", open(sys.argv[1]).read())
try:
    launching.launched_several(int(sys.argv[2]))
except typer.Exit as stop:
    sys.exit(stop.exit_code)
"""

CHILD = """
import os, signal, sys, time
from pathlib import Path
from align_cli import launched
launched.join()
rank, out = int(os.environ["RANK"]), Path(sys.argv[3])
"""


def start(tmp_path: Path, body: str, count: int = 2, **env: str) -> subprocess.Popen:
    """`launched_several` in a process of its own, on processes that do `body`."""
    (tmp_path / "child.py").write_text(CHILD + body)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", PARENT, str(tmp_path / "child.py"), str(count), str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    kept = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.Popen(command, env=kept | {"PYTHONPATH": str(ROOT)} | env, **pipes)


def run(tmp_path: Path, body: str, count: int = 2, **env: str) -> tuple[int, str, str]:
    process = start(tmp_path, body, count, **env)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(found) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_every_process_is_given(tmp_path):
    body = """
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
names += ["OMP_NUM_THREADS"]
(out / str(rank)).write_text(" ".join(os.environ[name] for name in names) + launched.again())
print("said by", rank)
"""
    code, out, err = run(tmp_path, body, 3)
    assert (code, out, err) == (0, "said by 0\n", "")
    words = [(tmp_path / "out" / str(rank)).read_text().split() for rank in range(3)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    for rank, found in enumerate(words):
        assert found[:5] == [str(rank), str(rank), "3", "3", "127.0.0.1"]
        assert found[6:] == [threads, "--num-processes", "3"]
    assert len({found[5] for found in words}) == 1


def test_threads_that_are_set_stay(tmp_path):
    code, out, _ = run(tmp_path, 'print(os.environ["OMP_NUM_THREADS"])', OMP_NUM_THREADS="7")
    assert (code, out) == (0, "7\n")


def test_a_mistake_of_all_is_told_once(tmp_path):
    code, out, err = run(tmp_path, 'launched.note_failure("error: no such thing", 2); sys.exit(2)')
    assert (code, out, err) == (2, "", "error: no such thing\n")


@pytest.mark.slow
def test_the_first_failure_is_told_and_ends_the_others(tmp_path):
    """The second process fails; the first, which waits for it, only fails because of that."""
    body = """
if rank == 1:
    raise RuntimeError("broken")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
time.sleep(100)
"""
    began = time.monotonic()
    code, _, err = run(tmp_path, body)
    assert code == 1 and err.startswith("Traceback") and err.endswith("RuntimeError: broken\n")
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_process_that_does_not_end_is_killed(tmp_path):
    body = """
if rank == 1:
    print("gone", file=sys.stderr)
    os._exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(100)
"""
    code, _, err = run(tmp_path, body)
    assert code == 3 and err == "gone\n"


def test_a_killed_process_is_named(tmp_path):
    body = """
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
launched.note_failure("error: connection closed", 1)
sys.exit(1)
"""
    code, _, err = run(tmp_path, body)
    assert code == 137 and err.count("\n") == 1
    assert err.startswith("error: process 1 of 2 was ended by SIGKILL")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once(tmp_path, number):
    body = """
counts = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: counts.append(number))
(out / f"ready{rank}").touch()
while not counts:
    time.sleep(0.01)
time.sleep(0.5)
(out / str(rank)).write_text(" ".join(map(str, map(int, counts))))
sys.exit(128 + counts[0] if rank == 0 else 0)
"""
    process = start(tmp_path, body)
    wait_for(lambda: len(list((tmp_path / "out").glob("ready*"))) == 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err == ""
    assert [(tmp_path / "out" / str(rank)).read_text() for rank in range(2)] == [str(int(number))] * 2


def test_the_processes_stop_when_the_command_is_gone(tmp_path):
    body = """
def stop(*_):
    (out / f"stopped{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(out / f"ready{rank}").touch()
time.sleep(100)
"""
    process = start(tmp_path, body)
    wait_for(lambda: len(list((tmp_path / "out").glob("ready*"))) == 2)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: len(list((tmp_path / "out").glob("stopped*"))) == 2)


def test_one_process_is_this_one(monkeypatch):
    monkeypatch.setattr(launching, "_Group", None)
    assert launching.launched_several(1) is False
    monkeypatch.setenv(FOLDER, "/folder")
    assert launching.launched_several(2) is False


@pytest.mark.slow
def test_options_that_do_not_fit(monkeypatch, tmp_path):
    monkeypatch.setattr(launching, "_Group", None)
    assert "--num-processes" in refused("train", "softrepa", "--num-processes", 0)
    assert "--verify alone" in refused("encode", "--verify", "--num-processes", 2)
    assert "setting" in ok("train", "softrepa", "--dry-run", "--num-processes", 2).stdout
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        for words in (["train", "softrepa"], ["encode"], ["eval", "shapes"], ["sample", "--prompt", "x"]):
            said = refused(*words, "--num-processes", 2)
            assert "is one of 2 that a launcher (torchrun, accelerate launch) has started" in said


def test_accelerate_that_started_one_process_in_place_of_several_is_noted(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert launching.launched_several(1) is False and capsys.readouterr().err == ""
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launching.launched_several(1) is False
    assert "accelerate launch --cpu has started a single process" in capsys.readouterr().err
