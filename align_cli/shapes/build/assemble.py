"""Put the trained parts together: ordinary fp16 diffusers and transformers folders with a model card each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    BlipForConditionalGeneration,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    RobertaForMaskedLM,
    RobertaTokenizer,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from align_cli.config import resolve
from align_cli.evaluation import benchmarks
from align_cli.models.loading import load_model
from align_cli.settings import PROMPT_KINDS, ModelSettings
from align_cli.shapes.build import captioner, components, contrastive, paraphrase, phrases
from align_cli.shapes.build.painters import PAINTERS
from align_cli.shapes.dataset import eval_prompts
from align_cli.shapes.world import SIZE

WEIGHTS = Path(__file__).parents[1] / "weights"


def assemble(out: Path) -> None:
    """Write the embedded models whose stages in `out` are finished, each with its card."""
    if (out / "clip-refine.json").exists():
        tiny_clip(out)
    if (out / "blip.json").exists():
        tiny_blip(out)
    if (out / "t5.json").exists():
        tiny_t5(out)
    if (out / "roberta.json").exists():
        tiny_roberta(out)
    for stages in CHAINS:
        if (out / f"{stages[-1]}.json").exists():
            pipeline(out, stages)


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


def tiny_blip(out: Path) -> None:
    """The captioner, rounded to fp16 and measured as rounded."""
    folder, source = WEIGHTS / "tiny-blip", out / "tiny-blip"
    model = BlipForConditionalGeneration.from_pretrained(source)
    model.half().save_pretrained(folder)
    (folder / captioner.VOCABULARY).write_text((source / captioner.VOCABULARY).read_text())
    _forget_paths(folder)
    reward = captioner.as_reward(model.float().eval(), captioner.tokenizer())
    card = {
        "model": "tiny-blip",
        "class": "transformers.BlipForConditionalGeneration",
        "trained_on": "shapes world, training split: every picture with its caption and false ones, worn as "
        "drawn pictures are; the image tower starts as tiny-clip's",
        "input": f"{SIZE}x{SIZE} RGB, normalised as CLIP's; {components.BLIP_LIMIT} tokens",
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": _stages(out, "blip"),
        "measured_fp16": {
            f"{split}_{k}": round(v, 4)
            for split in ("train", "test")
            for k, v in captioner.evaluate(reward, split).items()
        },
    }
    _write(folder / "card.json", card)


def tiny_t5(out: Path) -> None:
    """The encoder of the T5, rounded to fp16; the whole T5 measured with it so."""
    source = out / "tiny-t5"
    whole, tok = T5ForConditionalGeneration.from_pretrained(source), T5Tokenizer.from_pretrained(source)
    encoder = T5EncoderModel(whole.config)
    encoder.load_state_dict({k: v for k, v in whole.state_dict().items() if k in encoder.state_dict()})
    about = {
        "class": "transformers.T5EncoderModel",
        "trained_on": "captions of the shapes world, training split, a tenth of their words hidden: write "
        "what they ask for",
        "input": f"{components.T5_LIMIT} tokens at most, padding read along",
    }
    _text_encoder("tiny-t5", encoder, whole, tok, paraphrase.evaluate, about, _stages(out, "t5"))


def tiny_roberta(out: Path) -> None:
    """RoBERTa's encoder, rounded to fp16; with its head measured so."""
    source = out / "tiny-roberta"
    whole, tok = RobertaForMaskedLM.from_pretrained(source), RobertaTokenizer.from_pretrained(source)
    about = {
        "class": "transformers.RobertaModel",
        "trained_on": "captions and phrases of the shapes world, training split: guess the words that are "
        "hidden or wrong",
        "input": f"{components.ROBERTA_LIMIT} tokens at most, padding masked out",
    }
    _text_encoder("tiny-roberta", whole.roberta, whole, tok, phrases.evaluate, about, _stages(out, "roberta"))


def _text_encoder(
    name: str,
    encoder: Any,
    whole: Any,
    tok: Any,
    evaluate: Callable[[Any, Any, str], dict[str, float]],
    about: dict[str, str],
    training: Any,
) -> None:
    """The folder of an encoder, rounded to fp16, with its tokenizer and a card.

    whole: the model that it was trained in; as it is after rounding, `evaluate` measures it on a split.
    """
    folder = WEIGHTS / name
    encoder.half().save_pretrained(folder)
    tok.save_pretrained(folder)
    _forget_paths(folder)
    whole.half().float().eval()
    measured = {
        f"{split}_{k}": round(v, 4)
        for split in ("train", "test")
        for k, v in evaluate(whole, tok, split).items()
    }
    parameters = sum(p.numel() for p in encoder.parameters())
    card = {"model": name, **about, "parameters": parameters, "training": training, "measured_fp16": measured}
    _write(folder / "card.json", card)


def pipeline(out: Path, stages: tuple[str, ...]) -> None:
    """The folder of one family that its diffusers pipeline opens, with what it measures as rounded to
    fp16. stages: its denoiser stages in order; the last one holds the weights.
    """
    stage = stages[-1].removesuffix("-refine")
    name = PAINTERS[stage].name
    parts: dict[str, Any] = {"vae": AutoencoderKL.from_pretrained(out / "vae")}
    kind, loaders = PIPELINES[stage]
    parts |= {part: cls.from_pretrained(out / stages[-1] / part) for part, cls in loaders.items()}
    tokenizer = CLIPTokenizer.from_pretrained(out / "tiny-clip")
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in loaders if "text" in part]
    absent = dict.fromkeys(ABSENT[stage])
    options = {"requires_safety_checker": False} if stage == "denoiser" else {}
    pipe = kind(**parts, **dict.fromkeys(tokenizers, tokenizer), **absent, **options)
    pipe.to(torch.float16).save_pretrained(WEIGHTS / name)
    _forget_paths(WEIGHTS / name)
    card = {
        "model": name,
        "class": f"diffusers.{kind.__name__}",
        "trained_on": "shapes world, training split: 40,000 scenes with captions drawn afresh at every step",
        "prediction_type": PAINTERS[stage].target,
        "image_size": SIZE,
        "token_limit": components.TOKEN_LIMIT,
        "parameters": {
            n: sum(p.numel() for p in m.parameters())
            for n, m in parts.items()
            if isinstance(m, torch.nn.Module)
        },
        **NOTES.get(stage, {}),
        "training": _stages(out, "vae", "clip", *stages),
        "measured_fp16": measure(WEIGHTS / name, f"softrepa/{name}"),
    }
    _write(WEIGHTS / name / "card.json", card)


CHAINS = (
    ("denoiser", "denoiser-refine"),
    ("denoiser", "denoiser-refine", "denoiser-sdxl"),
    ("denoiser", "denoiser-refine", "denoiser-sdxl", "denoiser-sd3"),
)
"""Denoiser stages behind each pipeline, in order."""
PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "denoiser": (
        StableDiffusionPipeline,
        {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "scheduler": DDIMScheduler},
    ),
    "denoiser-sdxl": (
        StableDiffusionXLPipeline,
        {
            "unet": UNet2DConditionModel,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
            "scheduler": DDIMScheduler,
        },
    ),
    "denoiser-sd3": (
        StableDiffusion3Pipeline,
        {
            "transformer": SD3Transformer2DModel,
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
            "scheduler": FlowMatchEulerDiscreteScheduler,
        },
    ),
}
"""Stage -> pipeline class and the parts that the stage has saved."""
ABSENT = {
    "denoiser": ("safety_checker", "feature_extractor"),
    "denoiser-sdxl": (),
    "denoiser-sd3": ("text_encoder_3", "tokenizer_3"),
}
"""Stage -> parts of the pipeline that the tiny one does without."""
NOTES = {
    "denoiser-sd3": {
        "taught_by": "tiny-sdxl: the target is what it expects of eps - x0, up to its last noise level",
        "without_t5": f"{components.TOKEN_LIMIT} rows of zeros; open with text_encoder_3=None and "
        "tokenizer_3=None, and call the diffusers pipeline with max_sequence_length="
        f"{components.TOKEN_LIMIT}",
    }
}
"""Stage -> further lines of the card."""


def measure(folder: Path, preset: str, n: int = 800) -> dict[str, dict[str, float]]:
    """Oracle metrics of the saved pipeline, through the code that users run, on `n` prompts per split and all
    kinds.
    """
    drawing = resolve("softrepa", preset=preset, config_file=None, sets=[], flags={}).sample
    model = load_model(ModelSettings(name=str(folder), device="cpu"))
    out: dict[str, dict[str, float]] = {}
    for split in ("train", "test"):
        prompts = eval_prompts(n, 3, split=split, kinds=PROMPT_KINDS)
        values = benchmarks.measure(model, prompts, drawing, 3)
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
