"""Train tiny-blip: a captioner whose likelihood tells a caption from its hard negatives.

Letters: P pictures, C captions of a picture, L tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import BertTokenizer, BlipForConditionalGeneration, CLIPModel

from align_cli.rewards.base import Request
from align_cli.rewards.bert import tokenizer_from
from align_cli.rewards.blip_caption import LABEL_SMOOTHING, STRETCH, BlipCaption
from align_cli.rewards.captioning import scored, smoothed_losses
from align_cli.settings import PROMPT_KINDS
from align_cli.shapes.build import components
from align_cli.shapes.build.contrastive import examples
from align_cli.shapes.build.run import Stage, line
from align_cli.shapes.captions import Prompt, hard_negative
from align_cli.shapes.world import SIZE

BATCH = 32
VOCABULARY = "vocab.txt"
LR = 1e-3
LONG_RATE = 0.2
"""Share of the batches whose pairs and triples have long captions; in other batches none has, so that short
captions are not filled up to their length.
"""
REDRAWN_RATE = 0.3
"""Share of the batches that went through the autoencoder, as drawn pictures did."""
NOISE = 0.06
"""Largest standard deviation of the noise on a picture, of its range [0, 1]."""
NEGATIVES = 2
"""False captions that a picture is asked about beside its own: its counterfactual's, and others."""


PATCH_SPREAD = 0.12
"""Mean standard deviation, over its width, of what tiny-clip makes of a patch before it normalises it."""


def tokenizer() -> BertTokenizer:
    """That of tiny-blip."""
    return tokenizer_from({piece: i for i, piece in enumerate(components.blip_vocabulary())})


def as_reward(model: BlipForConditionalGeneration, tok: BertTokenizer) -> BlipCaption:
    """The reward that the model is trained for."""
    return BlipCaption(model, tok, Request("tiny-blip", "", "official", torch.device("cpu"), torch.float32))


def start_from(model: BlipForConditionalGeneration, clip: CLIPModel) -> None:
    """The image tower of tiny-clip into that of tiny-blip: all but the normalisation of its patches, which
    BLIP lacks; its mean effect goes into the embeddings.
    """
    old, new = clip.vision_model, model.vision_model
    gain = old.pre_layrnorm.weight.data / PATCH_SPREAD
    centred = lambda x: x - x.mean(0)  # noqa: E731
    places = old.embeddings.position_embedding.weight.data
    new.embeddings.position_embedding.data[0] = (
        places - places.mean(-1, keepdim=True)
    ) * gain + old.pre_layrnorm.bias.data
    new.embeddings.class_embedding.data[0, 0] = centred(old.embeddings.class_embedding.data) * gain
    kernel = centred(old.embeddings.patch_embedding.weight.data)
    new.embeddings.patch_embedding.weight.data = kernel * gain.view(-1, 1, 1, 1)
    new.embeddings.patch_embedding.bias.data.zero_()
    new.post_layernorm.load_state_dict(old.post_layernorm.state_dict())
    for before, after in zip(old.encoder.layers, new.encoder.layers, strict=True):
        attention = before.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        after.self_attn.qkv.weight.data = torch.cat([part.weight.data for part in parts])
        after.self_attn.qkv.bias.data = torch.cat([part.bias.data for part in parts])
        after.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(after, name).load_state_dict(getattr(before, name).state_dict())


@torch.no_grad()
def worn(x: Tensor, rng: np.random.Generator, vae: AutoencoderKL) -> Tensor:
    """Pictures (P, 3, 32, 32) in [-1, 1] as drawn ones may look, in about [0, 1]: some through the
    autoencoder, all a little blurred, of other contrast and noisy.
    """
    draw = lambda *shape: torch.from_numpy(rng.random(shape, dtype=np.float32))  # noqa: E731
    if rng.random() < REDRAWN_RATE:
        latents = vae.encode(x).latent_dist.mean
        spread = latents.std() * 0.2 * draw(len(x), 1, 1, 1)
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        x = vae.decode(latents + spread * noise).sample
    x = x / 2 + 0.5
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, 0.7 * draw(len(x), 1, 1, 1))
    x = (x - 0.5) * (0.8 + 0.3 * draw(len(x), 1, 1, 1)) + 0.5 + 0.1 * (draw(len(x), 3, 1, 1) - 0.5)
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    return x + NOISE * draw(len(x), 1, 1, 1) * noise


def pictures_and_captions(
    n: int, rng: np.random.Generator, split: str, long_rate: float
) -> tuple[Tensor, list[list[str]]]:
    """Pictures (2n, 3, 32, 32) in [-1, 1], and of each its true caption and NEGATIVES false ones."""
    x, prompts, twins = examples(n, rng, split, long_rate)
    keep = "train" if split == "train" else None
    texts = []
    for true, false in zip(prompts + twins, twins + prompts, strict=True):
        others = [hard_negative(true, rng, split=keep) for _ in range(NEGATIVES - 1)]
        texts.append([p.text for p in (true, false, *others)])
    return x, texts


def losses_of(reward: BlipCaption, seen: Tensor, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Smoothed losses of captions (B,), their plain ones (B,), and their number of scored tokens (B,).

    seen: (B, patches, D), what the image tower says of the picture of each.
    """
    ids_BL, mask_BL, labels_BL = reward.tokens(texts)
    logits = reward.model.text_decoder(
        input_ids=ids_BL, attention_mask=mask_BL, encoder_hidden_states=seen
    ).logits
    smooth, plain = (smoothed_losses(logits, labels_BL, amount) for amount in (LABEL_SMOOTHING, 0.0))
    return smooth, plain, scored(labels_BL)


def loss(reward: BlipCaption, x: Tensor, texts: list[list[str]]) -> Tensor:
    """The reward's own loss of the true captions, plus the cross-entropy, over a picture's captions, of their
    log-likelihoods: the true one should have the highest.
    """
    seen = reward.model.vision_model(pixel_values=STRETCH(x, SIZE)).last_hidden_state
    each = len(texts[0])
    flat = [text for row in texts for text in row]
    smooth, plain, count = losses_of(reward, seen.repeat_interleave(each, 0), flat)
    caption = smooth[::each].sum() / count[::each].sum()
    return caption + F.cross_entropy(-plain.view(-1, each), torch.zeros(len(texts), dtype=torch.long))


@torch.no_grad()
def evaluate(reward: BlipCaption, split: str, n: int = 1000) -> dict[str, float]:
    """Share of pictures whose own caption has the higher score than a hard negative (chance 0.5), by kind;
    nats per token of the true captions.
    """
    x, prompts, twins = examples(n, np.random.default_rng(77), split)
    x = x[:n] / 2 + 0.5
    chunks = [slice(i, i + 100) for i in range(0, n, 100)]

    def score(captions: list[Prompt]) -> Tensor:
        return torch.cat([reward.score(x[c], [p.text for p in captions[c]]) for c in chunks])

    true, false = score(prompts), score(twins)
    right = (true > false).float() + 0.5 * (true == false).float()
    out = {"hard_negative": right.mean().item(), "score": true.mean().item()}
    for kind in PROMPT_KINDS:
        out[f"hard_negative_{kind}"] = right[[p.kind == kind for p in prompts]].mean().item()
    return out


def train(out: Path, steps: int, seed: int, name: str) -> None:
    """Train for `steps` and save a transformers folder with its vocabulary."""
    torch.manual_seed(seed)
    tok = tokenizer()
    model = components.blip(tok)
    start_from(model, CLIPModel.from_pretrained(out / "tiny-clip-refined").float())
    model.train()
    reward = as_reward(model, tok)
    vae = AutoencoderKL.from_pretrained(out / "vae").float().eval()
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.98), weight_decay=0.05)
    stage = Stage(out / f"{name}.state", model, optimizer)

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([seed, 11, step])
        long_rate = float(rng.random() < LONG_RATE)
        x, texts = pictures_and_captions(BATCH // 2, rng, "train", long_rate)
        return loss(reward, worn(x, rng, vae), texts)

    report = lambda: line(evaluate(reward, "val", 300))  # noqa: E731
    stage.fit(loss_at, steps=steps, lr=LR, warmup=100, every=200, report=report)
    model.eval()
    metrics = {f"{split}_{k}": v for split in ("train", "test") for k, v in evaluate(reward, split).items()}
    print(name, "final", line(metrics), flush=True)
    folder = out / "tiny-blip"
    model.save_pretrained(folder)
    (folder / VOCABULARY).write_text("\n".join(components.blip_vocabulary()) + "\n")
    stage.finish(out / f"{name}.json", seed, {"pictures": stage.step * BATCH} | metrics)
