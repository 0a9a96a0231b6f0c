"""The LAION aesthetic predictor: CLIP ViT-L/14 pictures, and a linear head. It never reads the prompt.

Letters: B pictures, D the projected width of the tower (768).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.rewards import preprocess
from align_cli.rewards.base import Request, Reward, choose_preprocessing, rgb
from align_cli.rewards.places import Place, option, place
from align_cli.rewards.preprocess import Preprocess
from align_cli.rewards.towers import build, read_clip
from align_cli.rewards.weights import fill, read_tensors

TOWER, TOWER_LAYOUT = "openai/clip-vit-large-patch14", "ViT-L-14"
HEAD = "camenduru/improved-aesthetic-predictor"
"""A copy on the hub of the official file, which lies in no hub repository."""
HEAD_FILES = (
    "sac+logos+ava1-l14-linearMSE.pth", "sac+logos+ava1-l14-linearMSE.safetensors", "aesthetic-model.pth",
)  # fmt: skip
OFFICIAL_HEAD = "da17f86f2c73edeff23b5beb5335ced5a4356fbf8f6c51fdf146accd39b9243f"
"""Hash (`head_hash`) of the official sac+logos+ava1-l14-linearMSE head."""
SCALE = "about 1 to 10, mean human rating"
WAYS = {"official": preprocess.SHORTEST, "textcraftor": preprocess.TEXTCRAFTOR}


class AestheticHead(nn.Module):
    """Five linear layers without activations; the dropouts keep the numbering of the official file.

    Source: christophschuhmann/improved-aesthetic-predictor; keys layers.{0,2,4,6,7}.{weight,bias}.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, 1)."""
        rated: Tensor = self.layers(x)
        return rated


class Aesthetic(Reward):
    """head(image feature / its length). The tower runs in `dtype`, the head in float32."""

    def __init__(self, *, tower: Any, head: AestheticHead, way: Preprocess, **facts: Any) -> None:
        super().__init__(preprocessing=way.words, **facts)
        self.tower, self.head, self.way = tower, head, way
        self.size = int(tower.config.image_size)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = self.way(rgb(images, prompts).to(self.device), self.size).to(self.dtype)
        features = self.tower(pixel_values=pixels).image_embeds.float()
        return self.head(F.normalize(features, dim=-1)).squeeze(-1)


def build_aesthetic(request: Request) -> Aesthetic:
    """The tower is read from where the head is if a config.json lies there, else from TOWER."""
    way = choose_preprocessing(request, WAYS)
    home = place(request.name, request.source, HEAD)
    weights = home.weights(HEAD_FILES, "head")
    state = read_tensors(weights, request.name)
    beside = home.folder is not None and home.find("config.json") is not None
    at = Place(request.name, home.label, folder=home.folder) if beside else place(request.name, "", TOWER)
    config, tower_state = _read_tower(at)
    first = state.get("layers.0.weight")
    if first is not None and first.ndim == 2 and first.shape[1] != config.projection_dim:
        raise UserError(
            f"{request.name}: the head {weights.name} reads {first.shape[1]}-wide features, but the tower of "
            f"{at.label} gives {config.projection_dim}"
        )
    with torch.device("meta"):
        head = AestheticHead(config.projection_dim)
    fill(head, state, f"{request.name}: {weights}", device=request.device, dtype=torch.float32)
    where = f"{request.name}: {at.label}"
    tower = build(config, tower_state, where, device=request.device, dtype=request.dtype, vision_only=True)
    return Aesthetic(
        tower=tower,
        head=head,
        way=way,
        name=request.name,
        version=_version(state),
        source=request.source or HEAD,
        scale=SCALE,
        device=request.device,
        dtype=request.dtype,
    )


def _read_tower(at: Place) -> tuple[Any, dict[str, Tensor]]:
    try:
        return read_clip(at, TOWER_LAYOUT)
    except UserError as error:
        raise UserError(
            f"{error} (a folder that holds the head and, beside it, config.json and model.safetensors of "
            f"{TOWER}: {option(at.reward)})"
        ) from error


def head_hash(state: dict[str, Tensor]) -> str:
    """sha256 over the float32 tensors in the order of their names."""
    digest = sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _version(state: dict[str, Tensor]) -> str:
    found = head_hash(state)
    name = "sac+logos+ava1-l14-linearMSE" if found == OFFICIAL_HEAD else f"unknown head {found[:8]}"
    return f"LAION aesthetic v2, {name}"
