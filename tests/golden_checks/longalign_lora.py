"""LongAlign: the LoRA on a UNet: its layers in order, its file, at work through hooks, and merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from align_cli.methods.longalign.layers import longalign_layers
from align_cli.methods.longalign.lora_file import from_list, to_list
from align_cli.models.lora import LoraTuning
from golden_checks.lines import Kind, Line, same
from golden_checks.longalign import values


def unet_lora(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    x = load_file(folder / "io.safetensors")
    unet = UNet2DConditionModel(**case["unet_config"]).requires_grad_(False).eval()
    unet.load_state_dict(load_file(folder / "unet.safetensors"))
    order = longalign_layers(unet)
    yield same("lora_module_order", order, case["lora_module_order"])

    def output() -> torch.Tensor:
        found: torch.Tensor = unet(x["sample"], x["timesteps"], x["context"]).sample
        return found

    def lora(content: list[torch.Tensor]) -> LoraTuning:
        tuning = LoraTuning(unet, rank=case["rank"], alpha=case["rank"], targets=longalign_layers)
        tuning.load_state(from_list(content, unet, folder.name))
        return tuning

    numbered = load_file(folder / "lora_fp32.safetensors")
    full = [numbered[key] for key in sorted(numbered, key=lambda key: int(key.partition(".")[0]))]
    half = torch.load(folder / "lora_vis.pt", weights_only=True)
    written = to_list(lora(full).state(), unet, torch.float16)
    yield same("number of tensors", len(written), len(half))
    pairs = enumerate(zip(written, half, strict=True))
    differ = [i for i, (a, b) in pairs if a.dtype != b.dtype or not torch.equal(a, b)]
    yield same("lora_vis.pt as written", differ, [])
    with torch.no_grad():
        yield values("out_base", output(), x["out_base"])
        with lora(full).attached():
            yield values("out_lora", output(), x["out_lora"])
        with lora(full).merged():
            yield values("out_lora, merged", output(), x["out_lora"])
        with lora(half).attached():
            yield values("out_merged_from_fp16_file, hooks", output(), x["out_merged_from_fp16_file"])
        with lora(half).merged():
            yield values("out_merged_from_fp16_file", output(), x["out_merged_from_fp16_file"])
            for key in (key for key in x if key.startswith("merged_weight/")):
                weight = unet.get_submodule(key.partition("/")[2]).weight
                yield values(key, weight, x[key])
        yield values("out_base, afterwards", output(), x["out_base"])


KINDS = [Kind("longalign", lambda _, case: "lora_module_order" in case, unet_lora)]
