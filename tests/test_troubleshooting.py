"""Every message that docs/troubleshooting.md quotes is one that the code can print."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.compile(r"^    (?!t2ialign )(?:error: |warning: )?(.+)$", re.MULTILINE)


def texts() -> list[str]:
    """Every text of the package; what an f-string fills in is a gap."""
    found = []
    for path in (ROOT / "align_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def fixed_parts(message: str) -> list[str]:
    """Its words between the gaps, and between the pieces that it is put together from."""
    pieces = re.split(r"\.\.\.|; |: ", message)
    return [part for piece in pieces if (part := piece.strip(" :;,?()."))]


def test_every_quoted_message_can_be_printed():
    corpus = "\n".join(texts())
    quoted = QUOTED.findall(PAGE.read_text())
    assert len(quoted) >= 20
    system = {"Read-only file system"}
    unknown = {m: [p for p in fixed_parts(m) if p not in corpus and p not in system] for m in quoted}
    assert not {m: parts for m, parts in unknown.items() if parts}


def test_a_message_that_nobody_prints_is_found():
    assert fixed_parts("cannot write ...: the disk is full; go (...)") == [
        "cannot write",
        "the disk is full",
        "go",
    ]
    assert "the disk is brimming" not in "\n".join(texts())


def test_every_command_and_setting_of_the_page_exists():
    from typer.main import get_command

    from align_cli.cli.main import app

    command = get_command(app)
    flags = {opt for sub in command.commands.values() for p in sub.params for opt in p.opts}
    flags |= {"--for"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE.read_text()))
    assert named <= flags, named - flags
    settings = set(re.findall(r"--set ([a-z0-9_]+\.[a-z0-9_]+)=", PAGE.read_text()))
    from align_cli import config

    known = {key for key, _, _ in config.resolve("softrepa").values()}
    assert settings and settings <= known, settings - known
