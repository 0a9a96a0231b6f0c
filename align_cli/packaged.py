"""The adapters that travel inside the package: tokens/MODEL/METHOD, trained on the embedded models. No torch.

One is named as "tiny-sd15/softrepa" wherever an adapter is named; a folder of that name goes first.
"""

from __future__ import annotations

from pathlib import Path

from align_cli import config
from align_cli.adapters import INFO

ORDER = ("softrepa", "longalign", "textcraftor", "dpt", "comat")
"""In which the methods are listed; one that is not here comes last."""


def packaged() -> dict[str, Path]:
    """Name -> folder of every packaged adapter: models in the order of their names, methods in ORDER."""
    root = config.data_dir("tokens")
    found = [path.parent for path in root.glob(f"*/*/{INFO}")]

    def place(folder: Path) -> tuple[str, int, str]:
        method = folder.name.partition("-")[0]
        return folder.parent.name, ORDER.index(method) if method in ORDER else len(ORDER), folder.name

    return {f"{folder.parent.name}/{folder.name}": folder for folder in sorted(found, key=place)}


def find_packaged(name: str) -> Path | None:
    """The folder of a packaged adapter, None if there is none of that name."""
    return packaged().get(name)
