"""What a training is to do: its settings from all layers, its folder, in words. No torch."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from align_cli import config, registry
from align_cli.cli.text import columns
from align_cli.errors import UserError
from align_cli.training import run_folder


def method_flags(
    method: str,
    stage: str | None,
    rewards: dict[str, float],
    places: dict[str, str],
    start: Path | None,
) -> dict[str, object]:
    """The flags that are settings of some methods. UserError for one that this method does not have."""
    given: dict[str, object] = {
        "stage": stage,
        "rewards": rewards or None,
        "reward_weights": places or None,
        "from_adapter": start,
    }
    known = {f.name for f in fields(registry.load(registry.METHOD_CONFIGS, method))}
    for name, value in given.items():
        if value is not None and name not in known:
            raise UserError(f"{config.flag_name(f'{method}.{name}')} is no option of {method}")
    return {f"{method}.{name}": value for name, value in given.items()}


class Layers:
    """What the user gave, and the configuration it makes."""

    def __init__(
        self, method: str, preset: str | None, file: Path | None, sets: list[str], flags: dict[str, object]
    ) -> None:
        self.method, self.preset, self.file, self.sets, self.flags = method, preset, file, sets, flags

    def fresh(self) -> config.Resolved:
        """The configuration of a new run."""
        return config.resolve(
            self.method, preset=self.preset, config_file=self.file, sets=self.sets, flags=self.flags
        )

    def resolve(self, out: Path | None, *, resume: bool) -> tuple[config.Resolved, Path]:
        """Configuration and output folder. A run that goes on takes its own settings in place of a preset."""
        if not resume:
            fresh = self.fresh()
            return fresh, out or Path("runs") / default_name(fresh)
        if out is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it only serves to find the folder
                out = Path("runs") / default_name(self.fresh())
        return self._resumed(out), out

    def _resumed(self, folder: Path) -> config.Resolved:
        saved = run_folder.read_run(folder)
        where = str(folder / run_folder.RUN)
        settings = {key: part for key, part in saved["config"].items() if key not in run_folder.CONTENTS}
        old = config.Resolved.from_dict(settings, saved.get("origin"), where=where)
        if old.method != self.method:
            raise UserError(
                f"{folder} holds a run of {old.method}, not of {self.method}; choose another --out"
            )
        if self.preset or self.file:  # the same command as before, and --resume: it must come to the same
            return self.fresh()
        path = folder / run_folder.CONFIG
        with TemporaryDirectory() as made, warnings.catch_warnings():
            if not path.exists():  # the run was killed after its first file, run.json, which says the same
                path = Path(made) / run_folder.CONFIG
                path.write_text(old.to_toml(), encoding="utf-8")
            from_file = f"file {path}"  # an idle setting was told when the run began
            warnings.filterwarnings("ignore", message=rf".*\(from {re.escape(from_file)}\)")
            now = config.resolve(
                self.method, preset=config.NO_PRESET, config_file=path, sets=self.sets, flags=self.flags
            )
        origin = {key: old.origin[key] if text == from_file else text for key, text in now.origin.items()}
        return replace(now, origin=origin)


def default_name(resolved: config.Resolved) -> str:
    """softrepa-tiny-sd15-seed42, textcraftor-text-tiny-sd15-seed42."""
    tail = Path(resolved.model.name.rstrip("/")).name.removeprefix("embedded:")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", tail).strip("-.") or "model"
    parts = [resolved.method, stage_of(resolved), slug, f"seed{resolved.train.seed}"]
    return "-".join(part for part in parts if part)


def stage_of(resolved: config.Resolved) -> str:
    """The stage of a method that has stages, else ""."""
    return str(getattr(resolved.method_config, "stage", ""))


def describe(resolved: config.Resolved) -> str:
    """Every setting with its value and its origin, in columns."""
    rows = [("setting", "value", "origin")]
    rows += [(key, json.dumps(value), origin) for key, value, origin in resolved.values()]
    return f"method: {resolved.method}\n\n{columns(rows)}"


def check_allowed(resolved: config.Resolved, allowed: list[str], *, resume: bool) -> None:
    """UserError for a KEY of --allow-change that is no setting, and where nothing is resumed."""
    if allowed and not resume:
        raise UserError(f"{run_folder.ALLOW} is for a run that goes on: give --resume, too")
    run_folder.check_allowed(allowed, run_folder.flat(resolved.to_dict()).keys())
