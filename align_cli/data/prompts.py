"""Prompt files: plain text, UTF-8, one prompt per line."""

from __future__ import annotations

from pathlib import Path

from align_cli.errors import UserError

WANTED = "--prompts wants a text file with one prompt per line"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file; blank lines are skipped, blanks around a prompt are dropped.

    Raises:
        UserError: the file is missing, a folder, unreadable, not UTF-8 text (says at which line), or empty.
    """
    prompts = [line.strip() for line in read_utf8(path).splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one per line")
    return prompts


def read_utf8(path: Path, wanted: str = WANTED) -> str:
    """The text of a file of prompts, without a byte-order mark.

    Args:
        wanted: what should have been given, in words.
    Raises:
        UserError: the file is missing, a folder, unreadable, or not UTF-8 text (says at which line).
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no prompt file {path}; {wanted}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; {wanted}") from None
    except OSError as error:
        raise UserError(f"cannot read prompt file {path}: {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise UserError(
            f"{path}, line {line}: not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}, line {line}: a zero byte, so this is no text file; save the file as UTF-8")
    return text
