"""Published adapters by name: fetched from a server of this machine, resumed, checked, imported, cached."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread

import pytest
import torch
from cli_helpers import ok, refused
from huggingface_hub import constants
from torch import nn

from align_cli import downloads, index
from align_cli.adapters import load_adapter, read_adapter
from align_cli.errors import UserError
from align_cli.files import part_path

NAME = "softrepa/tiny"


def saved(value: object) -> bytes:
    content = BytesIO()
    torch.save(value, content)
    return content.getvalue()


def released() -> dict[str, bytes]:
    """Official files of SoftREPA for SD1.5."""
    g = torch.Generator().manual_seed(0)
    table = nn.Embedding(100, 768, _weight=torch.randn(100, 768, generator=g))
    tokens = nn.Parameter(torch.randn(4, 768, generator=g))
    return {"dc_tokens.pth": saved(tokens), "dc_t_tokens.pth": saved(table)}


class Server:
    """files: path -> content. log: requests, as (path, Range or ""). cut: bytes after which answers to come
    end early, one each. ranges: whether Range is understood.
    """

    def __init__(self) -> None:
        self.files = released()
        self.log: list[tuple[str, str]] = []
        self.cut: list[int] = []
        self.ranges = True
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name, asked = request.path.rpartition("/")[2], request.headers.get("Range", "")
        self.log.append((name, asked))
        if name not in self.files:
            request.send_error(404, "Not Found")
            return
        content = self.files[name]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        most = self.cut.pop(0) if self.cut else len(content)
        request.wfile.write(content[start : start + most])

    def index(self, **changes: object) -> str:
        """An index with one entry; changes: of its file dc_t_tokens.pth."""
        lines = [f'["{NAME}"]', 'method = "softrepa"', 'model = "sd15"', 'licence = "MIT"',
                 'source = "https://example.org/page"']  # fmt: skip
        for name, content in self.files.items():
            facts: dict[str, object] = {
                "url": f"{self.address}/a/{name}",
                "size": len(content),
                "sha256": sha256(content).hexdigest(),
            }
            facts |= changes if name == "dc_t_tokens.pth" else {}
            lines += [f'[["{NAME}".files]]']
            lines += [f"{key} = {v}" if isinstance(v, int) else f'{key} = "{v}"' for key, v in facts.items()]
        return "\n".join(lines)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    server = Server()
    file = tmp_path / "index.toml"
    file.write_text(server.index())
    monkeypatch.setattr(index, "index_file", lambda: file)
    monkeypatch.setenv("T2IALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloads, "CHUNK", 4096)
    monkeypatch.chdir(tmp_path)
    yield server
    server.http.shutdown()
    server.http.server_close()


def entry() -> index.Entry:
    return index.read_index()[NAME]


def files(folder: Path) -> list[str]:
    """All files below a folder, without locks."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if not name.startswith("locks/"))


def test_fetched_once_and_then_cached(server, monkeypatch, capsys):
    adapter = load_adapter(NAME)
    assert adapter.info.method == "softrepa" and adapter.info.family == "sd15"
    assert adapter.info.source == f"official release {NAME}, fetched from https://example.org/page"
    given = torch.load(BytesIO(server.files["dc_tokens.pth"]), weights_only=True)
    assert torch.equal(adapter.state["dc_tokens"], given.detach())
    assert [name for name, _ in server.log] == ["dc_tokens.pth", "dc_t_tokens.pth"]
    assert "fetching softrepa/tiny: http" in capsys.readouterr().err
    assert not entry().downloads.exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_adapter(NAME).info == adapter.info
    assert len(server.log) == 2 and capsys.readouterr().err == ""


def test_a_folder_of_that_name_goes_first(server, tmp_path):
    (tmp_path / NAME).mkdir(parents=True)
    with pytest.raises(UserError, match="is no adapter folder"):
        read_adapter(NAME)
    assert server.log == []


def test_by_name_wherever_an_adapter_is_named(server, tmp_path):
    assert NAME in ok("adapters", "list").stdout and "  no  " in ok("adapters", "list").stdout
    said = ok("adapters", "info", NAME).stdout
    assert "dc_t_tokens" in said
    assert "  cached  " in ok("adapters", "list").stdout
    said = refused("sample", "--model", "tiny-sd15", "--adapter", f"{NAME}@0.5", "--prompt", "x")
    assert "does not fit tiny-sd15" in said  # it was found, read and tried
    said = refused("adapters", "export", NAME, "--to", "peft", "--out", tmp_path / "out")
    assert "adapters of softrepa cannot be exported" in said


def test_a_cut_transfer_goes_on_at_once_and_later(server):
    server.cut = [5000, 5000, 5000]
    assert len(read_adapter(NAME)[2]) > 0
    asked = [r for name, r in server.log if name == "dc_tokens.pth"]
    assert asked == ["", "bytes=5000-", "bytes=10000-"]
    before = len(server.log)
    other = server.files["dc_tokens.pth"]
    target = entry().downloads / "again.pth"
    server.cut = [3000, 0]
    facts = {"size": len(other), "digest": sha256(other).hexdigest()}
    with pytest.raises(UserError, match="the connection was cut, 3,000 of .* the same command goes on"):
        downloads.download(f"{server.address}/a/dc_tokens.pth", target, **facts)
    assert not target.exists() and part_path(target).stat().st_size == 3000
    downloads.download(f"{server.address}/a/dc_tokens.pth", target, **facts)
    assert target.read_bytes() == other and not part_path(target).exists()
    assert [r for _, r in server.log[before:]] == ["", "bytes=3000-", "bytes=3000-"]


def test_what_is_left_of_another_file_is_fetched_anew(server):
    part = part_path(entry().downloads / "dc_tokens.pth")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 3000)
    assert len(read_adapter(NAME)[2]) > 0
    assert [r for name, r in server.log if name == "dc_tokens.pth"] == ["bytes=3000-", ""]


def test_a_damaged_one_says_where_it_lies(server):
    read_adapter(NAME)
    file = entry().folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated or altered") as caught:
        read_adapter(NAME)
    assert f"adapter {NAME} ({entry().folder}) is damaged" in str(caught.value)


def test_a_server_without_ranges_begins_anew(server):
    server.ranges, server.cut = False, [5000]
    assert len(read_adapter(NAME)[2]) > 0
    assert [r for name, r in server.log if name == "dc_tokens.pth"] == ["", "bytes=5000-"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "is not the file that the index names: sha256 .*, not 0+; it was removed"),
        ({"size": 1000}, "is not the file that the index names: more than 1,000 bytes; it was removed"),
        ({"size": 10**6}, "the connection was cut, .* of 1,000,000 bytes are there"),
        ({"url": "ADDRESS/a/gone.pth"}, "the server says 404 Not Found"),
        ({"url": "http://127.0.0.1:9/x.pth"}, "the connection failed"),
    ],
)
def test_one_line_and_nothing_half_written(server, tmp_path, changes, message):
    changes = {
        key: str(v).replace("ADDRESS", server.address) if key == "url" else v for key, v in changes.items()
    }
    (tmp_path / "index.toml").write_text(server.index(**changes))
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(NAME)
    said = str(caught.value)
    assert "\n" not in said and str(entry().downloads) in said and "by hand" in said
    assert not entry().cached
    kept = [name.rpartition("/")[2] for name in files(tmp_path / "cache")]
    assert kept == ([".dc_t_tokens.pth.part"] if "size" in changes and changes["size"] > 1000 else []) + [
        "dc_tokens.pth"
    ]
    (tmp_path / "index.toml").write_text(server.index())
    read_adapter(NAME)  # and the command works once the index is right


def test_without_network_it_says_what_to_do_by_hand(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused("sample", "--adapter", NAME, "--prompt", "x")
    place = entry().downloads
    assert "HF_HUB_OFFLINE forbids" in said and f"put both into {place}" in said
    assert all(f"{server.address}/a/{name}" in said for name in server.files) and server.log == []
    for name, content in server.files.items():
        (place / name).write_bytes(content)
    assert read_adapter(NAME)[1].method == "softrepa" and server.log == []


def test_a_wrong_file_put_there_by_hand_is_not_removed(server):
    entry().downloads.mkdir(parents=True)
    wrong = entry().downloads / "dc_tokens.pth"
    wrong.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"dc_tokens.pth is not the file .* 14 bytes, not .*; remove /"):
        read_adapter(NAME)
    assert wrong.exists()


def test_a_full_disk(server, tmp_path, monkeypatch):
    real = Path.open

    class Full:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(self: Path, mode: str = "r", *args: object, **options: object):
        file = real(self, mode, *args, **options)
        return Full(file) if mode in ("ab", "wb") and self.name.endswith(".part") else file

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"cannot write .*\.part: the disk is full; 0 bytes are kept"):
        read_adapter(NAME)
    monkeypatch.undo()


@pytest.mark.slow
def test_two_processes_at_once_fetch_once(server, tmp_path):
    code = (
        "import sys, pathlib; from align_cli import index; from align_cli.adapters import read_adapter;"
        f"index.index_file = lambda: pathlib.Path({str(tmp_path / 'index.toml')!r});"
        "from huggingface_hub import constants; constants.HF_HUB_OFFLINE = False;"
        f"print(read_adapter({NAME!r})[1].sha256)"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = {run.communicate(timeout=300)[0] for run in runs}
    assert all(run.returncode == 0 for run in runs) and len(said) == 1
    assert sorted(name for name, _ in server.log) == ["dc_t_tokens.pth", "dc_tokens.pth"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('licence = "MIT"', "", "lacks licence"),
        (
            'licence = "MIT"',
            'licence = "MIT"\nlicense = "MIT"',
            "unknown key 'license'; did you mean",
        ),
        ('method = "softrepa"', 'method = "softrep"', "unknown method"),
        (NAME, "SoftREPA", "a name must be like softrepa/sd3"),
        ("size = ", "size = -", "size must be a number of bytes"),
        ('sha256 = "', 'sha256 = "z', "sha256 must be 64 hexadecimal digits"),
        ("http://", "file://", "url must be http"),
        ("dc_t_tokens", "dc_tokens", "two files have one name"),
        ('method = "', "method = [", "is not valid TOML"),
    ],
)
def test_a_damaged_index_is_named(server, tmp_path, old, new, message):
    (tmp_path / "index.toml").write_text(server.index().replace(old, new))
    with pytest.raises(UserError, match=message):
        read_adapter(NAME)


def test_the_packaged_index():
    entries = index.read_index()
    assert list(entries) == ["softrepa/sd15", "softrepa/sdxl", "softrepa/sd3"]
    for entry in entries.values():
        assert all("/6fe75168f32f341bed76d60640c9813fdba7d964/" in file.url for file in entry.files)
        assert entry.files[0].name == "dc_tokens.pth"


def test_a_name_that_the_index_lacks():
    with pytest.raises(UserError, match=r"does not exist .*; nor has the index .* \(softrepa/sd15, "):
        read_adapter("softrepa/sd2")
    with pytest.raises(UserError, match=r"packaged adapter of that name .*did you mean 'tiny-sd15/comat'\?"):
        read_adapter("tiny-sd15/comaat")
    with pytest.raises(UserError, match=r"does not exist \(adapter.json and adapter.safetensors\)$"):
        read_adapter("runs/one")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("T2IALIGN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert index.cache_folder() == tmp_path / "t2ialign"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert index.cache_folder() == Path.home() / ".cache" / "t2ialign"
