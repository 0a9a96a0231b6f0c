"""The model card, and uploads to a model hub of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_helpers import ok, refused
from hub import Uploads, take_uploads
from huggingface_hub import ModelCardData, constants
from softrepa_helpers import save_random_adapter

from align_cli.adapters import INFO, TENSORS, AdapterInfo, load_adapter, write_adapter
from align_cli.publishing import PAPERS, card, publishable
from align_cli.registry import METHODS

ROW = {"arm": "a", "metric": "all", "group": None, "base": 0.316, "aligned": 0.332, "difference": 0.016,
       "low": 0.002, "high": 0.031, "verdict": "gain", "held_out": True}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of softrepa with a paired evaluation, as `train` leaves it."""
    folder = tmp_path / "run"
    sets = ["softrepa.num_tokens=3", "train.lr=0.002"]
    save_random_adapter(folder / "adapter", Path("tiny-sd15"), *sets)
    trained = {**ROW, "metric": "clip", "verdict": "no difference", "held_out": False}
    sha256 = json.loads((folder / "adapter" / INFO).read_text())["sha256"]
    evaluation = {
        "arms": [{"name": "a", "hashes": [sha256]}],
        "benchmark": {"name": "shapes", "source": "the shapes world, test split", "prompts": 512},
        "seed": 0,
        "comparisons": [ROW, trained, {**ROW, "group": ["Kind", "two"]}],
    }
    result = {"adapter": "adapter", "train_seconds": 120.0, "evaluation": evaluation}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "before-after.png").write_bytes(b"picture")
    return folder


@pytest.fixture
def hub(monkeypatch) -> Iterator[Uploads]:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with take_uploads(monkeypatch) as uploads:
        yield uploads


def held(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_card_tells_what_the_folder_says(run):
    said = ok("adapters", "card", run).stdout
    head = said.split("---")[1]
    assert "library_name: t2ialign" in head and "base_model" not in head  # no model of the hub
    assert "- all\n- clip" in head and "license" not in head
    info = json.loads((run / "adapter" / INFO).read_text())
    for text in (
        "# softrepa for tiny-sd15", f"`{info['sha256']}`", "| `softrepa.num_tokens` | 3 | --set |",
        "| `train.lr` | 0.002 | --set |", "the same 512 prompts", "2503.08250", "align_cli.load_pipeline",
        "| all | 0.316 | 0.332 | +0.016 | +0.002 to +0.031 | gain | held out |",
        "| clip | 0.316 | 0.332 | +0.016 | +0.002 to +0.031 | no difference | trained on |",
    ):  # fmt: skip
        assert text in said, text
    assert said.count("| all |") == 1 and "model.device" not in said
    licensed = ok("adapters", "card", run / "adapter", "--licence", "mit").stdout
    assert "license: mit" in licensed


def test_a_model_of_the_hub_and_places_of_this_machine(tmp_path):
    info = AdapterInfo(
        method="softrepa", model_id="sd3", family="sd3", step=7,
        config={"method": "softrepa", "data": {"name": "coco", "path": "/home/me/coco"},
                "softrepa": {"num_tokens": 4}, "model": {"unet": "/home/me/unet"}},
        origin={"data.path": "--data-path", "softrepa.num_tokens": "default", "model.unet": "--unet"},
    )  # fmt: skip
    write_adapter(tmp_path / "a", info, {"dc_tokens": torch.zeros(2, 4, 8)})
    said = card(tmp_path / "a")
    assert "base_model: stabilityai/stable-diffusion-3-medium-diffusers" in said
    assert "/home/me" not in said and "| `model.unet` | unet | --unet |" in said
    assert "64 in 1 tensors" in said and "None was recorded" in said and "| steps | 7 |" in said
    assert ModelCardData(library_name="t2ialign").to_yaml() in said


def test_numbers_of_another_adapter_are_not_shown(run, hub):
    """As a run leaves them that went on, and was stopped before its new adapter was measured."""
    file = run / "result.json"
    result = json.loads(file.read_text())
    result["evaluation"]["arms"][0]["hashes"] = ["0" * 64]
    file.write_text(json.dumps(result))
    assert "None was recorded" in ok("adapters", "card", run).stdout
    ok("adapters", "push", run, "someone/red")
    assert set(hub.files["someone/red"]) == {"README.md", INFO, TENSORS}


def test_no_place_on_this_machine_is_pushed(tmp_path, hub):
    """In values, lists, tables and origins; what is left still loads."""
    info = AdapterInfo(
        method="softrepa", model_id="/home/me/models/red", family="sd15", source="imported from ~/old/x.pth",
        config={"method": "softrepa", "data": {"name": "coco", "path": "/home/me/coco", "cache": "../me/c"},
                "softrepa": {"num_tokens": 3}, "model": {"name": "/home/me/models/red", "device": "cuda:3"},
                "eval": {"scorers": ["clip", "clip=/home/me/clip"]}, "train": {"tracker": "", "steps": 5}},
        origin={"data.path": "--data-path", "train.steps": "file /home/me/my runs/x.toml",
                "model.device": "--device", "softrepa.num_tokens": "preset softrepa/sd15"},
    )  # fmt: skip
    write_adapter(tmp_path / "a", info, {"dc_tokens": torch.zeros(3, 8)})
    ok("adapters", "push", tmp_path / "a", "someone/red")
    files = hub.files["someone/red"]
    for name in ("README.md", INFO):
        text = files[name].decode()
        assert not any(word in text for word in ("/home", "/me", "my runs", "~/", "cuda:3")), text
    said = json.loads(files[INFO])
    assert said["model_id"] == said["config"]["model"]["name"] == "red"
    assert said["config"]["eval"]["scorers"] == ["clip", "clip=clip"]
    assert said["config"]["softrepa"] == {"num_tokens": 3} and said["origin"]["train.steps"] == "file x.toml"
    assert said["source"] == "imported from x.pth" and "path" not in said["config"]["data"]
    for name, content in files.items():
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_bytes(content)
    assert load_adapter(tmp_path / "b").info.sha256 == said["sha256"]


def test_a_picture_whose_title_names_a_place_stays_here(run, hub):
    file = run / "result.json"
    result = json.loads(file.read_text())
    result["evaluation"]["benchmark"]["source"] = "/home/me/prompts.txt"
    file.write_text(json.dumps(result))
    ok("adapters", "push", run, "someone/red")
    files = hub.files["someone/red"]
    assert "before-after.png" not in files and b"/home" not in files["README.md"]
    assert b"prompts.txt: base and aligned model drew" in files["README.md"]


def test_addresses_are_no_places():
    kept = ["https://host.org/a/b", "someone/red", "a 1/2 b", "preset softrepa/sd15", "embedded:tiny-t5", 3]
    assert publishable(kept) == kept


def test_every_method_has_its_paper():
    assert PAPERS.keys() == METHODS.keys()


@pytest.mark.parametrize("public", [False, True])
def test_pushed_with_card_and_picture(run, hub, public):
    before = held(run)
    said = ok("adapters", "push", run, "someone/red", *(["--public"] if public else [])).stdout
    assert "pushed" in said and "/someone/red/commit/" in said
    files = hub.files["someone/red"]
    assert set(files) == {"README.md", INFO, TENSORS, "before-after.png"}
    assert files[TENSORS] == (run / "adapter" / TENSORS).read_bytes()
    assert b"hf download someone/red" in files["README.md"]
    assert hub.made["someone/red"] in (("public", False) if public else ("private", True))
    assert hub.tokens == {"Bearer hf_secret"} or hub.tokens == {"Bearer hf_secret", ""}
    assert held(run) == before


def test_a_name_without_owner_is_ones_own(run, hub):
    ok("adapters", "push", run, "red")
    assert list(hub.files) == ["someone/red"]


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        ({"whoami-v2": 401}, "does not take the token; log in again with 'hf auth login'"),
        ({"create": 403, "preupload": 403}, "the hub refuses: the token must have write access"),
        ({"commit": 500}, "the hub says 500"),
        ({"commit": 0}, "the connection failed"),
        ({"create": 0}, "the connection failed"),
    ],
)
def test_refusals_are_one_line_and_leave_the_adapter(run, hub, refuse, message, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    before = held(run)
    hub.refuse = refuse
    assert message in refused("adapters", "push", run, "someone/red")
    assert held(run) == before and not hub.files


def test_no_token_no_name_no_network(run, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    said = refused("adapters", "push", run, "someone/red")
    assert "there is no token of the hub; log in with 'hf auth login'" in said
    assert "write OWNER/NAME" in refused("adapters", "push", run, "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids it" in refused("adapters", "push", run, "someone/red")
    assert "does not exist" in refused("adapters", "push", tmp_path / "nothing", "someone/red")


def train(out: Path, *more: object) -> tuple[object, ...]:
    return ("train", "softrepa", "--model", "tiny-sd15", "--steps", 1, "--batch-size", 2, "--no-eval",
            "--set", "data.num_examples=8", "--set", "data.num_workers=0", "--out", out, *more)  # fmt: skip


def test_a_run_is_not_begun_where_nothing_could_be_pushed(hub, tmp_path):
    hub.refuse = {"whoami-v2": 401}
    said = refused(*train(tmp_path / "r", "--push-to-hub", "someone/red"))
    assert "does not take the token" in said and not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_run_pushes_at_its_end(hub, tmp_path):
    said = ok(*train(tmp_path / "r", "--push-to-hub", "someone/red")).stdout
    assert "pushed to someone/red: http://" in said
    assert INFO in hub.files["someone/red"] and hub.made
    hub.refuse = {"commit": 403}
    with pytest.raises(AssertionError) as caught:
        ok(*train(tmp_path / "s", "--push-to-hub", "someone/red"))
    assert "push it with 't2ialign adapters push" in str(caught.value)
    assert (tmp_path / "s" / "adapter" / INFO).exists()
