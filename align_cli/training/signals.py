"""Ctrl-C and SIGTERM: a training finishes its step, saves, then stops; an evaluation, which keeps what is
finished anyway, stops at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from align_cli.launched import is_main

_ASKED = b"\nstopping: this step is finished and saved first (again: stop at once, losing it)\n"
REPEAT_SECONDS = 0.5


class Stopped(BaseException):
    """Ctrl-C or SIGTERM was received. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM raise `Stopped`."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """Context manager; `received` is the number of the first signal, 0 if none came.

    A second Ctrl-C stops at once; not within moments, as launchers repeat and translate signals.
    """

    def __init__(self) -> None:
        self.received, self.when = 0, 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self.when > REPEAT_SECONDS:
                raise KeyboardInterrupt
            return
        self.received, self.when = number, time.monotonic()
        if is_main():
            os.write(2, _ASKED)
