"""A pipeline class of diffusers around the modules of a loaded model."""

from __future__ import annotations

from typing import Any, cast

from align_cli.exporting.compare import silent
from align_cli.models.base import BaseModel
from align_cli.models.sd3 import SD3Model
from align_cli.models.sdxl import SDXLModel
from align_cli.models.unet import UNetModel

with silent():  # they ask for torchvision, which nothing here needs
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline


def stock_pipeline(model: BaseModel, scheduler: Any) -> Any:
    """StableDiffusionPipeline, StableDiffusionXLPipeline or StableDiffusion3Pipeline with the very modules
    of `model`; without safety checker and watermark, which `t2ialign sample` has not, either.
    """
    if isinstance(model, SD3Model):
        pipe: Any = StableDiffusion3Pipeline(
            transformer=model.denoiser,
            scheduler=scheduler,
            vae=model.vae,
            text_encoder=model.encoders[0],
            tokenizer=model.tokenizers[0],
            text_encoder_2=model.encoders[1],
            tokenizer_2=model.tokenizers[1],
            text_encoder_3=None if model.t5_tokenizer is None else model.encoders[2],
            tokenizer_3=model.t5_tokenizer,
        )
    elif isinstance(model, SDXLModel):
        pipe = StableDiffusionXLPipeline(
            vae=model.vae,
            text_encoder=model.encoders[0],
            text_encoder_2=model.encoders[1],
            tokenizer=model.tokenizers[0],
            tokenizer_2=model.tokenizers[1],
            unet=model.denoiser,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=model.zeros_for_empty,
            add_watermarker=False,
        )
    else:
        pipe = StableDiffusionPipeline(
            vae=model.vae,
            text_encoder=model.encoders[0],
            tokenizer=cast("UNetModel", model).tokenizer,
            unet=model.denoiser,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.scheduler = scheduler  # the constructor of SD1.x rewrites a steps_offset other than 1
    return pipe
