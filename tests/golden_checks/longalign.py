"""LongAlign: splitting into segments, the segment score end to end, its decomposition and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPTokenizer

from align_cli.losses import common_direction, preference_loss, reweight_text
from align_cli.rewards.clip import ClipReward
from align_cli.rewards.denscore import Denscore
from align_cli.rewards.preprocess import Preprocess
from align_cli.rewards.towers import build, projected
from align_cli.sentences import split_sentences
from golden_checks.lines import Kind, Line, close, compare, same

RTOL, ATOL, GRADIENTS = 1e-4, 5e-5, 1e-4
"""Tolerances of the specification: values; gradients relative to the largest."""
AS_THEY_ARE = Preprocess("none", lambda images, _: images, (0, 0, 0), (1, 1, 1))
"""The pictures of the case are preprocessed already."""


def values(quantity: str, got: Tensor, expected: Tensor) -> Line:
    """Each value within the tolerances of the specification."""
    return close(quantity, got, expected, atol=ATOL, rtol=RTOL)


def reward_clip(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    x, captions, omega = load_file(folder / "tensors.safetensors"), case["captions"], case["omega"]
    segments = [s for text in captions for s in split_sentences(text)]
    owners = [i for i, text in enumerate(captions) for _ in split_sentences(text)]
    yield same("segments", segments, case["segments"])
    yield same("segment_owner", owners, case["segment_owner"])

    tokenizer = CLIPTokenizer.from_pretrained(folder / case["tokenizer"].split(",")[0])
    tokenizer.pad_token = tokenizer.eos_token
    config = CLIPConfig(**case["clip_config"])
    state = load_file(folder / "model.safetensors")
    state = {k: w for k, w in state.items() if not k.endswith("position_ids")}
    model = build(config, state, "model", device=torch.device("cpu"), dtype=torch.float32)
    facts = {"name": "", "version": "", "source": "golden", "scale": ""}
    dense = Denscore(model=model, tokenizer=tokenizer, way=AS_THEY_ARE, **facts)
    whole = ClipReward(model=model, tokenizer=tokenizer, way=AS_THEY_ARE, **facts)

    with torch.no_grad():
        raw = projected(model.get_image_features(pixel_values=x["images"]))
        ids = tokenizer(segments, padding="max_length", max_length=77, return_tensors="pt")
        raw_text = projected(model.get_text_features(**ids))
    for name in ("input_ids", "attention_mask"):
        yield same(name, ids[name].tolist(), x[name].tolist())
    yield values("image_embeds_raw", raw, x["image_embeds_raw"])
    yield values("segment_text_embeds_raw", raw_text, x["segment_text_embeds_raw"])
    vectors = ClipReward.text_vectors(dense, segments)
    yield values("segment vectors", vectors, F.normalize(x["segment_text_embeds_raw"], dim=-1))

    yield values("scores_plain", dense.score(x["images"], captions), x["scores_plain"])
    yield values("clip_scores_plain", whole.score(x["images"], captions), x["clip_scores_plain"])
    text = whole.text_vectors(captions)
    text = reweight_text(text, common_direction(text), 0.3)
    scores = (whole.image_vectors(x["images"]) * text).sum(-1)
    yield values("pick_scores_omega0.3", scores, x["pick_scores_omega0.3"])

    images = x["images"].clone().requires_grad_()
    text = dense.text_vectors(captions)
    text = reweight_text(text, common_direction(text), omega)
    scores = (dense.image_vectors(images) * text).sum(-1)
    yield values("scores", scores, x["scores"])
    loss = preference_loss(scores, omega)
    yield values("loss", loss, x["loss"])
    (gradient,) = torch.autograd.grad(loss, images)
    yield compare("grad_images", gradient, x["grad_images"], GRADIENTS)


def preference(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """The decomposition alone, on given embeddings; with the means of other processes too."""
    x = load_file(folder / "tensors.safetensors")
    owner = torch.tensor(case["segment_owner"])
    segments = F.normalize(x["text_embeds_segments"], dim=-1)
    means = torch.stack([segments[owner == i].mean(0) for i in range(int(owner.max()) + 1)])
    for facts in case["cases"]:
        name, omega = facts["name"], facts["omega"]
        texts = means if facts["segment_level"] else F.normalize(x["text_embeds_full"], dim=-1)
        others = x["other_process_means"][: facts["other_processes"]]
        direction = common_direction(texts, others)
        embeds = x["image_embeds"].clone().requires_grad_()
        images = F.normalize(embeds, dim=-1)
        found = {
            "text_used": texts,
            "common_direction": direction,
            "eta": texts @ direction,
            "text_relevant_score": (images * reweight_text(texts, direction, 0.0)).sum(-1),
            "text_irrelevant_score": (texts @ direction) * (images @ direction),
            "scores": (images * reweight_text(texts, direction, omega)).sum(-1),
        }
        found["loss"] = preference_loss(found["scores"], omega)
        for key, value in found.items():
            yield values(f"{name}/{key}", value, x[f"{name}/{key}"])
        (gradient,) = torch.autograd.grad(found["loss"], embeds)
        key = f"{name}/grad_image_embeds"
        yield compare(key, gradient, x[key], GRADIENTS)

    images = F.normalize(x["image_embeds"], dim=-1)
    reweighted = reweight_text(means, common_direction(means), 0.3)
    yield values("dense_plain/scores", (images * means).sum(-1), x["dense_plain/scores"])
    yield values("dense_plain/matrix", means @ images.T, x["dense_plain/matrix"])
    yield values("dense_matrix_w0.3/matrix", reweighted @ images.T, x["dense_matrix_w0.3/matrix"])
    yield values("dense_split/matrix", segments @ images[:1].T, x["dense_split/matrix"])


def tensor_named(key: str) -> Callable[[Path, dict[str, Any]], bool]:
    """Cases whose description names this tensor."""
    return lambda _, case: any(key in case.get(part, ()) for part in ("tensors", "inputs"))


KINDS = [
    Kind("longalign", tensor_named("segment_text_embeds_raw"), reward_clip),
    Kind("longalign", tensor_named("text_embeds_segments"), preference),
]
