"""The embedded models: exact configurations, all of the ordinary diffusers and transformers classes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from align_cli.rewards.blip_caption import LABEL_SMOOTHING, PREFIX
from align_cli.shapes.captions import word_list
from align_cli.shapes.world import SIZE

TOKEN_LIMIT = 32
"""Tokens the text towers read, start and end included: the long captions overflow it as real ones overflow
77.
"""
WIDTH = 128
"""Width of the text tower and of cross-attention."""
T5_WIDTH = 96
"""Width of tiny-t5, which is not that of the CLIP tower: the adapter has to make one of the other."""
T5_LIMIT = 96
"""Tokens tiny-t5 reads: more than any caption of the grammar has."""
ROBERTA_WIDTH = 80
"""Width of tiny-roberta, which is that of nothing else."""
ROBERTA_LIMIT = 96
"""Tokens tiny-roberta reads: more than any caption of the grammar has."""
BLIP_LIMIT = 64
"""Tokens tiny-blip reads: more than any caption of the grammar has, with what the reward puts before it."""
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the grammar is one token: same vocabulary order as the real
    one.
    """
    words = word_list()
    merges = _merges([[*word[:-1], word[-1] + "</w>"] for word in words])
    base = list(bytes_to_unicode().values())
    tokens = base + [c + "</w>" for c in base] + ["".join(pair) for pair in merges] + [START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    made = CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=TOKEN_LIMIT,
    )
    for word in words:
        ids = made(word)["input_ids"]
        assert len(ids) == 3, f"{word!r} is {len(ids) - 2} tokens"
    return made


def _merges(parts: list[list[str]]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of every list of parts, the most frequent pair first, then by
    alphabet: the same on every machine (the trainer of `tokenizers` breaks ties at random).
    """
    merges: list[tuple[str, str]] = []
    while any(len(part) > 1 for part in parts):
        counts = Counter(pair for part in parts for pair in pairwise(part))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for part in parts:
            at = 0
            while at < len(part) - 1:
                if (part[at], part[at + 1]) == best:
                    part[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def _text_config(tok: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKEN_LIMIT,
        projection_dim=WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def clip(tok: CLIPTokenizer) -> CLIPModel:
    """tiny-clip: both towers of the contrastive model; its text tower is the frozen text encoder of the tiny
    pipelines.
    """
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=4,
        projection_dim=WIDTH,
        hidden_act="quick_gelu",
    )
    config = CLIPConfig(
        text_config=_text_config(tok).to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH
    )
    return CLIPModel(config)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer in which every word of the grammar is one token; other text falls into letters."""
    words = word_list()
    letters = sorted({c for word in words for c in word} | set("abcdefghijklmnopqrstuvwxyz0123456789.,!?;'-"))
    pieces = [(f"\u2581{word}", -1.0) for word in words] + [("\u2581", -8.0)] + [(c, -10.0) for c in letters]
    names = list(dict.fromkeys(name for name, _ in pieces))
    scores = dict(reversed(pieces))
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    made = T5Tokenizer(
        vocab=special + [(n, scores[n]) for n in names], extra_ids=0, model_max_length=T5_LIMIT
    )
    for word in words:
        ids = made(word)["input_ids"]
        assert len(ids) == 2, f"{word!r} is {len(ids) - 1} tokens"
    return made


def t5(tok: T5Tokenizer) -> T5ForConditionalGeneration:
    """The whole T5, of which the encoder ships as tiny-t5."""
    config = T5Config(
        vocab_size=len(tok),
        d_model=T5_WIDTH,
        d_kv=24,
        d_ff=2 * T5_WIDTH,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=tok.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def roberta_tokenizer() -> RobertaTokenizer:
    """A RoBERTa tokenizer in which every word of the grammar is one token, with a blank before it and
    without; other text falls into bytes.
    """
    words = word_list()
    merges = _merges([list(form) for word in words for form in (word, f"\u0120{word}")])
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values()]
    tokens += ["".join(pair) for pair in merges] + ["<mask>"]
    made = RobertaTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=ROBERTA_LIMIT,
    )
    for word in words:
        ids = made(f"{word} {word}")["input_ids"]
        assert len(ids) == 4, f"{word!r} is not one token"
    return made


def roberta(tok: RobertaTokenizer) -> RobertaForMaskedLM:
    """RoBERTa with the head that guesses words, of which the encoder ships as tiny-roberta."""
    config = RobertaConfig(
        vocab_size=len(tok),
        hidden_size=ROBERTA_WIDTH,
        intermediate_size=2 * ROBERTA_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=ROBERTA_LIMIT + tok.pad_token_id + 1,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    return RobertaForMaskedLM(config)


def blip_vocabulary() -> list[str]:
    """The pieces of tiny-blip, a line of vocab.txt each: every word of the grammar and of what the reward
    puts before a caption; every other word is [UNK].
    """
    return [*BERT_SPECIAL, *dict.fromkeys([*PREFIX.split(), *word_list()])]


def blip(tok: BertTokenizer) -> BlipForConditionalGeneration:
    """tiny-blip: an image tower of the sizes of tiny-clip's, where its training starts, and a decoder that
    reads the caption.
    """
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
        "initializer_range": 0.02,
    }
    text = sizes | {
        "vocab_size": len(tok),
        "max_position_embeddings": BLIP_LIMIT,
        "label_smoothing": LABEL_SMOOTHING,
        "bos_token_id": tok.cls_token_id,
        "eos_token_id": tok.sep_token_id,
        "sep_token_id": tok.sep_token_id,
        "pad_token_id": tok.pad_token_id,
    }
    vision = sizes | {"image_size": SIZE, "patch_size": 4, "hidden_act": "quick_gelu"}
    config = BlipConfig(
        text_config=text, vision_config=vision, projection_dim=WIDTH, image_text_hidden_size=WIDTH
    )
    return BlipForConditionalGeneration(config)


def vae() -> AutoencoderKL:
    """Autoencoder 32x32x3 -> 8x8x4."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}


def unet() -> UNet2DConditionModel:
    """The denoiser of tiny-sd15: 8x8 latents, cross-attention at the 8x8 level and in the middle."""
    return UNet2DConditionModel(**_UNET, cross_attention_dim=WIDTH)


def sdxl_unet() -> UNet2DConditionModel:
    """The denoiser of tiny-sdxl: that of tiny-sd15 with the text of two towers and SDXL's added embedding."""
    return UNet2DConditionModel(
        **_UNET,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH + 6 * 16,
    )


def transformer() -> SD3Transformer2DModel:
    """The denoiser of tiny-sd3: one token per latent position."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        caption_projection_dim=128,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """SD3's schedule."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def scheduler() -> DDIMScheduler:
    """SD1.5's schedule, sampled with leading spacing."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )
