"""T5 beside a denoiser, and the adapter between: where they come from, what they give, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub import serve
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from align_cli.errors import UserError
from align_cli.methods.longalign.adapter import LAVI_BRIDGE, TextAdapter
from align_cli.models.dropout import RowDropout
from align_cli.models.t5 import T5Reader, load_t5
from align_cli.shapes.build import components

CPU = {"device": "cpu", "dtype": torch.float32}
PROMPTS = ["a red circle", "the background is white and there are two blue squares", ""]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory) -> Path:
    """A random whole T5 (encoder and decoder) with its tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("t5") / "t5"
    torch.manual_seed(0)
    words = components.t5_tokenizer()
    components.t5(words).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_the_encoder_of_a_whole_t5(t5_folder):
    words, encoder = load_t5(str(t5_folder), **CPU)
    assert not any("decoder" in name for name, _ in encoder.named_parameters())
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    saved = load_file(t5_folder / "model.safetensors")
    assert torch.equal(encoder.shared.weight, saved["shared.weight"])
    reader = T5Reader(words, encoder, 20)
    found = reader.states(PROMPTS)
    assert found.shape == (3, 20, components.T5_WIDTH) and not found.requires_grad
    for prompt, row in zip(PROMPTS, found, strict=True):
        ids = words(prompt).input_ids
        ids += [words.pad_token_id] * (20 - len(ids))
        torch.testing.assert_close(
            row, encoder(torch.tensor([ids])).last_hidden_state[0], rtol=1e-5, atol=1e-5
        )
        masked = encoder(torch.tensor([ids]), attention_mask=torch.tensor([ids]).ne(0)).last_hidden_state[0]
        assert (masked - row).abs().max() > 1e-3


def test_what_t5_cuts(t5_folder):
    reader = T5Reader(*load_t5(str(t5_folder), **CPU), 6)
    cut, whole = reader.audit(["a red circle and a blue square", "a red circle"])["t5"]
    assert cut.lost == "blue square" and cut.tokens == 8 and whole.lost == ""


def test_t5_of_a_pipeline(tiny_sd3_folder):
    words, encoder = load_t5(str(tiny_sd3_folder), device="cpu", dtype=torch.bfloat16)
    assert T5Reader(words, encoder, 9).states(["a red circle"]).dtype == torch.bfloat16


@pytest.fixture
def hub(t5_folder, tmp_path, monkeypatch) -> Iterator[list[str]]:
    """A hub with org/t5. Yields the list of fetched files."""
    shutil.copytree(t5_folder, tmp_path / "hub" / "org" / "t5")
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch) as log:
        yield log


def test_t5_of_the_hub_and_its_cache(hub, t5_folder, monkeypatch):
    _, encoder = load_t5("org/t5", **CPU)
    assert torch.equal(encoder.shared.weight, load_t5(str(t5_folder), **CPU)[1].shared.weight)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_t5("org/t5", **CPU)
    with pytest.raises(UserError, match=HOW) as caught:
        load_t5("google-t5/t5-large", **CPU)
    assert "cannot be reached" in str(caught.value) and "--model" not in str(caught.value)


HOW = "get it with 'hf download google-t5/t5-large'.*--set longalign.t5="


def test_no_t5_says_how_to_get_it(tmp_path, tiny_sd15_folder, t5_folder, monkeypatch):
    def why(source: object) -> str:
        with pytest.raises(UserError, match=HOW) as caught:
            load_t5(str(source), **CPU)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no such folder" in why("t5-large")
    assert "does not exist" in why(tmp_path / "none")
    assert "not in this installation" in why("embedded:none")
    assert "no config.json in" in why(tmp_path)
    assert "no text_encoder_3/config.json" in why(tiny_sd15_folder)
    assert "is no T5: its model_type is 'clip_text_model'" in why(_clip(tmp_path, tiny_sd15_folder))
    bare = tmp_path / "bare"
    shutil.copytree(t5_folder, bare)
    (bare / "model.safetensors").unlink()
    assert "no model.safetensors (or .bin)" in why(bare)


def _clip(tmp_path: Path, folder: Path) -> Path:
    shutil.copytree(folder / "text_encoder", tmp_path / "clip")
    return tmp_path / "clip"


# ---------------------------------------------------------------- the adapter


def test_the_official_widths():
    with torch.device("meta"):
        adapter = TextAdapter(*LAVI_BRIDGE)
    assert sum(p.numel() for p in adapter.parameters()) == 21_254_528
    shapes = {name: tuple(x.shape) for name, x in adapter.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "ff1.net.0.proj.weight": (8192, 1024), "ff1.net.2.weight": (896, 4096), "norm1.weight": (1024,),
        "ff2.net.0.proj.weight": (7168, 896), "ff2.net.2.weight": (768, 3584), "norm2.weight": (896,),
    }  # fmt: skip


def test_the_adapter_by_hand():
    torch.manual_seed(0)
    adapter, x = TextAdapter(6, 4, 5).eval(), torch.randn(2, 3, 6)
    w = dict(adapter.named_parameters())

    def ff(x: torch.Tensor, name: str) -> torch.Tensor:
        both = x @ w[f"{name}.net.0.proj.weight"].T + w[f"{name}.net.0.proj.bias"]
        a, g = both[..., : both.shape[-1] // 2], both[..., both.shape[-1] // 2 :]
        gelu = g * 0.5 * (1 + torch.erf(g / 2**0.5))
        return a * gelu @ w[f"{name}.net.2.weight"].T + w[f"{name}.net.2.bias"]

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    torch.testing.assert_close(adapter(x), ff(norm(ff(norm(x), "ff1")), "ff2"), rtol=1e-4, atol=1e-5)
    assert adapter.bfloat16()(x).dtype == torch.bfloat16
    plain = adapter.float()(x)
    with adapter.dropping(RowDropout(0.5)):
        assert not torch.equal(adapter(x), adapter(x))
    assert torch.equal(adapter(x), plain)


def test_folders_of_adapters(tmp_path):
    adapter = TextAdapter(6, 4, 5)
    adapter.to_folder(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    again = TextAdapter.from_folder(tmp_path / "a")
    for name, x in adapter.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)
    with pytest.raises(UserError, match="exists already"):
        adapter.to_folder(tmp_path / "a")
    weights = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    weights.unlink()
    torch.save({name: x.half() for name, x in state.items()}, weights.with_suffix(".bin"))
    half = TextAdapter.from_folder(tmp_path / "a")
    assert half.norm1.weight.dtype == torch.float32 and torch.equal(half.norm1.weight, adapter.norm1.weight)


def test_damaged_folders_of_adapters(tmp_path):
    folder = tmp_path / "a"
    with pytest.raises(UserError, match="no folder of a text adapter: there is no config.json"):
        TextAdapter.from_folder(folder)
    TextAdapter(6, 4, 5).to_folder(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({name: x for name, x in state.items() if name != "norm2.bias"}, weights)
    with pytest.raises(UserError, match="its 11 tensors are not the 12 .* norm2.bias is missing"):
        TextAdapter.from_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"in_dim": "six"}))
    with pytest.raises(UserError, match="in_dim, int_dim, out_dim must be whole numbers"):
        TextAdapter.from_folder(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        TextAdapter.from_folder(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"there is no diffusion_pytorch_model.safetensors \(or .bin\)"):
        TextAdapter.from_folder(folder)
