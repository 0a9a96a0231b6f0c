"""The one error type that users see."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONG_LIST = 16
"""Names above which a list is left out where a near name can be offered."""


class UserError(Exception):
    """A mistake of the user or of the machine: one line, no traceback, exit code 2.

    The message says what is wrong, where, what is allowed and what to type next.
    """


def unknown(kind: str, name: str, known: Iterable[str], *, where: str = "") -> UserError:
    """`UserError` for a name that is not in a table: the nearest known name first, then all of them
    (unless they are many)."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    text = f"{where}: " if where else ""
    text += f"unknown {kind} {name!r}"
    text += f"; did you mean {near[0]!r}?" if near else ""
    if near and len(names) > LONG_LIST:
        return UserError(text)
    return UserError(f"{text} (known: {', '.join(names) or 'none'})")


def first_line(error: Exception) -> str:
    """The first line of an error's text that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
