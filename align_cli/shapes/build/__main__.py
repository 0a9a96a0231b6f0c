"""Build the embedded models: python -m align_cli.shapes.build STAGE --out DIR [--steps N] [--seed S]."""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path

STAGES = {
    "vae": ("autoencoder", 900),
    "clip": ("contrastive", 3000),
    "clip-refine": ("contrastive", 4000),
    "t5": ("paraphrase", 2000),
    "roberta": ("phrases", 2000),
    "blip": ("captioner", 2400),
    "denoiser": ("denoiser", 8000),
    "denoiser-refine": ("denoiser", 5000),
    "denoiser-sdxl": ("denoiser", 3000),
    "denoiser-sd3": ("denoiser", 4000),
}
"""Stage -> module, and steps of the shipped weights (the learning rate ends with them), in order."""


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
    module, steps = STAGES[args.stage]
    stage = import_module(f"align_cli.shapes.build.{module}")
    stage.train(args.out, args.steps or steps, args.seed, args.stage)


if __name__ == "__main__":
    main()
