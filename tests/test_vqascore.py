"""VQAScore with tiny random vision-language models of transformers, saved as ordinary folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlm_files import WORDS, save_llava, word_tokenizer

from align_cli.errors import UserError
from align_cli.pictures import to_uint8
from align_cli.rewards.loading import load_reward
from align_cli.rewards.vqascore import QUESTION

PROMPTS = ["a red dog", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def reward(folder):
    return load_reward("vqascore", source=str(folder))


def test_probability_of_yes(folder, reward):
    """The same as transformers' own classes give it, asked by hand."""
    images = torch.rand(2, 3, 30, 40, generator=torch.Generator().manual_seed(0))
    got = reward.score(images, PROMPTS)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    for i, prompt in enumerate(PROMPTS):
        text = "USER <image> " + QUESTION.format(prompt=prompt)
        picture = Image.fromarray(to_uint8(images[i : i + 1])[0])
        logits = model(**processor(images=picture, text=text, return_tensors="pt")).logits[0, -1]
        assert float(got[i]) == pytest.approx(
            float(logits.softmax(-1)[WORDS.index("Yes")].detach()), rel=1e-5
        )
    assert len(set(got.tolist())) == 2 and bool(((got > 0) & (got < 1)).all())
    images[1, 0, 3, 4] = float("nan")
    assert reward.score(images, PROMPTS).isnan().tolist() == [False, True]
    assert "CLIPImageProcessor" in reward.facts()["preprocessing"]


def test_encoder_decoder(tmp_path):
    """BLIP-2 with T5: the first word that the decoder says after its start token, the padding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=sizes | {"image_size": 24, "patch_size": 8},
            qformer_config=sizes | {"encoder_hidden_size": 16},
            text_config={"model_type": "t5", "vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 16,
                         "num_layers": 1, "num_heads": 2, "pad_token_id": 0, "decoder_start_token_id": 0},
            num_query_tokens=4,
            image_token_index=2,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    size = {"height": 24, "width": 24}
    processor = Blip2Processor(BlipImageProcessorPil(size=size), word_tokenizer(WORDS), num_query_tokens=4)
    processor.save_pretrained(tmp_path)
    reward = load_reward("vqascore", source=str(tmp_path))
    image = (torch.rand(1, 3, 24, 24) * 255).round().div(255).requires_grad_()
    got = reward.score(image, PROMPTS[:1])
    got.sum().backward()
    picture = Image.fromarray(to_uint8(image.detach())[0])
    inputs = processor(images=picture, text=QUESTION.format(prompt=PROMPTS[0]), return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs, decoder_input_ids=torch.tensor([[0]])).logits
    assert logits.shape[1] == 1 and image.grad.abs().max() > 0
    assert float(got.detach()) == pytest.approx(float(logits[0, 0].softmax(-1)[WORDS.index("Yes")]), rel=1e-5)


def test_gradient(reward):
    """Pictures of the model's own size and of whole levels: processor and twin agree, the slope is exact."""
    assert reward.differentiable
    image = (torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 255).round().div(255)
    image.requires_grad_()
    score = reward.score(image, PROMPTS[:1])
    with torch.no_grad():
        torch.testing.assert_close(score, reward.score(image, PROMPTS[:1]))
    score.sum().backward()
    step = torch.where(image.grad.abs() > image.grad.abs().quantile(0.9), image.grad.sign(), 0.0) / 255
    step = torch.where((image + step > 1) | (image + step < 0), 0.0, step).detach()
    rise = float(reward.score(image.detach() + step, PROMPTS[:1]) - score.detach())
    assert rise == pytest.approx(float((image.grad * step).sum()), rel=0.1) and rise > 0


def test_processor_that_does_more(tmp_path, monkeypatch):
    """Pictures upside down: the twin does not do that, so there are scores but no gradients."""
    folder = save_llava(tmp_path)
    plain = CLIPImageProcessorPil.__call__

    def flipped(self, images, **options):
        out = plain(self, images, **options)
        out["pixel_values"] = out["pixel_values"].flip(-1)
        return out

    monkeypatch.setattr(CLIPImageProcessorPil, "__call__", flipped)
    reward = load_reward("vqascore", source=str(folder))
    image = torch.rand(1, 3, 24, 24)
    assert not reward.differentiable and reward.score(image, PROMPTS[:1]).shape == (1,)
    with pytest.raises(UserError, match="gives no gradients"):
        reward.score(image.requires_grad_(), PROMPTS[:1])


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--weights vqascore=ID"):
        load_reward("vqascore")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"cannot be loaded as a vision-language model.*--weights vqascore=PATH"
    ):
        load_reward("vqascore", source=str(tmp_path / "empty"))
    split = [w for w in WORDS if w != "Yes"]
    raw = save_llava(tmp_path / "split", words=split)
    with pytest.raises(UserError, match="'Yes'"):
        load_reward("vqascore", source=str(raw))
