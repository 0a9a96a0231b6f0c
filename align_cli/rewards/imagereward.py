"""ImageReward: BLIP tuned on human preferences over pictures of one prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import BertTokenizer

from align_cli.cuts import Cut, cuts
from align_cli.rewards.base import Request, Reward, choose_preprocessing, rgb
from align_cli.rewards.bert import bert_tokenizer
from align_cli.rewards.imagereward_net import ImageRewardNet, build
from align_cli.rewards.places import place
from align_cli.rewards.preprocess import SHORTEST
from align_cli.rewards.weights import read_tensors

HUB = "THUDM/ImageReward"
FILES = ("ImageReward.pt", "ImageReward.safetensors")
MAX_TOKENS = 35
"""Tokens that prompts are padded and cut to, [CLS] and [SEP] included. Source: official ImageReward.py."""


class ImageReward(Reward):
    """(raw reward - mean) / std, about N(0, 1) over the official data; see `ImageRewardNet`.

    Source: THUDM/ImageReward 1.5, `score` and (with gradients) `score_gard`. Deviations: none.
    """

    def __init__(self, net: ImageRewardNet, tokenizer: BertTokenizer, request: Request) -> None:
        super().__init__(
            name=request.name,
            version="ImageReward-v1.0" if net.published else "other sizes than ImageReward-v1.0",
            source=request.source or HUB,
            preprocessing=SHORTEST.words,
            scale="standardised reward: (r - 0.167) / 1.033",
            device=request.device,
            dtype=request.dtype,
        )
        self.net, self.tokenizer = net, tokenizer

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`; the prompt is cut to `MAX_TOKENS`."""
        pixels = SHORTEST(rgb(images, prompts).to(self.device), self.net.image_size)
        text = self.tokens(prompts)
        return self.net(pixels.to(self.dtype), text["input_ids"], text["attention_mask"])

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask, each (B, MAX_TOKENS) int64."""
        text = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return {name: text[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def audit(self, prompts: Sequence[str]) -> list[Cut]:
        return cuts(self.tokenizer, MAX_TOKENS, prompts)


def build_imagereward(request: Request) -> ImageReward:
    """ImageReward from a hub id, a folder (ImageReward.pt, and vocab.txt of uncased BERT) or the file itself.

    Raises:
        UserError: another preprocessing than "official"; missing or misfitting files.
    """
    choose_preprocessing(request, {"official": SHORTEST})
    where = place(request.name, request.source, HUB)
    path = where.weights(FILES)
    tokenizer = bert_tokenizer(where)
    state = read_tensors(path, request.name)
    return ImageReward(
        build(state, f"{request.name}: {path}", device=request.device, dtype=request.dtype),
        tokenizer,
        request,
    )
