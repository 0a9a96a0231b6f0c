"""What `sample` and `eval` share: which model, which adapters, how pictures are drawn. No torch at import."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_cli import config, registry
from align_cli.errors import UserError
from align_cli.settings import ModelSettings, SampleSettings

if TYPE_CHECKING:
    from align_cli.adapters import AdapterInfo
    from align_cli.models.base import BaseModel

DEFAULTS = "the defaults"


@dataclass(frozen=True)
class Plan:
    """A decided drawing. adapters: the specs as typed ("PATH@0.7"). infos: what their folders say.

    origin: in words, where the sampling settings come from. open_keys: those of sampler and spacing that
    nobody chose, so that the model's own holds. own_dtype: nobody chose a dtype on the command line.
    """

    model: ModelSettings
    sample: SampleSettings
    adapters: list[str]
    infos: list[AdapterInfo]
    origin: str
    open_keys: frozenset[str]
    own_dtype: bool

    def load(self) -> tuple[BaseModel, Plan]:
        """The model, with a look whether every adapter fits it, and the plan with nothing left open."""
        from align_cli.adapters import attach
        from align_cli.models.loading import load_model, pick_device
        from align_cli.sampling import check_settings, own_settings

        settings = self.model
        if self.own_dtype and pick_device(settings.device).type == "cpu":
            settings = replace(settings, dtype="float32")  # half precision on a CPU is slower, not faster
        model = load_model(settings)
        with attach(model, self.adapters):
            pass  # before the settings, which may come from an adapter that does not fit
        drawing = own_settings(model, self.sample, self.open_keys)
        check_settings(model, drawing)
        return model, replace(self, model=settings, sample=drawing)

    def describe(self) -> str:
        """One line: what is drawn with which settings."""
        s = self.sample
        spacing = "" if s.sampler == "euler" else f" ({s.spacing})"
        return (
            f"{self.model.name}: {s.sampler}, {s.steps} steps{spacing}, guidance {s.guidance:g}, as "
            f"{self.origin}"
        )


def make_plan(
    model: str | None, adapters: list[str], model_flags: Mapping[str, Any], flags: Mapping[str, Any]
) -> Plan:
    """Settings in layers: those recorded with the first adapter, or the preset of the model, or the class
    defaults; above them the flags.

    Args:
        model: alias, hub id or folder; None takes the base model of the first adapter, or the embedded one.
        adapters: "PATH" or "PATH@SCALE" each.
        model_flags, flags: fields of ModelSettings and SampleSettings; None means not given.
    Raises:
        UserError: an unknown model, an adapter that does not load, an impossible value.
    """
    from align_cli.adapters import load_adapter, parse_spec

    infos = [load_adapter(parse_spec(spec)[0]).info for spec in adapters]
    base, drawing, origin, layers = _recorded(model, infos[0] if infos else None, adapters)
    given = {key: value for key, value in flags.items() if value is not None}
    if given:
        origin += ", with " + ", ".join(config.flag_name(f"sample.{key}") for key in given)
    held = {key: value for key, value in model_flags.items() if value is not None}
    return Plan(
        model=replace(base, **held),
        sample=replace(drawing, **given),
        adapters=adapters,
        infos=infos,
        origin=origin,
        open_keys=frozenset(
            key
            for key in ("sampler", "spacing")
            if key not in given and layers.get(f"sample.{key}", "default") == "default"
        ),
        own_dtype="dtype" not in held,
    )


def _recorded(
    model: str | None, info: AdapterInfo | None, adapters: list[str]
) -> tuple[ModelSettings, SampleSettings, str, Mapping[str, str]]:
    """Model and sampling settings before flags, where they come from, and the layer of every value."""
    if info is not None and "sample" in info.config:
        raw = {**info.config, "method": info.method}
        saved = config.Resolved.from_dict(raw, info.origin, where=f"adapter {adapters[0]}: config")
        held = saved.model if model in (None, saved.model.name) else ModelSettings(name=str(model))
        # where it was trained says nothing about this machine
        return replace(held, device="auto"), saved.sample, f"recorded in {adapters[0]}", saved.origin
    name = model or (info.model_id if info is not None else ModelSettings().name)
    preset = preset_of(name)
    if preset is None:
        return ModelSettings(name=name), SampleSettings(), DEFAULTS, {}
    found = config.resolve(preset.partition("/")[0], preset=preset)
    return replace(found.model, name=name), found.sample, f"preset {preset}", found.origin


def preset_of(model: str) -> str | None:
    """The first preset `<method>/<alias>` made for this model."""
    source = registry.model_source(model)
    aliases = [alias for alias, target in registry.MODELS.items() if target == source]
    return next((p for p in config.list_presets() if p.partition("/")[2] in aliases), None)


def choose_folder(out: Path | None, default: str, names: list[str], overwrite: bool) -> Path:
    """The folder to write to; nothing is made yet.

    Args:
        out: as given with --out; None takes `default`, or `default`-2, -3, ... if that exists.
        names: files that will be written; one that is there already is refused unless `overwrite`.
    Raises:
        UserError: it holds such files, or is a file.
    """
    if out is None:
        out = Path(default)
        number = 1
        while out.exists():
            number += 1
            out = Path(f"{default}-{number}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder; choose another one with --out")
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(
            f"{out} already holds {there[0]}{more}; choose another folder with --out, or give --overwrite"
        )
    return out


def make_folder(out: Path) -> None:
    """Make the folder and prove that it can be written to, before minutes of drawing. UserError if not."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".t2ialign-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; choose another folder with --out"
        ) from None
