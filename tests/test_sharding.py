"""Frozen weights spread over two processes: the numbers of one that holds all, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import call, free_port, ok, refused
from test_distributed import run_two
from two_processes import LONGALIGN, SHARDED, dpt, longalign, softrepa, textcraftor

from align_cli.cli.sharding import KEY, Wish, wished
from align_cli.errors import UserError
from align_cli.models.loading import load_model
from align_cli.models.sharding import blocks
from align_cli.settings import ModelSettings
from align_cli.training.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"softrepa": softrepa, "textcraftor": textcraftor, "dpt": dpt}


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_sd15_folder) -> tuple[Path, list[dict]]:
    """The folder and the reports of both processes."""
    return run_two(tmp_path_factory.mktemp("sharded"), str(tiny_sd15_folder), SHARDED)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, *LONGALIGN])
def test_training_gives_the_numbers_of_one_whole_process(two, tmp_path, tiny_sd15_folder, name):
    out, reports = two
    model, place = str(tiny_sd15_folder), tmp_path / "one"
    alone = METHODS[name](model, place) if name in METHODS else longalign(model, place, name)
    one, both = (read_metrics(p / "metrics.jsonl")[0] for p in (place, out / name))
    assert one.keys() == both.keys()
    for key in one.keys() - {"step", "seconds"}:
        # other kernels (no channels-last): seen in differences of rewards and in gradients through many steps
        small = key == "grad_norm" or key.startswith("relevant/")
        assert both[key] == pytest.approx(one[key], rel=1e-4 if small else 1e-5)
    assert reports[0][name] == reports[1][name]
    for a, b in zip(alone, reports[0][name], strict=True):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


@pytest.mark.slow
def test_each_process_holds_its_part(two):
    held = [report["held"] for report in two[1]]
    assert sum(held) == two[1][0]["all"] and max(held) < 0.6 * sum(held)


@pytest.mark.slow
def test_what_needs_whole_weights_is_refused(monkeypatch):
    shard = ("--set", "train.shard=frozen")
    assert "LoRA is merged into the UNet" in refused("train", "comat", "--dry-run", *shard)
    for key in ("train.grid_every=5", "guard.every=5"):
        more = ("--set", key, "--guard", "shapes") if "guard" in key else ("--set", key)
        assert "one process draws alone" in refused("train", "softrepa", "--dry-run", *shard, *more)
    with pytest.warns(UserWarning, match="has no effect in one process"):
        ok("train", "softrepa", "--dry-run", *shard)
    assert "train.shard must be one of none, frozen" in refused("train", "softrepa", "--set", "train.shard=x")


@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sd3", "tiny-sdxl"])
def test_no_single_layer_is_a_block(name):
    found = blocks(load_model(ModelSettings(name=name, device="cpu")).denoiser)
    kinds = {type(block).__name__ for block in found}
    assert kinds & {"BasicTransformerBlock", "JointTransformerBlock"}
    assert not kinds & {"Linear", "GEGLU", "GELU", "Upsample2D", "Downsample2D"}


def shard_of(said) -> list[str]:
    """Value and origin of train.shard in what --dry-run says."""
    return next(line for line in said.stdout.splitlines() if line.startswith(KEY)).split()[1:]


@pytest.mark.slow
def test_accelerate_asks_for_fsdp(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    said = ok("train", "softrepa", "--dry-run")
    assert said.stderr.count("note: accelerate asks for FSDP: the frozen weights are spread") == 1
    assert shard_of(said) == ['"frozen"', "accelerate"]
    comat = call("train", "comat", "--dry-run")
    assert comat.exit_code == 2 and "leave it away (with accelerate" in comat.stderr
    said = ok("train", "softrepa", "--dry-run", "--set", "train.shard=none")
    assert "note: " not in said.stderr and shard_of(said)[0] == '"none"'


@pytest.mark.slow
def test_accelerate_asks_for_deepspeed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for stage in ("2", "3"):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        said = ok("train", "softrepa", "--dry-run")
        does = "every process holds" if stage == "2" else "the frozen weights are spread"
        text = f"note: accelerate asks for DeepSpeed's ZeRO-{stage} (its engine is not used): {does}"
        assert said.stderr.count(text) == 1
        assert shard_of(said) == (['"none"', "default"] if stage == "2" else ['"frozen"', "accelerate"])
        assert "mixed_precision bf16 has no effect: train.precision is fp32\n" in said.stderr


def test_the_stage_of_deepspeed(monkeypatch, tmp_path):
    assert wished() is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert wished() == Wish("DeepSpeed's ZeRO-2 (its engine is not used)", False)  # accelerate's default
    path = tmp_path / "ds.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # the file comes first
    path.write_text('{"zero_optimization": {"stage": 3}}')
    assert wished().spread
    path.write_text('{"optimizer": {}}')
    assert not wished().spread
    path.write_text('{"zero_optimization": {"stage": 4}}')
    with pytest.raises(UserError, match=r"zero_optimization.stage of .* must be one of .*, not '4'"):
        wished()
    path.write_text('{"zero_optimization": {"stage": "auto"}}')  # accelerate fills in its own
    assert wished() == Wish("DeepSpeed's ZeRO-2 (its engine is not used)", False)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert wished().spread
    for text in ("{", "[]", '{"zero_optimization": 3}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"configuration of DeepSpeed .*ds.json cannot be read: .*; mend"):
            wished()


@pytest.mark.parametrize(("version", "spread"), [("1", False), ("2", True)])
def test_fsdp_that_is_not_to_shard(version, spread, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", "NO_SHARD")
    assert wished().spread is spread


@pytest.mark.slow
def test_accelerate_launch_with_fsdp_evaluates_and_saves_as_ever(tiny_sd15_folder, tmp_path):
    sets = ["data.num_workers=0", "data.num_examples=16", "train.log_every=1", "softrepa.temperature=0.3"]
    sets += ["eval.num_prompts=4", "sample.steps=2", "sample.guidance=1.0"]
    words = ["train", "softrepa", "--model", str(tiny_sd15_folder), "--preset", "none", "--steps", "2"]
    words += [w for value in sets for w in ("--set", value)] + ["--batch-size", "4", "--device", "cpu"]
    launch = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--main_process_port", free_port()]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "align_cli", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    out = ["--out", str(tmp_path / "two")]
    done = subprocess.run([*command, *out], env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: accelerate asks for FSDP") == 1 and "returned a view" not in done.stderr
    ok(*words, "--out", tmp_path / "one")
    found = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert found[0]["evaluation"]["arms"][0] == found[1]["evaluation"]["arms"][0]
    files = [sorted(os.listdir(tmp_path / name / "adapter")) for name in ("one", "two")]
    assert files[0] == files[1]
