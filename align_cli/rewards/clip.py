"""Rewards that compare two CLIP towers: CLIPScore, PickScore, HPSv2 and 2.1, tiny-clip. One class.

Letters: B pictures (or prompts), T prompts, I pictures, D the common width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPTokenizer

from align_cli import registry
from align_cli.cuts import Cut, cuts
from align_cli.errors import UserError
from align_cli.rewards import preprocess
from align_cli.rewards.base import Request, Reward, choose_preprocessing, rgb
from align_cli.rewards.cleaning import clean
from align_cli.rewards.places import Place, place, published_source
from align_cli.rewards.preprocess import Preprocess
from align_cli.rewards.towers import WEIGHT_FILES, build, projected, published, read_clip
from align_cli.rewards.weights import CLIP_TOKENIZER_FILES, tokenizer_of

TOKENIZERS = (
    "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "stable-diffusion-v1-5/stable-diffusion-v1-5:tokenizer",
)  # fmt: skip
"""Where CLIP's vocabulary also lies: it is one and the same in all of them."""

COSINE, LOGIT = "cosine of image and text", "exp(logit_scale) * cosine of image and text"


@dataclass(frozen=True)
class Kind:
    """A published dual-tower reward.

    source: hub id, or folder of the package. version: of its weights. layout: of its towers, "" if only its
    own config.json tells. files: names of the weights. scaled: times exp(logit_scale). unescape: HTML
    entities of a prompt are resolved first, as open_clip's tokenizer does. ways: preprocessing by option.
    """

    source: str
    version: str
    layout: str
    ways: dict[str, Preprocess]
    files: tuple[str, ...] = WEIGHT_FILES
    scaled: bool = False
    unescape: bool = False
    scale: str = COSINE


def ways(official: Preprocess, **more: Preprocess) -> dict[str, Preprocess]:
    """The ways in which pictures reach such a scorer: its authors' own, LongAlign's, TextCraftor's."""
    both = {"longalign": preprocess.LONGALIGN, "textcraftor": preprocess.TEXTCRAFTOR}
    return {"official": official, **both, **more}


def _hps(version: str) -> Kind:
    return Kind(
        "xswu/HPSv2",
        version,
        "ViT-H-14",
        ways(preprocess.LONGEST) | {"no-antialias": preprocess.LONGEST_PLAIN},
        files=(HPS_FILES[version],),
        unescape=True,
    )


HPS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}

_GREY = (0.5, 0.5, 0.5)

TINY_CLIP = Kind(
    str(registry.WEIGHTS / "tiny-clip"),
    "shapes world, 32 px",
    "",
    {name: replace(way, mean=_GREY, std=_GREY) for name, way in ways(preprocess.SHORTEST).items()},
)

KINDS = {
    "clip": Kind(
        "openai/clip-vit-large-patch14",
        "ViT-L/14 openai",
        "ViT-L-14",
        ways(preprocess.SHORTEST),
        unescape=True,
    ),
    "clip-b32": Kind(
        "openai/clip-vit-base-patch32",
        "ViT-B/32 openai",
        "ViT-B-32",
        ways(preprocess.SHORTEST),
        unescape=True,
    ),
    "clip-g14": Kind(
        "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
        "ViT-g/14 laion2b_s34b_b88k",
        "ViT-g-14",
        ways(preprocess.SHORTEST),
        unescape=True,
    ),
    "pickscore": Kind(
        "yuvalkirstain/PickScore_v1",
        "PickScore v1, ViT-H/14",
        "ViT-H-14",
        ways(preprocess.SHORTEST_FLOOR),
        scaled=True,
        scale=LOGIT,
    ),
    "hpsv2": _hps("v2.0"),
    "hpsv2.1": _hps("v2.1"),
    "tiny-clip": TINY_CLIP,
}
"""Names and places of the published weights. Source: rewards-and-benchmarks.md."""


class ClipReward(Reward):
    """Similarity of the two towers of a CLIPModel, times exp(logit_scale) for some.

    Towers run in `dtype`; preprocessing, unit length and the product are float32. No gradient reaches the
    text.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        way: Preprocess,
        scaled: bool = False,
        unescape: bool = False,
        **facts: Any,
    ) -> None:
        super().__init__(preprocessing=way.words, **facts)
        self.model, self.tokenizer, self.way, self.unescape = model, tokenizer, way, unescape
        self.size = int(model.config.vision_config.image_size)
        positions = int(model.config.text_config.max_position_embeddings)
        self.limit = min(int(tokenizer.model_max_length), positions)
        self.factor = float(model.logit_scale.double().exp()) if scaled else 1.0

    def image_vectors(self, images: Tensor) -> Tensor:
        """(B, 1 | 3 | 4, H, W) in [0, 1] -> (B, D) float32 unit vectors, with gradients."""
        pixels = self.way(rgb(images).to(self.device), self.size).to(self.dtype)
        return F.normalize(projected(self.model.get_image_features(pixel_values=pixels)).float(), dim=-1)

    @torch.no_grad()
    def text_vectors(self, prompts: Sequence[str]) -> Tensor:
        """B texts -> (B, D) float32 unit vectors: each cut at `limit` tokens, no gradient."""
        ids = self.tokenizer(
            [self._clean(text) for text in prompts],
            padding="max_length",
            max_length=self.limit,
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        # no mask: attention is causal, so that what follows the end changes nothing
        return F.normalize(
            projected(self.model.get_text_features(input_ids=ids.to(self.device))).float(), dim=-1
        )

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        rgb(images, prompts)
        return (self.image_vectors(images) * self.text_vectors(prompts)).sum(-1) * self.factor

    def matrix(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(T, I) float32: every prompt with every picture; its diagonal is `score`. TextCraftor trains on the
        mean of PickScore's whole matrix.
        """
        return self.text_vectors(prompts) @ self.image_vectors(images).T * self.factor

    def audit(self, prompts: Sequence[str]) -> list[Cut]:
        return cuts(self.tokenizer, self.limit, [self._clean(text) for text in prompts])

    def _clean(self, text: str) -> str:
        return clean(text) if self.unescape else text


def build_clip(request: Request) -> ClipReward:
    """The reward of KINDS that `request` names."""
    return build_kind(request, KINDS[request.name], ClipReward)


def build_kind(request: Request, kind: Kind, cls: type[ClipReward]) -> ClipReward:
    """A reward of this kind and class: files found, read, checked."""
    way = choose_preprocessing(request, kind.ways)
    home = place(request.name, request.source, kind.source)
    _refuse_other_version(home, kind)
    config, state = read_clip(home, kind.layout, kind.files)
    where = f"{request.name}: {home.label}"
    return cls(
        model=build(config, state, where, device=request.device, dtype=request.dtype),
        tokenizer=tokenizer_of(CLIPTokenizer, home, TOKENIZERS, CLIP_TOKENIZER_FILES),
        way=way,
        scaled=kind.scaled,
        unescape=kind.unescape,
        name=request.name,
        version=_version(request, kind, home, config),
        source=request.source or published_source(kind.source),
        scale=kind.scale,
        device=request.device,
        dtype=request.dtype,
    )


def _version(request: Request, kind: Kind, home: Place, config: CLIPConfig) -> str:
    """What is known of the weights: those of the published place, or of a file with a published name that no
    other weights have, are the published ones; of all others only the sizes are known.
    """
    if not kind.layout:
        return f"other weights than {kind.version}" if request.source else kind.version
    if not published(config, kind.layout):
        return f"other sizes than {kind.version}"
    named = kind.files != WEIGHT_FILES and (home.file is None or home.file.name in kind.files)
    return kind.version if named or home.label == kind.source else f"{kind.version} by its sizes"


def _refuse_other_version(home: Place, kind: Kind) -> None:
    """UserError for the weights of the other HPSv2, which have the same shapes."""
    named = "" if home.file is None else home.file.name
    held = next((version for version, name in HPS_FILES.items() if name == named), kind.version)
    if kind.version in HPS_FILES and held != kind.version:
        other = next(name for name, k in KINDS.items() if k.version == held)
        raise UserError(
            f"{home.reward} is HPS {kind.version}, but {home.label} holds {held}; score with {other} instead"
        )
