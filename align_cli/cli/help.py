"""Help of a command in sections, and of a method's own settings. No torch at import."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import typer
from typer.core import TyperCommand

from align_cli import registry
from align_cli.config import toml_text
from align_cli.packaged import list_presets

INPUT, MODEL, DRAWING, TRAINING, MEASURING = "Input", "Model", "Drawing", "Training", "Measuring"
WATCHING, PLAN, OUTPUT, OTHER = "Watching the training", "Plan", "Output", "Other"
SECTIONS = {
    INPUT: (
        "--prompt --prompts --image --src-prompt --tgt-prompt --list --column --split --kind --limit --data "
        "--data-path --cache --captions"
    ),
    MODEL: "--model --unet --adapter --arm --compare --text --dtype --device --encoder-device",
    TRAINING: "--preset --config --set --lr --stage --from --reward --weights",
    DRAWING: (
        "--steps --guidance --src-guidance --tgt-guidance --convention --sampler --spacing --eta --n "
        "--n-start --n-min --n-avg --per-prompt --seed --batch-size --image-size --keep-aspect --from-step "
        "--self-correct --correction --attention --parser"
    ),
    MEASURING: (
        "--scorers --trained-on --vs --interval --gallery --images --allow-missing --protocol --reference "
        "--geneval-results --all-methods"
    ),
    WATCHING: "--guard --guard-every --keep --no-eval",
    OUTPUT: (
        "--out --for --layout --posterior --shard-items --verify --samples --resume --allow-change "
        "--overwrite --num-processes --push-to-hub"
    ),
    PLAN: "--dry-run --gpu --mfu --no-costs --json",
    OTHER: "--help",
}
"""Title -> options; those of a command that has few of them stay under one title."""
ELSEWHERE = {
    "train": {"--steps": TRAINING, "--batch-size": TRAINING, "--seed": TRAINING},
    "encode": {"--preset": INPUT, "--set": INPUT},
    "eval": {"--weights": MEASURING, "--json": OUTPUT},
}
"""Command -> option -> section, where the same option is about something else."""
UsageError: Any = typer.BadParameter.__mro__[1]
"""Typer's own usage error (unknown option, missing argument, ...), a class that Typer does not export."""
METHOD = "align_cli.method"
"""Where the context keeps the method that the help is asked for."""


class SectionedHelp(TyperCommand):
    """A command whose options are shown by what they are about, and each mistake in them names its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Some errors of Typer's parser say no command."""
        try:
            return self.parsed(ctx, args)
        except UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def parsed(self, ctx: Any, args: list[str]) -> list[str]:
        """What is left of the arguments."""
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then the options section by section, one column for all."""
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", *SECTIONS)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            option = param.param_type_name == "option"
            title = section_of(str(ctx.info_name), param.opts) if option else "Arguments"
            rows[title] += [] if record is None else [record]
        width = max(len(name) for found in rows.values() for name, _ in found)
        for title, found in rows.items():
            if found:
                with formatter.section(title):
                    formatter.write_dl([(name.ljust(width), text) for name, text in found])


class MethodHelp(SectionedHelp):
    """The same, and under it the settings of the method that stands in the command line."""

    def parsed(self, ctx: Any, args: list[str]) -> list[str]:
        """--help is answered before the arguments are looked at: the method is noted here."""
        ctx.meta[METHOD] = self.make_parser(ctx).parse_args(args=list(args))[0].get("method")
        return super().parsed(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Presets and settings of the method, or how to see them."""
        method = ctx.meta.get(METHOD)
        if method not in registry.METHOD_CONFIGS:
            formatter.write_paragraph()
            formatter.write_text("'t2ialign train METHOD --help' shows a method's own settings, too.")
            return
        names = [name.partition("/")[2] for name in list_presets() if name.startswith(f"{method}/")]
        with formatter.section(f"Presets of {method}"):
            for line in textwrap.wrap(", ".join(names), formatter.width - 2, break_on_hyphens=False):
                formatter.write(f"  {line}\n")
        with formatter.section(f"Settings of {method} (--set {method}.KEY=VALUE) without a preset"):
            formatter.write_dl([(f"{key} = {value}", text) for key, value, text in settings_of(method)])


def section_of(command: str, names: Sequence[str]) -> str:
    """The section of an option. KeyError: it is in none."""
    known = {name: title for title, text in SECTIONS.items() for name in text.split()}
    return (known | ELSEWHERE.get(command, {}))[next(name for name in names if name.startswith("--"))]


def settings_of(method: str) -> list[tuple[str, str, str]]:
    """(key, default as TOML writes it, what it is) of a method's own settings, from the docstrings of its
    configuration.
    """
    cls = registry.load(registry.METHOD_CONFIGS, method)
    parsed = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    body = next(node.body for node in parsed if isinstance(node, ast.ClassDef))
    texts: dict[str, str] = {}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            texts[ast.unparse(node.target)] = str(ast.literal_eval(after.value))
    found = []
    for field in fields(cls):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        text = " ".join(texts.get(field.name, "").partition("Source:")[0].split())
        found.append((field.name, toml_text(default), text))
    return found
