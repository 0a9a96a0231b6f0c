"""Build the embedded models: python -m align_cli.shapes.build STAGE --out DIR [--steps N] [--seed S]."""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path

STAGES = {
    "vae": "autoencoder:train",
    "clip": "contrastive:train",
    "clip-refine": "contrastive:refine",
    "denoiser": "denoiser:train",
}
"""Stage -> module and function; the denoiser needs vae and clip."""
STEPS = {"vae": 900, "clip": 3000, "clip-refine": 4000, "denoiser": 8000}
"""Steps of the shipped weights; the learning rate ends with them."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m align_cli.shapes.build", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "assemble"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.stage == "assemble":
        import_module("align_cli.shapes.build.assemble").assemble(args.out)
        return
    module, _, function = STAGES[args.stage].partition(":")
    stage = getattr(import_module(f"align_cli.shapes.build.{module}"), function)
    stage(args.out, args.steps or STEPS[args.stage], args.seed)


if __name__ == "__main__":
    main()
