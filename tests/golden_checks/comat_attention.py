"""CoMat: cross-attention maps of tiny UNets, and the losses of attribute concentration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from align_cli.grounding.entities import detectable, official_entity
from align_cli.losses import attention_losses, mask_at
from align_cli.methods.comat.concentration import Words
from align_cli.models.attention import AttentionMaps, watched
from align_cli.models.base import TextCond
from align_cli.models.lora import UNET_ATTENTION, LoraTuning
from align_cli.models.states import LORA_A, LORA_B
from align_cli.models.unet import unet_predict
from golden_checks.lines import DERIVED, FORWARD, Kind, Line, compare, same

ENDS = {".lora_layer.down.weight": LORA_A, ".lora_layer.up.weight": LORA_B}


def our_name(key: str) -> str:
    """LAYER.lora_layer.down.weight -> LAYER.lora_A.weight."""
    for end, ours in ENDS.items():
        if key.endswith(end):
            return key.removesuffix(end) + ours
    raise ValueError(f"no weight of a LoRA: {key}")


def tuned_unet(case: dict[str, Any], x: dict[str, Tensor]) -> tuple[UNet2DConditionModel, LoraTuning]:
    """The case's UNet with its LoRA, which is not attached yet."""
    unet = UNet2DConditionModel(**case["unet_config"]).eval().requires_grad_(False)
    unet.load_state_dict({k.removeprefix("unet."): v for k, v in x.items() if k.startswith("unet.")})
    state = {our_name(k.removeprefix("lora.")): v for k, v in x.items() if k.startswith("lora.")}
    rank = len(next(v for k, v in state.items() if k.endswith(LORA_A)))
    lora = LoraTuning(unet, rank=rank, alpha=rank, targets=UNET_ATTENTION)
    lora.load_state(state)
    return unet, lora


def lora_gradients(x: dict[str, Tensor], prefix: str, lora: LoraTuning) -> Iterator[Line]:
    """Of every weight that the case has a gradient of."""
    for key in sorted(k for k in x if k.startswith(prefix)):
        found = lora.weights[our_name(key.removeprefix(prefix))].grad
        got = torch.zeros_like(x[key]) if found is None else found
        yield compare(key, got, x[key], DERIVED)


def maps(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """The conditional half alone with its maps, the unconditional half, and a gradient through the maps."""
    x = load_file(folder / "tensors.safetensors")
    unet, lora = tuned_unet(case, x)
    half, t = case["batch"], x["timestep"].squeeze()
    texts = TextCond(x["prompt_embeds"], x.get("text_embeds"), x.get("time_ids"))
    z = x["latents"][-half:]
    keep = AttentionMaps()
    with lora.attached(), watched(unet):
        told = unet_predict(unet, z, t, texts[half:], keep)
        untold = unet_predict(unet, x["latents"][:half], t, texts[:half])
    yield compare("noise_pred", torch.cat([untold, told]), x["noise_pred"], FORWARD)
    yield same("layers", sorted(keep.maps), sorted(case["all_keys_available"]))
    scalar = torch.zeros(())
    for layer, found in keep.maps.items():
        expected = [k for k in x if k.startswith(f"map.{layer}.")]
        yield same(f"{layer}/number of maps", len(found), len(expected))
        for n, one in enumerate(found):
            yield compare(f"map.{layer}.{n}", one.flatten(0, 1), x[f"map.{layer}.{n}"], FORWARD)
            if (weight := x.get(f"weight.{layer}.{n}")) is not None:
                scalar = scalar + (one.flatten(0, 1) * weight).sum()
    if "scalar" in x:
        yield compare("scalar", scalar, x["scalar"], FORWARD)
        scalar.backward()
        yield from lora_gradients(x, "grad.lora.", lora)


def layer_losses(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """Losses and gradients of one layer."""
    x = load_file(folder / "tensors.safetensors")
    for facts in case["cases"]:
        number = facts["case"]
        found = [x[f"{number}.map.{n}"].clone().requires_grad_() for n in range(facts["n_maps"])]
        positions = facts["token_positions"]
        full = torch.cat([x[f"{number}.mask.{k}"][0] for k in range(len(positions))]).bool()
        masks = mask_at(full, facts["res"])
        for k, mask in enumerate(masks):
            yield same(
                f"{number}.mask_resized.{k}",
                bool((mask == x[f"{number}.mask_resized.{k}"][0, 0]).all()),
                True,
            )
        token, pixel = attention_losses(torch.stack(found), words_of(positions, facts["seq_len"]), masks)
        yield compare(f"{number}.token_loss", token, x[f"{number}.token_loss"], FORWARD)
        yield compare(f"{number}.pixel_loss", pixel, x[f"{number}.pixel_loss"], FORWARD)
        (token + pixel).backward()
        for n, one in enumerate(found):
            assert one.grad is not None
            yield compare(f"{number}.grad_map.{n}", one.grad, x[f"{number}.grad_map.{n}"], DERIVED)


def words_of(positions: list[list[int]], length: int) -> Tensor:
    """(N, L) bool."""
    words = torch.zeros(len(positions), length, dtype=torch.bool)
    for row, found in zip(words, positions, strict=True):
        row[found] = True
    return words


def batch_losses(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """Nouns of a batch, the masks that they are asked for, and the losses over steps and layers."""
    x = load_file(folder / "tensors.safetensors")
    entities = []
    for groups, pieces in zip(case["groups"], case["wordpieces"], strict=True):
        named = {int(place): piece for place, piece in pieces.items()}
        entities.append(detectable(official_entity(group, named) for group in groups if group))
    words = Words.of(entities, torch.device("cpu"))
    yield same("segmenter_calls", [nouns for nouns in words.nouns if nouns], case["segmenter_calls"])
    masks: list[Tensor | None] = []
    for nouns in words.nouns:
        call = len([mask for mask in masks if mask is not None])
        found = [x[f"mask.call{call}.{k}"][0, 0].bool() for k in range(len(nouns))]
        masks.append(torch.stack(found) if found else None)
    given = {key: value.clone().requires_grad_() for key, value in x.items() if key.startswith("map.")}
    kept = []
    for time in case["timesteps"]:
        keep = AttentionMaps(positions=words.positions)
        for layer, number in case["layers"].items():
            for n in range(number):
                whole = given[f"map.{time}.{layer}.{n}"].flatten(1, 2).unflatten(0, (case["batch"], -1))
                keep.add(layer.partition("_")[0], whole)
        kept.append(keep)
    for time, keep in zip(case["timesteps"], kept, strict=True):
        for layer in case["layers"]:
            only = AttentionMaps(positions=words.positions)
            only.maps = {layer: keep.maps[layer]}
            for name, loss in zip(("token", "pixel"), words.losses([only], masks), strict=True):
                key = f"{name}/{time}/{layer}"
                expected = torch.tensor(case["per_timestep_layer"][key])
                yield compare(key, loss * case["batch"], expected, FORWARD)
    token, pixel = words.losses(kept, masks)
    yield compare("token_loss", token, x["token_loss"], FORWARD)
    yield compare("pixel_loss", pixel, x["pixel_loss"], FORWARD)
    (token + pixel).backward()
    for key in sorted(k for k in x if k.startswith("grad.")):
        slope = given[key.removeprefix("grad.")].grad
        assert slope is not None
        yield compare(key, slope, x[key], DERIVED)


KINDS = [
    Kind("comat", lambda _, case: "all_keys_available" in case, maps),
    Kind("comat", lambda _, case: "segmenter_calls" in case, batch_losses),
    Kind("comat", lambda _, case: "token_positions" in str(case.get("cases")), layer_losses),
]
