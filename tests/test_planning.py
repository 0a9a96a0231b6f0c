"""Costs that are counted without numbers, against numbers worked out by hand and against real steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cli_helpers import ok, refused

from align_cli import config
from align_cli.cli.planned import gpu_rows, on_gpu, precision_of, time_text
from align_cli.models.empty import fake_tensor
from align_cli.models.loading import load_model
from align_cli.planning.counting import BACKWARD, OTHER, Counting, WithoutNumbers
from align_cli.planning.gpus import GPUS, gpu_named
from align_cli.planning.step import plan_step
from align_cli.settings import ModelSettings

PUBLISHED = {
    "sd15": (859_520_964, 83_653_863, [123_060_480]),
    "sd21-base": (865_910_724, 83_653_863, [340_387_840]),
    "sdxl": (2_567_463_684, 83_653_863, [123_060_480, 694_659_840]),
    "sd3": (2_028_328_000, 83_819_683, [123_650_304, 694_659_840, 4_762_310_656]),
}
"""Alias -> parameters of denoiser, autoencoder and text encoders, as counted in the published weights."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_packaged_architectures_have_the_published_sizes(name):
    model = load_model(ModelSettings(name=name), empty=True)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model.denoiser, model.vae, *model.encoders)]
    assert (sizes[0], sizes[1], sizes[2:]) == PUBLISHED[name]


def empty(*shape: int, grad: bool = False) -> torch.Tensor:
    return fake_tensor(torch.empty(*shape, device="meta")).requires_grad_(grad)


def test_flops_and_bytes_of_a_linear_layer_by_hand():
    x, w = empty(8, 16, grad=True), empty(32, 16, grad=True)
    with Counting() as counting:
        for tensor in (x, w):
            counting.know(tensor)
        weights = 4 * (8 * 16 + 32 * 16)
        y = F.linear(x, w)
        assert counting.count.held == weights + 4 * 8 * 32
        y.sum().backward()
    assert counting.count.flops == {OTHER: 2 * 8 * 16 * 32, BACKWARD: 2 * 2 * 8 * 16 * 32}
    assert counting.count.held == weights + 4 * 8 * 32 + weights  # y, and both gradients
    del tensor, y, x, w
    assert counting.count.held == 0


def test_flops_of_a_convolution_and_of_attention_by_hand():
    with Counting() as counting:
        F.conv2d(empty(2, 3, 16, 16), empty(5, 3, 3, 3), padding=1)
    assert counting.count.all_flops == 2 * 2 * 16 * 16 * 5 * 3 * 9
    with Counting() as counting:
        F.scaled_dot_product_attention(*(empty(2, 4, n, 8) for n in (16, 10, 10)))
    assert counting.count.all_flops == 2 * (2 * 2 * 4 * 16 * 10 * 8)


def test_reading_a_number_does_not_stop_the_count():
    with WithoutNumbers(as_gpu=False), Counting():
        x = empty(3)
        assert float(x.sum()) == 1.0
        assert bool(torch.isfinite(x).all())
        assert x.numpy().shape == (3,)


def test_cuda_normalises_in_float32_under_autocast():
    with WithoutNumbers(as_gpu=True), torch.autocast("cpu", torch.bfloat16):
        x = empty(4, 8).bfloat16()
        assert F.layer_norm(x, (8,)).dtype == torch.float32
        assert F.linear(x, empty(8, 8)).dtype == torch.bfloat16


def plan(*sets: str, gpu: bool = False, model: str = "tiny-sd15"):
    small = ["train.batch_size=2", *sets]
    return plan_step(config.resolve("softrepa", sets=small, flags={"model.name": model}), as_gpu=gpu)


@pytest.mark.slow
def test_what_saves_memory_shows():
    whole = plan()
    assert plan("train.gradient_checkpointing=true").peak < whole.peak
    assert plan("softrepa.pair_chunk=1").peak < whole.peak
    four = "train.batch_size=4"
    assert plan("train.precision=bf16", four).peak < plan(four).peak


@pytest.mark.slow
def test_offloaded_encoders_do_not_count_among_the_weights():
    here, away = plan(gpu=True), plan("model.encoder_device=offload", gpu=True)
    frozen = here.frozen
    assert here.weights - away.weights == 4 * (frozen["vae"] + frozen["text_encoder"]) + here_buffers()
    assert away.peak < here.peak


def here_buffers() -> int:
    model = load_model(ModelSettings(), empty=True)
    return sum(x.nbytes for m in (model.vae, *model.encoders) for x in m.buffers())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["softrepa", "longalign align", "textcraftor", "dpt tune", "comat"])
def test_a_real_step_of_tiny_models_needs_what_was_planned(case, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import plan_memory

    chosen = plan_memory.resolved(case, "tiny-sd15", "sd15", [])
    planned = plan_step(chosen, as_gpu=False)
    peak, flops = plan_memory.measured(chosen)
    assert planned.peak == pytest.approx(peak, rel=0.15)
    if case != "comat":
        assert sum(planned.flops.values()) == pytest.approx(flops, rel=0.05)


def test_a_batch_that_processes_cannot_share_is_refused_as_in_the_real_run():
    words = ["train", "softrepa", "--dry-run", "--no-costs", "--num-processes", 2, "--batch-size"]
    assert "train.batch_size 7 cannot be split over 2 processes" in refused(*words, 7)
    ok(*words, 8)


# ---------------------------------------------------------------- hours


def test_hours_by_hand():
    gpu = gpu_named("a100-80gb")
    found = on_gpu(gpu, 312e12 * 3600, "fp16", 0.5, 10)
    assert found["hours"] == 2.0 and found["fits"]
    assert gpu_rows(found)[0][1].startswith("2 hours (assumes 50% of 312 TFLOPs")
    assert [time_text(hours) for hours in (0.000323, 0.2, 1.5, 1234)] == [
        "1.2 s",
        "12 min",
        "1.5 hours",
        "1,234 hours",
    ]
    assert not on_gpu(gpu, 1, "fp16", 0.5, 80 * 2**30)["fits"]
    rows = [gpu_rows(on_gpu(gpu, 1, "fp16", 0.5, n * 2**30))[1][1] for n in (71, 73, 81)]
    assert [row.partition(": ")[2] for row in rows] == [
        "fits",
        "WARNING: tight, a tenth should stay free",
        "WARNING: does not fit",
    ]


def test_gpus_by_other_spellings():
    assert gpu_named("4090") is GPUS["RTX-4090"]
    assert gpu_named("rtx 3090").name == "RTX-3090"


def test_half_weights_compute_in_half():
    assert precision_of("fp32", "float16") == "fp16"
    assert precision_of("bf16", "float16") == "bf16"
    assert precision_of("fp32", "float32") == "fp32"


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_dry_run_says_the_costs_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ok("train", "softrepa", "--batch-size", 2, "--dry-run", "--gpu", "T4").stdout
    for words in ("group softrepa", "FLOPs per step of 2", "memory at the peak, on a GPU", "time on one T4"):
        assert words in text
    assert "assumes 35% of 8.1 TFLOPs in fp32" in text and "16.00 GiB: fits" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_json_holds_settings_and_plan():
    found = json.loads(ok("train", "softrepa", "--batch-size", 2, "--dry-run", "--json").stdout)
    assert found["settings"]["train.batch_size"] == {"value": 2, "origin": "--batch-size"}
    assert found["plan"]["memory"]["peak"] > found["plan"]["memory"]["weights"] > 0


@pytest.mark.slow
def test_encode_and_eval_say_theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode = ok("encode", "--limit", 8, "--dry-run").stdout
    assert "plan of one process" in encode and "autoencoder" in encode
    drawn = ok("eval", "shapes", "--n", 4, "--steps", 2, "--batch-size", 2, "--dry-run").stdout
    assert "4 pictures: 4 prompts x 1 x 1 arms" in drawn
    assert re.search(r"sample\.steps +2 +--steps\n", drawn)
    assert re.search(r"sample\.guidance +\S+ +preset softrepa/tiny-sd15\n", drawn)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_encode_says_where_its_settings_come_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["encode", "--limit", 8, "--layout", "captions", "--dry-run", "--no-costs"]
    text = ok(*words).stdout
    for key, value, origin in (
        ("model.name", '"tiny-sd15"', "preset softrepa/tiny-sd15"),
        ("data.num_examples", "8", "--limit"),
        ("train.batch_size", "8", "preset softrepa/tiny-sd15"),
        ("layout", '"captions"', "--layout"),
        ("shard_items", "256", "default"),
    ):
        assert re.search(rf"^{re.escape(key)} +{re.escape(value)} +{origin}$", text, re.MULTILINE), key
    drawn = ok("encode", "--for", "comat", "--guidance", 3, "--dry-run", "--no-costs").stdout
    for key, value, origin in (
        ("sample.guidance", "3.0", "--guidance"),
        ("sample.steps", "50", "--for comat"),
        ("train.batch_size", "8", "--for comat"),
    ):
        assert re.search(rf"^{re.escape(key)} +{re.escape(value)} +{origin}$", drawn, re.MULTILINE), key


def figure(text: str, line: str) -> tuple[float, str]:
    """The number and the unit of a line of a plan."""
    found = re.search(rf"{line} +([\d.,]+) (\w+)", text)
    assert found is not None, text
    return float(found[1]), found[2]


@pytest.mark.slow
def test_drawing_for_a_method_is_planned_at_the_size_and_with_the_sampler_that_it_has():
    """The embedded models have four pixels a latent, SD3 draws with euler: both as in the real command."""
    drawn = ok("encode", "--for", "comat", "--limit", 8, "--dry-run").stdout
    drawing = ["--sampler", "ddpm", "--guidance", 7.5, "--batch-size", 8, "--steps", 50]
    alike = ok("eval", "shapes", "--n", 8, *drawing, "--dry-run").stdout
    assert "autoencoder" not in drawn and "autoencoder" in alike
    assert re.search(r"denoiser ([\d.]+ GFLOP)", drawn)[1] == re.search(r"denoiser ([\d.]+ GFLOP)", alike)[1]
    assert "plan of one process" in ok("encode", "--for", "comat", "--model", "tiny-sd3", "--dry-run").stdout


@pytest.mark.slow
def test_weights_that_rest_elsewhere_are_none_of_the_device():
    words = ["eval", "shapes", "--n", 2, "--batch-size", 2, "--dry-run", "--gpu", "T4"]
    here, away = (ok(*words, *more).stdout for more in ([], ["--encoder-device", "offload"]))
    weights = "weights, trained and frozen"
    frozen = here_parameters("vae") + here_parameters("encoder")
    less = figure(here, weights)[0] - figure(away, weights)[0]
    assert less == pytest.approx(frozen * 4 / 2**20, abs=0.05)


def here_parameters(what: str) -> int:
    model = load_model(ModelSettings(), empty=True)
    modules = [model.vae] if what == "vae" else model.encoders
    return sum(p.numel() for m in modules for p in m.parameters())


@pytest.mark.slow
def test_a_checkpoint_has_the_planned_size(tmp_path):
    sets = ["data.num_workers=0", "data.num_examples=8", "train.ema_decay=0.9", "train.save_every=1"]
    words = ["--batch-size", 2, "--steps", 1, *(w for x in sets for w in ("--set", x))]
    plan = json.loads(ok("train", "softrepa", *words, "--dry-run", "--json").stdout)["plan"]
    ok("train", "softrepa", *words, "--no-eval", "--out", tmp_path / "run")
    planned = next(count for name, count in plan["disk"].items() if name.startswith("checkpoints (1 of"))
    size = (tmp_path / "run/checkpoints/step-00000001/state.pt").stat().st_size
    assert planned == pytest.approx(size, rel=0.05)


def test_refusals():
    assert "--gpu is for --dry-run alone" in refused("train", "softrepa", "--gpu", "T4")
    assert "did you mean 'RTX-4090'" in refused("train", "softrepa", "--dry-run", "--gpu", "RTX-4080")
    assert "dpt-probe draws nothing" in refused("eval", "dpt-probe", "--dry-run")
    text = refused("train", "softrepa", "--dry-run", "--gpu", "T4", "--set", "train.precision=bf16")
    assert "T4 has no bfloat16" in text
