"""Tiny random models of the real diffusers and transformers classes, built under a fixed seed, without
network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def build_tiny_sd15(
    folder: Path,
    *,
    seed: int = 0,
    width: int = 32,
    prediction_type: str = "epsilon",
    zero_snr: bool = False,
    spacing: str = "leading",
    variant: str | None = None,
) -> Path:
    """Save a random Stable Diffusion pipeline (32 px pictures, 8x8x4 latents, 32 tokens) as an ordinary
    folder.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from align_cli.shapes.build.components import tokenizer

    torch.manual_seed(seed)
    words = tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            hidden_act="quick_gelu",
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    # a random cross-attention hardly moves the picture: louder text, so that prompts and soft tokens are seen
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or ("attn2.to_out" in name and name.endswith("weight")):
                weight.mul_(10)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing=spacing,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if variant == "fp16":
        pipe.to(torch.float16)
    pipe.save_pretrained(folder, variant=variant)
    return folder


@pytest.fixture(scope="session")
def tiny_sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD1.5-type pipeline: epsilon prediction, leading spacing. Do not write into it."""
    return build_tiny_sd15(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline with velocity prediction, zero terminal SNR and trailing spacing. Do not write into
    it.
    """
    return build_tiny_sd15(
        tmp_path_factory.mktemp("models") / "tiny-v",
        prediction_type="v_prediction",
        zero_snr=True,
        spacing="trailing",
    )


@pytest.fixture(scope="session")
def make_tiny_sd15() -> Callable[..., Path]:
    """`build_tiny_sd15(folder, **options)` for tests that need another one."""
    return build_tiny_sd15
