"""Captioners beside BLIP: GIT and a vision-language model, tiny random ones of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_helpers import pictures
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPConfig,
    CLIPModel,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlm_files import WORDS, save_llava, word_tokenizer

from align_cli.errors import UserError
from align_cli.pictures import to_uint8
from align_cli.rewards.captioning import Captioner
from align_cli.rewards.loading import load_reward

PROMPTS = ["a red dog", "a dog", ""]
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog"]
SIZE = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
CHAT_WORDS = ["<pad>", "<unk>", "<image>", "</s>", "USER", "Describe", "the", "image", ".", "a", "red", "dog"]


def save_git(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GitConfig(
        **sizes, vocab_size=len(BERT_WORDS), max_position_embeddings=12,
        vision_config=sizes | {"image_size": 24, "patch_size": 8},
    )  # fmt: skip
    model = GitForCausalLM(config)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    words = BertTokenizer(vocab={w: i for i, w in enumerate(BERT_WORDS)}, do_lower_case=True)
    GitProcessor(CLIPImageProcessorPil(**SIZE), words).save_pretrained(folder)
    return folder


def save_chat(folder: Path, **options: object) -> Path:
    """A LLaVA whose tokenizer has an end token."""
    save_llava(folder, words=CHAT_WORDS, **options)
    processor = LlavaProcessor.from_pretrained(folder)
    processor.tokenizer.add_special_tokens({"eos_token": "</s>"})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {
        "git-caption": save_git(tmp_path_factory.mktemp("git")),
        "vlm-caption": save_chat(tmp_path_factory.mktemp("llava")),
    }


@pytest.fixture(params=["git-caption", "vlm-caption"])
def reward(request, folders) -> Captioner:
    return load_reward(request.param, source=str(folders[request.param]))


def test_git_as_transformers_gives_it(folders):
    """The loss that the model was trained with, on a prompt alone."""
    reward = load_reward("git-caption", source=str(folders["git-caption"]))
    model = GitForCausalLM.from_pretrained(folders["git-caption"]).eval()
    processor = GitProcessor.from_pretrained(folders["git-caption"])
    images = pictures(2, (24, 24))
    got, counts = reward.token_losses(images, ["A red dog", "a dog"])
    for i, prompt in enumerate(["a red dog", "a dog"]):
        picture = Image.fromarray(to_uint8(images)[i])
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        assert float(counts[i]) == inputs["input_ids"].shape[1] - 1  # all words and [SEP]
        assert float(got[i] / counts[i]) == pytest.approx(float(loss.detach()), rel=1e-4)
    (cut,) = reward.audit(["dog " * 10 + "red"])
    assert (cut.limit, cut.tokens, cut.lost) == (12, 13, "red")
    assert reward.token_counts(["dog " * 99]).tolist() == [11]


def test_vlm_by_hand(folders):
    """The words of the prompt and the end, after the question and the picture."""
    reward = load_reward("vlm-caption", source=str(folders["vlm-caption"]))
    model = LlavaForConditionalGeneration.from_pretrained(folders["vlm-caption"]).eval()
    processor = LlavaProcessor.from_pretrained(folders["vlm-caption"])
    image = pictures(1, (24, 24))
    got, counts = reward.token_losses(image, ["a red dog"])
    picture = Image.fromarray(to_uint8(image)[0])
    text = "USER <image> Describe the image. a red dog</s>"
    inputs = processor(images=picture, text=text, return_tensors="pt")
    logits = model(**inputs).logits[0, -5:-1].detach()
    wanted = F.cross_entropy(logits, torch.tensor([9, 10, 11, 3]), reduction="sum")
    assert counts.tolist() == [4.0]
    torch.testing.assert_close(got, wanted[None], rtol=1e-4, atol=1e-5)


def test_no_chat_template(folders, tmp_path):
    """LLaVA-1.5's words take its place."""
    folder = save_chat(tmp_path)
    (folder / "chat_template.jinja").unlink()
    reward = load_reward("vlm-caption", source=str(folder))
    assert reward.answered("a dog") == "USER: <image>\nDescribe the image. ASSISTANT: a dog</s>"
    assert reward.score(pictures(1), ["a dog"]).isfinite().all()


def test_scores(reward):
    """A picture's score does not depend on its neighbours; counts need no pictures; gradients stay apart."""
    images = pictures(3, (30, 40)).requires_grad_()
    score = reward.score(images, PROMPTS)
    alone = torch.cat([reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(score, alone, rtol=1e-4, atol=1e-5)
    sums, counts = reward.token_losses(images, PROMPTS)
    assert counts.tolist() == reward.token_counts(PROMPTS).tolist() == [4, 3, 1]
    torch.testing.assert_close(reward.batch_score(images, PROMPTS), -sums.sum() / counts.sum())
    score[1].backward()
    assert images.grad[1].abs().max() > 0 and not images.grad[[0, 2]].any()


def test_gradient(reward):
    """Against finite differences, also beyond [0, 1], where drawn pictures may be."""
    image = pictures(1, (30, 40)) * 1.4 - 0.2
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(5))
    moved = [reward.score(image + s * direction, PROMPTS[:1]) for s in (2e-3, -2e-3)]
    image.requires_grad_()
    reward.score(image, PROMPTS[:1]).sum().backward()
    slope = float((moved[0] - moved[1]) / 4e-3)
    assert slope == pytest.approx(float((image.grad * direction).sum()), rel=0.02, abs=2e-3)
    assert image.grad[(image > 1) | (image < 0)].abs().max() > 0


def test_mistakes(folders, tmp_path):
    image = pictures(1)
    chat = load_reward("vlm-caption", source=str(folders["vlm-caption"]))
    with pytest.raises(UserError, match="'<image>' in it"):
        chat.score(image, ["a <image> dog"])
    with pytest.raises(ValueError, match="1 pictures but 2 prompts"):
        chat.score(image, ["a", "b"])
    CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
            vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        )
    ).save_pretrained(tmp_path / "clip")
    for name, words in (("git-caption", "a GIT model"), ("vlm-caption", "a vision-language model")):
        with pytest.raises(UserError, match=f"cannot be loaded as {words}.*--weights {name}=PATH"):
            load_reward(name, source=str(tmp_path / "clip"))
        with pytest.raises(UserError, match="preprocessing 'textcraftor'"):
            load_reward(name, source=str(folders[name]), preprocessing="textcraftor")


def test_encoder_decoder(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "t5", "vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 16}
    Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=sizes | {"image_size": 24, "patch_size": 8},
            qformer_config=sizes | {"encoder_hidden_size": 16},
            text_config=text | {"num_layers": 1, "num_heads": 2},
        )
    ).save_pretrained(tmp_path)
    size = {"height": 24, "width": 24}
    Blip2Processor(BlipImageProcessorPil(size=size), word_tokenizer(WORDS)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not read picture and answer as one text"):
        load_reward("vlm-caption", source=str(tmp_path))
