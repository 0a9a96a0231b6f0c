"""Build the embedded models: python -m align_cli.shapes.build STAGE --out DIR [--minutes M] [--seed S]."""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path

STAGES = {"vae": "autoencoder", "clip": "contrastive", "denoiser": "denoiser", "assemble": "assemble"}
MINUTES = {"vae": 13.0, "clip": 13.0, "denoiser": 75.0, "assemble": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m align_cli.shapes.build", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    stage = import_module(f"align_cli.shapes.build.{STAGES[args.stage]}")
    stage.train(args.out, args.minutes or MINUTES[args.stage], args.seed)


if __name__ == "__main__":
    main()
