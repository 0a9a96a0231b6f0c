"""A model hub on this machine, for tests of loading and of uploading."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass
class Uploads:
    """What was uploaded. refuse: call (whoami-v2, create, preupload, commit) -> status, or 0 to cut the
    connection. made: repository -> its visibility, as it was asked for. files: repository -> path -> content.
    """

    refuse: dict[str, int] = field(default_factory=dict)
    made: dict[str, object] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)


class Inbox(BaseHTTPRequestHandler):
    """Just enough of a model hub to upload a folder of small files."""

    def __init__(self, uploads: Uploads, *args: object) -> None:
        self.uploads = uploads
        super().__init__(*args)

    def do_GET(self) -> None:
        self.take(b"")

    def do_POST(self) -> None:
        self.take(self.rfile.read(int(self.headers["Content-Length"])))

    def take(self, body: bytes) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        call = parts[-1] if parts[-1] in ("whoami-v2", "create", "validate-yaml") else parts[-2]
        up = self.uploads
        up.calls.append(call)
        up.tokens.add(self.headers.get("Authorization", ""))
        if call in up.refuse:
            if status := up.refuse[call]:
                self.say(status, {"error": "no"})
            else:
                self.close_connection = True
            return
        repo = "/".join(parts[2:4])
        if call == "create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            up.made[name] = asked.get("visibility", asked.get("private"))
            self.say(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": "1"})
        elif call == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self.say(200, {"files": files})
        elif call == "commit":
            lines = [json.loads(line) for line in body.splitlines() if line]
            own = up.files.setdefault(repo, {})
            own |= {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines if line["key"] == "file"}  # fmt: skip
            address = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
            self.say(200, {"commitUrl": address, "commitOid": COMMIT, "success": True})
        elif call == "whoami-v2":
            self.say(200, {"name": "someone", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        elif call == "validate-yaml":
            self.say(200, {"errors": [], "warnings": []})
        else:  # is the repository there?
            self.say(200 if repo in up.files else 404, {})

    def say(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def take_uploads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Uploads]:
    """Inside, the hub takes uploads and keeps them."""
    uploads = Uploads()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Inbox, uploads))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield uploads
    server.shutdown()
    server.server_close()
