"""One SoftREPA training step (loss and gradient of all n x n pairs) against the straightforward form: the
whole batch in one graph. Random weights; time, peak memory, difference of loss and gradient, in one run.

    python benchmarks/softrepa_step.py --size small medium --n 4 8 16 --threads 2
    python benchmarks/softrepa_step.py --size real --family sd3 --device cuda --precision bf16 --n 4 8

Memory is what the step allocates on top of weights and inputs: torch's allocator on a GPU, the profiler's
allocation events on a CPU. Times are medians of steps taken in turns. On a GPU, FLOPs are counted by torch
and set against --peak-tflops (989 for bf16 on an H100 or H200) as model FLOPs utilisation; what gradient
checkpointing computes again does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from parts import T5_ROWS, TEXT_ROWS, denoiser, facts, peak_memory
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from align_cli.diffusion.flow import FlowProcess
from align_cli.diffusion.process import NoiseProcess
from align_cli.losses import denoising_error, softrepa_loss
from align_cli.methods.softrepa.config import SoftREPAConfig
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.models.base import TextCond
from align_cli.models.sd3 import mmdit_predict
from align_cli.models.sdxl import size_ids
from align_cli.models.unet import unet_predict
from align_cli.shapes.build import components


class Model:
    """What SoftREPA needs of a model to take a step on encodings that are there."""

    model_id = "random"

    def __init__(self, family: str, size: str, device: str, dtype: torch.dtype) -> None:
        self.family, self.device, self.dtype = family, torch.device(device), dtype
        self.denoiser = denoiser(family, size).to(device, dtype).eval().requires_grad_(False)
        if isinstance(self.denoiser, UNet2DConditionModel) and device == "cpu":  # as the model loader does
            self.denoiser.to(memory_format=torch.channels_last)
        self.process = (
            FlowProcess.from_scheduler_config(dict(components.flow_scheduler().config))
            if family == "sd3"
            else NoiseProcess.from_scheduler_config(dict(components.scheduler().config))
        )

    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        if self.family == "sd3":
            return mmdit_predict(self.denoiser, z_t, t, cond)
        if self.family == "sdxl":
            cond = replace(cond, time_ids=size_ids(z_t, 8))
        return unet_predict(self.denoiser, z_t, t, cond)


@dataclass
class Inputs:
    """Latents, texts and noise of one step."""

    latents: Tensor
    texts: TextCond
    eps: Tensor
    t: Tensor
    own: Tensor


def inputs(model: Model, size: str, n: int) -> Inputs:
    rng = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(model.device)

    config = model.denoiser.config
    side, pooled = config.sample_size, None
    width = config.joint_attention_dim if model.family == "sd3" else config.cross_attention_dim
    rows = TEXT_ROWS[size] + (T5_ROWS[size] if model.family == "sd3" else 0)
    if model.family == "sd3":
        pooled = draw(n, config.pooled_projection_dim)
    elif model.family == "sdxl":
        pooled = draw(n, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    shape = (config.in_channels, side, side)
    own = torch.arange(n, device=model.device)
    eps, t = draw(1, *shape).expand(n, -1, -1, -1), torch.tensor(400, device=model.device)
    return Inputs(draw(n, *shape), TextCond(draw(n, rows, width), pooled), eps, t, own)


def straightforward(method: SoftREPA, x: Inputs) -> float:
    """All pairs in one graph, as the official train.py."""
    model, n = method.model, len(x.own)
    noisy = model.process.add_noise(x.latents, x.eps, x.t)
    target = model.process.target(x.latents, x.eps, x.t)
    columns = torch.arange(n, device=x.t.device).repeat_interleave(n)
    with method.attach(model):
        pred = model.predict(noisy.repeat(n, 1, 1, 1), x.t, x.texts[columns])
        err = denoising_error(pred, target.repeat(n, 1, 1, 1)).view(n, n).T
        loss = softrepa_loss(err, x.own, temperature=method.config.temperature)
        loss.backward()
    return float(loss.detach())


def ours(method: SoftREPA, x: Inputs) -> float:
    """The step as the training loop takes it."""
    losses: list[float] = []

    def backward(loss: Tensor) -> None:
        loss.backward()
        losses.append(float(loss.detach()))

    method.contrast(x.latents, x.texts, x.eps, x.t, x.own, x.texts[:0], backward)
    return losses[0]


def gradient(method: SoftREPA) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.tokens.parameters() if p.grad is not None])


def measure(
    family: str, size: str, counts: list[int], options: argparse.Namespace
) -> list[dict[str, object]]:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    model = Model(family, size, options.device, dtype)
    rows: list[dict[str, object]] = []
    for n in counts:
        x = inputs(model, size, n)
        methods = {
            "straightforward": make(model, 0),
            f"pair_chunk {options.pair_chunk}": make(model, options.pair_chunk),
            f"pair_chunk {options.pair_chunk}, checkpointed": make(model, options.pair_chunk),
        }
        if n * n <= options.pair_chunk:
            methods = dict(list(methods.items())[:2])
        rows += forms(model, methods, x, n, options) if n <= options.most else flat(model, methods, x, n)
        for row in rows[-len(methods) :]:
            row |= {"family": family, "size": size}
            print(json.dumps(row), flush=True)
    return rows


def make(model: Model, chunk: int) -> SoftREPA:
    # random weights have errors of about 1, where the official temperature leaves no gradient
    config = SoftREPAConfig(use_t_table=True, init="normal", pair_chunk=chunk, temperature=1.0)
    return SoftREPA(model, config)  # type: ignore[arg-type]


def runner(model: Model, name: str, method: SoftREPA, x: Inputs) -> Callable[[], float]:
    def run() -> float:
        method.tokens.zero_grad(set_to_none=True)
        if name == "straightforward":
            return straightforward(method, x)
        if "checkpointed" not in name:
            return ours(method, x)
        model.denoiser.enable_gradient_checkpointing()
        try:
            return ours(method, x)
        finally:
            model.denoiser.disable_gradient_checkpointing()

    return run


def forms(
    model: Model, methods: dict[str, SoftREPA], x: Inputs, n: int, options: argparse.Namespace
) -> list[dict[str, object]]:
    """All forms in turns, each against the straightforward one."""
    runs = {name: runner(model, name, method, x) for name, method in methods.items()}
    losses = {name: run() for name, run in runs.items()}  # warm, too
    grads = {name: gradient(method) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeat):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    memory = {name: peak_memory(run, model.device) for name, run in runs.items()}
    first = next(iter(runs))
    flops = 0
    if model.device.type == "cuda":
        with FlopCounterMode(display=False) as counter:
            runs[first]()
        flops = counter.get_total_flops()
    rows = []
    for name in runs:
        seconds = statistics.median(times[name])
        row: dict[str, object] = {
            "n": n,
            "form": name,
            "seconds": round(seconds, 4),
            "time_ratio": round(seconds / statistics.median(times[first]), 3),
            "peak_mib": round(memory[name] / 2**20, 1),
            "memory_ratio": round(memory[name] / memory[first], 3),
            "loss_difference": abs(losses[name] - losses[first]),
            "gradient_difference": float((grads[name] - grads[first]).norm() / grads[first].norm()),
        }
        if flops:
            row |= {"tflop": flops / 1e12, "mfu": round(flops / seconds / options.peak_tflops / 1e12, 3)}
        rows.append(row)
    return rows


def flat(model: Model, methods: dict[str, SoftREPA], x: Inputs, n: int) -> list[dict[str, object]]:
    """Memory alone, where the straightforward form does not fit."""
    del methods["straightforward"]
    rows: list[dict[str, object]] = []
    for name, method in methods.items():
        peak = peak_memory(runner(model, name, method, x), model.device)
        rows.append({"n": n, "form": name, "peak_mib": round(peak / 2**20, 1)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", default=["sd15", "sdxl", "sd3"])
    parser.add_argument("--size", nargs="+", default=["small"], choices=["small", "medium", "real"])
    parser.add_argument("--n", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--most", type=int, default=8, help="largest n of the straightforward form")
    parser.add_argument("--pair-chunk", type=int, default=SoftREPAConfig().pair_chunk)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of the weights")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.deterministic = True  # as the training loop does
    found = facts(options.device, options.threads) | {"precision": options.precision}
    print(json.dumps(found), flush=True)
    rows = [row for s in options.size for f in options.family for row in measure(f, s, options.n, options)]
    if options.json:
        options.json.write_text(json.dumps({"facts": found, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
