"""How likely the prompt is as a vision-language model's description of the picture.

Letters: B pictures, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from align_cli.errors import UserError
from align_cli.rewards.base import Request, choose_preprocessing, rgb
from align_cli.rewards.captioning import UNSCORED, Captioner, scored, smoothed_losses
from align_cli.rewards.pretrained import pretrained
from align_cli.rewards.twin import TensorTwin, twin_of

HUB = "llava-hf/llava-1.5-7b-hf"
REQUEST = "Describe the image."
QUESTION = f"USER: <image>\n{REQUEST} ASSISTANT:"
"""For models without a chat template of their own; LLaVA-1.5's makes the same of `REQUEST`."""


class VLMCaption(Captioner):
    """Minus the mean cross-entropy, in nats per token, of the prompt and its end as the answer of a
    vision-language model that is asked to describe the picture.

    CoMat compares BLIP, GIT and LLaVA and publishes code for BLIP alone, so that its question to LLaVA is not
    known; `REQUEST` is ours, and nothing is smoothed. The models are those of transformers that read picture
    and text as one sequence, and whose processor only resizes, crops and normalises: only then there are
    gradients. Prompts are not cut.
    """

    def __init__(self, model: Any, processor: Any, twin: TensorTwin, request: Request) -> None:
        super().__init__(
            name=request.name,
            version=type(model).__name__,
            source=request.source or HUB,
            preprocessing=f"official: the model's own ({type(processor.image_processor).__name__})",
            scale="mean log-likelihood per token (nats)",
            device=request.device,
            dtype=request.dtype,
        )
        self.model, self.processor, self.twin = model, processor, twin
        self.question = QUESTION
        if getattr(processor, "chat_template", None):
            said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": REQUEST}]}]
            self.question = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)

    def token_losses(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `Captioner.token_losses`."""
        pixels = self.twin(rgb(images, prompts).to(self.device).float(), clamp=False).to(self.dtype)
        blank = Image.new("RGB", (images.shape[-1], images.shape[-2]))  # what tokens stand for a picture
        inputs = self.processor(
            images=[blank] * len(prompts),
            text=[self.answered(prompt) for prompt in prompts],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        ).to(self.device)
        inputs["pixel_values"] = pixels.view(inputs["pixel_values"].shape)
        counts = self.token_counts(prompts)
        after_BL = inputs["attention_mask"].flip(1).cumsum(1).flip(1)  # tokens from here to the end
        asked = (inputs["attention_mask"] == 1) & (after_BL <= counts[:, None])
        labels_BL = inputs["input_ids"].masked_fill(~asked, UNSCORED)
        logits_BLV = self.model(**inputs, use_cache=False).logits
        return smoothed_losses(logits_BLV, labels_BL, 0.0), scored(labels_BL)

    def token_counts(self, prompts: Sequence[str]) -> Tensor:
        """See `Captioner.token_counts`."""
        read = self.processor.tokenizer
        before = read(self.question)["input_ids"]
        counts = []
        for prompt in prompts:
            ids = read(self.answered(prompt))["input_ids"]
            same = takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False))
            counts.append(len(ids) - len(list(same)))
        return torch.tensor(counts, dtype=torch.float32, device=self.device)

    def answered(self, prompt: str) -> str:
        """Question and answer. UserError if the prompt has the words that stand for a picture."""
        picture = self.processor.image_token
        if picture in prompt:
            raise UserError(
                f"{self.name}: the prompt {prompt!r} has {picture!r} in it, which stands for a picture in "
                f"{self.source}; take it out"
            )
        blank = "" if self.question[-1:].isspace() else " "
        return f"{self.question}{blank}{prompt}{self.processor.tokenizer.eos_token or ''}"


def build_vlm_caption(request: Request) -> VLMCaption:
    """A vision-language model from a hub id or a folder of transformers.

    Raises:
        UserError: another preprocessing than "official"; not there; of another kind; an encoder-decoder; a
        processor that does more than resize, crop and normalise.
    """
    choose_preprocessing(request, {"official": None})
    source = request.source or HUB
    model, processor = pretrained(
        request, source, AutoModelForImageTextToText, "a vision-language model of transformers"
    )
    if model.config.get_text_config().is_encoder_decoder or not hasattr(processor, "image_token"):
        raise UserError(
            f"{request.name}: {source} ({type(model).__name__}) does not read picture and answer as one "
            f"text; name another with --weights {request.name}=ID, for example {HUB}"
        )
    return VLMCaption(model, processor, twin_of(processor.image_processor, request), request)
