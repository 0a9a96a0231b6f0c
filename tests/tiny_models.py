"""Tiny random models of the real diffusers and transformers classes, built under a fixed seed, without
network.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

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
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    words = tiny_tokenizer()
    text = CLIPTextModel(_tiny_clip_text(words, width, "quick_gelu"))
    vae = _tiny_vae()
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
    _louder_text(unet)
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
    return _save(pipe, folder, variant, None)


def build_tiny_sdxl(
    folder: Path,
    *,
    seed: int = 0,
    widths: tuple[int, int] = (16, 24),
    prediction_type: str = "epsilon",
    zeros_for_empty: bool = True,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Save a random Stable Diffusion XL pipeline (32 px pictures, 8x8x4 latents, 32 tokens) as an ordinary
    folder.

    widths: of the two text encoders, together the width of the UNet's text; the second one's is the pooled
    width too.
    """
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    first, second = _tiny_tokenizers()
    text = CLIPTextModel(_tiny_clip_text(first, widths[0], "quick_gelu"))
    text_2 = CLIPTextModelWithProjection(_tiny_clip_text(second, widths[1], "gelu"))
    vae = _tiny_vae(scaling_factor=0.13025, force_upcast=False)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=sum(widths),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + widths[1],
        norm_num_groups=4,
    )
    _louder_text(unet)
    scheduler = EulerDiscreteScheduler.from_config(  # with the keys of other schedulers that SDXL's file has
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "interpolation_type": "linear",
            "prediction_type": prediction_type,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        }
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text,
        text_encoder_2=text_2,
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=zeros_for_empty,
        add_watermarker=False,
    )
    return _save(pipe, folder, variant, max_shard_size)


def build_tiny_sd3(
    folder: Path,
    *,
    seed: int = 0,
    t5: bool = True,
    t5_tokens: int = 24,
    latent_channels: int = 4,
    num_layers: int = 3,
    dual: bool = False,
    shift: float = 3.0,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Save a random Stable Diffusion 3 pipeline (32 px pictures, 8x8 latents, 32 CLIP tokens) as an ordinary
    folder.

    t5: False leaves out the third text encoder and its tokenizer. t5_tokens: the limit of that tokenizer (of
    SD3: 512). dual: the layout of SD3.5 medium (a second attention in the first blocks, normalised queries
    and keys).
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    first, second = _tiny_tokenizers()
    text = CLIPTextModelWithProjection(_tiny_clip_text(first, 16, "quick_gelu"))
    text_2 = CLIPTextModelWithProjection(_tiny_clip_text(second, 24, "gelu"))
    third = tiny_t5_tokenizer(t5_tokens) if t5 else None
    text_3 = None
    if third is not None:
        text_3 = T5EncoderModel(
            T5Config(
                vocab_size=len(third),
                d_model=48,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                pad_token_id=third.pad_token_id,
                eos_token_id=third.eos_token_id,
            )
        )
    vae = _tiny_vae(
        latent_channels=latent_channels,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=48,
        pooled_projection_dim=40,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    with torch.no_grad():  # louder text, as in the UNets
        transformer.context_embedder.weight.mul_(10)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=text,
        tokenizer=first,
        text_encoder_2=text_2,
        tokenizer_2=second,
        text_encoder_3=text_3,
        tokenizer_3=third,
    )
    return _save(pipe, folder, variant, max_shard_size)


def _tiny_vae(**options: Any) -> Any:
    """An autoencoder of 32 px pictures and 8x8 latents; `options` go to AutoencoderKL."""
    from diffusers import AutoencoderKL

    common: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 32,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**(common | options))


def _tiny_tokenizers() -> tuple[Any, Any]:
    """The two CLIP tokenizers of SDXL and SD3: the second pads with "!"."""
    second = tiny_tokenizer()
    second.pad_token = "!"
    return tiny_tokenizer(), second


def tiny_tokenizer() -> Any:
    """The tokenizer of the embedded models. Trained once: its trainer breaks ties at random, so that two
    trainings may exchange the ids of two tokens.
    """
    return copy.deepcopy(_trained_tokenizer())


@cache
def _trained_tokenizer() -> Any:
    from align_cli.shapes.build.components import tokenizer

    return tokenizer()


def _tiny_clip_text(words: Any, width: int, activation: str) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        hidden_act=activation,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def tiny_t5_tokenizer(limit: int = 24) -> Any:
    """A T5 tokenizer (Unigram) in which every word of the shapes grammar is one token; other words are
    spelled in ASCII characters.
    """
    from transformers import T5Tokenizer

    from align_cli.shapes.captions import word_list

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    pieces += [("\u2581" + word, -4.0) for word in word_list()]
    pieces += [(chr(code), -9.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=limit)


def _louder_text(unet: Any) -> None:
    """A random cross-attention hardly moves the picture: louder text, so that prompts and soft tokens are
    seen.
    """
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or ("attn2.to_out" in name and name.endswith("weight")):
                weight.mul_(10)


def _save(pipe: Any, folder: Path, variant: str | None, max_shard_size: int | str | None) -> Path:
    if variant == "fp16":
        pipe.to(torch.float16)
    pipe.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
    return folder
