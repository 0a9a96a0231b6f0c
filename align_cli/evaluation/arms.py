"""Arms of an evaluation: the base model, and stacks of adapters on it. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from align_cli.adapters import AdapterInfo, parse_spec, read_adapter
from align_cli.drawing import CRITIC
from align_cli.errors import UserError, unknown
from align_cli.settings import SampleSettings

if TYPE_CHECKING:
    from align_cli.models.base import BaseModel

BASE, ALIGNED = "base", "aligned"
"""The arm without adapters, and the name of the stack that `--adapter` gives."""
CORRECTED = "-corrected"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True)
class Arm:
    """One way to draw. name: also that of its folder of pictures. adapters: "PATH" or "PATH@SCALE" each, the
    first is innermost. hashes: sha256 of their tensors. trained_on: scorers that they were trained on.
    self_correct: scale of DPT's self-correction, None for that of the settings.
    """

    name: str
    adapters: tuple[str, ...] = ()
    hashes: tuple[str, ...] = ()
    trained_on: tuple[str, ...] = ()
    self_correct: float | None = None

    def at_work(self, model: BaseModel) -> AbstractContextManager[None]:
        """Inside, `model` draws as this arm. UserError if an adapter does not fit."""
        from align_cli.adapters import attach

        return attach(model, self.adapters)

    def drawing(self, settings: SampleSettings) -> SampleSettings:
        """How this arm draws where the others draw with `settings`."""
        return settings if self.self_correct is None else replace(settings, self_correct=self.self_correct)


def make_arms(
    adapters: Sequence[str],
    named: Sequence[str],
    trained_on: Sequence[str] = (),
    self_correct: float | None = None,
) -> list[Arm]:
    """The base, the stack of `adapters`, and one arm for each "NAME=A@0.5+B" of `named`; and of each of these
    with an adapter of DPT one more that corrects itself, by the name NAME-corrected.

    Args:
        trained_on: scorers that the user says the adapters were trained on, beside those that they say
            themselves.
        self_correct: the scale of that; None for no such arms.
    Raises:
        UserError: a name that is none, or is given twice; an adapter that is damaged or not there; no adapter
            of DPT where one is needed.
    """
    stacks: dict[str, tuple[str, ...]] = {BASE: ()}
    if adapters:
        stacks[ALIGNED] = tuple(adapters)
    for text in named:
        name, specs = _split(text, "--arm", "NAME=FOLDER@0.5+FOLDER")
        if name in stacks:
            what = "the arm without adapters" if name == BASE else "given twice"
            raise UserError(f"--arm {text}: the name {name!r} is {what}; choose another one")
        stacks[name] = _adapters(specs)
    arms = [_arm(name, specs, trained_on) for name, specs in stacks.items()]
    return arms if self_correct is None else [*arms, *_corrected(arms, self_correct)]


def _corrected(arms: Sequence[Arm], scale: float) -> list[Arm]:
    found = []
    for arm in arms:
        methods = [read_adapter(parse_spec(spec)[0])[1].method for spec in arm.adapters]
        if CRITIC in methods:
            name = f"{arm.name}{CORRECTED}"
            check_name(name, "--self-correct")
            if any(name == other.name for other in arms):
                raise UserError(f"--self-correct makes an arm {name!r}, and there is one; rename it")
            found.append(replace(arm, name=name, self_correct=scale))
    if not found:
        raise UserError(
            f"--self-correct needs an adapter of {CRITIC}, whose discriminator scores pictures in the "
            "making: give it with --adapter or --arm"
        )
    return found


def check_name(name: str, option: str) -> None:
    """UserError unless `name` can name an arm and its folder."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{option}: {name!r} cannot name an arm; a name has up to 40 letters, digits, '.', '_' or '-'"
        )


def baseline(arms: Collection[str], vs: str | None) -> str:
    """The arm that the others are compared with: `vs`, else the first. UserError if there is no such arm."""
    if vs is None:
        return next(iter(arms))
    if vs not in arms:
        raise unknown("arm", vs, arms, where="--vs")
    return vs


def _split(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise UserError(f"{option} {text}: write {option} {form}")
    check_name(name, f"{option} {text}")
    return name, rest


def _adapters(text: str) -> tuple[str, ...]:
    """A@0.5+B as its parts; a folder whose own name holds the + is taken as it is."""
    parts = text.split("+")
    whole = Path(parse_spec(text)[0]).expanduser().exists()
    return (text,) if whole or not all(parts) else tuple(parts)


def _arm(name: str, specs: tuple[str, ...], trained_on: Sequence[str]) -> Arm:
    infos = [read_adapter(parse_spec(spec)[0])[1] for spec in specs]
    known = [scorer for info in infos for scorer in rewards_of(info)]
    marked = tuple(dict.fromkeys([*known, *trained_on])) if specs else ()
    return Arm(name, specs, tuple(info.sha256 for info in infos), marked)


def rewards_of(info: AdapterInfo) -> tuple[str, ...]:
    """Scorers that an adapter's own configuration says it was trained on: `rewards` in the section of its
    method, a table of name -> weight or a list of names. A weight of 0 is none.
    """
    return rewards_in(info.config.get(info.method, {}))


def rewards_in(section: object) -> tuple[str, ...]:
    """The same of the section of a method itself, as plain dicts and lists."""
    found = section.get("rewards", ()) if isinstance(section, Mapping) else ()
    if isinstance(found, Mapping):
        return tuple(str(name) for name, weight in found.items() if weight)
    if isinstance(found, str):
        return (found,) if found else ()
    return tuple(map(str, found)) if isinstance(found, Sequence) else ()
