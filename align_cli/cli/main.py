"""The `t2ialign` command: its subcommands, and how errors reach the user. No torch at import."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

import align_cli
from align_cli import launched
from align_cli.cli import doctor, edit, encode, eval, manage, sample, train
from align_cli.cli.help import MethodHelp, SectionedHelp, UsageError
from align_cli.errors import UserError, first_line

LESS_MEMORY = (
    "take less at once (--batch-size, --image-size), --dtype float16, or --encoder-device cpu; in training "
    "also --set train.gradient_checkpointing=true; what is finished is kept, see docs/troubleshooting.md"
)
"""What a user may do."""


class OneLineErrors(TyperGroup):
    """A mistake of the user is one line `error: ...` on stderr and exit code 2; a bug keeps its traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line `args` (default: sys.argv) and exit."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            if not standalone_mode:
                return code
        except UserError as error:
            sys.exit(_fail(str(error)))
        except (RuntimeError, MemoryError) as error:
            if not _memory_lacks(error):
                raise
            sys.exit(_fail(f"not enough memory ({first_line(error).rstrip('.')}); {LESS_MEMORY}"))
        except UsageError as error:
            sys.exit(_fail(_usage_text(error)))
        except typer.Abort:
            sys.exit(_fail("stopped", 1))
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=OneLineErrors,
    name="t2ialign",
    help="Make a text-to-image diffusion model follow its prompts better, and prove it.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: half the start-up time, and readable in a pipe
    pretty_exceptions_enable=False,
)


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"t2ialign {align_cli.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("train", cls=MethodHelp)(train.train)
app.command("sample", cls=SectionedHelp)(sample.sample)
app.command("edit", cls=SectionedHelp)(edit.edit)
app.command("encode", cls=SectionedHelp)(encode.encode)
app.command("eval", cls=SectionedHelp)(eval.evaluate)
app.add_typer(manage.presets_app, name="presets")
app.add_typer(manage.adapters_app, name="adapters")
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of `t2ialign` and of `python -m align_cli`."""
    launched.join()
    warnings.showwarning = _show_warning
    app(prog_name="t2ialign")


def _fail(message: str, code: int = 2) -> int:
    """Print the one line of an error, or leave that to the command that started this process; returns the
    exit code.
    """
    line = f"error: {' '.join(message.split())}"
    if not launched.note_failure(line, code):
        typer.echo(line, err=True)
    return code


def _memory_lacks(error: Exception) -> bool:
    """Whether that is how torch, which has no class for it on a CPU, or numpy say that memory has run out."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _usage_text(error: Exception) -> str:
    """Message of a Typer usage error and the help command that answers it."""
    text: str = getattr(error, "format_message", error.__str__)()
    context: typer.Context | None = getattr(error, "ctx", None)
    path = context.command_path if context else "t2ialign"
    return f"{text.rstrip('.')} (see {path} --help)"


_default_showwarning = warnings.showwarning
_PACKAGE = str(Path(align_cli.__file__).resolve().parent)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are one line `warning: ...`; those of libraries keep Python's form."""
    if filename.startswith(_PACKAGE):
        typer.echo(f"warning: {message}", err=True)
    else:
        _default_showwarning(message, category, filename, lineno, file, line)
