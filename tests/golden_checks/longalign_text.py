"""LongAlign: captions fall into sentences and are encoded so; CLIP by sentence, T5, adapter, conditioning."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from align_cli.diffusion.process import NoiseProcess
from align_cli.methods.longalign.adapter import TextAdapter
from align_cli.models.segments import SegmentReader
from align_cli.models.t5 import T5Reader
from align_cli.models.unet import UNetModel
from align_cli.sentences import drop_captions, split_sentences
from golden_checks.lines import Kind, Line, same
from golden_checks.longalign import values


def splitter(_: Path, case: dict[str, Any]) -> Iterator[Line]:
    for one in case["cases"]:
        yield same(f"case {one['id']}", split_sentences(one["text"]), one["segments"])
    yield from segments_of("batch", case["batch"]["texts"], case["batch"]["segments"], case["batch"]["owner"])
    for i, one in enumerate(case["collate"]):
        draws = random.Random(one["python_random_seed"])
        captions = drop_captions(one["captions_in"], one["drop_ratio"], draws.random)
        yield same(f"collate {i}/captions_after_drop", captions, one["captions_after_drop"])
        yield from segments_of(f"collate {i}", captions, one["segments"], one["segment_owner"])
        yield same(
            f"collate {i}/four_random_sentences",
            [four_sentences(split_sentences(text), draws) for text in captions],
            one["four_random_sentences"],
        )


def segments_of(name: str, texts: list[str], segments: list[str], owners: list[int]) -> Iterator[Line]:
    parts = [split_sentences(text) for text in texts]
    yield same(f"{name}/segments", [s for own in parts for s in own], segments)
    yield same(f"{name}/owners", [i for i, own in enumerate(parts) for _ in own], owners)


def four_sentences(segments: list[str], draws: random.Random) -> str:
    """The official code draws them and leaves them unused; they show that the draws before were as many."""
    chosen = sorted(draws.sample(range(len(segments)), min(4, len(segments))))
    return " ".join(segments[i].strip() for i in chosen)


@torch.no_grad()
def encoding(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    length, captions = case["token_length"], case["captions"]
    place = {name: folder / text.split(" ")[0] for name, text in case["tokenizers"].items()}
    t5 = T5EncoderModel(T5Config(**case["t5_config"])).eval()
    lacking = t5.load_state_dict(load_file(folder / "t5_encoder.safetensors"), strict=False)
    yield same("T5 weights", (lacking.unexpected_keys, lacking.missing_keys), ([], TIED))
    adapter = TextAdapter(**case["adapter"]).eval()
    adapter.load(load_file(folder / "adapter.safetensors"), "adapter.safetensors")
    whole = T5Reader(T5TokenizerFast.from_pretrained(place["t5"]), t5, length)
    for output in case["outputs"]:
        x, name = load_file(folder / output["file"]), output["file"].removesuffix(".safetensors")
        model = clip_model(folder, case, place["clip"], output["clip_pad_token"])
        reader = SegmentReader(model, length=length, more=lambda texts: adapter(whole.states(texts)))
        (tower,) = model.towers()
        parts = [split_sentences(text) for text in captions]
        flat = [s for own in parts for s in own]
        owners = [i for i, own in enumerate(parts) for _ in own]
        yield same(f"{name}/pad id", tower.tokenizer.pad_token_id, output["clip_pad_id"])
        yield same(f"{name}/segment_owner", owners, x["segment_owner"].tolist())
        ids = tower.ids(flat)
        yield same(f"{name}/clip_input_ids", ids.tolist(), x["clip_input_ids"].tolist())
        counts = [reader.count(text) for text in captions]
        yield same(f"{name}/kept tokens", counts, output["kept_clip_tokens_before_truncation"])
        yield values(f"{name}/clip_hidden_per_segment", tower.states(ids), x["clip_hidden_per_segment"])
        yield values(f"{name}/pad_embedding", tower.filler()[None], x["pad_embedding"])
        found = reader.encode(captions).tokens
        yield values(f"{name}/clip_part", found[:, :length], x["clip_part"])
        t5_ids = whole.tokenizer(captions, padding="max_length", max_length=length, truncation=True)
        yield same(f"{name}/t5_input_ids", t5_ids["input_ids"], x["t5_input_ids"].tolist())
        yield values(f"{name}/t5_hidden", whole.states(captions), x["t5_hidden"])
        yield values(f"{name}/adapter_out", found[:, length:], x["adapter_out"])
        yield values(f"{name}/conditioning", found, x["conditioning"])
        if "" in captions:
            expected = x["conditioning"][captions.index("")]
            yield values(f"{name}/unconditional", reader.uncond(1).tokens[0], expected)


TIED = ["encoder.embed_tokens.weight"]
"""The tied copy of the token embedding, which files leave out."""


def clip_model(folder: Path, case: dict[str, Any], words: Path, pad: str) -> UNetModel:
    """The case's text encoder in a pipeline whose other parts are the smallest there are."""
    tokenizer = CLIPTokenizer.from_pretrained(words, pad_token=pad)
    text = CLIPTextModel(CLIPTextConfig(**case["clip_text_config"]))
    state: dict[str, Tensor] = load_file(folder / "clip_text_model.safetensors")
    text.load_state_dict(
        {k.removeprefix("text_model."): w for k, w in state.items() if "position_ids" not in k}
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=case["clip_text_config"]["hidden_size"],
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return UNetModel(
        model_id="golden",
        tokenizer=tokenizer,
        text_encoder=text,
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        unet=unet,
        process=NoiseProcess.from_scheduler_config(dict(DDIMScheduler().config)),
    )


KINDS = [
    Kind("longalign", lambda _, case: "collate" in case and "batch" in case, splitter),
    Kind("longalign", lambda _, case: "adapter" in case and "token_length" in case, encoding),
]
