"""Files of attention maps. No torch.

Letters: E entities of a prompt, S side of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from align_cli.files import file_errors, write_bytes


def relative(maps: np.ndarray) -> np.ndarray:
    """Maps (E, S, S) in [0, 1], each as a share of its own maximum."""
    peaks = maps.max((1, 2), keepdims=True)
    found: np.ndarray = maps / np.where(peaks > 0, peaks, 1)
    return found


def write_maps(path: Path, maps: np.ndarray, facts: Mapping[str, str]) -> None:
    """(E, S, S) float32, with what they are of. UserError if the file cannot be written."""
    content = save({"maps": np.ascontiguousarray(maps)}, metadata=dict(facts))
    with file_errors(f"cannot write {path}", "make room, then go on with --resume"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)


def read_maps(path: Path) -> tuple[dict[str, str], np.ndarray]:
    """What maps are of, and (E, S, S) float32.

    Raises:
        OSError, SafetensorError: it is not there, or no whole file of maps.
    """
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {}), file.get_tensor("maps")
