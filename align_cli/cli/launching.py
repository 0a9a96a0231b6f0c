"""`--num-processes`: the same command in several processes of this machine. No torch at import.

Plain processes with the variables that torchrun sets, and not torch's own launcher: that one answers Ctrl-C
with a second signal, kills after 30 seconds what is still saving, and tells an error once for every process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

from align_cli.errors import UserError
from align_cli.launched import FOLDER, asked, note_path, world_size

LEAVE_SECONDS, STOP_SECONDS = 3.0, 5.0
"""After the failure of one process: until the others are told to stop, and then until they are killed."""
POLL = 0.05
THREADS = "OMP_NUM_THREADS"
MODULE = ("-m", "align_cli")


def launched_several(count: int) -> bool:
    """Run this command in `count` processes, to their end; False where this process is to do the work.

    Ctrl-C and SIGTERM are passed on to every process once (they are in sessions of their own, which the
    terminal does not reach). The first process has the terminal.

    Raises:
        UserError: the processes of a launcher are not started once more.
        typer.Exit: with the code of the process that failed first.
    """
    _note_single()
    if count == 1 or FOLDER in os.environ:
        return False
    if world_size() > 1:
        raise UserError(
            f"--num-processes {count} starts processes of its own, but this is one of {world_size()} that a "
            "launcher (torchrun, accelerate launch) has started; leave the option away, or the launcher"
        )
    with tempfile.TemporaryDirectory(prefix="t2ialign-") as folder:
        code = _Group(count, Path(folder)).run()
    if code:
        raise typer.Exit(code)
    return True


def _note_single() -> None:
    """`accelerate launch` starts one process on CPUs, however many are asked for: told, as it does not."""
    asked_for_several = "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ
    if asked_for_several and asked("ACCELERATE_USE_CPU"):
        typer.echo(
            "note: accelerate launch --cpu has started a single process; for several on CPUs give "
            "--num-processes N to t2ialign, in place of accelerate launch",
            err=True,
        )


class _Group:
    """The processes of one command. folder: for what they note and what the others than the first say."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.received = 0
        self.first = -1
        """The process that failed first, as far as one can see; -1 while there is none."""
        self.ended_by_us = False

    def run(self) -> int:
        """Start them and see them to their end; returns the exit code."""
        with self._signals():
            self._start()
            self._watch()
        return self._outcome([process.returncode for process in self.processes])

    def _start(self) -> None:
        command = [sys.executable, *MODULE, *sys.argv[1:]]
        common = {
            THREADS: str(max(1, _cores() // self.count)),
            **os.environ,
            "WORLD_SIZE": str(self.count),
            "LOCAL_WORLD_SIZE": str(self.count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            FOLDER: str(self.folder),
        }
        started: list[subprocess.Popen[bytes]] = []
        for rank in range(self.count):
            with self._said(rank).open("wb") as said:
                started.append(
                    subprocess.Popen(
                        command,
                        env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE,
                        stdout=said if rank else None,
                        stderr=said if rank else None,
                        start_new_session=True,
                    )
                )
        self.processes = started
        if self.received:  # while they were being started
            self._send(self.received)

    def _watch(self) -> None:
        """Wait for all; when one fails the others get time to end by themselves, then are ended."""
        failed = 0.0
        while True:
            codes = [process.poll() for process in self.processes]
            if any(codes) and not self.ended_by_us:
                failed = failed or time.monotonic()
                self._notice(codes)
            if None not in codes:
                return
            waited = time.monotonic() - failed if failed else 0.0
            if waited > LEAVE_SECONDS and not self.ended_by_us:
                self.ended_by_us = True
                self._send(signal.SIGTERM)
            if waited > LEAVE_SECONDS + STOP_SECONDS:
                self._send(signal.SIGKILL)
            time.sleep(POLL)

    def _notice(self, codes: Sequence[int | None]) -> None:
        """Which one failed first: one that was killed, if any, as the others only miss it."""
        killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
        if killed or self.first < 0:
            self.first = killed[0] if killed else next(rank for rank, code in enumerate(codes) if code)

    def _send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)  # nothing to one that has ended

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, Ctrl-C and SIGTERM are passed on."""

        def handle(number: int, _frame: FrameType | None) -> None:
            self.received = number
            self._send(number)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _outcome(self, codes: Sequence[int]) -> int:
        """Tell the failure that came first, and give its code."""
        if not any(codes):
            return 0
        rank, code = self.first, codes[self.first]
        if code < 0 and not self.received:
            typer.echo(
                f"error: process {rank} of {self.count} was ended by {signal.Signals(-code).name} (as a "
                "machine without memory left does it)",
                err=True,
            )
            return 128 - code
        notes = [json.loads(path.read_text(encoding="utf-8")) for path in self._notes()]
        if notes:
            first = min(notes, key=lambda note: note["time"])
            typer.echo(first["text"], err=True)
            return int(first["code"])
        if rank and not self.received:  # the first process has said it by itself
            typer.echo(self._said(rank).read_text(encoding="utf-8", errors="replace"), err=True, nl=False)
        return code if code > 0 else 128 - code

    def _notes(self) -> list[Path]:
        paths = [note_path(self.folder, str(rank)) for rank in range(self.count)]
        return [path for path in paths if path.exists()]

    def _said(self, rank: int) -> Path:
        return self.folder / f"{rank}.txt"


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
