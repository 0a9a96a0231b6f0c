"""Adapters by name: the packaged ones, and officially published ones, which are fetched, checked and imported
on first use. No torch at import.

tokens/index.toml says what is published; the cache holds each as an ordinary adapter folder.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from align_cli import packaged, registry
from align_cli.downloads import check, download
from align_cli.errors import UserError, unknown
from align_cli.files import file_errors, part_path
from align_cli.packaged import packaged_adapters

VARIABLE = "T2IALIGN_CACHE"
"""Environment variable: the folder of the cache."""
NAME = re.compile(r"[a-z0-9]+(?:[-._][a-z0-9]+)*/[a-z0-9]+(?:[-._][a-z0-9]+)*")
_ENTRY = ("method", "model", "licence", "source", "files")
_FILE = ("url", "size", "sha256")


@dataclass(frozen=True)
class File:
    """One released file. size: in bytes."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """Its name in the release, which the importers go by."""
        return unquote(urlparse(self.url).path).rpartition("/")[2]


@dataclass(frozen=True)
class Entry:
    """One published adapter. name: "<method>/<model>". model: base model that it was trained on. source: the
    page it is published on.
    """

    name: str
    method: str
    model: str
    licence: str
    source: str
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        return sum(file.size for file in self.files)

    @cached_property
    def key(self) -> str:
        """Part of the names in the cache: another release of the same name is another folder."""
        content = " ".join(f"{file.name} {file.sha256}" for file in self.files)
        return f"{self.name}-{sha256(content.encode()).hexdigest()[:12]}"

    @property
    def folder(self) -> Path:
        """The adapter folder in the cache, whether it is there or not."""
        return cache_folder() / "adapters" / self.key

    @property
    def downloads(self) -> Path:
        """Where its released files are put before they are imported."""
        return cache_folder() / "downloads" / self.key

    @property
    def cached(self) -> bool:
        """Whether the adapter folder is there."""
        return self.folder.is_dir()


def cache_folder() -> Path:
    """$T2IALIGN_CACHE, else t2ialign in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "t2ialign"


def index_file() -> Path:
    """The packaged index."""
    return packaged.data_dir("tokens") / "index.toml"


def read_index(path: Path | None = None) -> dict[str, Entry]:
    """Name -> entry, in the order of the file. path: None for the packaged index.

    Raises:
        UserError: it is not there, or damaged; says which entry.
    """
    path = path or index_file()
    raw, _ = packaged.read_toml(path, f"index {path}")
    return {name: _entry(f"index {path}: {name}", name, content) for name, content in raw.items()}


def _entry(where: str, name: str, content: Any) -> Entry:
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: a name must be like softrepa/sd3, in lower case")
    _check_keys(where, content, _ENTRY)
    if not (isinstance(content["files"], list) and content["files"]):
        raise UserError(f"{where}: files must be a list of at least one file")
    texts = {key: _text(where, key, content[key]) for key in _ENTRY if key != "files"}
    registry.path_of(registry.METHODS, texts["method"])
    files = tuple(_file(f"{where}: file {i + 1}", file) for i, file in enumerate(content["files"]))
    if len({file.name for file in files}) < len(files):
        raise UserError(f"{where}: two files have one name")
    return Entry(name=name, files=files, **texts)


def _file(where: str, content: Any) -> File:
    _check_keys(where, content, _FILE)
    found = File(
        _text(where, "url", content["url"]), content["size"], _text(where, "sha256", content["sha256"])
    )
    if urlparse(found.url).scheme not in ("http", "https") or found.name in ("", ".", ".."):
        raise UserError(f"{where}: url must be http(s) and end in a file name, got {found.url!r}")
    if not (type(found.size) is int and found.size > 0):
        raise UserError(f"{where}: size must be a number of bytes, got {found.size!r}")
    if not re.fullmatch(r"[0-9a-f]{64}", found.sha256):
        raise UserError(f"{where}: sha256 must be 64 hexadecimal digits, got {found.sha256!r}")
    return found


def _check_keys(where: str, content: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a table with {', '.join(keys)}")
    if missing := [key for key in keys if key not in content]:
        raise UserError(f"{where}: lacks {', '.join(missing)}")
    if stray := [key for key in content if key not in keys]:
        raise unknown("key", stray[0], keys, where=where)


def _text(where: str, key: str, value: Any) -> str:
    if not (isinstance(value, str) and value):
        raise UserError(f"{where}: {key} must be a text that is not empty, got {value!r}")
    return value


# ---------------------------------------------------------------- the cache


def locate(name: str) -> Path | None:
    """The folder of a packaged adapter, or of a published one, fetched on first use; None for a name that is
    neither.

    Several processes may ask at once: one fetches, the others wait.
    Raises:
        UserError: it is not cached and cannot be fetched, or what was fetched is not what the index names.
    """
    if not NAME.fullmatch(name):
        return None
    if folder := packaged_adapters().get(name):
        return folder
    entry = read_index().get(name)
    if entry is None:
        return None
    if not entry.cached:
        _bring(entry)
    return entry.folder


def knows(name: str) -> bool:
    """Whether a packaged or a published adapter has this name."""
    return name in packaged_adapters() or name in read_index()


def names_near(name: str) -> str:
    """What to add to "does not exist" for something that may be meant as a name of an adapter."""
    if not NAME.fullmatch(name):
        return ""
    near = get_close_matches(name, [*packaged_adapters(), *read_index()], n=1, cutoff=0.8)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    first = name.partition("/")[0]
    if first in registry.METHODS:
        return f"; nor has the index of published adapters such a name ({', '.join(read_index())}){meant}"
    own = [one for one in packaged_adapters() if one.startswith(f"{first}/")]
    return f"; nor is there a packaged adapter of that name ({', '.join(own)}){meant}" if own else meant


def _bring(entry: Entry) -> None:
    from huggingface_hub.utils import WeakFileLock

    from align_cli.adapters import import_official

    downloads = entry.downloads
    lock = cache_folder() / "locks" / f"{entry.key.replace('/', '-')}.lock"
    with file_errors(f"cannot write to the cache {cache_folder()}", f"name another folder with {VARIABLE}"):
        downloads.mkdir(parents=True, exist_ok=True)
        lock.parent.mkdir(parents=True, exist_ok=True)
        waiting = WeakFileLock(lock)
        waiting.__enter__()
    try:
        if entry.cached:
            return  # another process was faster
        for file in entry.files:
            _bring_file(entry, file)
        source = f"official release {entry.name}, fetched from {entry.source}"
        import_official(entry.method, downloads, entry.model, entry.folder, source=source)
        for file in entry.files:
            (downloads / file.name).unlink(missing_ok=True)
        if not any(downloads.iterdir()):
            downloads.rmdir()
    finally:
        waiting.__exit__(None, None, None)


def _bring_file(entry: Entry, file: File) -> None:
    path = entry.downloads / file.name
    if path.exists():  # put there by hand
        check(path, size=file.size, digest=file.sha256, label=str(path))
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{entry.name} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; {by_hand(entry)}"
        )
    kept = part_path(path).stat().st_size if part_path(path).exists() else 0
    begun = f", {kept:,} of them are there" if kept else ""
    print(f"fetching {entry.name}: {file.url}, {file.size:,} bytes{begun}", file=sys.stderr, flush=True)
    try:
        download(file.url, path, size=file.size, digest=file.sha256)
    except UserError as error:
        raise UserError(f"{entry.name}: {error}; or {by_hand(entry)}") from error


def by_hand(entry: Entry) -> str:
    """What someone without network does."""
    addresses = " and ".join(file.url for file in entry.files)
    what = "it" if len(entry.files) == 1 else "both" if len(entry.files) == 2 else "all"
    return f"get {addresses} by hand and put {what} into {entry.downloads}"
