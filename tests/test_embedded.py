"""The models that ship in the package: ordinary folders, true cards, pictures that follow captions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPModel

from align_cli import config, registry
from align_cli.evaluation.benchmarks import measure
from align_cli.models.loading import load_model
from align_cli.models.roberta import load_roberta
from align_cli.models.t5 import load_t5
from align_cli.settings import ModelSettings
from align_cli.shapes.build import components
from align_cli.shapes.dataset import eval_prompts

PIPELINES = [name for name, source in registry.MODELS.items() if source.startswith("embedded:")]
MOST_BYTES = 40 * 2**20
"""All embedded weights together."""


def card(name: str) -> dict:
    return json.loads((registry.WEIGHTS / name / "card.json").read_text())


def test_every_folder_is_a_model_and_all_are_small():
    assert sorted(path.name for path in registry.WEIGHTS.iterdir()) == sorted(
        [*PIPELINES, "tiny-blip", "tiny-clip", "tiny-roberta", "tiny-t5"]
    )
    assert sum(path.stat().st_size for path in registry.WEIGHTS.rglob("*.safetensors")) < MOST_BYTES


def test_card_of_tiny_t5():
    """Its class and size; and every word of the grammar is one token, so that no caption is cut."""
    facts = card("tiny-t5")
    tokenizer, encoder = load_t5("embedded:tiny-t5", device="cpu", dtype=torch.float32)
    assert facts["class"] == f"transformers.{type(encoder).__name__}"
    assert facts["parameters"] == sum(p.numel() for p in encoder.parameters())
    texts = [p.text for p in eval_prompts(200, 0, kinds=("long",))]
    counts = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert counts == [len(text.split()) + 1 for text in texts] and max(counts) <= 64
    assert facts["measured_fp16"]["test_written_right"] > 0.5


def test_card_of_tiny_roberta():
    """Its class and size; every word of the grammar is one token, whose characters lead to it; and phrases
    that differ in one word differ in that word most.
    """
    facts = card("tiny-roberta")
    reader = load_roberta("embedded:tiny-roberta", device="cpu", dtype=torch.float32)
    assert facts["class"] == "transformers.RobertaModel"
    assert facts["parameters"] == sum(p.numel() for p in reader.encoder.parameters())
    assert sum(p.stat().st_size for p in (registry.WEIGHTS / "tiny-roberta").iterdir()) < 700_000
    texts = [p.text for p in eval_prompts(200, 0, kinds=("single", "count", "long"))]
    encoding = reader.read(texts)
    assert encoding["attention_mask"].sum(1).tolist() == [len(text.split()) + 2 for text in texts]
    for row, text in enumerate(texts[:20]):
        ends = [encoding.token_to_chars(row, i + 1) for i in range(len(text.split()))]
        assert [text[at.start : at.end] for at in ends] == text.split()
    assert reader.tokenizer.get_vocab() == components.roberta_tokenizer().get_vocab()
    states = reader.states(reader.read(["two red circles", "two blue circles"]))
    assert (states[0] - states[1]).norm(dim=-1).argmax() == 2
    measured = facts["measured_fp16"]
    assert measured["test_hidden_word"] > 0.6 and measured["test_seen_word"] > 0.95


@pytest.mark.parametrize("name", PIPELINES)
def test_card_of_a_pipeline(name):
    facts = card(name)
    absent = {part: None for part in ("text_encoder_3", "tokenizer_3") if name == "tiny-sd3"}
    pipe = DiffusionPipeline.from_pretrained(registry.WEIGHTS / name, **absent)
    assert facts["class"] == f"diffusers.{type(pipe).__name__}"
    counts = {
        part: sum(p.numel() for p in module.parameters())
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
    }
    assert counts == facts["parameters"]
    assert set(facts["measured_fp16"]) == {"train", "test"}


def test_card_of_the_reward_model():
    model, facts = CLIPModel.from_pretrained(registry.WEIGHTS / "tiny-clip"), card("tiny-clip")
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["measured_fp16"]["test_hard_negative"] >= 0.9


@pytest.mark.parametrize("name", [*PIPELINES, "tiny-clip", "tiny-roberta"])
def test_no_path_of_a_machine_in_any_configuration(name):
    for path in (registry.WEIGHTS / name).rglob("*config.json"):
        text = path.read_text()
        assert "_name_or_path" not in text and '"/' not in text, path


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_follow_simple_captions(name):
    """A few pictures with the packaged settings score about what the card says."""
    drawing = config.resolve("softrepa", preset=f"softrepa/{name}").sample
    model = load_model(ModelSettings(name=name, device="cpu"))
    found = measure(model, eval_prompts(24, 5, split="train", kinds=("single",)), drawing, 5)
    assert np.mean(found["all"]) >= card(name)["measured_fp16"]["train"]["all_single"] - 0.25
