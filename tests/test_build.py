"""The recipe of the embedded models: what a larger model takes over from a smaller one."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from align_cli import registry
from align_cli.models.roberta import load_roberta
from align_cli.rewards.loading import load_reward
from align_cli.shapes.build import captioner, components, contrastive, phrases
from align_cli.shapes.build.painters import PAINTERS, SDXL, _widen
from align_cli.shapes.build.run import Stage
from align_cli.shapes.captions import parse
from align_cli.shapes.oracle import judge


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """What the stages before leave behind, with random weights."""
    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    clip = components.clip(components.tokenizer())
    clip.save_pretrained(folder / "tiny-clip")
    clip.text_model.save_pretrained(folder / "denoiser-refine" / "text_encoder")
    components.unet().save_pretrained(folder / "denoiser-refine" / "unet")
    SDXL(folder).save(folder / "denoiser-sdxl")
    return folder


def test_widened_unet_predicts_as_before():
    """It reads wider text and pooled text, and at first heeds only what the small one read."""
    torch.manual_seed(1)
    small, wide = components.unet().eval(), components.sdxl_unet().eval()
    _widen(wide, small)
    z, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 32, 2 * components.WIDTH)
    added = {"text_embeds": torch.randn(2, components.WIDTH), "time_ids": torch.full((2, 6), 32.0)}
    with torch.no_grad():
        found = wide(z, t, text, added_cond_kwargs=added).sample
        expected = small(z, t, text[..., : components.WIDTH]).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        wide.add_embedding.linear_2.weight.fill_(0.01)
        assert not torch.allclose(wide(z, t, text, added_cond_kwargs=added).sample, found, atol=1e-3)


@pytest.mark.parametrize("stage", PAINTERS)
def test_painters_learn_in_all_their_parts(stage, stages):
    """Predictions of the right shape, and a gradient in the denoiser and in every text tower (SDXL's second
    from the second step on, when the weights that read it are no longer zero).
    """
    model = PAINTERS[stage](stages)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ids, empty = torch.tensor([[1, 5, 2], [1, 2, 2], [1, 7, 2]]), torch.tensor([False, True, False])
    z, t = torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 900])
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        found = model(z, t, ids, empty)
        assert found.shape == z.shape
        (found.square().mean((1, 2, 3)) * model.weight(t)).mean().backward()
    for name, part in model.named_children():
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters()), name
    if isinstance(model, SDXL):
        cond = model.encode(ids, empty)
        assert cond.tokens[1].abs().max() == cond.pooled[1].abs().max() == 0 < cond.pooled[0].abs().max()


def test_what_the_flow_model_is_taught(stages, monkeypatch):
    """The teacher sees the same picture at the same noise level in its own scale; where it knows the noise
    exactly, the target is the plain one; above its last level the target is the plain one anyway.
    """
    model = PAINTERS["denoiser-sd3"](stages)
    (teacher,) = model.teacher
    assert not any("teacher" in name for name, _ in model.named_parameters())
    drawn = torch.tensor([3.0, 300.0, 700.0, 935.0, 990.0])
    t = model.times(drawn)
    assert torch.equal(t[[0, 4]], drawn[[0, 4]]) and (t - drawn).abs().max() < 1
    x0, eps = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    ids, empty = torch.zeros(5, 4, dtype=torch.int64), torch.zeros(5, dtype=torch.bool)
    seen = []

    def knows_the_noise(z, step, *_texts):
        seen.append((z, step))
        return eps

    monkeypatch.setattr(teacher, "forward", knows_the_noise)
    torch.testing.assert_close(model.goal(x0, eps, t, ids, empty), eps - x0, atol=1e-4, rtol=1e-4)
    z, step = seen[0]
    expected = teacher.process.add_noise(x0, eps, step)
    torch.testing.assert_close(z[1:4], expected[1:4], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(teacher, "forward", lambda z, *_: torch.zeros_like(z))
    found = model.goal(x0, eps, t, ids, empty)
    assert torch.equal(found[[0, 4]], (eps - x0)[[0, 4]])
    assert not torch.allclose(found[1], (eps - x0)[1], atol=0.1)


def test_words_to_guess():
    """The labels are the words themselves, and nothing is asked of padding, start and end; what is not asked
    is left as it was.
    """
    tok, rng = components.roberta_tokenizer(), np.random.default_rng(0)
    texts = phrases.captions(300, rng, "train", 0.5)
    ids, mask, labels = phrases.covered(tok, texts, rng)
    true = tok(texts, padding=True, return_tensors="pt").input_ids
    asked = labels != phrases.IGNORED
    words = ~torch.isin(true, torch.tensor(tok.all_special_ids))
    assert torch.equal(labels[asked], true[asked]) and torch.equal(ids[~asked], true[~asked])
    assert words[asked].all() and torch.equal(mask.bool(), true != tok.pad_token_id)
    assert asked.sum() / words.sum() == pytest.approx(phrases.CHOSEN, abs=0.02)
    hidden = ids[asked] == tok.mask_token_id
    assert hidden.float().mean() == pytest.approx(phrases.HIDDEN, abs=0.03)
    assert (ids[asked][~hidden] == true[asked][~hidden]).float().mean() == pytest.approx(0.5, abs=0.1)


def test_the_phrase_encoder_learns(tmp_path, monkeypatch):
    """A few steps, and a folder that its reader opens."""
    whole = phrases.evaluate
    monkeypatch.setattr(phrases, "BATCH", 8)
    monkeypatch.setattr(phrases, "evaluate", lambda *given: whole(*given[:3], 4))
    phrases.train(tmp_path, 3, 0, "roberta")
    facts = json.loads((tmp_path / "roberta.json").read_text())
    assert facts["steps"] == 3 and 0 <= facts["measured"]["test_hidden_word"] < 0.5
    reader = load_roberta(str(tmp_path / "tiny-roberta"), device="cpu", dtype=torch.float32)
    assert reader.width == components.ROBERTA_WIDTH and reader.limit == components.ROBERTA_LIMIT


def test_stage_stopped_twice_ends_as_one_that_ran_through(tmp_path):
    """Weights, moments, and what the state file keeps beside them."""

    def sitting(path, stop: int) -> torch.nn.Linear:
        """From the state file to the stop, as in a process of its own. Returns the average."""
        torch.manual_seed(0)
        model, average = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1).requires_grad_(False)
        average.load_state_dict(model.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        stage = Stage(path, model, optimizer, average=average.state_dict())

        def loss_at(step: int) -> torch.Tensor:
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            return (model(x) - 1).square().mean()

        def after_step(step: int) -> None:
            average.weight.lerp_(model.weight.detach(), 0.3)
            if step == stop:
                stage.save()
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            stage.fit(loss_at, steps=9, lr=0.1, warmup=1, every=9, report=str, after_step=after_step)
        return average

    def train(path, *stops: int):
        average = [sitting(path, stop) for stop in (*stops, 10)][-1]
        return torch.load(path, weights_only=True), average.weight

    whole, average = train(tmp_path / "whole.state")
    parts, same = train(tmp_path / "parts.state", 2, 5)
    assert torch.equal(average, same)
    for part in ("model", "average"):
        for key, value in whole[part].items():
            assert torch.equal(parts[part][key], value)
    assert torch.equal(whole["average"]["weight"], average)


@pytest.mark.slow
def test_the_captioner_starts_as_tiny_clip_and_learns(stages, tmp_path, monkeypatch):
    """Its image tower says about what tiny-clip's says; a few steps, and a folder that the reward opens."""
    tok = captioner.tokenizer()
    model, clip = components.blip(tok), CLIPModel.from_pretrained(registry.WEIGHTS / "tiny-clip").float()
    captioner.start_from(model, clip)
    x, _, _ = contrastive.examples(4, np.random.default_rng(0), "train")
    with torch.no_grad():
        before = clip.vision_model.post_layernorm(clip.vision_model(x).last_hidden_state)
        after = model.vision_model(x).last_hidden_state
    assert torch.nn.functional.cosine_similarity(before, after, dim=-1).mean() > 0.9
    clip.save_pretrained(tmp_path / "tiny-clip-refined")
    components.vae().save_pretrained(tmp_path / "vae")
    whole = captioner.evaluate
    monkeypatch.setattr(captioner, "BATCH", 4)
    monkeypatch.setattr(captioner, "evaluate", lambda *given: whole(*given[:2], 4))
    captioner.train(tmp_path, 3, 0, "blip")
    facts = json.loads((tmp_path / "blip.json").read_text())
    assert facts["steps"] == 3 and facts["measured"]["test_score"] < -1
    reward = load_reward("blip-caption", source=str(tmp_path / "tiny-blip"))
    assert reward.token_counts(["a red circle .", "zebra"]).tolist() == [5, 2]


def test_what_the_captioner_is_asked():
    """Every picture has its own caption first, and false ones that the training split allows."""
    rng = np.random.default_rng(0)
    x, texts = captioner.pictures_and_captions(20, rng, "train", 0.5)
    assert len(x) == len(texts) == 40
    shown = ((x.permute(0, 2, 3, 1) / 2 + 0.5) * 255).round().byte().numpy()
    for i in range(1 + captioner.NEGATIVES):
        true = judge(shown, [parse(row[i]) for row in texts])["all"]
        assert true.all() if i == 0 else not true.any()
    worn = captioner.worn(x, rng, components.vae())
    assert worn.shape == x.shape and worn.min() > -0.5 and worn.max() < 1.5
