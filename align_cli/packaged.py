"""What travels inside the package: presets, and adapters trained on the embedded models. No torch.

An adapter of tokens/MODEL/METHOD is named as "tiny-sd15/softrepa" wherever an adapter is named; a folder of
that name goes first.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from align_cli.errors import UserError, unknown

ORDER = ("softrepa", "longalign", "textcraftor", "dpt", "comat")
"""In which the methods are listed; one that is not here comes last."""


def data_dir(kind: str) -> Path:
    """Folder of packaged files, "presets" or "tokens": in the installed package or in a source checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_data" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise UserError(
        f"this installation of t2ialign has no {kind} folder (looked beside {package}); reinstall it"
    )


def preset_dir() -> Path:
    """Folder of the presets, `<method>/<name>.toml`."""
    return data_dir("presets")


def list_presets() -> list[str]:
    """Names of all presets, sorted: "softrepa/sd15", ..."""
    root = preset_dir()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*.toml"))


def read_preset(name: str) -> tuple[dict[str, object], str]:
    """Parsed content and text of one preset. UserError for an unknown name."""
    known = list_presets()
    if name not in known:
        raise unknown("preset", name, known)
    return read_toml(preset_dir() / f"{name}.toml", f"preset {name}")


def read_toml(path: Path, where: str) -> tuple[dict[str, object], str]:
    """Parsed content and text of a TOML file; `where` names it in errors."""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: is not valid TOML: {error}") from error


def packaged_adapters() -> dict[str, Path]:
    """Name -> folder of every packaged adapter: models in the order of their names, methods in ORDER."""

    def place(folder: Path) -> tuple[str, int, str]:
        method = folder.name
        return folder.parent.name, ORDER.index(method) if method in ORDER else len(ORDER), method

    folders = [path for path in data_dir("tokens").glob("*/*") if path.is_dir()]
    return {f"{folder.parent.name}/{folder.name}": folder for folder in sorted(folders, key=place)}
