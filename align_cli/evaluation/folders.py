"""Pictures that another tool drew: folders whose file names say which prompt they belong to. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from align_cli.errors import UserError
from align_cli.evaluation.arms import check_name
from align_cli.evaluation.store import PICTURE_ERRORS, Item, read_picture
from align_cli.files import file_errors

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
RULE = (
    "a picture is called by the id of its prompt, or by the prompt's number from 0 (00000.png), with -K for "
    "the K-th of several pictures of a prompt"
)
SHOWN = 3
"""Names that a message lists."""


def parse_folders(given: Sequence[str]) -> dict[str, Path]:
    """--images [NAME=]DIR, repeated -> arm -> folder. The name of a folder is the arm's if none is given.

    Raises:
        UserError: no such folder, no name, or a name given twice.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        if not equals or Path(text).expanduser().is_dir():
            name, rest = "", text
        folder = Path(rest).expanduser()
        if not rest or not folder.is_dir():
            what = "is a file, not a folder" if rest and folder.exists() else "does not exist"
            raise UserError(f"--images {text}: {rest or 'the folder'} {what}")
        if not name:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:40] or "images"
        check_name(name, f"--images {text}")
        if name in found:
            raise UserError(f"--images {text}: two folders are called {name!r}; write --images NAME=FOLDER")
        found[name] = folder
    return found


def match(
    folder: Path, items: Sequence[Item], *, allow_missing: bool, limited: bool = False
) -> tuple[list[Path | None], list[str]]:
    """The picture of every item in a folder.

    A picture that an evaluation drew says in its metadata which prompt it is of. All others belong to prompts
    by their paths without the suffix, all in the same way: by the prompt's id (which may name a folder:
    anime/00012), or by its number from 0; "-K" or "_K" behind either is the K-th picture of the prompt, from
    0 (as GenEval has it: "/samples/K"). Numbers may have leading zeros. Where ids are numbers, the way is the
    one that leaves no file or no prompt over.

    Args:
        limited: the items are a part of the prompts. Pictures that are called by numbers which only the whole
            set has are refused then: 00001.png is of the set's prompt 1, not of the part's.
    Returns:
        a path or None for each item, and what the user should know, in words.
    Raises:
        UserError: missing or broken pictures (the first are named) unless `allow_missing`; not one picture
            that fits; two files for one item; a picture that was drawn for other words; names that are ids
            as well as numbers, of other prompts; see `limited`.
    """
    with file_errors(f"cannot look into {folder}"):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    told, plain = _told(files, items)
    way, named = _named(folder, plain, items, limited)
    found = [a or b for a, b in zip(told, named, strict=True)]
    if not any(found):
        raise UserError(f"no picture in {folder} belongs to a prompt; {RULE}")
    notes = [f"{folder}: pictures belong to prompts by their {way}"] if way else []
    broken: dict[int, str] = {}
    for i, path in enumerate(found):
        if path is not None:
            try:
                read_picture(path)
            except UserError as error:
                broken[i] = str(error)
    missing = [i for i, path in enumerate(found) if path is None]
    if (missing or broken) and not allow_missing:
        raise UserError(f"{_trouble(folder, items, missing, broken)}; --allow-missing goes on without them")
    if missing or broken:
        notes.append(f"{_trouble(folder, items, missing, broken)}: left out")
    used = {path for path in found if path is not None}
    if spare := [path for path in files if path not in used]:
        notes.append(
            f"{folder}: {len(spare)} pictures belong to no prompt of this run ({spare[0].name}, ...)"
        )
    return [None if i in broken else path for i, path in enumerate(found)], notes


def _trouble(folder: Path, items: Sequence[Item], missing: Sequence[int], broken: Mapping[int, str]) -> str:
    """What is wrong, with names."""
    parts = []
    if missing:
        names = ", ".join(items[i].stem for i in missing[:SHOWN])
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        parts.append(f"{len(missing)} of {len(items)} pictures are missing in {folder} ({names}{more})")
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        parts.append(f"broken: {next(iter(broken.values()))}{more}")
    return "; ".join(parts)


def _told(files: Sequence[Path], items: Sequence[Item]) -> tuple[list[Path | None], list[Path]]:
    """By what the metadata of pictures of an evaluation say; and the files that say nothing."""
    table: dict[tuple[str, str], Path] = {}
    texts: dict[Path, str] = {}
    for path in files:
        facts = _facts(path)
        if "id" in facts and "run" in facts:
            _put(table, (facts["id"], facts.get("k", "0")), path)
            texts[path] = facts.get("prompt", "")
    found = [table.get((item.row.id, str(item.k))) for item in items]
    for item, drawn in zip(items, found, strict=True):
        if drawn is not None and texts[drawn] != item.row.text:
            raise UserError(f"{drawn} was drawn for {texts[drawn]!r}, not for {item.row.text!r}")
    return found, [path for path in files if path not in texts]


def _facts(path: Path) -> dict[str, str]:
    """What a picture says of itself before its pixels, so that one that is cut off says it, too."""
    try:
        with Image.open(path) as file:
            return {str(key): str(value) for key, value in file.info.items()}
    except PICTURE_ERRORS:
        return {}


def _named(
    folder: Path, files: Sequence[Path], items: Sequence[Item], limited: bool
) -> tuple[str, list[Path | None]]:
    """By names: ids of prompts, or their numbers. The way in words ("" for none), and the pictures."""
    table: dict[str, Path] = {}
    for path in files:
        _put(table, _plain(path.relative_to(folder).with_suffix("").as_posix()), path)
    ways = {
        "ids": _by(lambda item: item.row.id, table, items),
        "numbers from 0": _by(lambda item: str(item.number), table, items),
    }
    last = items[-1].number
    beyond = next(
        (p for name, p in table.items() if (n := name.partition("-")[0]).isdigit() and int(n) > last), None
    )
    if limited and beyond is not None and any(ways.pop("numbers from 0")) and not any(ways["ids"]):
        raise UserError(
            f"{beyond} is of a larger set of prompts than the {last + 1} that --limit leaves, whose numbers "
            "are others; name the pictures by the ids of their prompts, or leave --limit away"
        )
    if beyond is not None and None not in ways["ids"]:
        ways.pop("numbers from 0", None)
    ways = {way: found for way, found in ways.items() if any(found)}
    if len(ways) == 2 and ways["ids"] != ways["numbers from 0"]:
        for all_used in (
            lambda found: sum(path is not None for path in found) == len(files),
            lambda found: None not in found,
        ):
            if sum(map(all_used, ways.values())) == 1:
                ways = {way: found for way, found in ways.items() if all_used(found)}
        if len(ways) == 2:
            clash = next(p for p in ways["ids"] if p is not None)
            raise UserError(
                f"{clash}: its name is the id of one prompt and the number (from 0) of another, and so are "
                "others; give the prompts ids that are no numbers, and name the pictures by them"
            )
    if not ways:
        return "", [None] * len(items)
    return next(iter(ways.items()))


def _by(own: Callable[[Item], str], table: Mapping[str, Path], items: Sequence[Item]) -> list[Path | None]:
    """The picture of every item whose prompt is called `own` of it."""
    found: list[Path | None] = []
    for item in items:
        names = [f"{own(item)}-{item.k}", f"{own(item)}/samples/{item.k}"]
        names += [own(item)] if item.k == 0 else []
        found.append(next((table[_plain(name)] for name in names if _plain(name) in table), None))
    return found


def _plain(name: str) -> str:
    """A name with "-" for "_", and without leading zeros of its numbers."""
    return re.sub(r"(?<![0-9.])0+(?=\d)", "", name.replace("_", "-"))


def _put(table: dict[Any, Path], key: Any, path: Path) -> None:
    if key in table:
        raise UserError(f"{table[key]} and {path} are of the same prompt; leave one of them away")
    table[key] = path
