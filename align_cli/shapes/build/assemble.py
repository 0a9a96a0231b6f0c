"""Put the trained parts together: ordinary fp16 diffusers and transformers folders with a model card each."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from align_cli.shapes.build import components, contrastive
from align_cli.shapes.world import SIZE

WEIGHTS = Path(__file__).parents[1] / "weights"


def train(out: Path, minutes: float, seed: int) -> None:
    """Write `weights/tiny-sd15` and `weights/tiny-clip` from the stages in `out`; `minutes` and `seed` have no effect."""
    tiny_clip(out)
    tiny_sd15(out)


def tiny_clip(out: Path) -> None:
    """The contrastive model, rounded to fp16 and measured as rounded."""
    folder = WEIGHTS / "tiny-clip"
    model, tok = CLIPModel.from_pretrained(out / "tiny-clip"), CLIPTokenizer.from_pretrained(out / "tiny-clip")
    model.half().save_pretrained(folder)
    tok.save_pretrained(folder)
    model.float().eval()
    measured = {
        f"{split}_{k}": round(v, 4) for split in ("train", "test") for k, v in contrastive.evaluate(model, tok, split).items()
    }
    stage = json.loads((out / "clip.json").read_text())
    card = {
        "model": "tiny-clip",
        "class": "transformers.CLIPModel",
        "trained_on": "shapes world, training split, captions with two hard negatives each",
        "input": f"{SIZE}x{SIZE} RGB, x / 127.5 - 1; {components.TOKEN_LIMIT} tokens",
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": stage,
        "measured_fp16": measured,
    }
    _write(folder / "card.json", card)


def tiny_sd15(out: Path, name: str = "denoiser") -> None:
    """The pipeline folder that StableDiffusionPipeline.from_pretrained opens."""
    folder = WEIGHTS / "tiny-sd15"
    vae = AutoencoderKL.from_pretrained(out / "vae")
    unet = UNet2DConditionModel.from_pretrained(out / name / "unet")
    scheduler = DDIMScheduler.from_pretrained(out / name / "scheduler")
    tower = CLIPModel.from_pretrained(out / "tiny-clip").text_model
    text = CLIPTextModel(tower.config)
    text.load_state_dict(tower.state_dict())
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(out / "tiny-clip"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)
    card = {
        "model": "tiny-sd15",
        "class": "diffusers.StableDiffusionPipeline",
        "trained_on": "shapes world, training split: 40,000 scenes with captions drawn afresh at every step",
        "prediction_type": scheduler.config.prediction_type,
        "image_size": SIZE,
        "token_limit": components.TOKEN_LIMIT,
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in (("unet", unet), ("vae", vae), ("text_encoder", text))},
        "training": {stage: json.loads((out / f"{stage}.json").read_text()) for stage in ("vae", "clip", name)},
        "measured_fp16": measure(folder),
    }
    _write(folder / "card.json", card)


def measure(folder: Path, n: int = 1000) -> dict[str, dict[str, float]]:
    """Oracle metrics of the saved pipeline on `n` prompts of the training and of the held-out split."""
    from align_cli.evaluation.benchmarks import measure_shapes

    return {split: measure_shapes(folder, n, split) for split in ("train", "test")}


def _write(path: Path, card: dict) -> None:
    path.write_text(json.dumps(card, indent=2) + "\n")
    print(path, flush=True)


