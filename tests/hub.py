"""A model hub on this machine, for tests of loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

COMMIT = "2" * 40
"""Commit of the models served here."""


class Hub(BaseHTTPRequestHandler):
    """Just enough of a model hub: HEAD and GET of files at one commit."""

    def __init__(self, root: Path, log: list[str], *args: object) -> None:
        self.root, self.log = root, log
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        parts = self.path.strip("/").removeprefix("datasets/").split("/")
        repo, file = "/".join(parts[:2]), self.root / "/".join(parts[:2] + parts[4:])
        if self.path != "/" and not file.is_file():
            self.send_response(403 if repo == "org/gated" else 404)
            errors = {"org/gated": "GatedRepo"}
            known = (self.root / repo).is_dir()
            self.send_header("X-Error-Code", errors.get(repo, "EntryNotFound" if known else "RepoNotFound"))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = b"" if self.path == "/" else file.read_bytes()
        if body:
            self.log.append("/".join(parts[4:]))
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside, the hub is one of the repositories `root`/org/name. Yields the list of fetched files."""
    log: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root, log))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield log
    server.shutdown()
    server.server_close()
