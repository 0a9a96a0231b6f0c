"""The adapters that travel inside the package: tokens/MODEL/METHOD, trained on the embedded models. No torch.

One is named as "tiny-sd15/softrepa" wherever an adapter is named; a folder of that name goes first.
"""

from __future__ import annotations

from pathlib import Path

from align_cli import config

ORDER = ("softrepa", "longalign", "textcraftor", "dpt", "comat")
"""In which the methods are listed; one that is not here comes last."""


def packaged() -> dict[str, Path]:
    """Name -> folder of every packaged adapter: models in the order of their names, methods in ORDER."""

    def place(folder: Path) -> tuple[str, int, str]:
        method = folder.name
        return folder.parent.name, ORDER.index(method) if method in ORDER else len(ORDER), method

    folders = [path for path in config.data_dir("tokens").glob("*/*") if path.is_dir()]
    return {f"{folder.parent.name}/{folder.name}": folder for folder in sorted(folders, key=place)}
