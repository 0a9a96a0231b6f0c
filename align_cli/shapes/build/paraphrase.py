"""Train tiny-t5: a T5 that reads captions of any form with words missing, and writes what they ask for; its
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
from align_cli.shapes.captions import RELATIONS, Prompt, recaption
from align_cli.shapes.world import BACKGROUNDS, COLORS, SHAPES, sample_scenes

BATCH = 64
LR = 1e-3
WEIGHTS = (0.1, 0.4, 0.1, 0.4)
LONG_RATE = 0.6
MISSING = 0.1
"""Share of the words that are hidden in training: many can be told from the other sentences."""
LENGTHS = (64, 80, components.T5_LIMIT)
"""Tokens that captions are filled up to. Fillers are read like words, as LongAlign reads them."""
IGNORED = -100
CONTENT = {*COLORS, *SHAPES, *(f"{s}s" for s in SHAPES), *BACKGROUNDS, "two", "three"}
CONTENT |= {word for relation in RELATIONS for word in relation.split()}


def meaning(text: str) -> str:
    """The words of a caption that ask for something, in its order. Not the whole pair of objects in one fixed
    order: a decoder learns the pairs of the training split by heart then, and fails on all others.
    """
    return " ".join(word for word in text.split() if word in CONTENT)


def hidden(text: str, rng: np.random.Generator) -> str:
    """The caption with some of its words replaced by what the tokenizer does not know."""
    return " ".join("<unk>" if rng.random() < MISSING else word for word in text.split())


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


def forward(
    model: T5ForConditionalGeneration, tok: T5Tokenizer, sources: list[str], texts: list[str], length: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy per written token, and for each caption whether every token has the highest score."""
    ids = read(tok, sources, length)
    wanted = tok([meaning(text) for text in texts], padding=True, return_tensors="pt")
    labels = wanted.input_ids.masked_fill(wanted.attention_mask == 0, IGNORED)
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    right = (found.logits.argmax(-1) == labels) | (labels == IGNORED)
    return found.loss, right.all(-1)


@torch.no_grad()
def evaluate(
    model: T5ForConditionalGeneration, tok: T5Tokenizer, split: str, n: int = 1000
) -> dict[str, float]:
    """Share of captions that are written right to the last token, each token after the true ones before it:
    read whole, and with words missing.
    """
    rng = np.random.default_rng(78)
    texts = [p.text for p in examples(n, rng, split)]
    gaps = [hidden(text, rng) for text in texts]

    def right(sources: list[str]) -> float:
        parts = [slice(i, i + 100) for i in range(0, n, 100)]
        found = [forward(model, tok, sources[part], texts[part], LENGTHS[0])[1] for part in parts]
        return torch.cat(found).float().mean().item()

    return {"written_right": right(texts), "written_right_with_words_missing": right(gaps)}


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
        texts = [p.text for p in examples(BATCH, rng, "train")]
        sources = [hidden(text, rng) for text in texts]
        return forward(model, tok, sources, texts, int(rng.choice(LENGTHS)))[0]

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
