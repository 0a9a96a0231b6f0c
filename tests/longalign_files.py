"""Files of LongAlign for tests: adapters with random values, and official ones as the official code saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from align_cli.adapters import AdapterInfo, write_adapter
from align_cli.methods.longalign.adapter import TextAdapter
from align_cli.methods.longalign.layers import longalign_layers
from align_cli.methods.longalign.lora_file import to_list
from align_cli.models.lora import LoraTuning
from align_cli.models.parts import outline

WIDTHS = (48, 10, 32)
"""Of the text adapter: the T5 of the tiny SD3, between, the text of the tiny SD1.5."""


def lora(unet: torch.nn.Module, seed: int = 0, rank: int = 3) -> dict[str, torch.Tensor]:
    """The state of a LoRA on all layers, loud enough to be seen."""
    rng = torch.Generator().manual_seed(seed)
    tuning = LoraTuning(unet, rank=rank, alpha=rank, targets=longalign_layers, device=torch.device("cpu"))
    return {key: 0.1 * torch.randn(x.shape, generator=rng) for key, x in tuning.state().items()}


def text_adapter(widths: tuple[int, int, int] = WIDTHS) -> TextAdapter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TextAdapter(*widths)


def save_longalign(
    folder: Path,
    model,
    stage: str = "align",
    below: Sequence[str] = (),
    *,
    adapter: bool = True,
    ranks: Sequence[int] = (3, 2, 4),
) -> dict[str, torch.Tensor]:
    """An adapter folder with random values; returns its tensors. below: stages under it. ranks: of these and
    of its own.
    """
    groups = (*below, "unet")
    state = {}
    for i, group in enumerate(groups):
        state |= {f"{group}.{key}": x for key, x in lora(model.denoiser, i, ranks[i]).items()}
    if adapter:
        state |= {f"adapter.{key}": x for key, x in text_adapter().state_dict().items()}
    section = {"stage": stage, "lora_rank": ranks[len(below)]} | ({} if adapter else {"t5": ""})
    info = AdapterInfo(
        method="longalign",
        stage=stage,
        model_id=model.model_id,
        family=model.family,
        config={"method": "longalign", "longalign": section},
    )
    write_adapter(folder, info, state)
    return state


def save_release(folder: Path, model: str, names: Sequence[str], adapter: str = "") -> None:
    """Official files: LoRAs called `names`, of seeds 0, 1, ..., and the folder of a text adapter."""
    folder.mkdir(exist_ok=True)
    unet = outline(model, "unet")
    for i, name in enumerate(names):
        torch.save(to_list(lora(unet, i), unet, torch.float16), folder / name)
    if adapter:
        text_adapter().to_folder(folder / adapter)
