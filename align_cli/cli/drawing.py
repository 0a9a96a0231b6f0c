"""What `sample`, `edit` and `eval` share: folders that pictures go to, notes on long prompts. No torch at
import.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from align_cli.adapters import INFO
from align_cli.errors import UserError
from align_cli.training import run_folder

if TYPE_CHECKING:
    from align_cli.models.base import BaseModel

SHEET = "sheet.png"
OURS = (SHEET, run_folder.RUN, INFO)
"""Any of these tells that a folder was written by t2ialign."""


def note_long_prompts(model: BaseModel, texts: Iterable[str]) -> None:
    """Tell on stderr of which prompts the model does not see the end, and where prompts are read sentence by
    sentence, what that adds.
    """
    for text in dict.fromkeys(texts):
        count = model.token_count(text)
        note = ""
        if model.reader is not None:
            note = _segment_note(model, text)
        elif count > model.token_limit:
            note = f", {model.model_id} reads {model.token_limit}: its end is not seen"
        if note:
            typer.echo(f"note: the prompt {_short(text)!r} has {count} tokens{note}", err=True)


def _segment_note(model: BaseModel, text: str) -> str:
    plain, now = (
        next((cut for cuts in found.values() for cut in cuts if cut.lost), None)
        for found in (model.plain_audit([text]), model.audit_text([text]))
    )
    if plain is None and now is None:
        return ""
    said = "" if plain is None else f"; read as a whole it would lose {_short(plain.lost)!r}"
    if now is None:
        return f"{said}, by sentence it loses nothing"
    return f"{said}; by sentence it loses {_short(now.lost)!r}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def choose_folder(out: Path | None, default: str, names: list[str], overwrite: bool) -> Path:
    """The folder to write to; nothing is made yet.

    Args:
        out: as given with --out; None takes `default`, or `default`-2, -3, ... if that exists.
        names: files that will be written; one that is there already is refused unless `overwrite`, and so
        is a folder of other things.
    Raises:
        UserError: it holds such files or nothing that t2ialign wrote, is a file, or cannot be looked into.
    """
    if out is None:
        out = Path(default)
        number = 1
        while out.exists():
            number += 1
            out = Path(f"{default}-{number}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder; choose another one with --out")
    if overwrite or not out.exists():
        return out
    there = [name for name in names if (out / name).exists()]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(
            f"{out} already holds {there[0]}{more}; choose another folder with --out, or give --overwrite"
        )
    try:
        foreign = any(out.iterdir()) and not any(any(out.glob(name)) for name in OURS)
    except OSError as error:
        raise UserError(
            f"cannot look into {out}: {error.strerror}; choose another folder with --out"
        ) from error
    if foreign:
        raise UserError(
            f"{out} is not empty and holds nothing that t2ialign wrote; choose another folder with --out, "
            f"or give --overwrite"
        )
    return out


def make_folder(out: Path) -> None:
    """Make the folder and prove that it can be written to, before minutes of drawing. UserError if not."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".t2ialign-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; choose another folder with --out"
        ) from None
