"""CoMat: so far its caption score."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration

from align_cli.rewards.base import Request
from align_cli.rewards.bert import tokenizer_from
from align_cli.rewards.blip_caption import LABEL_SMOOTHING, STRETCH, BlipCaption, fill_blip
from align_cli.rewards.captioning import UNSCORED
from golden_checks.lines import DERIVED, FORWARD, Kind, Line, compare, same

REQUEST = Request("blip-caption", "", "official", torch.device("cpu"), torch.float32)


def caption_model(case: dict[str, Any], tensors: dict[str, Tensor]) -> BlipCaption:
    """The case's BLIP and tokenizer as our reward."""
    names = ("text_config", "vision_config", "projection_dim", "image_text_hidden_size")
    with torch.device("meta"):
        model = BlipForConditionalGeneration(BlipConfig(**{name: case[name] for name in names}))
    state = {k.removeprefix("blip."): x for k, x in tensors.items() if k.startswith("blip.")}
    fill_blip(model, state, "golden", REQUEST)
    return BlipCaption(model, tokenizer_from({w: i for i, w in enumerate(case["vocab"])}), REQUEST)


def caption_loss(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """Tokens, labels, preprocessing, logits, the batch's reward and its gradient in the picture."""
    tensors = load_file(folder / "tensors.safetensors")
    reward = caption_model(case, tensors)
    yield same("label_smoothing", LABEL_SMOOTHING, case["label_smoothing"])
    for facts in case["cases"]:
        number, prompts = facts["case"], facts["prompts"]
        x = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{number}.")}
        image = x["image"].clone().requires_grad_()
        row, column, side = facts["crop_row_offset"], facts["crop_col_offset"], facts["crop_size"]
        cut = image[:, :, row : row + side, column : column + side]
        ids, mask, labels = reward.tokens(prompts)
        for name, got in (("input_ids", ids), ("attention_mask", mask), ("labels", labels)):
            yield same(f"{number}_{name}", got.tolist(), x[name].tolist())
        pixels = STRETCH(cut, case["vision_config"]["image_size"])
        yield compare(f"{number}_preprocessed", pixels[:, :, ::37, ::41], x["preprocessed_sample"], FORWARD)
        moments = torch.stack([pixels.mean(), pixels.std()])
        yield compare(f"{number}_preprocessed_mean_std", moments, x["preprocessed_mean_std"], FORWARD)
        logits = reward.logits(cut, prompts, ids, mask)
        yield compare(f"{number}_logits", logits, x["logits"], FORWARD)
        plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=UNSCORED)
        yield compare(f"{number}_loss_without_smoothing", plain, x["loss_without_smoothing"], FORWARD)
        got = reward.batch_score(cut, prompts)
        yield compare(f"{number}_reward", got, x["reward"], FORWARD)
        got.backward()
        assert image.grad is not None
        yield compare(f"{number}_grad_image", image.grad, x["grad_image"], DERIVED)


KINDS = [Kind("comat", lambda _, case: "prefix_positions_masked" in str(case.get("cases")), caption_loss)]
