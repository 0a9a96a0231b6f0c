"""Run our functions against golden numbers of the official code.

    python tests/check_golden.py DIR [--only softrepa/sd15 --only textcraftor/rewards]

Every case.json below DIR is run; one line per quantity: `method/case/quantity  max_err  tol  ok|FAIL`. Exit
code 1 on any failure, on a case of unknown kind, or if nothing ran. --only keeps the lines that begin with a
prefix, and runs no other cases (several: repeat it, or separate by commas); a prefix that meets nothing is a
failure. What a kind of case is, and how it is checked, stands in golden_checks/, a module per method.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
from pathlib import Path

# MKL's documented switch for the same numbers on every x86 processor. Without it, its exp differs by an ulp
# between processors; through the timestep embedding of the frozen model that moves gradients by over 1e-4.
if __name__ == "__main__":
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import torch
from golden_checks import (
    comat,
    comat_attention,
    comat_entities,
    comat_masks,
    comat_steps,
    dpt,
    dpt_discriminator,
    dpt_steps,
    imagereward,
    longalign,
    longalign_lcm,
    longalign_lora,
    longalign_steps,
    longalign_text,
    softrepa,
    textcraftor,
)
from golden_checks.lines import Line

from align_cli.errors import UserError

MODULES = (
    comat, comat_attention, comat_entities, comat_masks, comat_steps, dpt, dpt_discriminator,
    dpt_steps, imagereward, longalign, longalign_lcm, longalign_lora, longalign_steps,
    longalign_text, softrepa, textcraftor,
)  # fmt: skip
KINDS = [kind for module in MODULES for kind in module.KINDS]


def run_case(folder: Path) -> tuple[str, list[Line]]:
    """Method and lines of one case folder. Whatever goes wrong is a failed line, so that all other cases
    still run.
    """
    lines: list[Line] = []
    method = "?"
    try:
        case = json.loads((folder / "case.json").read_text())
        kind = next((kind for kind in KINDS if kind.fits(folder, case)), None)
        if kind is None:
            return method, [Line("(unknown kind of case)", math.inf, 0.0)]
        method = kind.method
        for line in kind.check(folder, case):
            lines.append(line)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AssertionError, UserError) as error:
        traceback.print_exc()
        lines.append(Line(f"(stopped by {type(error).__name__}: {error})", math.inf, 0.0))
    return method, lines or [Line("(nothing compared)", math.inf, 0.0)]


def place(name: str, method: str, folder: Path) -> str:
    """What the lines of a case begin with: method and folder, wherever the cases were looked for."""
    if method == "?" or name == method or name.startswith(f"{method}/"):
        return name
    own = folder.resolve().name
    return own if own == method else f"{method}/{own}"


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}/")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", action="append", default=[], metavar="PREFIX", help="of the lines")
    options = parser.parse_args(argv)
    prefixes = [p.strip("/") for text in options.only for p in text.split(",") if p.strip("/")]
    torch.manual_seed(0)
    below = {
        p.parent.relative_to(options.folder).as_posix(): p.parent for p in options.folder.rglob("case.json")
    }
    met: set[str] = set()
    passed = failed = 0
    for name, folder in sorted(below.items()):
        near = [p for p in prefixes if within(name, p) or within(p, name)]
        if prefixes and not near:
            continue
        method, lines = run_case(folder)
        where = place(name, method, folder)
        for line in lines:
            full = f"{where}/{line.quantity}"
            wanted = {p for p in near if within(name, p) or within(full, p)}
            if prefixes and not wanted:
                continue
            met |= wanted
            print(f"{full}  {line.error:.3e}  {line.tol:.3e}  {'ok' if line.ok else 'FAIL'}")
            passed, failed = passed + line.ok, failed + (not line.ok)
    for prefix in prefixes:
        if prefix not in met:
            print(f"{prefix}  (no case there)  inf  0  FAIL")
            failed += 1
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
