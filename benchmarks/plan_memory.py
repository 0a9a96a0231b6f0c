"""What `t2ialign train --dry-run` says a step needs, against what the allocator was asked for in a real step.

    python benchmarks/plan_memory.py --size small medium --out FOLDER

Models have random weights (medium: pipelines that are written to FOLDER first, as diffusers saves them). The
real step is the second of a run, so that optimiser states are there; its peak is the running sum of the
allocation events of torch's profiler, on top of the weights, trained tensors and optimiser states that are
there before. CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from parts import denoiser, facts, peak_memory
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from align_cli import config, registry
from align_cli.models.loading import load_model
from align_cli.planning.batch import planned_batch
from align_cli.planning.step import plan_step
from align_cli.rewards.loading import forget_rewards
from align_cli.training.learner import Learner

aten = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""Not in torch's table of FLOPs."""

TINY = {"sd15": "tiny-sd15", "sdxl": "tiny-sdxl", "sd3": "tiny-sd3"}
CASES: dict[str, tuple[str, list[str]]] = {
    "softrepa": ("softrepa", []),
    "softrepa, pair_chunk 4": ("softrepa", ["softrepa.pair_chunk=4"]),
    "softrepa, checkpointing": ("softrepa", ["train.gradient_checkpointing=true"]),
    "softrepa, bf16": ("softrepa", ["train.precision=bf16"]),
    "textcraftor": ("textcraftor", []),
    "longalign align": ("longalign", ["longalign.stage=align"]),
    "longalign reward": (
        "longalign", ["longalign.stage=reward", 'longalign.t5=""', "longalign.rewards={tiny-denscore=1.0}"]
    ),
    "dpt tune": ("dpt", ["dpt.stage=tune"]),
    "comat": ("comat", []),
}  # fmt: skip
FAMILIES = {"softrepa": ("sd15", "sdxl", "sd3"), "textcraftor": ("sd15", "sdxl", "sd3")}


def pipeline(family: str, folder: Path) -> Path:
    """A medium pipeline with random weights, as an ordinary folder: the embedded one's, with other parts."""
    import shutil

    from diffusers import SD3Transformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    place = folder / f"medium-{family}"
    if (place / "model_index.json").exists():
        return place
    shutil.copytree(registry.WEIGHTS / TINY[family], place)
    torch.manual_seed(0)
    body: Any = denoiser(family, "medium")
    assert isinstance(body, (UNet2DConditionModel, SD3Transformer2DModel))
    body.save_pretrained(place / ("transformer" if family == "sd3" else "unet"))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
    )
    vae.save_pretrained(place / "vae")
    plain, projecting = CLIPTextModel, CLIPTextModelWithProjection
    kinds = {"sd15": [plain], "sdxl": [plain, projecting], "sd3": [projecting, projecting]}
    for number, cls in enumerate(kinds[family]):
        name = "text_encoder" if number == 0 else f"text_encoder_{number + 1}"
        held = json.loads((place / name / "config.json").read_text())
        sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
        sizes |= {"num_hidden_layers": 6, "projection_dim": 256}
        cls(CLIPTextConfig(**{**held, **sizes})).save_pretrained(place / name)
    return place


def resolved(case: str, model: str, family: str, more: list[str]) -> config.Resolved:
    method, sets = CASES[case]
    stage = next((s.partition("=")[2] for s in sets if ".stage=" in s), "")
    preset = "/".join([method, TINY[family] + (f"-{stage}" if stage else "")])
    preset = preset if preset in config.list_presets() else config.NO_PRESET
    return config.resolve(method, preset=preset, sets=[*sets, *more], flags={"model.name": model})


def bytes_of(tensors: Iterator[Tensor]) -> int:
    """Of different storages."""
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(found.values())


def tensors_in(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Those that an object, its attributes, modules, lists and dictionaries hold."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from (*thing.parameters(), *thing.buffers())
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_in(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from tensors_in(value, seen)
    elif type(thing).__module__.startswith("align_cli"):
        yield from tensors_in(getattr(thing, "__dict__", {}), seen)


def measured(chosen: config.Resolved) -> tuple[int, int]:
    """Bytes at the peak, and FLOPs, of a real step."""
    forget_rewards()
    model = load_model(chosen.model)
    if chosen.train.gradient_checkpointing:
        cast("Any", model.denoiser).enable_gradient_checkpointing()
    method = registry.load(registry.METHODS, chosen.method)(
        model, chosen.method_config, seed=chosen.train.seed
    )
    method.check(chosen.train)
    batch = planned_batch(chosen, model)[0]
    learner = Learner(method, chosen.train)
    step: Callable[[], Any] = lambda: learner.step(0, repeat(batch))  # noqa: E731
    step()
    states = [s for o in learner.optimizers.values() for s in o.state.values()]
    before = bytes_of(tensors_in([model, method, states, learner.ema, batch], set()))
    gc.collect()
    peak = before + peak_memory(step, torch.device("cpu"))
    if chosen.method == "comat":  # the hooks of torch's counter do not allow its nested gradients
        return peak, 0
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step()
    return peak, counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["small"], choices=["small", "medium"])
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--family", nargs="+", default=list(TINY))
    parser.add_argument("--out", type=Path, help="folder of the medium models; default: a temporary one")
    parser.add_argument("--set", dest="sets", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(facts("cpu", 1)), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for size in options.size:
            for case in options.case:
                for family in FAMILIES.get(case.partition(",")[0], ("sd15", "sdxl")):
                    if family not in options.family:
                        continue
                    name = TINY[family]
                    if size == "medium":
                        name = str(pipeline(family, options.out or Path(temporary)))
                    chosen = resolved(case, name, family, options.sets)
                    plan = plan_step(chosen, as_gpu=False)
                    peak, flops = measured(chosen)
                    row = {
                        "case": case, "size": size, "family": family,
                        "estimated_mib": round(plan.peak / 2**20, 1), "measured_mib": round(peak / 2**20, 1),
                        "ratio": round(plan.peak / peak, 3),
                        "flops_ratio": round(sum(plan.flops.values()) / flops, 4) if flops else None,
                    }  # fmt: skip
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
