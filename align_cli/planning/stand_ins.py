"""Scorers and readers without weights in place of those that a method would load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration, CLIPModel, CLIPVisionModelWithProjection

from align_cli.errors import UserError
from align_cli.grounding.entities import Entity
from align_cli.methods.base import Method
from align_cli.models.architectures import BLIP_LARGE
from align_cli.models.empty import HOST, NoTokenizer, empty_module, faked
from align_cli.planning.counting import Counting
from align_cli.planning.model import DENOISER, REWARD, TEXT, named
from align_cli.rewards import clip, denscore
from align_cli.rewards.aesthetic import TOWER_LAYOUT, WAYS, Aesthetic, AestheticHead
from align_cli.rewards.base import Request, Reward
from align_cli.rewards.blip_caption import SOURCES, BlipCaption
from align_cli.rewards.places import Place, place
from align_cli.rewards.towers import LAYOUTS, clip_config, read_config
from align_cli.rewards.weights import read_json

FACTS: dict[str, Any] = {"version": "", "source": "", "scale": "", "device": HOST}


def stand_in_rewards(
    names: Mapping[str, float],
    places: Mapping[str, str],
    preprocessing: str,
    dtype: torch.dtype,
    counting: Counting,
) -> tuple[dict[str, Reward], list[str]]:
    """Scorers with fake weights by name, and the names of those whose architecture is not known here."""
    found, unknown = dict[str, Reward](), list[str]()
    for name, weight in names.items():
        build = BUILDERS.get(name)
        if not weight or build is None:
            unknown += [name] if weight else []
            continue
        request = Request(name, places.get(name, ""), preprocessing, HOST, dtype)
        with counting.elsewhere():
            found[name] = build(request)
        for module in vars(found[name]).values():
            if isinstance(module, nn.Module):
                counting.hold(module)
                named(counting, REWARD, *_entrances(module))
    return found, unknown


def _entrances(module: nn.Module) -> list[nn.Module]:
    """The parts of a scorer that are called: a CLIPModel's towers, a captioner's halves, or itself."""
    names = ("vision_model", "text_model", "text_decoder")
    parts = [part for name in names if isinstance(part := getattr(module, name, None), nn.Module)]
    return [module, *parts]


def _two_towers(request: Request) -> Reward:
    kinds = denscore.KINDS if request.name in denscore.KINDS else clip.KINDS
    kind = kinds[request.name]
    config: Any = _clip_config(place(request.name, request.source, kind.source), kind.layout)
    with torch.device("meta"):
        model = CLIPModel(config)
    cls = denscore.Denscore if kinds is denscore.KINDS else clip.ClipReward
    return cls(
        model=faked(model, request.dtype),
        tokenizer=NoTokenizer(config.text_config.max_position_embeddings),
        way=kind.ways.get(request.preprocessing, kind.ways["official"]),
        scaled=kind.scaled,
        name=request.name,
        dtype=request.dtype,
        **FACTS,
    )


def _clip_config(home: Place, layout: str) -> Any:
    """From the files that are there, else the published one."""
    try:
        return read_config(home, layout)
    except UserError:
        if not layout:
            raise
        return clip_config(LAYOUTS[layout])


def _aesthetic(request: Request) -> Reward:
    config = clip_config(LAYOUTS[TOWER_LAYOUT])
    config.vision_config.projection_dim = config.projection_dim
    with torch.device("meta"):
        tower, head = (
            CLIPVisionModelWithProjection(config.vision_config),
            AestheticHead(config.projection_dim),
        )
    return Aesthetic(
        tower=faked(tower, request.dtype),
        head=cast("AestheticHead", faked(head, torch.float32)),
        way=WAYS.get(request.preprocessing, WAYS["official"]),
        name=request.name,
        dtype=request.dtype,
        **FACTS,
    )


def _blip(request: Request) -> Reward:
    config = BLIP_LARGE
    home = place(request.name, request.source, SOURCES[request.name])
    if home.folder is not None and (file := home.find("config.json")) is not None:
        config = read_json(file, request.name)
    model: Any = empty_module(_Blip, config, request.dtype, request.name)
    tokens = int(model.config.text_config.max_position_embeddings)
    words: Any = NoTokenizer(min(tokens, CAPTION))
    return BlipCaption(model, words, request)


class _Blip(BlipForConditionalGeneration):
    config_class = BlipConfig


CAPTION = 64
"""Tokens of a caption, where only a tokenizer could tell."""

BUILDERS: dict[str, Callable[[Request], Reward]] = {
    **dict.fromkeys((*clip.KINDS, *denscore.KINDS), _two_towers),
    **dict.fromkeys(SOURCES, _blip),
    "aesthetic": _aesthetic,
}
"""Reward -> what makes one with fake weights."""


def give_stand_ins(method: Method, counting: Counting) -> list[str]:
    """Put them in place. Returns what is not counted, in words."""
    given: Any = method
    config, said = given.config, list[str]()
    if getattr(config, "rewards", None) and hasattr(method, "use_rewards"):
        rewards, unknown = stand_in_rewards(
            config.rewards, config.reward_weights, getattr(config, "reward_preprocessing", "official"),
            getattr(torch, config.reward_dtype), counting,
        )  # fmt: skip
        given.use_rewards(rewards)
        said += [f"the reward {name}, whose architecture is not packaged" for name in unknown]
    if method.name == "comat" and config.concentration:
        given._finders = lambda: (_Nouns(), _Everywhere())
        said.append("what finds the nouns in pictures (parser, GroundingDINO and SAM)")
    return said


def hold_more(method: Method, counting: Counting) -> None:
    """Count what a method has loaded for itself: encoders of its own, another model's denoiser."""
    given: Any = method
    own = [getattr(getattr(given, name, None), "encoder", None) for name in ("t5", "phrases")]
    for encoder in own:
        if encoder is not None:
            counting.hold(encoder)
            named(counting, TEXT, encoder)
    other = getattr(getattr(given, "discriminator", None), "model", None)
    if other is not None and other is not method.model:
        counting.hold(other.denoiser)
        named(counting, DENOISER, other.denoiser)


class _Nouns:
    """Two nouns with an attribute each in every prompt."""

    def entities(self, _prompt: str) -> list[Entity]:
        return [Entity("apple", (5, 6), ("red", "apple")), Entity("cup", (12, 13), ("blue", "cup"))]


class _Everywhere:
    """Finds every noun."""

    def masks(self, images: Tensor, nouns: Sequence[Sequence[str]]) -> list[Tensor | None]:
        side = images.shape[-2:]
        return [torch.ones(len(own), *side, dtype=torch.bool) for own in nouns]
