"""Layered, typed run configuration: class default < preset < --config file < --set key=value < named flag.

Every value remembers the layer it came from. Importing this costs no torch.
"""

from __future__ import annotations

import json
import math
import tomllib
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from align_cli import registry
from align_cli.errors import UserError, unknown
from align_cli.methods.applies import why_not_alias
from align_cli.packaged import list_presets, read_preset, read_toml
from align_cli.settings import (
    DataSettings,
    EditSettings,
    EvalSettings,
    GuardSettings,
    MethodConfig,
    ModelSettings,
    SampleSettings,
    TrainSettings,
)

SECTIONS: dict[str, type] = {
    "model": ModelSettings,
    "data": DataSettings,
    "train": TrainSettings,
    "guard": GuardSettings,
    "sample": SampleSettings,
    "edit": EditSettings,
    "eval": EvalSettings,
}
"""Sections that every method has; one more has the method's own name."""

FLAGS = {
    "model.name": "--model",
    "data.name": "--data",
    "data.path": "--data-path",
    "data.cache": "--cache",
    "guard.scorers": "--guard",
    "guard.every": "--guard-every",
    "guard.weights": "--weights",
    "eval.num_prompts": "--no-eval",
}
"""Named flags whose spelling is not `--` plus the key's last part."""

METHOD_FLAGS = {"rewards": "--reward", "reward_weights": "--weights", "from_adapter": "--from"}
"""The same for settings that several methods have in their own sections, by the key's last part."""

PAPER = "-paper"
"""Ending of a preset with the settings of a paper where a script has others: the model's own by default."""

NO_PRESET = "none"
"""`--preset none`: class defaults only."""


# ---------------------------------------------------------------- the result


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A complete configuration and, per dotted key, the layer its value came from."""

    method: str
    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    guard: GuardSettings
    sample: SampleSettings
    edit: EditSettings
    eval: EvalSettings
    method_config: MethodConfig
    """The method's own frozen dataclass; its section has the method's name."""
    origin: dict[str, str] = field(compare=False)
    """Dotted key -> "default", "preset softrepa/sd15", "file x.toml", "--set", "--lr", ..."""

    def values(self) -> Iterator[tuple[str, object, str]]:
        """(dotted key, value, origin) of every setting, section by section."""
        for section, part in self._parts():
            for name in _settings(type(part)):
                yield f"{section}.{name}", getattr(part, name), self.origin[f"{section}.{name}"]

    def to_dict(self) -> dict[str, object]:
        """Nested plain dict, ready for JSON; tuples become lists."""
        raw: dict[str, object] = {"method": self.method}
        for section, part in self._parts():
            raw[section] = {name: _plain(getattr(part, name)) for name in _settings(type(part))}
        return raw

    def to_toml(self) -> str:
        """The same layout as a preset, every line followed by its origin; `--config` reads it back."""
        lines = [f"method = {toml_text(self.method)}"]
        section = ""
        for key, value, origin in self.values():
            head, _, name = key.partition(".")
            if head != section:
                section = head
                lines += ["", f"[{section}]"]
            if value is not None:
                lines.append(f"{name} = {toml_text(value)}  # {origin}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_dict(
        cls,
        raw: Mapping[str, object],
        origin: Mapping[str, str] | None = None,
        *,
        where: str = "saved config",
    ) -> Resolved:
        """Inverse of `to_dict`. Keys that `raw` lacks take their default; unknown keys are a UserError."""
        method = raw.get("method")
        if not isinstance(method, str):
            raise UserError(f"{where}: no method named")
        state = _State(method)
        state.add_nested(raw, where, where)
        state.origin.update({key: text for key, text in (origin or {}).items() if key in state.raw})
        return state.build()

    def _parts(self) -> Iterator[tuple[str, object]]:
        for section in SECTIONS:
            yield section, getattr(self, section)
        yield self.method, self.method_config


def resolve(
    method: str,
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    sets: list[str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Resolved:
    """The configuration of one run.

    Args:
        method: registered method.
        preset: "softrepa/sd15", or "sd15" for short, or "none". Not given: `<method>/<model alias>`, or
        `<method>/<model alias>-<stage>`.
        config_file: TOML file in the layout of a preset.
        sets: "section.key=value" texts; the value is TOML, or bare text for a setting that is a text.
        flags: dotted key -> value of a named flag; None means that the flag was not given.
    Raises:
        UserError: an unknown name, a wrong type or an impossible value, naming the layer and the key.
    A setting given by the user that has no effect in this run is a Python warning.
    """
    state = _State(method)
    file_raw: dict[str, object] = {}
    if config_file is not None:
        file_raw, _ = read_toml(config_file, f"file {config_file}")
    texts = [_split_set(text) for text in sets or []]
    given = {key: str(v) if isinstance(v, Path) else v for key, v in (flags or {}).items() if v is not None}

    name = _preset_name(method, preset, _User(file_raw, texts, given))
    if name is not None:
        state.add_nested(read_preset(name)[0], f"preset {name}", f"preset {name}")
    if config_file is not None:
        state.add_nested(file_raw, f"file {config_file}", f"file {config_file}")
    for key, text in texts:
        where = f"--set {key}={text}"
        state.add(key, _parse_text(text, state.hint(key, where)), where, "--set")
    for key, value in given.items():
        flag = flag_name(key)
        state.add(key, value, flag, flag)
    resolved = state.build()
    for message in idle_settings(resolved):
        warnings.warn(message, stacklevel=2)
    return resolved


def flag_name(key: str) -> str:
    """The named flag of a dotted key: train.batch_size -> --batch-size."""
    end = key.rpartition(".")[2]
    return FLAGS.get(key) or METHOD_FLAGS.get(end) or "--" + end.replace("_", "-")


# ---------------------------------------------------------------- settings without effect


_IDLE: tuple[tuple[tuple[str, ...], Callable[[Resolved], bool], str], ...] = (
    (("model.segment_length", "model.splitter"), lambda r: r.model.text == "plain", "model.text is plain"),
    (("train.lr_every", "train.lr_period"), lambda r: r.train.lr_schedule != "cosine-restarts",
     "train.lr_schedule is not cosine-restarts"),
    (("train.lr_min",), lambda r: r.train.lr_schedule == "constant", "train.lr_schedule is constant"),
    (("data.path", "data.image_size", "data.interpolation"), lambda r: r.data.name == "shapes",
     "the shapes dataset is generated"),
    (("data.image_size", "data.interpolation"),
     lambda r: not (r.method_config.pictures or (r.method_config.latents and r.data.cache))
     and r.data.name != "shapes", "the method sees captions alone"),
    (("data.column",), lambda r: r.data.name not in ("prompts", "captions", "latents"),
     "data.name is not prompts, captions or latents"),
    (("data.expressions", "data.negatives"), lambda r: r.data.name != "refcoco",
     "data.name is not refcoco"),
    (("data.images",), lambda r: r.data.name not in ("captions", "latents"),
     "data.name is not captions or latents"),
    (("data.images",), lambda r: r.data.name == "captions" and not r.method_config.pictures,
     "the method sees captions alone"),
    (("data.images",), lambda r: r.data.name == "latents" and not r.method_config.latents,
     "the method sees captions alone"),
    (("data.images",), lambda r: r.data.name in ("captions", "latents") and bool(r.data.cache),
     "data.cache is read instead"),
    (("data.path",), lambda r: bool(r.data.cache) and r.data.name != "shapes", "data.cache is read instead"),
    (("data.mixture",), lambda r: r.data.name != "shapes", "data.name is not shapes"),
    (("guard.scorers",), lambda r: not r.guard.every and r.origin["guard.every"] != "default",
     "guard.every is 0"),  # where nobody said how often, that is an error
    (("guard.weights", "guard.prompts", "guard.num_prompts", "guard.seed"),
     lambda r: not r.guard.every, "guard.every is 0"),
    (("sample.eta",), lambda r: r.sample.sampler != "ddim", "sample.sampler is not ddim"),
    (("sample.spacing",), lambda r: r.sample.sampler == "euler", "sample.sampler is euler"),
)  # fmt: skip
"""(keys, condition under which they do nothing, the reason in words)."""


def idle_settings(resolved: Resolved) -> list[str]:
    """One line per setting that the user changed (file, --set or flag) and that has no effect in this run."""
    changed = {
        key
        for key, value, origin in resolved.values()
        if origin.startswith(("file ", "--")) and value != class_default(key)
    }
    return [
        f"{key} (from {resolved.origin[key]}) has no effect: {reason}"
        for keys, idle, reason in _IDLE
        for key in keys
        if key in changed and idle(resolved)
    ]


def class_default(key: str) -> object:
    """Default of a setting that every method has; None for a method's own."""
    section, _, name = key.partition(".")
    return getattr(SECTIONS[section](), name) if section in SECTIONS else None


# ---------------------------------------------------------------- building


class _State:
    """Dotted key -> value while layers are laid over one another."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.classes: dict[str, type] = SECTIONS | {method: registry.load(registry.METHOD_CONFIGS, method)}
        self.hints = {
            f"{section}.{name}": hint
            for section, cls in self.classes.items()
            for name, hint in _settings(cls).items()
        }
        self.raw: dict[str, object] = {}
        self.origin: dict[str, str] = {}

    def hint(self, key: str, where: str) -> object:
        """Type of a dotted key; UserError with the nearest key if there is none such."""
        if key in self.hints:
            return self.hints[key]
        section, dot, _ = key.partition(".")
        if section in self.classes and dot:
            raise unknown("key", key, [k for k in self.hints if k.startswith(f"{section}.")], where=where)
        if not dot:
            same = [k for k in self.hints if k.rpartition(".")[2] == key]
            if same:
                raise UserError(f"{where}: unknown key {key!r}; did you mean {' or '.join(map(repr, same))}?")
        raise unknown("section", section, self.classes, where=where)

    def add(self, key: str, value: object, where: str, origin: str) -> None:
        self.raw[key] = convert(value, self.hint(key, where), f"{where}: {key}")
        self.origin[key] = origin

    def add_nested(self, raw: Mapping[str, object], where: str, origin: str) -> None:
        for section, content in raw.items():
            if section == "method":
                if content != self.method:
                    raise UserError(
                        f"{where}: is for the method {content!r}, but the method here is {self.method!r}"
                    )
            elif not isinstance(content, Mapping):
                self.hint(section, where)
            elif section not in self.classes:
                raise unknown("section", section, self.classes, where=where)
            else:
                for name, value in content.items():
                    self.add(f"{section}.{name}", value, where, origin)

    def build(self) -> Resolved:
        parts: dict[str, Any] = {section: self._build(section, cls) for section, cls in self.classes.items()}
        origin = {key: self.origin.get(key, "default") for key in self.hints}
        method_config = parts.pop(self.method)
        assert isinstance(method_config, MethodConfig)
        return Resolved(method=self.method, method_config=method_config, origin=origin, **parts)

    def _build(self, section: str, cls: type) -> object:
        values = {
            key.partition(".")[2]: value
            for key, value in self.raw.items()
            if key.partition(".")[0] == section
        }
        for f in _fields(cls):
            if f.init and f.name not in values and f.default is MISSING and f.default_factory is MISSING:
                raise UserError(f"{section}.{f.name} has no default and must be set")
        try:
            return cls(**values)
        except UserError as error:
            where = self._blame(section, str(error), list(values))
            raise UserError(f"{where}: {error}" if where else str(error)) from error

    def _blame(self, section: str, message: str, names: list[str]) -> str:
        """The layers that set the keys named by an error message of a settings class."""
        words = set("".join(c if c.isalnum() or c == "_" else " " for c in message).split())
        named = [name for name in names if name in words] or names
        return ", ".join(dict.fromkeys(self.origin[f"{section}.{name}"] for name in named))


def convert(value: object, hint: object, where: str) -> object:
    """`value` as the type `hint` of a settings field; UserError if it is none. `where`: layer and key."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint), where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise UserError(
                f"{where} must be one of {', '.join(map(str, typing.get_args(hint)))}, got {value!r}"
            )
        return value
    if origin is dict:
        return _convert_table(value, typing.get_args(hint), where)
    if origin is tuple:
        return _convert_tuple(value, typing.get_args(hint), where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{where} must be a finite number, got {value!r}")
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if (hint is bool and isinstance(value, bool)) or (hint is str and isinstance(value, str)):
        return value
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    for kind, text in names.items():
        if hint is kind:
            raise UserError(f"{where} must be {text}, got {value!r}")
    raise TypeError(f"{where}: settings of type {hint!r} are not supported")


def _convert_union(value: object, arms: tuple[object, ...], where: str) -> object:
    if value is None and types.NoneType in arms:
        return None
    real = [arm for arm in arms if arm is not types.NoneType]
    for arm in real[:-1]:
        try:
            return convert(value, arm, where)
        except UserError:
            continue  # the last arm writes the error
    return convert(value, real[-1], where)


def _convert_tuple(value: object, args: tuple[object, ...], where: str) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} must be a list, got {value!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise UserError(f"{where} must be a list of {len(args)} values, got {len(value)}")
    return tuple(
        convert(item, arg, f"{where}[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True))
    )


def _convert_table(value: object, args: tuple[object, ...], where: str) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a table, got {value!r}")
    return {str(name): convert(item, args[1], f"{where}.{name}") for name, item in value.items()}


def _fields(cls: type) -> tuple[Field[object], ...]:
    if not is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass")
    return fields(cls)


def _settings(cls: type) -> dict[str, object]:
    """Field name -> type of a settings class, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in _fields(cls) if f.init}


# ---------------------------------------------------------------- layers


def _split_set(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text}: write it as section.key=value, for example train.lr=1e-4")
    return key.strip(), value.strip()


def _parse_text(text: str, hint: object) -> object:
    """Value of `--set`: TOML; whatever is not TOML, or is wanted as a text, is that text itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    if len(parsed) > 1 or (hint is str and not isinstance(value, str)):
        return text
    return value


class _User:
    """What the user gave, before it is known on which preset it goes: the highest layer that has a key."""

    def __init__(
        self, file_raw: Mapping[str, object], texts: list[tuple[str, str]], flags: Mapping[str, object]
    ) -> None:
        self.file_raw, self.texts, self.flags = file_raw, texts, flags

    def wants(self, key: str) -> str:
        """The text of a setting, "" if no layer names it."""
        if isinstance(self.flags.get(key), str):
            return str(self.flags[key])
        for name, text in reversed(self.texts):
            if name == key:
                return str(_parse_text(text, str))
        section, _, name = key.partition(".")
        found = self.file_raw.get(section)
        value = found.get(name) if isinstance(found, Mapping) else None
        return value if isinstance(value, str) else ""


def _preset_name(method: str, preset: str | None, user: _User) -> str | None:
    """The preset that was named, else the model's own: of the stage, where stages have their own."""
    known = list_presets()
    if preset == NO_PRESET:
        return None
    if preset is not None:
        return f"{method}/{preset}" if f"{method}/{preset}" in known else preset
    model = user.wants("model.name") or ModelSettings().name
    source = registry.model_source(model)
    aliases = [alias for alias, target in registry.MODELS.items() if target == source]
    settings = registry.load(registry.METHOD_CONFIGS, method)
    stage = user.wants(f"{method}.stage") or getattr(settings, "stage", "")
    if stage and hasattr(settings, "stage"):
        settings(stage=stage)  # an unknown one is an error here, not one of presets
    names = [f"{method}/{alias}{tail}" for tail in (f"-{stage}", "", PAPER) for alias in aliases]
    for name in names:
        if name in known:
            return name
    if reason := why_not_alias(method, aliases):
        raise UserError(f"{method} does not train {model}: {reason}")
    own = [name for name in known if name.startswith(f"{method}/")]
    raise UserError(
        f"{method} has no preset for the model {model!r}"
        + (f" and stage {stage!r}" if stage else "")
        + f"; name one with --preset ({', '.join(own) or 'there is none'}; {NO_PRESET} takes the class "
        "defaults)"
    )


# ---------------------------------------------------------------- output


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def toml_text(value: object) -> str:
    """A value as a preset writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_text, value))}]"
    if isinstance(value, Mapping):
        items = ", ".join(f"{json.dumps(name)} = {toml_text(item)}" for name, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    return repr(value)
