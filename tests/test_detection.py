"""GroundingDINO and SAM: tiny random networks of transformers, saved as ordinary folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from reward_helpers import pictures
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    SamConfig,
    SamModel,
    SamProcessor,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from align_cli import registry
from align_cli.errors import UserError
from align_cli.grounding.detection import load_grounded_sam
from align_cli.grounding.masks import MaskRequest, clean_phrase, counted, masks_of_nouns, sent_to_detector
from align_cli.pictures import to_uint8

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "dog", "cat", "t", "-", "shirt", "red"]


def save_detector(folder: Path) -> Path:
    torch.manual_seed(0)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=SwinConfig(
                image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
                window_size=2, out_indices=[2, 3, 4],
            ),
            text_config=BertConfig(**text, vocab_size=len(WORDS), max_position_embeddings=32),
            d_model=32, num_queries=12, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_text_len=16,
        )
    )  # fmt: skip
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    words = BertTokenizer(vocab={w: i for i, w in enumerate(WORDS)}, do_lower_case=True)
    size = {"shortest_edge": 96, "longest_edge": 160}
    GroundingDinoProcessor(GroundingDinoImageProcessorPil(size=size), words).save_pretrained(folder)
    GroundingDinoImageProcessorPil(size=size).save_pretrained(folder)
    return folder


def save_segmenter(folder: Path) -> Path:
    torch.manual_seed(1)
    size = {"image_size": 64, "patch_size": 16}
    model = SamModel(
        SamConfig(
            vision_config=size
            | {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_channels": 16,
               "num_pos_feats": 8, "window_size": 2, "global_attn_indexes": [0], "mlp_dim": 16},
            prompt_encoder_config=size | {"hidden_size": 16, "mask_input_channels": 4},
            mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2,
                                 "iou_head_hidden_dim": 16},
        )
    )  # fmt: skip
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    whole = {"height": 64, "width": 64}
    SamImageProcessorPil(size={"longest_edge": 64}, pad_size=whole).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    return save_detector(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Path:
    return save_segmenter(tmp_path_factory.mktemp("sam"))


def load(detector: Path, segmenter: Path, dtype: torch.dtype = torch.float32, **thresholds: float):
    return load_grounded_sam(str(detector), str(segmenter), device="cpu", dtype=dtype, **thresholds)


def by_hand(detector: Path, segmenter: Path, picture, text: str, threshold: float) -> torch.Tensor:
    """The union of SAM's masks of all boxes, with transformers' own classes."""
    image = Image.fromarray(picture)
    processor = GroundingDinoProcessor.from_pretrained(detector)
    network = GroundingDinoForObjectDetection.from_pretrained(detector).eval()
    inputs = processor(images=image, text=text, return_tensors="pt")
    outputs = network(**inputs)
    (found,) = processor.post_process_grounded_object_detection(
        outputs, inputs["input_ids"], threshold=threshold, text_threshold=0.0, target_sizes=[image.size[::-1]]
    )
    width, height = image.size
    edge = torch.tensor([width, height, width, height])
    boxes = found["boxes"].round().clamp(min=0).minimum(edge).tolist()
    assert 2 <= len(boxes) < 12 and {clean_phrase(p) for p in found["text_labels"]} == {"dog"}
    sam, sizes = SamModel.from_pretrained(segmenter).eval(), SamProcessor.from_pretrained(segmenter)
    seen = sizes(images=image, input_boxes=[boxes], return_tensors="pt")
    drawn = sam(seen["pixel_values"], input_boxes=seen["input_boxes"].float(), multimask_output=False)
    (masks,) = sizes.post_process_masks(
        drawn.pred_masks.detach(), seen["original_sizes"], seen["reshaped_input_sizes"]
    )
    return masks[:, 0].any(0)


@torch.no_grad()
def test_masks_as_transformers_gives_them(detector, segmenter):
    """Of a single noun, at text threshold 0, every box's phrase is the noun."""
    images = pictures(2, (48, 64))
    network = GroundingDinoForObjectDetection.from_pretrained(detector).eval()
    processor = GroundingDinoProcessor.from_pretrained(detector)
    inputs = processor(images=Image.fromarray(to_uint8(images)[0]), text="dog.", return_tensors="pt")
    scores = network(**inputs).logits.sigmoid().amax(-1)[0].sort().values
    threshold = float(scores[6:8].mean())
    masker = load(detector, segmenter, box_threshold=threshold, text_threshold=0.0)
    first, none, second = masker.masks(images[[0, 1, 0]], [["Dog"], [], ["dog"]])
    wanted = by_hand(detector, segmenter, to_uint8(images)[0], "dog.", threshold)
    assert first.shape == (1, 48, 64) and first.dtype == torch.bool and none.shape == (0, 48, 64)
    assert torch.equal(first[0], wanted) and torch.equal(second[0], wanted) and wanted.sum() > 0


def test_which_boxes_count(detector, segmenter, monkeypatch):
    """The networks' outputs given: a box of one noun, one of two nouns, one of none; another size of picture,
    values beyond [0, 1], and a picture that is not finite.
    """
    masker = load(detector, segmenter)
    asked = []

    def detections(pictures, nouns):
        asked.append([list(names) for names in nouns])
        boxes = torch.tensor([[0.0, 0, 8, 8], [8, 8, 20, 24], [2, 2, 30, 30]])
        return [(boxes, ["t - shirt", "dog cat", "red [SEP]"])] * len(pictures)

    def filled(picture, boxes):
        out = torch.zeros(len(boxes), *picture.shape[:2], dtype=torch.bool)
        for i, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
            out[i, y0:y1, x0:x1] = True
        return out

    monkeypatch.setattr(masker, "_detect", detections)
    monkeypatch.setattr(masker, "_segment", filled)
    images = pictures(3, (24, 40)) * 3 - 1
    images[1, 0, 0, 0] = float("nan")
    first, broken, other = masker.masks(images, [["T-shirt", "cat", "dog"], ["dog"], ["Red"]])
    assert asked == [[["T-shirt", "cat", "dog"], ["Red"]]] and broken is None
    assert first.flatten(1).sum(1).tolist() == [64, 0, 0] and first[0, :8, :8].all()
    assert other.flatten(1).sum(1).tolist() == [22 * 28]
    with pytest.raises(ValueError, match="3 pictures, but nouns of 1"):
        masker.masks(images, [["dog"]])


def test_nothing_is_found_and_nothing_asked(detector, segmenter):
    masker = load(detector, segmenter, box_threshold=1.0)
    images = pictures(2, (40, 40))
    found, empty = masker.masks(images, [["dog", "cat"], []])
    assert found.shape == (2, 40, 40) and not found.any() and empty.shape == (0, 40, 40)
    assert [len(m) for m in masker.masks(images, [[], []])] == [0, 0]
    assert not masker.masks(images[:1], [["dog"] * 40])[0].any()  # more nouns than the detector reads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(detector, segmenter, dtype):
    masker = load(detector, segmenter, dtype, box_threshold=0.0, text_threshold=0.0)
    (mask,) = masker.masks(pictures(1, (40, 40)).to(dtype), [["dog"]])
    assert mask.shape == (1, 40, 40)


def test_words():
    assert sent_to_detector(["Dog", "cat"]) == "dog . cat." and clean_phrase(" dog . [SEP]") == "dog"
    assert counted(["dog", "caf\u00e9"], ["cafe", "dog", "dog dog", "", "dog."]) == [(0, 1), (1, 0), (4, 0)]
    assert counted(["."], ["", "."]) == []
    segments = torch.eye(3, dtype=torch.bool)[:, None]
    union = masks_of_nouns(2, [(0, 1), (4, 1)], segments[:2])
    assert union.tolist() == [[[False, False, False]], [[True, True, False]]]
    with pytest.raises(ValueError, match="1 pairs"):
        masks_of_nouns(2, [(0, 0)], segments)


def test_mistakes(detector, segmenter, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no GroundingDINO.*hf download.*--set comat\.detector=PLACE"):
        load(empty, segmenter)
    with pytest.raises(UserError, match=r"is no SAM: its model_type is 'grounding-dino'.*comat\.segmenter"):
        load(detector, detector)
    lacking = tmp_path / "lacking"
    shutil.copytree(detector, lacking)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (lacking / name).unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json.*comat\.detector"):
        load(lacking, segmenter)
    with pytest.raises(UserError, match=r"no such folder.*comat\.segmenter"):
        load(detector, Path("sam"))


def test_registered(detector, segmenter):
    build = registry.load(registry.MASKERS, "grounded-sam")
    masker = build(MaskRequest(detector=str(detector), segmenter=str(segmenter), box_threshold=0.7))
    assert masker.box_threshold == 0.7 and masker.text_threshold == 0.25
    assert not any(p.requires_grad for p in (*masker.detector.parameters(), *masker.segmenter.parameters()))
