"""Put the trained parts together: ordinary fp16 diffusers and transformers folders with a model card each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from align_cli.config import resolve
from align_cli.evaluation import paired
from align_cli.models.loading import load_model
from align_cli.settings import ModelSettings
from align_cli.shapes.build import components, contrastive
from align_cli.shapes.captions import PROMPT_KINDS
from align_cli.shapes.dataset import eval_prompts
from align_cli.shapes.world import SIZE

WEIGHTS = Path(__file__).parents[1] / "weights"


def assemble(out: Path) -> None:
    """Write `weights/tiny-clip` and `weights/tiny-sd15` from the finished stages in `out`."""
    tiny_clip(out)
    tiny_sd15(out)


def tiny_clip(out: Path) -> None:
    """The contrastive model, rounded to fp16 and measured as rounded."""
    folder = WEIGHTS / "tiny-clip"
    source = out / "tiny-clip-refined"
    model, tok = CLIPModel.from_pretrained(source), CLIPTokenizer.from_pretrained(source)
    model.half().save_pretrained(folder)
    tok.save_pretrained(folder)
    _forget_paths(folder)
    model.float().eval()
    measured = {
        f"{split}_{k}": round(v, 4)
        for split in ("train", "test")
        for k, v in contrastive.evaluate(model, tok, split).items()
    }
    card = {
        "model": "tiny-clip",
        "class": "transformers.CLIPModel",
        "trained_on": "shapes world, training split, every picture and caption with its counterfactual twin",
        "input": f"{SIZE}x{SIZE} RGB, x / 127.5 - 1; {components.TOKEN_LIMIT} tokens",
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": _stages(out, "clip", "clip-refine"),
        "measured_fp16": measured,
    }
    _write(folder / "card.json", card)


def tiny_sd15(out: Path, name: str = "denoiser") -> None:
    """The pipeline folder that StableDiffusionPipeline.from_pretrained opens."""
    folder = WEIGHTS / "tiny-sd15"
    vae = AutoencoderKL.from_pretrained(out / "vae")
    unet = UNet2DConditionModel.from_pretrained(out / name / "unet")
    scheduler = DDIMScheduler.from_pretrained(out / name / "scheduler")
    text = CLIPTextModel.from_pretrained(out / name / "text_encoder")
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
    _forget_paths(folder)
    card = {
        "model": "tiny-sd15",
        "class": "diffusers.StableDiffusionPipeline",
        "trained_on": "shapes world, training split: 40,000 scenes with captions drawn afresh at every step",
        "prediction_type": scheduler.config.prediction_type,
        "image_size": SIZE,
        "token_limit": components.TOKEN_LIMIT,
        "parameters": {
            n: sum(p.numel() for p in m.parameters())
            for n, m in (("unet", unet), ("vae", vae), ("text_encoder", text))
        },
        "training": _stages(out, "vae", "clip", name),
        "measured_fp16": measure(folder),
    }
    _write(folder / "card.json", card)


def measure(folder: Path, n: int = 800) -> dict[str, dict[str, float]]:
    """Oracle metrics of the saved pipeline, through the code that users run, on `n` prompts per split and all
    kinds.
    """
    preset = resolve("softrepa", preset="softrepa/tiny-sd15", config_file=None, sets=[], flags={})
    model = load_model(ModelSettings(name=str(folder), device="cpu"))
    out: dict[str, dict[str, float]] = {}
    for split in ("train", "test"):
        prompts = eval_prompts(n, 3, split=split, kinds=PROMPT_KINDS)
        values = paired.measure(model, prompts, preset.sample, 3).values
        kinds = np.array([p.kind for p in prompts])
        out[split] = {k: round(float(np.nanmean(v)), 4) for k, v in values.items()}
        out[split] |= {f"all_{k}": round(float(values["all"][kinds == k].mean()), 4) for k in PROMPT_KINDS}
    return out


def _stages(out: Path, *names: str) -> dict[str, dict]:
    return {name: json.loads((out / f"{name}.json").read_text()) for name in names}


def _forget_paths(folder: Path) -> None:
    """Take out of every configuration where its part was built."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def _write(path: Path, card: dict) -> None:
    path.write_text(json.dumps(card, indent=2) + "\n")
    print(path, flush=True)
