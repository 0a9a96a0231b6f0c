"""Masks of nouns by GroundingDINO, which finds their boxes, and SAM, which fills them.

Letters: B pictures, N nouns of a picture, S boxes of a picture, P counted boxes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BertTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    SamModel,
    SamProcessor,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from align_cli.errors import UserError, first_line
from align_cli.grounding.masks import MaskRequest, counted, masks_of_nouns, sent_to_detector
from align_cli.models.encoders import find_weights
from align_cli.models.loading import LOAD_ERRORS, load_weights, quiet
from align_cli.models.sources import Source, with_tokenizer
from align_cli.pictures import to_uint8

DETECTOR, SEGMENTER = "IDEA-Research/grounding-dino-tiny", "facebook/sam-vit-base"
"""The detector holds the weights of CoMat's (SwinT OGC)."""
PROCESSOR_FILE = "preprocessor_config.json"


class GroundedSam:
    """A `grounding.masks.Masker`: the union of SAM's masks of all boxes whose phrase is the noun.

    Source: CoMat gsam_interface.py. Deviations: SAM's mask of a box, rounded to pixels, takes the place of
    FastSAM's segment of the largest overlap with it, so that there is one for every box and only a picture
    that is not finite is left out.
    """

    def __init__(
        self,
        detector: GroundingDinoForObjectDetection,
        detector_processor: GroundingDinoProcessor,
        segmenter: SamModel,
        segmenter_processor: SamProcessor,
        *,
        box_threshold: float = 0.3,
        text_threshold: float = 0.25,
    ) -> None:
        self.detector, self.detector_processor = detector, detector_processor
        self.segmenter, self.segmenter_processor = segmenter, segmenter_processor
        self.box_threshold, self.text_threshold = box_threshold, text_threshold

    @torch.no_grad()
    def masks(self, images: Tensor, nouns: Sequence[Sequence[str]]) -> list[Tensor | None]:
        """See `grounding.masks.Masker.masks`."""
        if len(nouns) != len(images):
            raise ValueError(f"{len(images)} pictures, but nouns of {len(nouns)}")
        whole = images.isfinite().flatten(1).all(1).tolist()
        asked = [i for i, names in enumerate(nouns) if names and whole[i]]
        pictures = dict(zip(asked, to_uint8(images[asked]), strict=True)) if asked else {}
        found = dict(zip(asked, self._detect([*pictures.values()], [nouns[i] for i in asked]), strict=True))
        size = tuple(images.shape[-2:])
        out: list[Tensor | None] = []
        for i, names in enumerate(nouns):
            boxes, phrases = found.get(i, (torch.zeros(0, 4), []))
            pairs = counted(names, phrases)
            if not whole[i]:
                out.append(None)
            elif not pairs:
                out.append(torch.zeros(len(names), *size, dtype=torch.bool, device=images.device))
            else:
                segments = self._segment(pictures[i], boxes[[box for box, _ in pairs]])
                out.append(masks_of_nouns(len(names), pairs, segments).to(images.device))
        return out

    def _detect(
        self, pictures: list[np.ndarray], nouns: list[Sequence[str]]
    ) -> list[tuple[Tensor, list[str]]]:
        """Of each picture: corners (S, 4) float32 in whole pixels within it, and the phrases of these boxes.

        Pictures: (H, W, 3) uint8.
        """
        if not pictures:
            return []
        inputs = self.detector_processor(
            images=[Image.fromarray(picture) for picture in pictures],
            text=[sent_to_detector(names) for names in nouns],
            padding=True,
            truncation=True,
            max_length=self.detector.config.max_text_len,
            return_tensors="pt",
        ).to(self.detector.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.detector.dtype)
        outputs = self.detector(**inputs)
        results = self.detector_processor.post_process_grounded_object_detection(
            outputs,
            inputs["input_ids"],
            threshold=self.box_threshold,
            text_threshold=self.text_threshold,
            target_sizes=[picture.shape[:2] for picture in pictures],
        )
        found = []
        for picture, result in zip(pictures, results, strict=True):
            height, width = picture.shape[:2]
            limit = torch.tensor([width, height, width, height], dtype=torch.float32)
            boxes = result["boxes"].float().cpu().round()
            found.append((torch.minimum(boxes.clamp(min=0), limit), result["text_labels"]))
        return found

    def _segment(self, picture: np.ndarray, boxes: Tensor) -> Tensor:
        """(P, H, W) bool: what SAM sees in each of the boxes (P, 4) of one picture."""
        device, dtype = self.segmenter.device, self.segmenter.dtype
        inputs = self.segmenter_processor(
            images=Image.fromarray(picture), input_boxes=[boxes.tolist()], return_tensors="pt"
        )
        outputs = self.segmenter(
            pixel_values=inputs["pixel_values"].to(device, dtype),
            input_boxes=inputs["input_boxes"].to(device, dtype),
            multimask_output=False,
        )
        (segments,) = self.segmenter_processor.post_process_masks(
            outputs.pred_masks.float(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        return segments[:, 0]


def build_grounded_sam(request: MaskRequest) -> GroundedSam:
    """See `load_grounded_sam`."""
    return load_grounded_sam(
        request.detector or DETECTOR,
        request.segmenter or SEGMENTER,
        device=request.device,
        dtype=request.dtype,
        box_threshold=request.box_threshold,
        text_threshold=request.text_threshold,
    )


def load_grounded_sam(
    detector: str = DETECTOR,
    segmenter: str = SEGMENTER,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    box_threshold: float = 0.3,
    text_threshold: float = 0.25,
) -> GroundedSam:
    """Both networks, frozen. detector, segmenter: hub ids or folders of transformers.

    Raises:
        UserError: one is not there, damaged, or of another kind; says how to get it, and which setting.
    """
    how = _how("GroundingDINO", DETECTOR, "detector")
    with quiet():
        found, network = _load(
            "GroundingDINO", "grounding-dino", GroundingDinoForObjectDetection, detector, dtype, how
        )
        found = with_tokenizer(found, "")
        words = _part(BertTokenizer, found, "tokenizer (tokenizer.json)", how)
        pictures = _part(GroundingDinoImageProcessorPil, found, PROCESSOR_FILE, how)
        how = _how("SAM", SEGMENTER, "segmenter")
        held, painter = _load("SAM", "sam", SamModel, segmenter, dtype, how)
        boxes = _part(SamImageProcessorPil, held, PROCESSOR_FILE, how)
    return GroundedSam(
        network.to(device),
        GroundingDinoProcessor(pictures, words),
        painter.to(device),
        SamProcessor(boxes),
        box_threshold=box_threshold,
        text_threshold=text_threshold,
    )


def _how(what: str, repo: str, setting: str) -> str:
    return (
        f"get it with 'hf download {repo}' where there is a network, or name a {what} with "
        f"--set comat.{setting}=PLACE (hub id or folder of transformers)"
    )


def _load(what: str, kind: str, cls: Any, source: str, dtype: torch.dtype, how: str) -> tuple[Source, Any]:
    """The source, with the configuration of the pictures' processor, and the frozen network."""
    found, prefix, weight = find_weights(what, kind, "text_encoder", source, dtype=dtype, how=how)
    network = load_weights(cls, found.folder / prefix, weight, dtype, f"{what} {source}")
    if found.fetch is not None:
        found.fetch(PROCESSOR_FILE)
    return found, network.eval().requires_grad_(False)


def _part(cls: Any, source: Source, what: str, how: str) -> Any:
    """A tokenizer or processor that lies beside the weights."""
    try:
        return cls.from_pretrained(source.folder, local_files_only=True)
    except LOAD_ERRORS as error:
        raise UserError(f"no {what} in {source.folder}: {first_line(error)}; {how}") from error
