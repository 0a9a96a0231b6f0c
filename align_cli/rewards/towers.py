"""CLIP dual towers: transformers' CLIPModel, from its own files or from those of open_clip (HPSv2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from align_cli.errors import UserError, first_line
from align_cli.rewards.places import Place
from align_cli.rewards.weights import fill, read_json, read_tensors

WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
"""Names under which published CLIP models lie, the best first."""


def _layout(
    embed: int, image: tuple[int, int, int, int], text: tuple[int, int, int], **vision: float
) -> dict[str, Any]:
    """image: patch, width, layers, width of a head. text: width, heads, layers."""
    patch, width, layers, head = image
    sizes = {"image_size": 224, "patch_size": patch, "width": width, "layers": layers, "head_width": head}
    return {
        "embed_dim": embed,
        "vision_cfg": sizes | vision,
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": text[0], "heads": text[1], "layers": text[2]
        },
    }  # fmt: skip


LAYOUTS: dict[str, dict[str, Any]] = {
    "ViT-B-32": _layout(512, (32, 768, 12, 64), (512, 8, 12)) | {"quick_gelu": True},
    "ViT-L-14": _layout(768, (14, 1024, 24, 64), (768, 12, 12)) | {"quick_gelu": True},
    "ViT-H-14": _layout(1024, (14, 1280, 32, 80), (1024, 16, 24)),
    "ViT-g-14": _layout(1024, (14, 1408, 40, 88), (1024, 16, 24), mlp_ratio=4.3637),
}
"""The published architectures in the words of open_clip's configurations. Source: its model_configs."""


def clip_config(layout: Mapping[str, Any]) -> CLIPConfig:
    """transformers' configuration of an open_clip layout ({"embed_dim", "vision_cfg", "text_cfg"}).

    eos_token_id 2 makes transformers pool the text at the largest id, as open_clip does.
    Raises:
        KeyError, TypeError: sizes are not there, or no numbers.
    """
    vision, text, embed = layout["vision_cfg"], layout["text_cfg"], layout["embed_dim"]
    act = "quick_gelu" if layout.get("quick_gelu") else "gelu"
    common = {"hidden_act": act, "projection_dim": embed, "layer_norm_eps": 1e-5}
    return CLIPConfig(
        projection_dim=embed,
        vision_config=common
        | {
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        text_config=common
        | {
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    )


_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of open_clip's CLIP class under the names of transformers' CLIPModel; unknown names stay as
    they are.

    Source: HPSv2's and open_clip's model files; see rewards-and-benchmarks 2.6.
    """
    out: dict[str, Tensor] = {}
    for key, x in state.items():
        stem, _, kind = key.rpartition(".")
        block = _BLOCK.fullmatch(key)
        if block is not None:
            tower = "vision_model" if block[1] else "text_model"
            prefix, rest = f"{tower}.encoder.layers.{block[2]}.", block[3]
            if rest.startswith("attn.in_proj_"):
                names = (f"{prefix}self_attn.{p}_proj.{rest[len('attn.in_proj_') :]}" for p in "qkv")
                out.update(zip(names, x.chunk(3), strict=True))
            else:
                part, _, kind = rest.rpartition(".")
                out[f"{prefix}{_IN_BLOCK.get(part, part)}.{kind}"] = x
        elif key in ("visual.proj", "text_projection"):
            out[_NAMES[key]] = x.T
        elif stem in _NORMS:
            out[f"{_NORMS[stem]}.{kind}"] = x
        else:
            out[_NAMES.get(key, key)] = x
    return out


def read_clip(place: Place, layout: str, files: tuple[str, ...] = WEIGHT_FILES) -> tuple[CLIPConfig, Any]:
    """Configuration and weights (names of CLIPModel) of a CLIP model.

    The configuration is config.json or open_clip_config.json beside the weights, else the published one.
    Args:
        layout: key of LAYOUTS, used where no configuration lies beside the weights.
        files: names of weight files, the first that is there is read.
    Raises:
        UserError: no weights; unreadable files; a configuration of something else.
    """
    weights = place.weights(files)
    config = read_config(place, layout)
    state = read_tensors(weights, place.reward, place)
    if "token_embedding.weight" in state or "visual.conv1.weight" in state:
        state = from_open_clip(state)
    return config, {k: x for k, x in state.items() if not k.endswith(".position_ids")}


def read_config(place: Place, layout: str) -> CLIPConfig:
    """The configuration beside the weights, else the published one of `layout`. UserError for another's."""
    for name in ("config.json", "open_clip_config.json"):
        path = place.find(name)
        if path is None:
            continue
        content = read_json(path, place.reward)
        if name == "config.json" and content.get("model_type") not in ("clip", None):
            found = content["model_type"]
            raise UserError(f"{place.reward}: {path} is of a {found} model, not of a CLIP model")
        if name == "config.json" and "model_type" not in content:
            continue  # of something else, as open_clip's own repositories have
        try:
            return (
                CLIPConfig.from_dict(content)
                if name == "config.json"
                else clip_config(content.get("model_cfg", content))
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{place.reward}: {path} is no configuration of a CLIP model: {first_line(error)}"
            ) from error
    return clip_config(LAYOUTS[layout])


def build(
    config: CLIPConfig,
    state: Mapping[str, Tensor],
    where: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vision_only: bool = False,
) -> Any:
    """The frozen CLIPModel with these weights, all of them and no others; or its image tower alone, a
    CLIPVisionModelWithProjection. UserError about `where` if the weights do not fit.
    """
    with torch.device("meta"):
        if vision_only:
            vision = config.vision_config
            vision.projection_dim = config.projection_dim
            model: nn.Module = CLIPVisionModelWithProjection(vision)
            state = {k: x for k, x in state.items() if not k.startswith(("text_", "logit_scale"))}
        else:
            model = CLIPModel(config)
    fill(model, dict(state), where, device=device, dtype=dtype)
    if not vision_only:  # its exponential would be off by a percent in bfloat16
        model.logit_scale.data = state["logit_scale"].to(device, torch.float32)
    return model


def published(config: CLIPConfig, layout: str) -> bool:
    """Has the model the sizes of the published one?"""
    known = clip_config(LAYOUTS[layout])
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "hidden_act")
    return config.projection_dim == known.projection_dim and all(
        getattr(getattr(config, part), name) == getattr(getattr(known, part), name)
        for part in ("vision_config", "text_config")
        for name in names
    )


def projected(output: Any) -> Tensor:
    """The projected feature of `get_image_features` and `get_text_features`: transformers 5 wraps it."""
    return output if isinstance(output, Tensor) else output.pooler_output
