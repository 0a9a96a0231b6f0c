"""Train tiny-clip: contrastive towers on pictures with counterfactual twins, the reward and the frozen text
encoder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from align_cli.settings import PROMPT_KINDS
from align_cli.shapes.build import components
from align_cli.shapes.build.run import Stage, line
from align_cli.shapes.captions import Prompt, counterfactual, recaption
from align_cli.shapes.world import render, sample_scenes

BATCH = 64
LR = 1e-3
REFINE_LR = 7e-4
WEIGHTS = (0.15, 0.5, 0.15, 0.2)
LONG_RATE = 0.1


def examples(
    n: int, rng: np.random.Generator, split: str, long_rate: float = LONG_RATE
) -> tuple[Tensor, list[Prompt], list[Prompt]]:
    """Pictures (2n, 3, 32, 32) in [-1, 1]: n scenes, then their counterfactuals; n captions each, true of
    their own.
    """
    scenes = sample_scenes(n, rng, weights=WEIGHTS, split=split)
    prompts = [recaption(s, rng, long_rate=long_rate) for s in scenes]
    changed = [
        counterfactual(s, p, rng, split="train" if split == "train" else None)
        for s, p in zip(scenes, prompts, strict=True)
    ]
    x = torch.from_numpy(render(scenes + [c[0] for c in changed])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x, prompts, [c[1] for c in changed]


def text_features(model: CLIPModel, tok: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(B, D) unit vectors."""
    ids = tok(texts, padding=True, truncation=True, return_tensors="pt").input_ids
    return F.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)


def image_features(model: CLIPModel, x: Tensor) -> Tensor:
    """(B, D) unit vectors of pictures (B, 3, 32, 32) in [-1, 1]."""
    return F.normalize(model.visual_projection(model.vision_model(x).pooler_output), dim=-1)


def loss(model: CLIPModel, tok: CLIPTokenizer, x: Tensor, texts: list[str]) -> Tensor:
    """Symmetric InfoNCE over a batch in which every picture and caption meets its counterfactual twin."""
    image, text = image_features(model, x), text_features(model, tok, texts)
    logits = model.logit_scale.clamp(max=4.6).exp() * image @ text.T
    names = np.array(texts)
    same = torch.from_numpy(names[:, None] == names[None]) & ~torch.eye(len(texts), dtype=torch.bool)
    logits = logits.masked_fill(same, -1e4)
    label = torch.arange(len(texts))
    return (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2


@torch.no_grad()
def evaluate(model: CLIPModel, tok: CLIPTokenizer, split: str, n: int = 1000) -> dict[str, float]:
    """Share of pictures that prefer their caption to a hard negative (chance 0.5), by kind; R@1 among 400.

    A long caption can differ from its negative only after the token limit: such a tie counts one half.
    """
    x, prompts, negatives = examples(n, np.random.default_rng(77), split)
    texts = [p.text for p in prompts]
    chunks = [slice(i, i + 100) for i in range(0, n, 100)]
    image = torch.cat([image_features(model, x[part]) for part in chunks])
    text = torch.cat([text_features(model, tok, texts[part]) for part in chunks])
    false = torch.cat([text_features(model, tok, [p.text for p in negatives[part]]) for part in chunks])
    margin = (image * text).sum(-1) - (image * false).sum(-1)
    right = (margin > 1e-6).float() + 0.5 * (margin.abs() <= 1e-6).float()
    best = (image[:400] @ text[:400].T).argmax(1).tolist()
    out = {"hard_negative": right.mean().item()}
    out["recall_at_1_of_400"] = sum(texts[b] == texts[i] for i, b in enumerate(best)) / 400
    for kind in PROMPT_KINDS:
        out[f"hard_negative_{kind}"] = right[[p.kind == kind for p in prompts]].mean().item()
    return out


def train(out: Path, steps: int, seed: int, name: str) -> None:
    """Train for `steps` and save a transformers CLIPModel folder with its tokenizer.

    name: "clip", where the text towers of the pipelines start; or "clip-refine", which goes on from it under
    a new cosine and ships as tiny-clip.
    """
    torch.manual_seed(seed)
    refining = name != "clip"
    lr = REFINE_LR if refining else LR
    if refining:
        tok = CLIPTokenizer.from_pretrained(out / "tiny-clip")
        model = CLIPModel.from_pretrained(out / "tiny-clip")
    else:
        tok = components.tokenizer()
        model = components.clip(tok)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98), weight_decay=0.05)
    stage = Stage(out / f"{name}.state", model, optimizer)

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 5 if refining else 2, step])
        x, prompts, twins = examples(BATCH // 2, rng, "train")
        return loss(model, tok, x, [p.text for p in prompts + twins])

    report = lambda: line(evaluate(model, tok, "val", 300))  # noqa: E731
    stage.fit(loss_at, steps=steps, lr=lr, warmup=100, every=200, report=report)
    model.eval()
    metrics = {
        f"{split}_{k}": v for split in ("train", "test") for k, v in evaluate(model, tok, split).items()
    }
    print(name, "final", line(metrics), flush=True)
    folder = out / ("tiny-clip-refined" if refining else "tiny-clip")
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    stage.finish(out / f"{name}.json", seed, {"pairs": stage.step * BATCH} | metrics)
