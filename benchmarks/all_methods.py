"""README's table of all methods and its pictures, made anew from the packaged adapters.

    python benchmarks/all_methods.py [FOLDER]

FOLDER holds the evaluation, which goes on where it stopped; runs/eval-all-methods if it is not given.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copyfile

from align_cli.cli.eval_all import TABLE
from align_cli.evaluation.all_methods import Comparison, footnote, markdown, read, to_text
from align_cli.evaluation.forest import save_forest

ROOT = Path(__file__).resolve().parent.parent
README, STORED = ROOT / "README.md", Path(__file__).with_name("all-methods.json")
BEGIN, END = "<!-- all methods: begin -->\n", "<!-- all methods: end -->\n"


def block(found: Comparison) -> str:
    """What stands in README between the two marks."""
    models = " and ".join(f"`{family.model}`" for family in found.families[:1])
    return (
        f"{markdown(found)}\n{footnote(found)}\n\n"
        "![Gains of every method on every embedded model](benchmarks/all-methods.png)\n\n"
        f"![The first held-out prompts of each kind, drawn by every method on {models}]"
        f"(benchmarks/all-methods_{found.families[0].model}.png)\n"
    )


def written(text: str, found: Comparison) -> str:
    """README's text with the block in it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{block(found)}{END}{after}"


def main(folder: Path) -> None:
    """Measure, then write what README shows."""
    words = ["eval", "shapes", "--all-methods"]
    subprocess.run([sys.executable, "-m", "align_cli", *words, "--out", str(folder)], check=True, cwd=ROOT)
    found = replace(read(folder / TABLE), command=["t2ialign", *words])  # without the folder's place
    STORED.write_text(to_text(found), encoding="utf-8")
    save_forest(found, STORED.with_suffix(".png"))
    first = found.families[0].model
    copyfile(folder / f"{first}.png", STORED.with_name(f"all-methods_{first}.png"))
    README.write_text(written(README.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/eval-all-methods").absolute())
