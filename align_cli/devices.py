"""Names of devices."""

from __future__ import annotations

import torch

from align_cli.errors import UserError


def pick_device(name: str, advice: str = "--device cpu or auto") -> torch.device:
    """auto, cpu, cuda, cuda:N or mps -> a device that is there. UserError with `advice` if it is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; one of auto, cpu, cuda, cuda:N, mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"unsupported device {name!r}; one of auto, cpu, cuda, cuda:N, mps")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            built = "" if torch.version.cuda else "; this torch was built without CUDA"
            raise UserError(
                f"device {name} is not there: torch sees {found} CUDA devices{built}; use {advice}"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device mps is not there; use {advice}")
    return device
