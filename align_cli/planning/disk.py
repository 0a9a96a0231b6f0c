"""What a training run writes, in bytes: of tensors exactly, of lines of text and pictures about."""

from __future__ import annotations

from align_cli import config
from align_cli.planning.step import StepPlan

METRICS_LINE = 400
"""Bytes of a line of metrics.jsonl, about."""
PICTURE_BYTES_PER_PIXEL = 1.6
"""Of a PNG of a photograph, about."""
GRID_PICTURES = 8
"""Of a sample grid, at most."""


def run_bytes(resolved: config.Resolved, plan: StepPlan, image_size: int) -> dict[str, int]:
    """What -> bytes, of a whole run. image_size: pixels of a drawn picture."""
    train = resolved.train
    trained = plan.gradients
    average = trained if train.ema_decay else 0
    checkpoint = trained + average + plan.optimizer
    count = min(train.keep_checkpoints, -(-train.steps // train.save_every))
    found = {
        f"checkpoints ({count} of {checkpoint:,} bytes)": count * checkpoint,
        "adapter": plan.state_bytes,
        "metrics (about)": train.steps // train.log_every * METRICS_LINE,
    }
    if train.grid_every:
        grids = train.steps // train.grid_every
        picture = int(image_size**2 * PICTURE_BYTES_PER_PIXEL)
        found[f"grids (about, {grids})"] = grids * GRID_PICTURES * picture
    return found
