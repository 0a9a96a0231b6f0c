"""Files of CoMat for tests: adapters with random values, and the layout of the official checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpt_files import lora
from safetensors.torch import save_file
from torch import Tensor, nn

from align_cli.adapters import AdapterInfo, write_adapter

FILE = "pytorch_lora_weights.safetensors"


def official(unet: nn.Module, rank: int = 2, seed: int = 0, prefix: str = "unet.unet.") -> dict[str, Tensor]:
    """A LoRA on all attention with the official names."""
    sides = {"lora_A": "lora.down", "lora_B": "lora.up"}
    found = {}
    for key, x in lora(unet, rank, seed).items():
        layer, side, _ = key.rsplit(".", 2)
        found[f"{prefix}{layer}.{sides[side]}.weight"] = x
    return found


def save_official(folder: Path, unet: nn.Module, **options: Any) -> Path:
    """A checkpoint folder with the discriminator's beside; returns the file."""
    (folder / "D_sd").mkdir(parents=True)
    (folder / "D_sd" / "mlp.pt").touch()
    save_file(official(unet, **options), folder / FILE)
    return folder / FILE


def save_comat(folder: Path, model: Any, *, seed: int = 0) -> dict[str, Tensor]:
    """An adapter folder with random values and rank 2; returns its tensors."""
    state = {f"{model.denoiser_part}.{key}": x for key, x in lora(model.denoiser, seed=seed).items()}
    info = AdapterInfo(
        method="comat",
        model_id=model.model_id,
        family=model.family,
        config={"method": "comat", "comat": {"lora_rank": 2}},
    )
    write_adapter(folder, info, state)
    return state
