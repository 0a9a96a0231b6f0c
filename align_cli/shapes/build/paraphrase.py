"""Train tiny-t5: a T5 that reads a caption of any form and writes what it asks for in one fixed form; its
encoder ships.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration, T5Tokenizer

from align_cli.shapes.build import components
from align_cli.shapes.build.run import Stage, line
from align_cli.shapes.captions import OPPOSITE, Prompt, Spec, recaption
from align_cli.shapes.world import sample_scenes

BATCH = 64
LR = 1e-3
WEIGHTS = (0.1, 0.4, 0.1, 0.4)
LONG_RATE = 0.6
LENGTHS = (64, 80, components.T5_LIMIT)
"""Tokens that captions are filled up to. Fillers are read like words, as LongAlign reads them."""
IGNORED = -100


def meaning(spec: Spec) -> str:
    """What a caption asks for, the same text for every caption that asks for the same: objects by alphabet,
    relations between them, background. For example "blue square , red circle , left of , white".
    """
    order = sorted(range(len(spec.objects)), key=lambda i: spec.objects[i])
    parts = [" ".join(spec.objects[i]) for i in order]
    for a, relation, b in spec.relations:
        at, bt = order.index(a), order.index(b)
        parts.append(relation if at < bt else OPPOSITE[relation])
    return " , ".join(parts + [spec.background] * bool(spec.background))


def examples(n: int, rng: np.random.Generator, split: str) -> list[Prompt]:
    """Captions of n scenes, most of them long."""
    scenes = sample_scenes(n, rng, weights=WEIGHTS, split=split)
    return [recaption(s, rng, long_rate=LONG_RATE) for s in scenes]


def read(tok: T5Tokenizer, texts: list[str], length: int) -> Tensor:
    """(B, length) int64, filled up and cut to `length`."""
    ids: Tensor = tok(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def forward(model: T5ForConditionalGeneration, tok: T5Tokenizer, prompts: list[Prompt], length: int) -> tuple:
    """Cross-entropy per written token, and for each caption whether every token has the highest score."""
    ids = read(tok, [p.text for p in prompts], length)
    wanted = tok([meaning(p.spec) for p in prompts], padding=True, return_tensors="pt")
    labels = wanted.input_ids.masked_fill(wanted.attention_mask == 0, IGNORED)
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    right = (found.logits.argmax(-1) == labels) | (labels == IGNORED)
    return found.loss, right.all(-1)


@torch.no_grad()
def evaluate(
    model: T5ForConditionalGeneration, tok: T5Tokenizer, split: str, n: int = 1000
) -> dict[str, float]:
    """Share of captions that are written right to the last token, each token after the true ones before it."""
    prompts = examples(n, np.random.default_rng(78), split)
    right = torch.cat([forward(model, tok, prompts[i : i + 100], LENGTHS[0])[1] for i in range(0, n, 100)])
    long = torch.tensor([p.kind == "long" for p in prompts])
    return {
        "written_right": right.float().mean().item(),
        "written_right_long": right[long].float().mean().item(),
    }


def train(out: Path, steps: int, seed: int, name: str) -> None:
    """Train for `steps` and save the encoder as a transformers T5EncoderModel folder with its tokenizer."""
    torch.manual_seed(seed)
    tok = components.t5_tokenizer()
    model = components.t5(tok)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.98), weight_decay=0.01)
    stage = Stage(out / f"{name}.state", model, optimizer)

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 6, step])
        prompts = examples(BATCH, rng, "train")
        value: Tensor = forward(model, tok, prompts, int(rng.choice(LENGTHS)))[0]
        return value

    report = lambda: line(evaluate(model, tok, "val", 300))  # noqa: E731
    stage.fit(loss_at, steps=steps, lr=LR, warmup=100, every=200, report=report)
    model.eval()
    metrics = {
        f"{split}_{k}": v for split in ("train", "test") for k, v in evaluate(model, tok, split).items()
    }
    print(name, "final", line(metrics), flush=True)
    folder = out / "tiny-t5"
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    stage.finish(out / f"{name}.json", seed, {"captions": stage.step * BATCH} | metrics)
