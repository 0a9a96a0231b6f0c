"""VQAScore: the probability that a vision-language model answers "Yes" when asked whether the picture shows
the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from align_cli.errors import UserError
from align_cli.pictures import to_uint8
from align_cli.rewards.base import Request, Reward, choose_preprocessing, rgb
from align_cli.rewards.pretrained import pretrained
from align_cli.rewards.twin import TensorTwin

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
ANSWER = "Yes"
"""Source: linzhiqiu/t2v_metrics."""


class VQAScore(Reward):
    """P("Yes") as the first word of the answer to `QUESTION`, in [0, 1], over the whole vocabulary.

    The model and its own processor do the work, one picture at a time; in an encoder-decoder the first word
    is the decoder's. Gradients exist where the processor does no more than resize, crop and normalise: then
    the values are the processor's, the gradients those of `TensorTwin`. `differentiable` says so; it is found
    out by comparing both on one picture.
    Source: linzhiqiu/t2v_metrics (2024). Deviations: whichever model the user names, at temperature 1.
    """

    def __init__(self, model: Any, processor: Any, request: Request) -> None:
        super().__init__(
            name=request.name,
            version=type(model).__name__,
            source=request.source,
            preprocessing=f"official: the model's own ({type(processor.image_processor).__name__})",
            scale='probability of "Yes"',
            device=request.device,
            dtype=request.dtype,
        )
        self.model, self.processor = model, processor
        ids = processor.tokenizer.encode(ANSWER, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == processor.tokenizer.unk_token_id:
            raise UserError(
                f"{self.name}: {ANSWER!r} is not one token of {self.source}'s tokenizer; name another model"
            )
        self.answer, self.start = ids[0], _decoder_start(model.config.get_text_config())
        self.twin = TensorTwin.of(processor.image_processor)
        self.differentiable = self.twin is not None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`. A picture with a NaN scores NaN.

        Raises:
            UserError: gradients are wanted of a model that gives none.
        """
        images = rgb(images, prompts)
        wanted = torch.is_grad_enabled() and images.requires_grad
        if wanted and self.twin is None:
            raise UserError(
                f"{self.name}: {self.source} gives no gradients to train with, because its processor does "
                "more than resize, crop and normalise a picture; name another model or another reward"
            )
        scores = [self._one(image, prompt, wanted) for image, prompt in zip(images, prompts, strict=True)]
        return torch.stack(scores).masked_fill(images.isnan().flatten(1).any(1).to(self.device), float("nan"))

    def _one(self, image: Tensor, prompt: str, wanted: bool) -> Tensor:
        picture = Image.fromarray(to_uint8(image[None].nan_to_num())[0])
        inputs = self.processor(images=picture, text=self.question(prompt), return_tensors="pt").to(
            self.device
        )
        pixels = inputs["pixel_values"].float()
        if wanted and self.twin is not None:
            soft = self.twin(image.to(self.device).float()).reshape(pixels.shape)
            pixels = pixels + (soft - soft.detach())
        inputs["pixel_values"] = pixels.to(self.dtype)
        if self.start is not None:
            inputs["decoder_input_ids"] = torch.tensor([[self.start]], device=self.device)
        return self.model(**inputs).logits[0, -1].float().softmax(-1)[self.answer]

    def question(self, prompt: str) -> str:
        """The question about one picture, in the words that the model was trained with."""
        text = QUESTION.format(prompt=prompt)
        if getattr(self.processor, "chat_template", None):
            said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            return self.processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        return text


def _decoder_start(config: Any) -> int | None:
    """Token that an encoder-decoder's answer begins after (T5's is its padding); None for other models."""
    if not config.is_encoder_decoder:
        return None
    start = getattr(config, "decoder_start_token_id", None)
    return config.pad_token_id if start is None else start


def build_vqascore(request: Request) -> VQAScore:
    """The model that `request.source` names, a hub id or a folder of transformers.

    Raises:
        UserError: no model named; not there; not of the image-text-to-text kind; its processor needs a
        package that is not installed.
    """
    choose_preprocessing(request, {"official": None})
    if not request.source:
        raise UserError(
            f"{request.name} needs a vision-language model of transformers: name it with "
            f"--weights {request.name}=ID, for example --weights {request.name}=llava-hf/llava-1.5-7b-hf"
        )
    model, processor = pretrained(
        request, request.source, AutoModelForImageTextToText, "a vision-language model of transformers"
    )
    return VQAScore(model, processor, request)
