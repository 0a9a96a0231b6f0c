"""The command line in a test: call it, expect success, expect one line of error."""

from __future__ import annotations

import re
import socket

from typer.testing import CliRunner

from align_cli.cli.main import app


def call(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def ok(*args: object):
    result = call(*args)
    assert result.exit_code == 0, result.output
    return result


def refused(*args: object) -> str:
    result = call(*args)
    assert result.exit_code == 2, result.output
    said = re.sub(r"^loading .* \.\.\.\n", "", result.stderr)
    assert said.startswith("error: ") and said.count("\n") == 1, result.stderr
    return said


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])
