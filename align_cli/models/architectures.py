"""The published architectures of the models that have an alias, as facts: what their config.json files say,
as far as it differs from the defaults of diffusers and transformers. So shapes, sizes and costs of these
models need no file. No torch.

Source: the models' repositories (`registry.MODELS`); tests hold their numbers of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """pipeline: its class. parts: configurations by name; of tokenizers the tokens that they read at most.
    scheduler: scheduler_config.json.
    """

    pipeline: str
    parts: dict[str, Config]
    scheduler: Config = field(default_factory=dict)


STABLE_DIFFUSION, SDXL, SD3 = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
)

CLIP_L: Config = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
"""text_encoder of SD1.x, SDXL and SD3: openai/clip-vit-large-patch14."""
CLIP_H: Config = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 512,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
"""text_encoder of SD2.x: OpenCLIP ViT-H without its last layer."""
CLIP_G: Config = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
"""text_encoder_2 of SDXL and SD3: OpenCLIP ViT-bigG."""
T5_XXL: Config = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
"""text_encoder_3 of SD3: google/t5-v1_1-xxl."""
T5_LARGE: Config = {
    "vocab_size": 32128,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 4096,
    "num_layers": 24,
    "num_heads": 16,
    "feed_forward_proj": "relu",
}
"""google-t5/t5-large, which LongAlign reads."""
ROBERTA_BASE: Config = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
"""FacebookAI/roberta-base, which DPT reads."""
BLIP_LARGE: Config = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 16,
    },
    "text_config": {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024},
}
"""Salesforce/blip-image-captioning-large, CoMat's captioner."""

VAE: Config = {
    "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
SD3_VAE: Config = VAE | {
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

SD1_UNET: Config = {"sample_size": 64, "cross_attention_dim": 768}
SD2_UNET: Config = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SDXL_UNET: Config = {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_TRANSFORMER: Config = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35_TRANSFORMER: Config = SD3_TRANSFORMER | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}

NOISE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
FLOW: Config = {"num_train_timesteps": 1000, "shift": 3.0}

_CLIP_TOKENS, _T5_TOKENS = {"model_max_length": 77}, {"model_max_length": 512}
_SD1 = Architecture(
    STABLE_DIFFUSION,
    {"unet": SD1_UNET, "vae": VAE, "text_encoder": CLIP_L, "tokenizer": _CLIP_TOKENS},
    NOISE,
)


def _sd3(transformer: Config) -> Architecture:
    parts = {"transformer": transformer, "vae": SD3_VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G}
    words = {"tokenizer": _CLIP_TOKENS, "tokenizer_2": _CLIP_TOKENS, "tokenizer_3": _T5_TOKENS}
    return Architecture(SD3, parts | {"text_encoder_3": T5_XXL} | words, FLOW)


ARCHITECTURES: dict[str, Architecture] = {
    "sd14": _SD1,
    "sd15": _SD1,
    "sd21-base": Architecture(
        STABLE_DIFFUSION,
        {"unet": SD2_UNET, "vae": VAE, "text_encoder": CLIP_H, "tokenizer": _CLIP_TOKENS},
        NOISE,
    ),
    "sdxl": Architecture(
        SDXL,
        {
            "unet": SDXL_UNET,
            "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_G,
            "tokenizer": _CLIP_TOKENS,
            "tokenizer_2": _CLIP_TOKENS,
        },
        NOISE,
    ),
    "sd3": _sd3(SD3_TRANSFORMER),
    "sd35-medium": _sd3(SD35_TRANSFORMER),
}
"""Alias -> its architecture."""
