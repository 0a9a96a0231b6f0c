"""One file from an address: resumed where it was cut, checked, complete or not there. No torch at import."""

from __future__ import annotations

import http.client
import sys
import urllib.error
import urllib.request
from hashlib import sha256
from pathlib import Path

import align_cli
from align_cli.errors import UserError
from align_cli.files import file_errors, part_path

TIMEOUT = 20.0
"""Seconds without an answer, or without a byte, until a transfer counts as cut."""
ATTEMPTS = 3
"""Times that one call goes on with a transfer that is cut."""
CHUNK = 1 << 20


def download(url: str, path: Path, *, size: int, digest: str) -> None:
    """The file behind `url` at `path`, of `size` bytes with the sha256 `digest`.

    What a cut transfer left is in `part_path(path)`; the next call goes on there, if the server can.
    Raises:
        UserError: no such file, out of reach, cut again and again, a full disk; another file than the one
        that was asked for, of which nothing is kept.
    """
    part = part_path(path)
    with file_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > size:
            part.unlink()
    reason, resumed = "", part.exists()
    for _ in range(ATTEMPTS):
        before = _held(part)
        reason = _transfer(url, part, size) if before < size else ""
        if not reason or _held(part) == before:
            break
    if reason:
        raise UserError(
            f"cannot fetch {url}: {reason}, {_held(part):,} of {size:,} bytes are there; the same command "
            "goes on from there"
        )
    try:
        check(part, size=size, digest=digest, label=url, remove=True)
    except UserError:
        if not resumed:
            raise
        download(url, path, size=size, digest=digest)  # what was there was of another file
        return
    with file_errors(f"cannot write {path}"):
        part.replace(path)


def check(path: Path, *, size: int, digest: str, label: str, remove: bool = False) -> None:
    """UserError if a file is another one. remove: then it goes."""
    with file_errors(f"cannot read {path}"):
        content, count = sha256(), path.stat().st_size
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                content.update(chunk)
        wrong = f"sha256 {content.hexdigest()}, not {digest}" if content.hexdigest() != digest else ""
        if count != size:
            wrong = f"{count:,} bytes, not {size:,}"
        if wrong and remove:
            path.unlink()
    if wrong:
        gone = "; it was removed" if remove else f"; remove {path}"
        raise UserError(f"{label} is not the file that the index names: {wrong}{gone}")


def _held(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _transfer(url: str, part: Path, size: int) -> str:
    """Append what is missing; "" if all is there, else what cut it."""
    from huggingface_hub.utils import tqdm

    have = _held(part)
    agent = {"User-Agent": f"t2ialign/{align_cli.__version__}"}
    ask = urllib.request.Request(url, headers=agent | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        with urllib.request.urlopen(ask, timeout=TIMEOUT) as answer:
            goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
                f"bytes {have}-"
            )
            with file_errors(f"cannot write {part}"):
                file = part.open("ab" if goes_on else "wb")
            done = have if goes_on else 0
            shown = sys.stderr.isatty()
            with file, tqdm(total=size, initial=done, unit="B", unit_scale=True, disable=not shown) as bar:
                while chunk := answer.read(CHUNK):
                    done += len(chunk)
                    if done > size:
                        break
                    with file_errors(f"cannot write {part}", f"{done - len(chunk):,} bytes are kept"):
                        file.write(chunk)
                        file.flush()
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        raise UserError(f"cannot fetch {url}: the server says {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        return f"the connection failed ({str(getattr(error, 'reason', error)) or type(error).__name__})"
    if done > size:
        part.unlink()
        raise UserError(
            f"{url} is not the file that the index names: more than {size:,} bytes; it was removed"
        )
    return "" if done == size else "the connection was cut"
