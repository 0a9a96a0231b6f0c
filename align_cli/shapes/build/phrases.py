"""Train tiny-roberta: a RoBERTa that guesses the hidden words of captions and phrases; its encoder ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import RobertaForMaskedLM, RobertaTokenizer

from align_cli.shapes.build import components
from align_cli.shapes.build.run import Stage, line
from align_cli.shapes.captions import recaption
from align_cli.shapes.world import COLORS, SHAPES, sample_scenes

BATCH = 64
LR = 2e-3
WEIGHTS = (0.2, 0.3, 0.2, 0.3)
LONG_RATE = 0.2
"""Share of the batches whose pairs and triples have long captions; in other batches none has, so that short
captions are not filled up to their length.
"""
CHOSEN = 0.2
"""Share of the words to guess in training."""
HIDDEN, REPLACED = 0.7, 0.15
"""Of these: hidden, or replaced by another word; the rest stays, so that words that are seen are read too."""
IGNORED = -100


def captions(n: int, rng: np.random.Generator, split: str, long_rate: float) -> list[str]:
    """Captions of n scenes: a fifth of them name one object, a fifth several of one kind."""
    scenes = sample_scenes(n, rng, weights=WEIGHTS, split=split)
    return [recaption(s, rng, long_rate=long_rate).text for s in scenes]


def covered(
    tok: RobertaTokenizer, texts: list[str], rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, L) with words hidden or replaced, attention mask (B, L), labels (B, L): the true ids of the
    words to guess, IGNORED elsewhere.
    """
    read = tok(texts, padding=True, return_tensors="pt")
    ids = read.input_ids
    words = ids[~torch.isin(ids, torch.tensor(tok.all_special_ids))].unique()
    drawn, way = (torch.from_numpy(rng.random(ids.shape)) for _ in range(2))
    chosen = (drawn < CHOSEN) & torch.isin(ids, words)
    others = words[torch.from_numpy(rng.integers(len(words), size=ids.shape))]
    changed = torch.where(chosen & (way < HIDDEN), tok.mask_token_id, ids)
    changed = torch.where(chosen & (way >= HIDDEN) & (way < HIDDEN + REPLACED), others, changed)
    return changed, read.attention_mask, ids.masked_fill(~chosen, IGNORED)


@torch.no_grad()
def evaluate(model: RobertaForMaskedLM, tok: RobertaTokenizer, split: str, n: int = 400) -> dict[str, float]:
    """Share of words that are guessed right, one hidden at a time: all words; colours and shapes, which only
    another sentence of a long caption can tell, by length of caption. And of the same words read plainly.
    """
    rng = np.random.default_rng(78)
    right: dict[str, list[bool]] = {}
    named = {*COLORS, *SHAPES, *(f"{s}s" for s in SHAPES)}
    for text in captions(n, rng, split, LONG_RATE):
        words = text.split()
        read = tok(text, return_tensors="pt").input_ids
        ids = read.repeat(len(words) + 1, 1)
        places = torch.arange(len(words))
        ids[places, places + 1] = tok.mask_token_id
        found = model(input_ids=ids).logits.argmax(-1)
        guessed = found[places, places + 1] == read[0, 1:-1]
        plain = found[-1, 1:-1] == read[0, 1:-1]
        for word, hit, seen in zip(words, guessed.tolist(), plain.tolist(), strict=True):
            right.setdefault("hidden_word", []).append(hit)
            right.setdefault("seen_word", []).append(seen)
            if word in named:
                form = "long" if text.endswith(".") else "short"
                right.setdefault(f"hidden_color_or_shape_{form}", []).append(hit)
    return {name: float(np.mean(hits)) for name, hits in sorted(right.items())}


def train(out: Path, steps: int, seed: int, name: str) -> None:
    """Train for `steps` and save a transformers RobertaForMaskedLM folder with its tokenizer."""
    torch.manual_seed(seed)
    tok = components.roberta_tokenizer()
    model = components.roberta(tok)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.98), weight_decay=0.01)
    stage = Stage(out / f"{name}.state", model, optimizer)

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 7, step])
        texts = captions(BATCH, rng, "train", float(rng.random() < LONG_RATE))
        ids, mask, labels = covered(tok, texts, rng)
        logits = model(input_ids=ids, attention_mask=mask).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    report = lambda: line(evaluate(model, tok, "val", 100))  # noqa: E731
    stage.fit(loss_at, steps=steps, lr=LR, warmup=100, every=200, report=report)
    model.eval()
    metrics = {
        f"{split}_{k}": v for split in ("train", "test") for k, v in evaluate(model, tok, split).items()
    }
    print(name, "final", line(metrics), flush=True)
    folder = out / "tiny-roberta"
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    stage.finish(out / f"{name}.json", seed, {"captions": stage.step * BATCH} | metrics)
