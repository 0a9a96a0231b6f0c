"""One command at a time writes to a folder of a training or an evaluation."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align_cli import files
from align_cli.errors import UserError
from align_cli.files import LOCK, only_writer

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys, time
from pathlib import Path
from align_cli.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "run"."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_who_the_first_is(tmp_path, holder):
    with pytest.raises(UserError) as caught, only_writer(tmp_path / "run"):
        pass
    assert f"another t2ialign is writing to {tmp_path / 'run'} (process {holder.pid} on " in str(caught.value)
    with only_writer(tmp_path / "run", main=False), only_writer(tmp_path / "other"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_kill_9_leaves_no_lock_behind(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with only_writer(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_what_was_made_for_the_lock_goes_with_it(tmp_path):
    with only_writer(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["file"]
    with pytest.raises(ValueError), only_writer(tmp_path / "c"):
        raise ValueError
    assert not (tmp_path / "c").exists()


def test_a_lock_file_that_its_owner_removed_meanwhile_is_made_anew(tmp_path, monkeypatch):
    real, times = files.fcntl.lockf, []

    def late(handle, how):
        times.append(handle)
        if len(times) == 1:
            (tmp_path / LOCK).unlink()
        real(handle, how)

    monkeypatch.setattr(files.fcntl, "lockf", late)
    with only_writer(tmp_path):
        assert len(times) == 2 and (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch):
    def none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", none)
    with pytest.warns(UserWarning, match="knows no locks"), only_writer(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_the_second_of_two_commands_ends_with_one_line(kind, tmp_path, holder, tiny_sd15_folder):
    words = {
        "train": ["train", "softrepa", "--preset", "none", "--steps", "2", "--no-eval"],
        "eval": ["eval", "shapes", "--n", "2", "--steps", "1"],
    }[kind]
    command = [sys.executable, "-m", "align_cli", *words, "--model", str(tiny_sd15_folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], env=env, capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert said[0].startswith(
        f"error: another t2ialign is writing to {tmp_path / 'run'} (process {holder.pid}"
    )
    assert [p.name for p in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.mark.slow
def test_a_training_that_works_locks_its_folder(tmp_path, tiny_sd15_folder):
    out = tmp_path / "run"
    given = ["--model", str(tiny_sd15_folder), "--preset", "none", "--no-eval", "--out", str(out)]
    command = [sys.executable, "-m", "align_cli", "train", "softrepa", *given]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    quick = ["--set", "data.num_examples=16", "--set", "data.num_workers=0"]
    first = subprocess.Popen([*command, *quick, "--steps", "100000"], env=env, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (out / "run.json").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    second = subprocess.run([*command, "--resume"], env=env, capture_output=True, text=True, check=False)
    third = subprocess.run([*command, "--overwrite"], env=env, capture_output=True, text=True, check=False)
    first.kill()
    first.communicate()
    for done in (second, third):
        assert done.returncode == 2 and f"(process {first.pid} on " in done.stderr, done.stderr
    resumed = subprocess.run(
        [*command, *quick, "--resume", "--steps", "1"], env=env, capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert not (out / LOCK).exists()
