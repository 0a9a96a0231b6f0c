"""ImageReward's network in transformers' BLIP classes, built from names and shapes of the published file."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from align_cli.errors import UserError, first_line
from align_cli.rewards.aesthetic import AestheticHead
from align_cli.rewards.weights import fill

HEAD_WIDTH = 64
"""Width of one attention head of both towers. Source: BLIP's create_vit (base 768/12, large 1024/16) and
med_config.json (768/12).
"""
VISION_EPS, TEXT_EPS = 1e-6, 1e-12
"""Epsilons of the layer norms. Source: BLIP's vit.py and med_config.json; transformers' defaults differ."""

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the raw reward on the validation set. Source: official ImageReward.py."""

PUBLISHED = (1024, 24, 768, 12)
"""Width and layers of the published image tower and text encoder. Source: ImageReward.py, med_config.json."""

DROPPED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Keys of the published file that take no part in the score."""

RENAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (
        r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
        r"vision.encoder.layers.\1.self_attn.projection.",
    ),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.fc([12])\.", r"vision.encoder.layers.\1.mlp.fc\2."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)
"""Key of the published file -> key here; the first pattern that fits."""


class ImageRewardNet(nn.Module):
    """BLIP's image tower, its text encoder with cross attention to the image, and a purely linear head.

    Every size follows from the shapes of the state. The head runs in float32.
    Source: THUDM/ImageReward, ImageReward.py and models/BLIP. Deviations from the official code: none (its
    drop-outs do nothing at inference).
    """

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        super().__init__()
        width, _, patch, _ = shapes["vision.embeddings.patch_embedding.weight"]
        side = round((shapes["vision.embeddings.position_embedding"][1] - 1) ** 0.5)
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=shapes["vision.encoder.layers.0.mlp.fc1.weight"][0],
                num_hidden_layers=_layers(shapes, "vision.encoder.layers."),
                num_attention_heads=width // HEAD_WIDTH,
                image_size=side * patch,
                patch_size=patch,
                layer_norm_eps=VISION_EPS,
            )
        )
        words, text_width = shapes["text.embeddings.word_embeddings.weight"]
        config = BlipTextConfig(
            vocab_size=words,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=shapes["text.encoder.layer.0.intermediate.dense.weight"][0],
            num_hidden_layers=_layers(shapes, "text.encoder.layer."),
            num_attention_heads=text_width // HEAD_WIDTH,
            max_position_embeddings=shapes["text.embeddings.position_embeddings.weight"][0],
            layer_norm_eps=TEXT_EPS,
            bos_token_id=None,  # never generates
            eos_token_id=None,
            sep_token_id=None,
        )
        self.text = BlipTextModel(config, add_pooling_layer=False)
        self.head = AestheticHead(text_width)

    @property
    def image_size(self) -> int:
        """Side of the pictures that it takes, in pixels."""
        return int(self.vision.config.image_size)

    @property
    def published(self) -> bool:
        """Has it the sizes of the published network?"""
        vision, text = self.vision.config, self.text.config
        sizes = (vision.hidden_size, vision.num_hidden_layers, text.hidden_size, text.num_hidden_layers)
        return sizes == PUBLISHED

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards.

        Args:
            pixels: (B, 3, S, S) with S = `image_size`, normalised by CLIP's mean and standard deviation.
            ids: (B, L) token ids. mask: (B, L), 1 for tokens, 0 for padding.
        Returns:
            (B,) float32, about N(0, 1) over the official data.
        """
        seen = self.vision(pixel_values=pixels).last_hidden_state
        out = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen)
        return (self.head(out.last_hidden_state[:, 0].float()).squeeze(-1) - MEAN) / STD


def build(
    state: dict[str, Tensor], where: str, *, device: torch.device, dtype: torch.dtype
) -> ImageRewardNet:
    """The network of a published state, frozen and in evaluation mode.

    Raises:
        UserError: about `where`: missing or unknown keys, or shapes that are not ImageReward's.
    """
    state = {_renamed(key): x for key, x in state.items() if not key.startswith(DROPPED)}
    try:
        with torch.device("meta"):
            net = ImageRewardNet({key: x.shape for key, x in state.items()})
    except KeyError as error:
        raise UserError(f"{where} is not ImageReward's: it has no {error.args[0]} (names as here)") from error
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{where} has not ImageReward's shapes: {first_line(error)}") from error
    fill(net, state, where, device=device, dtype=dtype)
    net.head.float().load_state_dict({k.removeprefix("head."): x for k, x in state.items() if "head." in k})
    return net


def _renamed(key: str) -> str:
    for pattern, new in RENAMES:
        renamed, count = re.subn(pattern, new, key)
        if count:
            return renamed
    return key


def _numbers(keys: Iterable[str], prefix: str) -> set[str]:
    """What stands between the prefix and the next dot."""
    return {key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)}


def _layers(keys: Iterable[str], prefix: str) -> int:
    return len(_numbers(keys, prefix))
