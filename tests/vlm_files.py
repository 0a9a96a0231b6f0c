"""Tiny random vision-language models of transformers, saved as ordinary folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

WORDS = [
    "<pad>", "<unk>", "<image>", "Yes", "No", "a", "red", "dog", "Does", "this", "figure", "show", "USER",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}USER {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}"
    "{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )


def save_llava(folder: Path, *, words: list[str] = WORDS, **processor: object) -> Path:
    """A LLaVA of 24-pixel pictures whose vocabulary is `words`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=24, patch_size=8),
        text_config=LlamaConfig(
            **sizes, num_key_value_heads=2, vocab_size=len(words), max_position_embeddings=128
        ),
        image_token_index=words.index("<image>"),
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    tokenizer = word_tokenizer(words)
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}} | processor
    LlavaProcessor(
        CLIPImageProcessorPil(**size), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder
