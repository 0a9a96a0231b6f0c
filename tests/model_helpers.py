"""What the tests of all model families share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from align_cli.diffusion.rollout import rollout
from align_cli.models.loading import load_model
from align_cli.settings import ModelSettings

PROMPTS = ["a red circle left of a blue square", "two green triangles"]


def load(name: object, **options: object):
    """A model on the CPU."""
    return load_model(ModelSettings(name=str(name), **{"device": "cpu", **options}))


def field(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pipeline(cls: type, folder: object, **options: object) -> Any:
    """A pipeline of diffusers, with the sums of a model as loaded here in the same order."""
    pipe = cls.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "unet"):
        pipe.unet.to(memory_format=torch.channels_last)
    return pipe


def check_frozen(*modules: torch.nn.Module) -> None:
    for module in modules:
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def check_text_gradient(model) -> None:
    """A text encoder gets a gradient only if it asks for one."""
    for encoder in model.encoders:
        parameter = next(encoder.parameters())
        parameter.requires_grad_(True)
        try:
            assert model.encode_text(PROMPTS).tokens.requires_grad
            with torch.no_grad():
                assert not model.encode_text(PROMPTS).tokens.requires_grad
        finally:
            parameter.requires_grad_(False)


def check_sampling(model, pipe: Any, steps: int, guidance: float, *, ours: dict, theirs: dict) -> None:
    """From the same noise our roll-out gives the latents and the pictures of diffusers' own pipeline.

    ours, theirs: more options of `rollout` and of the pipeline.
    """
    start = field(0, 2, model.latent_channels, 8, 8)
    common = {"num_inference_steps": steps, "guidance_scale": guidance, "latents": start.clone(), **theirs}
    with torch.no_grad():
        wanted = pipe(PROMPTS, output_type="latent", **common).images
        pictures = pipe(PROMPTS, output_type="pt", **common).images
        found = rollout(
            model.predict,
            model.process,
            start,
            steps=steps,
            guidance=guidance,
            cond=model.encode_text(PROMPTS),
            uncond=model.uncond(2),
            **ours,
        )
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.decode(found), pictures, atol=1e-5, rtol=1e-5)


def sdxl_unet() -> UNet2DConditionModel:
    """The UNet of SDXL by its published config.json, on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
