"""Who does what where several processes fill one folder.

Record locks of the operating system on one file: byte k stands for piece k of the work. A lock belongs to its
process and goes with it, after kill -9 too, so that no claim can be left behind. They hold between the
machines of a network file system as far as that supports locks.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_PRESENT, _ORDER = 1 << 40, (1 << 40) + 1
"""Bytes beyond all pieces: held together by all that are at work; held by one that changes common files."""


class Claims:
    """Context manager over the lock file `path`. One at a time per process: closing it drops all locks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Claims:
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.handle)

    def take(self, piece: int) -> bool:
        """Claim a piece; False if another process has it."""
        return self._try(fcntl.LOCK_EX, piece)

    def release(self, piece: int) -> None:
        """Give a piece back."""
        fcntl.lockf(self.handle, fcntl.LOCK_UN, 1, piece)

    def come(self) -> bool:
        """Be at work from now on. Returns whether nobody else is; call it inside `order`."""
        alone = self._try(fcntl.LOCK_EX, _PRESENT)
        fcntl.lockf(self.handle, fcntl.LOCK_SH, 1, _PRESENT)
        return alone

    @contextmanager
    def order(self) -> Iterator[None]:
        """Inside, no other process is: for reading and changing what all share. Waits for its turn."""
        fcntl.lockf(self.handle, fcntl.LOCK_EX, 1, _ORDER)
        try:
            yield
        finally:
            fcntl.lockf(self.handle, fcntl.LOCK_UN, 1, _ORDER)

    def _try(self, how: int, byte: int) -> bool:
        try:
            fcntl.lockf(self.handle, how | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True
