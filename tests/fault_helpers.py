"""Faults for tests: real commands in processes that are killed, a small disk, a read-only folder.

`Warm` is a process that has imported everything and loaded nothing; it forks a child for every command. A
child is a process of its own that runs the command from its first line to its last, and a SIGKILL is a
SIGKILL; only the seconds of `import torch` are saved.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEFTOVER = re.compile(r"\.(part|old|new)(-\d+)?$|^\.")
"""Names that no finished command leaves behind."""
PATIENCE = 120.0
"""Seconds after which a command hangs."""


# ---------------------------------------------------------------- processes


class Warm:
    """Context manager: commands in forked children of a process that is warm."""

    def __enter__(self) -> Warm:
        env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.finished(0)  # it answers once it is warm
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait(PATIENCE)

    def start(self, arguments: Sequence[object], log: Path, env: Mapping[str, str] | None = None) -> int:
        """Start `t2ialign ARGUMENTS`; returns the process id. Its output is added to `log`."""
        return self._ask({"argv": [str(a) for a in arguments], "log": str(log), "env": dict(env or {})})

    def finished(self, pid: int) -> int | None:
        """The exit code of a process, negative for a signal; None if it is still at work."""
        return self._ask({"poll": pid})

    def wait(self, pid: int) -> int:
        """The exit code of a process that comes to its end by itself."""
        deadline = time.monotonic() + PATIENCE
        while (code := self.finished(pid)) is None:
            assert time.monotonic() < deadline, "the command hangs"
            time.sleep(0.01)
        return code

    def run(self, arguments: Sequence[object], log: Path, env: Mapping[str, str] | None = None) -> int:
        """The exit code of `t2ialign ARGUMENTS`."""
        return self.wait(self.start(arguments, log, env))

    def _ask(self, request: dict[str, Any]) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def _serve() -> None:
    """The warm process."""
    import diffusers  # noqa: F401
    import torch
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    import align_cli.cli.main
    import align_cli.cli.measuring
    import align_cli.data.filling
    import align_cli.evaluation.engine
    import align_cli.evaluation.outcome
    import align_cli.evaluation.report
    import align_cli.methods.softrepa.method
    import align_cli.models.loading
    import align_cli.rewards.loading
    import align_cli.training.loop  # noqa: F401

    torch.set_num_threads(1)
    codes: dict[int, int] = {}
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if pid and pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        else:
            answer = os.fork()
            if answer == 0:
                _child(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _child(request: dict[str, Any]) -> None:
    """A command, from the first line to the last."""
    from align_cli.cli.main import main

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= request["env"]
    sys.argv = ["t2ialign", *request["argv"]]
    code = 1
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---------------------------------------------------------------- kills


def writing(folder: Path) -> bool:
    """Whether a file or a folder is being written below `folder`."""
    return any(p.name.endswith(".part") or ".new-" in p.name for p in folder.rglob(".*"))


def survive_kills(
    command: Callable[[], Sequence[object]],
    start: Callable[[Sequence[object]], Sequence[int]],
    poll: Callable[[int], int | None],
    folder: Path,
    *,
    whole: Callable[[], None],
    kills: int,
    window: float,
    seed: int,
) -> None:
    """Kill a command `kills` times, every third time while a file is being written. One that comes to its end
    before its kill does not count: `whole` looks at what it wrote, and the next one starts anew.

    Args:
        command: its words, as a user would type them now. start: the processes of one run. window: seconds
        within which a run is killed, evenly. folder: in which it writes.
    """
    rng = random.Random(seed)
    hit = number = 0
    while hit < kills:
        number += 1
        assert number <= 5 * kills, f"only {hit} of {number} kills hit"
        pids = start(command())
        until = time.monotonic() + rng.uniform(0, window)
        while time.monotonic() < until:
            time.sleep(0.001)
        while number % 3 == 2 and time.monotonic() < until + window and not writing(folder):
            if all(poll(pid) is not None for pid in pids):
                break
        for pid in pids:
            if poll(pid) is None:
                os.kill(pid, signal.SIGKILL)
        codes = [_end(poll, pid) for pid in pids]
        assert all(code in (0, -signal.SIGKILL) for code in codes), codes
        if -signal.SIGKILL in codes:
            hit += 1
        else:
            whole()
            shutil.rmtree(folder)


def _end(poll: Callable[[int], int | None], pid: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while (code := poll(pid)) is None:
        assert time.monotonic() < deadline, "a killed process does not end"
        time.sleep(0.001)
    return code


def leftovers(folder: Path) -> list[str]:
    """What lies in `folder` and should not, once a command has come to its end."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if LEFTOVER.search(p.name))


# ---------------------------------------------------------------- disks


class SmallDisk:
    """A folder on a disk of its own, with as much room as the test wants.

    A tmpfs where mounting is allowed. Elsewhere the largest size of a file stands in for the disk: the kernel
    then refuses writes in the same places, with another reason.
    """

    def __init__(self, folder: Path, megabytes: int = 64) -> None:
        self.folder, self.megabytes = folder, megabytes

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir(parents=True)
        self.mounted = _mount("-t", "tmpfs", "-o", f"size={self.megabytes}m", "tmpfs", str(self.folder))
        self.reason = os.strerror(errno.EFBIG)
        if self.mounted:
            self.reason = "the disk is full"
        return self

    def __exit__(self, *error: object) -> None:
        self.empty()
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)

    @property
    def ballast(self) -> Path:
        return self.folder / "ballast"

    def fill(self, room: int = 0) -> None:
        """Leave room for `room` bytes more (whole pages), or for files of that size."""
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        stat = os.statvfs(self.folder)
        page = stat.f_frsize
        with self.ballast.open("ab") as file:
            file.write(bytes(max(0, stat.f_bavail - -(-room // page)) * page))

    def empty(self) -> None:
        """Make room."""
        if not self.mounted:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        self.ballast.unlink(missing_ok=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """`folder` cannot be written to; for root, whom permission bits do not stop, by a read-only mount."""
    if os.geteuid() != 0:
        before = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(before)
    elif _mount("--bind", str(folder), str(folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    else:
        subprocess.run(["chattr", "+i", str(folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["chattr", "-i", str(folder)], check=True)


def _mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    _serve()
