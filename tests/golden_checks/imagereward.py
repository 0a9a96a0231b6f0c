"""ImageReward: tokens, reward and gradient with a tiny network in the published key layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from align_cli.rewards.base import Request
from align_cli.rewards.bert import tokenizer_from
from align_cli.rewards.imagereward import MAX_TOKENS, ImageReward
from align_cli.rewards.imagereward_net import build
from align_cli.rewards.preprocess import SHORTEST
from golden_checks.lines import DERIVED, FORWARD, Kind, Line, compare, same

REQUEST = Request("imagereward", "", "official", torch.device("cpu"), torch.float32)


def tiny_imagereward(folder: Path, case: dict[str, Any]) -> ImageReward:
    """The case's network and tokenizer as our reward."""
    net = build(load_file(folder / "state.safetensors"), "golden", device=REQUEST.device, dtype=REQUEST.dtype)
    return ImageReward(net, tokenizer_from({w: i for i, w in enumerate(case["vocab"])}), REQUEST)


def rewards(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    tensors = load_file(folder / "tensors.safetensors")
    reward = tiny_imagereward(folder, case)
    yield same("max_length", MAX_TOKENS, case["max_length"])
    for number, prompt in enumerate(case["prompts"]):
        x = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{number}.")}
        picture = x["picture"].float()[None] / 255
        text = reward.tokens([prompt])
        for name in ("input_ids", "attention_mask"):
            yield same(f"{number}_{name}", text[name][0].tolist(), x[name].tolist())
        yield compare(f"{number}_reward", reward.score(picture, [prompt]), x["reward"], FORWARD)
        pixels = SHORTEST(picture, reward.net.image_size).requires_grad_()
        reward.net(pixels, text["input_ids"], text["attention_mask"]).sum().backward()
        assert pixels.grad is not None
        yield compare(f"{number}_grad_pixels", pixels.grad[0, :, ::11, ::13], x["grad_pixels"], DERIVED)


KINDS = [Kind("imagereward", lambda _, case: case.get("kind") == "imagereward", rewards)]
