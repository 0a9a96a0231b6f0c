"""Train the adapters of tokens/ anew: every method on every embedded model that it works on, by the presets.

    python benchmarks/tiny_adapters.py [--out FOLDER] [NAME ...]

NAME: tiny-sd15/softrepa, ...; all of them if none is given. The runs lie in FOLDER (runs/tiny-adapters), go
on where they stopped, and are not trained again once they are whole. One thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copyfile

from align_cli.adapters import INFO, TENSORS
from align_cli.training.run_folder import ADAPTER, RUN

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("tiny-sd15", "tiny-sdxl", "tiny-sd3")
STAGES = {"longalign": [["--stage", "align"]], "dpt": [["--stage", "probe"], ["--stage", "tune"]]}
"""Of methods that have them, first to last; the last is packaged, and each starts from the one before."""
METHODS = ("softrepa", "longalign", "textcraftor", "dpt", "comat")
LEFT_OUT = frozenset({"tiny-sd3/longalign"})
"""Pairs that are not applicable, see docs/methods.md."""


def names() -> list[str]:
    """All packaged adapters."""
    return [name for model in MODELS for method in METHODS if (name := f"{model}/{method}") not in LEFT_OUT]


def train(name: str, folder: Path) -> Path:
    """Train one with the stages before it; the folder of its adapter."""
    model, method = name.split("/")
    run, start = folder, []
    for options in STAGES.get(method, [[]]):
        run = folder / "-".join([model, method, *options[1:]])
        command = [sys.executable, "-m", "align_cli", "train", method, "--out", str(run), "--no-eval"]
        if not (run / ADAPTER / INFO).exists():
            begun = (run / RUN).exists()
            fresh = ["--model", model, *options, *start]
            subprocess.run(
                [*command, *(["--resume"] if begun else fresh)],
                check=True,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        start = ["--from", str(run)]
    return run / ADAPTER


def pack(source: Path, name: str) -> None:
    """Copy an adapter to tokens/; the run that it started from is known by its name alone."""
    info = json.loads((source / INFO).read_text(encoding="utf-8"))
    for section in info["config"].values():
        if isinstance(section, dict) and section.get("from_adapter"):
            section["from_adapter"] = Path(section["from_adapter"]).name
    target = ROOT / "tokens" / name
    target.mkdir(parents=True, exist_ok=True)
    copyfile(source / TENSORS, target / TENSORS)
    (target / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the adapters of tokens/ anew.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-adapters"), help="folder of the runs")
    asked = parser.parse_args()
    for name in asked.names or names():
        pack(train(name, asked.out.absolute()), name)
        print(f"packed {name}", flush=True)


if __name__ == "__main__":
    main()
