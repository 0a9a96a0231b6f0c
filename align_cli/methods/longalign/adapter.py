"""The adapter between T5 and a denoiser that reads CLIP, in the official form and with the official keys.

Letters: B prompts, L tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.models.attention import FeedForward
from safetensors.torch import save
from torch import Tensor, nn

from align_cli.adapters import load_pickle, load_safetensors
from align_cli.errors import UserError
from align_cli.files import new_folder, write_text
from align_cli.models.dropout import RowDropout
from align_cli.models.sources import read_json

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""The best first."""
WIDTHS = ("in_dim", "int_dim", "out_dim")
LAVI_BRIDGE = (1024, 896, 768)
"""Widths from T5-large to SD1.5. Source: LaVi-Bridge train/t5_unet.py."""


class TextAdapter(nn.Module):
    """y = FF2(LN2(FF1(LN1(x)))), no residual; FF: Linear to 2 * 4 * its input, a * gelu(g), dropout, Linear.

    Source: LongAlign modules/adapters.py (from LaVi-Bridge). Deviations: forward returns the tensor itself;
    dropout is at work inside `dropping`, not in training mode.
    """

    def __init__(self, in_dim: int, int_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim, self.int_dim, self.out_dim = in_dim, int_dim, out_dim
        self.ff1 = FeedForward(in_dim, int_dim, mult=4, activation_fn="geglu")
        self.ff2 = FeedForward(int_dim, out_dim, mult=4, activation_fn="geglu")
        self.norm1 = nn.LayerNorm(in_dim)
        self.norm2 = nn.LayerNorm(int_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, in_dim) -> (B, L, out_dim), in the adapter's dtype."""
        x = self.ff1(self.norm1(x.to(self.norm1.weight.dtype)))
        found: Tensor = self.ff2(self.norm2(x))
        return found

    @contextmanager
    def dropping(self, dropout: RowDropout) -> Iterator[None]:
        """Inside, the inner activations of both layers go through dropout."""
        hooks = [
            ff.net[1].register_forward_hook(lambda _layer, _inputs, x: dropout(x))
            for ff in (self.ff1, self.ff2)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @classmethod
    def from_folder(cls, path: Path | str) -> TextAdapter:
        """Read config.json and diffusion_pytorch_model.safetensors (or .bin), float32, on the CPU.

        Raises:
            UserError: no such folder, a file is missing or damaged, or tensors do not fit the widths.
        """
        folder = Path(path).expanduser()
        weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        if not (folder / CONFIG).is_file() or weights is None:
            lacking = f"{WEIGHTS[0]} (or .bin)" if (folder / CONFIG).is_file() else CONFIG
            raise UserError(f"{path} is no folder of a text adapter: there is no {lacking} in it")
        config = read_json(folder / CONFIG, f"the text adapter {path}")
        widths: list[Any] = [config.get(name) for name in WIDTHS]
        if not all(isinstance(width, int) and width > 0 for width in widths):
            raise UserError(f"{folder / CONFIG}: {', '.join(WIDTHS)} must be whole numbers > 0, got {widths}")
        state = load_safetensors(weights) if weights.suffix == ".safetensors" else load_pickle(weights, ())
        adapter = cls(widths[0], widths[1], widths[2])
        adapter.load(state, str(weights))
        return adapter

    def load(self, state: Any, where: str) -> None:
        """Take the tensors of an adapter. UserError, naming `where`, if they do not fit these widths."""
        own = {name: tuple(x.shape) for name, x in self.state_dict().items()}
        if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
            raise UserError(f"{where} holds no tensors by name")
        given = {name: tuple(x.shape) for name, x in state.items()}
        if given != own:
            first = next(name for name in [*own, *given] if own.get(name) != given.get(name))
            raise UserError(
                f"{where}: its {len(given)} tensors are not the {len(own)} of an adapter of widths "
                f"{self.in_dim}, {self.int_dim}, {self.out_dim}: {first} is {given.get(first, 'missing')}, "
                f"and should be {own.get(first, 'absent')}"
            )
        self.load_state_dict({name: x.float() for name, x in state.items()})

    def to_folder(self, path: Path | str) -> None:
        """Write the folder that `from_folder` and the official code read. UserError if it exists already."""
        state = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        config = {"_class_name": "TextAdapter", **{name: getattr(self, name) for name in WIDTHS}}
        with new_folder(Path(path)) as folder:
            write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
            with (folder / WEIGHTS[0]).open("wb") as file:
                file.write(save(state))
                file.flush()
                os.fsync(file.fileno())
