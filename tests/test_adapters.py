"""The adapter folder: written whole or not at all, one clear line for every damage; official files read."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from align_cli import adapters, config
from align_cli.adapters import (
    INFO,
    TENSORS,
    attach,
    import_official,
    load_adapter,
    parse_spec,
    restore,
    save_adapter,
)
from align_cli.errors import UserError
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.models.loading import load_model
from align_cli.settings import ModelSettings


@pytest.fixture(scope="module")
def model(tiny_sd15_folder):
    return load_model(ModelSettings(name=str(tiny_sd15_folder), device="cpu"))


def trained(model, seed: int = 0, **options: object) -> tuple[SoftREPA, config.Resolved]:
    """A method whose tokens are random numbers, and the configuration it was made with."""
    flags = {"model.name": model.model_id, "softrepa.stages": "TTT", "softrepa.use_t_table": True, **options}
    resolved = config.resolve("softrepa", preset="none", flags=flags)
    method = SoftREPA(model, resolved.method_config)
    with torch.no_grad():
        for p in method.tokens.parameters():
            p.normal_(generator=torch.Generator().manual_seed(seed))
    return method, resolved


@pytest.fixture
def folder(model, tmp_path) -> Path:
    method, resolved = trained(model)
    out = tmp_path / "adapter"
    save_adapter(out, method, resolved.to_dict(), resolved.origin, step=7, data_fingerprint="abc")
    return out


def predict(model, seed: int = 0) -> torch.Tensor:
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.predict(
            z, torch.tensor([700, 20]), model.encode_text(["a red circle", "two blue squares"])
        )


# ---------------------------------------------------------------- round trip


def test_round_trip(model, folder):
    method, resolved = trained(model)
    adapter = load_adapter(folder)
    assert adapter.state.keys() == method.state().keys()
    assert all(torch.equal(adapter.state[k], v) for k, v in method.state().items())
    info = adapter.info
    assert (info.method, info.family, info.model_id) == ("softrepa", "sd15", model.model_id)
    assert (info.step, info.seed, info.data_fingerprint) == (7, 42, "abc")
    assert info.shapes == {"dc_tokens": [4, 32], "dc_t_tokens": [100, 32]}
    assert {"t2ialign", "torch", "diffusers"} <= info.versions.keys()
    again = config.Resolved.from_dict(info.config, info.origin)
    assert again == resolved
    assert again.origin["softrepa.stages"] == "--stages"
    assert sorted(p.name for p in folder.iterdir()) == [INFO, TENSORS]
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_attached_is_the_method_itself(model, folder):
    method, _ = trained(model)
    plain = predict(model)
    with method.attach(model):
        expected = predict(model)
    assert not torch.allclose(expected, plain, atol=1e-3)
    with attach(model, [str(folder)]):
        assert torch.equal(predict(model), expected)
    assert torch.equal(predict(model), plain)
    with attach(model, [f"{folder}@0"]):
        assert torch.equal(predict(model), plain)
    with attach(model, []):
        assert torch.equal(predict(model), plain)


def test_stacking(model, folder, tmp_path):
    other, resolved = trained(model, 1, **{"softrepa.num_tokens": 2, "softrepa.use_t_table": False})
    second = tmp_path / "second"
    save_adapter(second, other, resolved.to_dict(), resolved.origin)
    with attach(model, [str(folder), f"{second}@0.5"]):
        both = predict(model)
    with attach(model, [f"{second}@0.5", str(folder)]):
        torch.testing.assert_close(predict(model), both, atol=1e-5, rtol=1e-5)
    with attach(model, [str(folder)]), other.attach(model, 0.5):
        torch.testing.assert_close(predict(model), both, atol=1e-5, rtol=1e-5)


def test_detached_after_an_error(model, folder):
    plain = predict(model)
    with pytest.raises(RuntimeError, match="inside"), attach(model, [str(folder)]):
        raise RuntimeError("inside")
    assert torch.equal(predict(model), plain)
    with pytest.raises(UserError, match="does not exist"), attach(model, [str(folder), "nowhere"]):
        pass
    assert torch.equal(predict(model), plain)


def test_specs(folder):
    assert parse_spec("runs/a") == ("runs/a", 1.0)
    assert parse_spec("runs/a@0.7") == ("runs/a", 0.7)
    assert parse_spec("me@home/a@2") == ("me@home/a", 2.0)
    assert parse_spec("me@home/a") == ("me@home/a", 1.0)
    named = folder.rename(folder.with_name("v@2"))
    assert parse_spec(str(named)) == (str(named), 1.0)
    assert parse_spec(f"{named}@0.5") == (str(named), 0.5)
    for bad in ("a@-1", "a@nan", "a@inf"):
        with pytest.raises(UserError, match="finite number >= 0"):
            parse_spec(bad)
    with pytest.raises(UserError, match="scale after @ must be a number, got 'strong'"):
        parse_spec(f"{named}@strong")
    with pytest.raises(UserError, match="scale after @ must be a number, got 'abc'"):
        parse_spec("tiny-sd15/comat@abc")


# ---------------------------------------------------------------- writing


def test_replaced_whole_or_refused(model, folder):
    method, resolved = trained(model, 5)
    args = (folder, method, resolved.to_dict(), resolved.origin)
    before = (folder / TENSORS).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        save_adapter(*args, overwrite=False)
    assert (folder / TENSORS).read_bytes() == before
    save_adapter(*args)
    assert (folder / TENSORS).read_bytes() != before
    load_adapter(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_failure_leaves_the_old_adapter(model, folder, monkeypatch):
    method, resolved = trained(model, 5)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "_write", full)
    with pytest.raises(UserError, match="cannot write the adapter to .*: the disk is full; make room"):
        save_adapter(folder, method, resolved.to_dict(), resolved.origin)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_no_folder_can_be_made(model, tmp_path):
    method, resolved = trained(model)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the adapter"):
        save_adapter(tmp_path / "file" / "adapter", method, resolved.to_dict(), resolved.origin)


# ---------------------------------------------------------------- damage


def edit(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / INFO).read_text())
    (folder / INFO).write_text(json.dumps({k: v for k, v in {**raw, **changes}.items() if v is not None}))


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)


def test_no_adapter(tmp_path, folder):
    assert_refused(tmp_path / "nowhere", "does not exist")
    assert_refused(folder / INFO, "is a file; an adapter is a folder")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "is no adapter folder: it has no adapter.json")
    (folder / TENSORS).unlink()
    assert_refused(folder, "is incomplete: no adapter.safetensors")


def test_damaged(folder):
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:-1])
    assert_refused(folder, "truncated or altered")
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    (folder / TENSORS).write_bytes(bytes(flipped))
    assert_refused(folder, "truncated or altered")
    (folder / TENSORS).write_bytes(whole)
    text = (folder / INFO).read_text()
    (folder / INFO).write_text(text[: len(text) // 2])
    assert_refused(folder, "is damaged: adapter.json")
    for changes, message in (
        ({"format_version": None}, "has no format_version"),
        ({"format_version": 2}, r"has format 2; this t2ialign .* reads up to 1: upgrade"),
        ({"sha256": None}, "lacks sha256"),
        ({"method": 3}, "method of adapter.json must be a text that is not empty, got 3"),
        ({"model_id": ""}, "model_id of adapter.json must be a text that is not empty, got ''"),
        ({"config": []}, "config of adapter.json is not an object"),
    ):
        (folder / INFO).write_text(text)
        edit(folder, **changes)
        assert_refused(folder, message)
    (folder / INFO).write_text(text)
    edit(folder, a_field_of_tomorrow=1)
    load_adapter(folder)  # a newer program of the same format may add facts


def test_what_does_not_fit(model, folder, make_tiny_sd15, tmp_path):
    def refused(message: str, base=model) -> None:
        with pytest.raises(UserError, match=message) as caught, attach(base, [str(folder)]):
            pass
        assert "\n" not in str(caught.value)

    wide = load_model(ModelSettings(name=str(make_tiny_sd15(tmp_path / "wide", width=64)), device="cpu"))
    refused(r"does not fit .*wide: dc_t_tokens has shape \[100, 32\], expected \[100, 64\]", wide)
    text = (folder / INFO).read_text()
    edit(folder, family="sdxl")
    refused(r"family sdxl\) and does not fit .* \(family sd15\)")
    (folder / INFO).write_text(text)
    edit(folder, method="softreap")
    refused("unknown method 'softreap'; did you mean 'softrepa'")
    raw = json.loads(text)["config"]
    edit(folder, method="softrepa", config={**raw, "softrepa": {**raw["softrepa"], "num_tokens": 3}})
    refused(r"dc_tokens has shape \[4, 32\], expected \[3, 32\]")
    edit(folder, config={**raw, "softrepa": {**raw["softrepa"], "use_t_table": False}})
    refused("unused dc_t_tokens")
    edit(folder, config={**raw, "softrepa": {**raw["softrepa"], "num_tokens": "four"}})
    refused("softrepa.num_tokens must be a whole number")


# ---------------------------------------------------------------- official files


def release(
    folder: Path, *, width: int = 768, table: bool = True, suffix: str = ""
) -> dict[str, torch.Tensor]:
    """Files as the official code writes them: a bare Parameter and a pickled Embedding module."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tokens = nn.Parameter(torch.randn(4, width, generator=generator))
    torch.save(tokens, folder / f"dc_tokens{suffix}.pth")
    if not table:
        return {"dc_tokens": tokens.detach()}
    embedding = nn.Embedding(100, width)
    torch.save(embedding, folder / f"dc_t_tokens{suffix}.pth")
    return {"dc_tokens": tokens.detach(), "dc_t_tokens": embedding.weight.detach()}


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("as_file", [True, False])
def test_import(tmp_path, table, as_file):
    state = release(tmp_path / "sd1.5", table=table)
    source = tmp_path / "sd1.5" / "dc_tokens.pth" if as_file else tmp_path / "sd1.5"
    import_official("softrepa", source, "sd15", tmp_path / "out")
    adapter = load_adapter(tmp_path / "out")
    assert adapter.state.keys() == state.keys()
    assert all(torch.equal(adapter.state[k], v) for k, v in state.items())
    saved = config.Resolved.from_dict(adapter.info.config, adapter.info.origin)
    assert saved.method_config.num_tokens == 4
    assert (saved.method_config.use_t_table, saved.method_config.stages) == (table, "TFF")
    assert saved.origin["softrepa.use_t_table"] == "imported file"
    assert (adapter.info.family, adapter.info.model_id) == ("sd15", "sd15")
    assert "official release" in adapter.info.source


def test_import_from_a_training_folder(tmp_path):
    for step in (500, 1000):
        release(tmp_path / "run", suffix=f"_{step}")
    with pytest.raises(UserError, match="several files, name one: dc_tokens_1000.pth, dc_tokens_500.pth"):
        import_official("softrepa", tmp_path / "run", "sd15", tmp_path / "out")
    import_official("softrepa", tmp_path / "run" / "dc_tokens_500.pth", "sd14", tmp_path / "out")
    assert load_adapter(tmp_path / "out").info.model_id == "sd14"
    assert "dc_t_tokens" in load_adapter(tmp_path / "out").state


def test_import_of_safetensors_works_on_a_model(model, tmp_path):
    tokens = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    save_file({"dc_tokens": tokens}, tmp_path / "tokens.safetensors")
    import_official("softrepa", tmp_path, model.model_id, tmp_path / "out")
    plain = predict(model)
    with attach(model, [str(tmp_path / "out")]):
        assert not torch.allclose(predict(model), plain, atol=1e-3)


class Evil:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("evil"),)


def test_import_refusals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(source: object, message: str, model: str = "sd15", method: str = "softrepa") -> None:
        with pytest.raises(UserError, match=message) as caught:
            import_official(method, str(source), model, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    release(tmp_path / "xl", width=2048, table=False)
    refused("xl", r"shape \[4, 2048\] \(SDXL\), but sd15 needs \[n, 768\]")
    release(tmp_path / "good")
    refused("good", r"but sd21-base needs \[n, 1024\]", model="sd21-base")
    refused("good", "unknown model 'sd51'", model="sd51")
    refused("good", "unknown method 'softreap'", method="softreap")
    refused("nowhere", "does not exist")
    refused("good/dc_t_tokens.pth", "expected dc_tokens")
    (tmp_path / "empty").mkdir()
    refused("empty", "no dc_tokens")
    torch.save({"dc_tokens": torch.zeros(4, 768)}, tmp_path / "dc_tokens_dict.pth")
    refused("dc_tokens_dict.pth", "holds a dict, expected a tensor")
    torch.save(torch.full((4, 768), torch.nan), tmp_path / "dc_tokens_nan.pth")
    refused("dc_tokens_nan.pth", "not finite")
    torch.save(Evil(), tmp_path / "dc_tokens_evil.pth")
    refused("dc_tokens_evil.pth", "no PyTorch file that can be read safely")
    assert not (tmp_path / "evil").exists()
    whole = (tmp_path / "good" / "dc_tokens.pth").read_bytes()
    (tmp_path / "dc_tokens_cut.pth").write_bytes(whole[: len(whole) // 2])
    refused("dc_tokens_cut.pth", "no PyTorch file that can be read safely")
    (tmp_path / "dc_tokens_empty.pth").write_bytes(b"")
    refused("dc_tokens_empty.pth", "no PyTorch file that can be read safely")
    (tmp_path / "tokens.safetensors").write_bytes(b"12345678")
    refused("tokens.safetensors", "cannot be read")
    (tmp_path / "busy").mkdir()
    with pytest.raises(UserError, match="busy exists already"):
        import_official("softrepa", tmp_path / "good", "sd15", tmp_path / "busy")


def test_info_is_plain_json(folder):
    raw = json.loads((folder / INFO).read_text())
    assert raw == asdict(load_adapter(folder).info)
    copied = shutil.copytree(folder, folder.with_name("moved"))
    assert load_adapter(copied).info == load_adapter(folder).info


def test_the_folder_of_a_run_leads_to_its_adapter(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "adapter")
    assert load_adapter(run).path == run / "adapter"


def test_another_model_of_the_family_is_told(model, folder):
    other = copy.copy(model)
    other.model_id = "sd14"
    with pytest.warns(UserWarning, match="was trained on .* and is used on sd14"):
        restore(load_adapter(folder), other)
