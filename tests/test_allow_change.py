"""A run that goes on keeps its settings; what --allow-change lets differ is written down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import ok, refused
from safetensors.torch import load_file, save_file
from training_helpers import LinearMap, Points, settings, trace

from align_cli.errors import UserError
from align_cli.training.checkpoint import load_newest
from align_cli.training.loop import train
from align_cli.training.run_folder import check_allowed, check_same


def run(out: Path, *, steps: int, dataset=None, method=None, **changes):
    """As the command does it: settings and config say the same."""
    options = {key: changes.pop(key) for key in ("resume", "allow_change") if key in changes}
    chosen = settings(steps=steps, **changes)
    config = {"method": "linear", "train": {"steps": steps, **changes}}
    method = method or LinearMap()
    return method, train(method, dataset or Points(), chosen, out, config=config, **options)


def saved(out: Path) -> dict[str, object]:
    return json.loads((out / "run.json").read_text())


def test_all_that_differs_is_named(tmp_path):
    run(tmp_path, steps=4, lr=0.05, weight_decay=0.0)
    with pytest.raises(UserError) as caught:
        run(tmp_path, steps=8, lr=0.1, weight_decay=0.5, dataset=Points(24), resume=True)
    text = str(caught.value)
    assert (
        "train.lr: 0.05 -> 0.1; train.weight_decay: 0.0 -> 0.5; data (fingerprint of its content): " in text
    )
    assert "'points-20' -> 'points-24'" in text and "\n" not in text and "train.steps" not in text
    options = {"resume": True, "allow_change": ["train.lr", "data"]}
    with pytest.raises(UserError) as caught:
        run(tmp_path, steps=8, lr=0.1, weight_decay=0.5, dataset=Points(24), **options)
    assert "settings: train.weight_decay: 0.0 -> 0.5; a resumed run" in str(caught.value)


def test_an_allowed_change_takes_effect_and_is_written_down(tmp_path):
    run(tmp_path, steps=4, lr=0.05, weight_decay=0.0, adam_beta1=0.9)
    changed = {"lr": 0.1, "weight_decay": 0.5, "adam_beta1": 0.5}
    keys = [f"train.{key}" for key in changed]
    run(tmp_path, steps=8, **changed, resume=True, allow_change=keys)
    state = load_newest(tmp_path / "checkpoints")[0].state["optimizers"]["map"]["param_groups"][0]
    assert state["weight_decay"] == 0.5 and state["betas"][0] == 0.5  # not those of the checkpoint
    found = saved(tmp_path)
    assert found["changes"][0] == {"step": 4, "key": "train.adam_beta1", "before": 0.9, "now": 0.5}
    assert found["origin"]["train.lr"] == "changed at step 4 from 0.05 with --allow-change"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == [0.05] * 4 + [0.1] * 4
    run(tmp_path, steps=12, **changed, resume=True)  # from here on it is the run's own
    assert saved(tmp_path)["changes"] == found["changes"]
    run(tmp_path, steps=16, **changed | {"lr": 0.2}, resume=True, allow_change=["train.lr"])
    assert saved(tmp_path)["origin"]["train.lr"] == (
        "changed at step 4 from 0.05 with --allow-change, changed at step 12 from 0.1 with --allow-change"
    )


def test_a_change_whose_checkpoint_is_lost_counts_from_where_the_run_goes_on(tmp_path):
    run(tmp_path, steps=8, lr=0.05)
    run(tmp_path, steps=9, lr=0.1, resume=True, allow_change=["train.lr"])
    assert saved(tmp_path)["changes"][0]["step"] == 8
    for step in (8, 9):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.pt").write_bytes(b"")
    run(tmp_path, steps=9, lr=0.1, resume=True)
    assert saved(tmp_path)["changes"] == [{"step": 0, "key": "train.lr", "before": 0.05, "now": 0.1}]


def test_other_data_an_average_and_a_scaler_that_are_new(tmp_path):
    run(tmp_path, steps=4)
    options = {"resume": True, "allow_change": ["data", "train.ema_decay", "train.precision"]}
    method, result = run(tmp_path, steps=8, ema_decay=0.9, precision="fp16", dataset=Points(24), **options)
    assert result.step == 8 and saved(tmp_path)["data_fingerprint"] == "points-24"
    state = load_newest(tmp_path / "checkpoints")[0].state
    assert 0 < state["ema"]["updates"] <= 4 and state["scaler"] is not None
    torch.testing.assert_close(method.weight.detach(), state["ema"]["average"][0], rtol=0, atol=0)


def test_what_a_guard_measures_with_stays(tmp_path):
    """Measurements of two settings would be compared with each other; without a guard nothing hangs on it."""

    def check(every: int, **now: object) -> None:
        first = {"sample": {"steps": 20, "batch_size": 8}, "eval": {"kinds": ["pair"], "num_prompts": 8}}
        second = {
            part: {**first[part], **{k: v for k, v in now.items() if k in first[part]}} for part in first
        }
        saved, wanted = ({**c, "guard": {"every": every}} for c in (first, second))
        check_same(saved, wanted, "d", "d", tmp_path)

    check(5, batch_size=1, num_prompts=2)
    check(0, steps=4, kinds=["long"])
    for changed, said in (({"steps": 4}, "sample.steps: 20 -> 4"), ({"kinds": ["long"]}, "eval.kinds: ")):
        with pytest.raises(UserError, match=said):
            check(5, **changed)


def test_another_adapter_in_the_folder_that_a_run_started_from(tmp_path):
    """Its name is the same; a run of a version that did not note it goes on."""
    check_same({}, {"start": "b"}, "d", "d", tmp_path)
    with pytest.raises(UserError, match=r"start \(sha256 of the adapter of --from\): 'a' -> 'b'; a resumed"):
        check_same({"start": "a"}, {"start": "b"}, "d", "d", tmp_path)
    found = check_same({"start": "a"}, {"start": "b"}, "d", "d", tmp_path, ["start"])
    assert found == [("start", "a", "b")]
    check_allowed(["start", "data"], {"train.lr"})


def test_other_weights_of_the_base_model(tmp_path):
    """A part is named, `weights` stands for all; a run of a version that did not note them goes on."""
    saved, now = ({"weights": {"denoiser": x, "vae": "c"}} for x in "ab")
    assert check_same({}, now, "d", "d", tmp_path) == []
    said = (
        r"weights.denoiser \(sha256 of that part of the base model\): 'a' -> 'b'; .* --allow-change weights$"
    )
    with pytest.raises(UserError, match=said):
        check_same(saved, now, "d", "d", tmp_path, ["weights.denoiser"])
    saved["model"], now["model"] = {"dtype": "float32"}, {"dtype": "float16"}
    with pytest.raises(UserError, match=r"with --allow-change model.dtype --allow-change weights$"):
        check_same(saved, now | {"weights": {"denoiser": "b", "vae": "d"}}, "d", "d", tmp_path)
    now["model"] = saved["model"]
    assert check_same(saved, now, "d", "d", tmp_path, ["weights"]) == [("weights.denoiser", "a", "b")]
    check_allowed(["weights"], {"train.lr"})


def test_no_change_changes_nothing(tmp_path):
    run(tmp_path / "a", steps=8)
    run(tmp_path / "b", steps=4)
    run(tmp_path / "b", steps=8, resume=True, allow_change=["train.lr", "data"])
    assert trace(tmp_path / "a") == trace(tmp_path / "b") and saved(tmp_path / "b")["changes"] == []


def test_tensors_that_do_not_fit_any_more(tmp_path):
    run(tmp_path, steps=4, lr=0.05)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"with train.lr changed: leave --allow-change away"):
        run(tmp_path, steps=8, lr=0.1, method=LinearMap(groups=2), resume=True, allow_change=["train.lr"])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_the_command(tmp_path, tiny_sd15_folder):
    out = tmp_path / "run"
    sets = {"data.num_workers": 0, "data.num_examples": 16, "train.num_threads": 1, "train.save_every": 2}
    given = [
        "--preset",
        "none",
        "--batch-size",
        2,
        *(w for k, v in sets.items() for w in ("--set", f"{k}={v}")),
    ]
    ok("train", "softrepa", "--model", tiny_sd15_folder, *given, "--steps", 2, "--no-eval", "--out", out)
    on = ["train", "softrepa", "--resume", "--out", out]
    said = refused(*on, "--lr", 0.5, "--set", "train.adam_beta2=0.9", "--set", "data.num_examples=8")
    assert (
        "data.num_examples: 16 -> 8; train.adam_beta2: 0.999 -> 0.9; train.lr: 0.001 -> 0.5; data (" in said
    )
    assert "unknown key 'train.lrr'; did you mean 'train.lr'" in refused(*on, "--allow-change", "train.lrr")
    assert "unknown key 'lr'; did you mean 'train.lr'" in refused(*on, "--allow-change", "lr")
    new = ["train", "softrepa", "--out", tmp_path / "new", "--allow-change", "train.lr"]
    assert "--allow-change is for a run that goes on: give --resume, too" in refused(*new)
    wide = ["--set", "softrepa.num_tokens=7", "--allow-change", "softrepa.num_tokens"]
    assert "does not fit the trained tensors of softrepa with softrepa.num_tokens changed" in refused(
        *on, *wide
    )
    ok(*on, "--lr", 0.5, "--allow-change", "train.lr", "--steps", 4)
    text = "changed at step 2 from 0.001 with --allow-change"
    assert f"lr = 0.5  # {text}" in (out / "config.toml").read_text()
    info = json.loads((out / "adapter" / "adapter.json").read_text())
    assert info["config"]["train"]["lr"] == 0.5 and info["origin"]["train.lr"] == text
    ok(*on, "--steps", 6)
    info = json.loads((out / "adapter" / "adapter.json").read_text())
    assert info["config"]["train"]["lr"] == 0.5 and info["origin"]["train.lr"] == text
    (out / "config.toml").unlink()  # killed between the two files that a run begins with
    ok(*on, "--steps", 7)
    assert f"lr = 0.5  # {text}" in (out / "config.toml").read_text()


@pytest.mark.slow
def test_a_base_model_that_was_trained_on_between_two_halves_of_a_run(tmp_path, tiny_sd15_folder):
    model = tmp_path / "model"
    shutil.copytree(tiny_sd15_folder, model)
    out = tmp_path / "run"
    sets = {"data.num_workers": 0, "data.num_examples": 16, "train.num_threads": 1}
    given = [
        "--preset",
        "none",
        "--batch-size",
        2,
        *(w for k, v in sets.items() for w in ("--set", f"{k}={v}")),
    ]
    ok("train", "softrepa", "--model", model, *given, "--steps", 2, "--no-eval", "--out", out)
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"][0] += 0.5
    save_file(weights, path, {"format": "pt"})
    on = ["train", "softrepa", "--resume", "--out", out, "--steps", 3]
    assert "other settings: weights.denoiser (sha256 of that part of the base model)" in refused(*on)
    ok(*on, "--allow-change", "weights")
    changes = json.loads((out / "run.json").read_text())["changes"]
    assert [(row["step"], row["key"]) for row in changes] == [(2, "weights.denoiser")]
    for said in (ok("adapters", "info", out).stdout, ok("adapters", "card", out).stdout):
        line = next(line for line in said.splitlines() if "weights.denoiser" in line)
        assert "changed at step 2 from '" in line and line.startswith(("content  ", "| content of `"))
    ok(*on[:-1], 4)
