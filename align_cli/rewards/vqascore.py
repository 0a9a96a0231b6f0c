"""VQAScore: the probability that a vision-language model answers "Yes" when asked whether the picture shows
the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from align_cli.errors import UserError, first_line
from align_cli.hub import reachable
from align_cli.pictures import to_uint8
from align_cli.rewards.base import Request, Reward, choose_preprocessing, rgb
from align_cli.rewards.places import option

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
ANSWER = "Yes"
"""Source: linzhiqiu/t2v_metrics."""

LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError)
"""What transformers raises for absent, damaged or unsupported models, and for missing packages."""

TWIN_TOLERANCE = 0.05
"""Largest difference, in units of normalised pixels, between what the processor makes of a picture and what
`TensorTwin` makes of it: a few levels of 255, since processors round to 8 bit.
"""
MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of filters -> interpolate's names."""


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


class TensorTwin:
    """What an image processor does, with gradients: resize, crop the centre, normalise."""

    def __init__(self, processor: Any) -> None:
        self.size = dict(processor.size) if processor.do_resize else {}
        self.mode = MODES[int(processor.resample)]
        self.crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else {}
        self.mean, self.std = processor.image_mean, processor.image_std
        if not processor.do_normalize:
            self.mean, self.std = [0.0] * 3, [1.0] * 3

    @classmethod
    def of(cls, processor: Any) -> TensorTwin | None:
        """The twin of a processor; None if it makes something else of a picture."""
        ramp = torch.linspace(0, 1, 96).expand(80, 96)
        image = torch.stack([ramp, ramp.flip(1) * 0.5, ramp * ramp])
        picture = Image.fromarray(to_uint8(image[None])[0])
        try:
            twin = cls(processor)
            wanted = processor(images=[picture], return_tensors="pt")["pixel_values"].float()
            got = twin(torch.from_numpy(to_uint8(image[None])[0]).permute(2, 0, 1) / 255)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            return None
        if wanted.numel() != got.numel() or wanted.shape[-2:] != got.shape[-2:]:
            return None
        return twin if float((wanted.reshape(got.shape) - got).abs().max()) <= TWIN_TOLERANCE else None

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) in [0, 1] -> (3, h, w), normalised."""
        height, width = image.shape[-2:]
        new = self._resized(height, width)
        if new != (height, width):
            antialias = self.mode != "nearest"
            options: dict[str, Any] = {"antialias": True, "align_corners": False} if antialias else {}
            image = F.interpolate(image[None], new, mode=self.mode, **options)[0].clamp(0, 1)
        if self.crop:
            high, wide = self.crop["height"], self.crop["width"]
            top, left = (new[0] - high) // 2, (new[1] - wide) // 2
            image = image[:, top : top + high, left : left + wide]
        mean, std = (image.new_tensor(x).view(3, 1, 1) for x in (self.mean, self.std))
        return (image - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if "shortest_edge" in self.size:
            scale = self.size["shortest_edge"] / min(height, width)
            return int(height * scale), int(width * scale)
        return (self.size["height"], self.size["width"]) if self.size else (height, width)


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
    folder = Path(request.source).expanduser()
    source = str(folder) if folder.is_dir() else request.source
    options = {"local_files_only": folder.is_dir() or not reachable()}
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=request.dtype, **options)
    except LOAD_ERRORS as error:
        raise UserError(
            f"{request.name}: {request.source} cannot be loaded as a vision-language model of transformers: "
            f"{first_line(error)}; name a hub id or a local folder with {option(request.name)}"
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UserError(f"{request.name}: {request.source} has no processor of pictures and text")
    return VQAScore(model.to(request.device).eval().requires_grad_(False), processor, request)
