"""What a process knows of the command that started it as one of several (`--num-processes`). No torch.

The command shows what the first process says; how a process failed is noted in a folder, so that it is told
once, by the command.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from align_cli.files import write_text

FOLDER = "T2IALIGN_PROCESSES"
"""Environment: the folder for notes; not set in a process that was started in another way."""


def world_size() -> int:
    """Processes of this run, whoever started them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def asked(variable: str) -> bool:
    """Whether `accelerate launch` has set this variable of the environment to true."""
    return os.environ.get(variable, "").lower() == "true"


def tell(text: str) -> None:
    """A line on stderr, by the first process alone."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


def again() -> str:
    """What to add to a command that goes on with this run: " --num-processes N", or nothing."""
    return f" --num-processes {world_size()}" if FOLDER in os.environ else ""


def join() -> None:
    """To be called first of all: an uncaught error is noted, and the process stops when the command that
    started it is gone. Nothing in a process that was started in another way.
    """
    if FOLDER in os.environ:
        sys.excepthook = _note_uncaught
        threading.Thread(target=_stop_with_parent, daemon=True).start()


def note_failure(text: str, code: int) -> bool:
    """Leave the telling to the command that started this process; False if there is none."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return False
    note = {"time": time.time_ns(), "code": code, "text": text}
    write_text(note_path(Path(folder), os.environ.get("RANK", "0")), json.dumps(note))
    return True


def note_path(folder: Path, rank: str) -> Path:
    """Where a process notes its failure."""
    return folder / f"{rank}.json"


def _note_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        note_failure("".join(traceback.format_exception(kind, error, trace)).rstrip(), 1)


def _stop_with_parent() -> None:
    """Standard input is a pipe that the parent holds open and never writes to: it ends with the parent."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
