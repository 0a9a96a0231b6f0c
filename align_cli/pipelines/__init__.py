"""Adapters in the pipelines of diffusers: `align_cli.load_pipeline`.

Model, adapters and settings are decided as `t2ialign sample` decides them, by the same plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from align_cli.adapters import load_adapter, parse_spec
from align_cli.drawing import make_plan
from align_cli.errors import UserError, unknown
from align_cli.exporting.compare import silent
from align_cli.models.sources import find, read_json
from align_cli.pipelines.installed import Installed, installed_on
from align_cli.pipelines.schedulers import scheduler_for
from align_cli.pipelines.stock import stock_pipeline

__all__ = ["call_options", "load_pipeline", "remove_adapters"]

MODEL_OPTIONS = (
    "device", "dtype", "text", "unet", "vae", "t5_length", "segment_length", "splitter",
)  # fmt: skip
DRAWING_OPTIONS = ("sampler", "spacing", "steps", "guidance", "eta", "image_size", "from_step")
ELSEWHERE = {
    "self_correct": "self-correction moves the latents by a gradient, for which a pipeline of diffusers has "
    "no place; draw with t2ialign sample --self-correct",
    "correction": "it belongs to self-correction; draw with t2ialign sample --self-correct",
    "batch_size": "a pipeline draws all prompts of a call at once; give it fewer prompts",
    "encoder_device": "a pipeline has one device; take device, or pipe.enable_model_cpu_offload()",
    "seed": "give the call generator=torch.Generator().manual_seed(SEED)",
}
"""Options of `t2ialign sample` that are none here -> what to do."""


def load_pipeline(model: str | None = None, adapters: str | Sequence[str] = (), **options: Any) -> Any:
    """A pipeline of diffusers with adapters at work, for as long as it lives or until `remove_adapters`.

        pipe = load_pipeline("sd3", ["runs/softrepa", "runs/textcraftor@0.7"])
        pipe("a red cube", **call_options(pipe), generator=torch.Generator().manual_seed(42)).images[0]

    is the picture of `t2ialign sample --adapter ... --prompt "a red cube" --seed 42`, up to rounding.
    docs/adapters.md says what holds of prompts, negative prompts, embeddings, callbacks, devices.

    Args:
        model: alias, hub id or folder; None: the base model of the first adapter, or the embedded one.
        adapters: "FOLDER" or "FOLDER@SCALE" each, the first innermost; or names of the index.
        options: settings above those that the first adapter (or the preset of the model) has: device,
        dtype, text, unet, vae, t5_length, segment_length, splitter; sampler, spacing (both choose the
        scheduler), steps, guidance, eta, image_size (all in `call_options`), from_step.
    Returns:
        StableDiffusionPipeline, StableDiffusionXLPipeline or StableDiffusion3Pipeline.
    Raises:
        UserError: whatever stops `t2ialign sample`; an option that a pipeline has no place for.
    """
    specs = [adapters] if isinstance(adapters, str) else list(adapters)
    for name in options:
        if name in ELSEWHERE:
            raise UserError(f"load_pipeline takes no {name}: {ELSEWHERE[name]}")
        if name not in MODEL_OPTIONS + DRAWING_OPTIONS:
            raise unknown("option", name, MODEL_OPTIONS + DRAWING_OPTIONS, where="load_pipeline")
    plain = {name: str(value).removeprefix("torch.") if name in ("device", "dtype") else value
             for name, value in options.items() if value is not None}  # fmt: skip
    plan = make_plan(
        model,
        specs,
        {name: value for name, value in plain.items() if name in MODEL_OPTIONS},
        {name: value for name, value in plain.items() if name in DRAWING_OPTIONS},
    )
    if plan.sample.self_correct:
        warnings.warn(f"the recorded self_correct is left out: {ELSEWHERE['self_correct']}", stacklevel=2)
        plan = replace(plan, sample=replace(plan.sample, self_correct=0.0))
    loaded, plan = plan.load(quiet=True)
    source = find(plan.model.name)
    config = read_json(source.folder / "scheduler" / "scheduler_config.json", source.label)
    with silent():
        scheduler = scheduler_for(loaded.process, config, plan.sample)
        pipe = stock_pipeline(loaded, scheduler)
    found = [(load_adapter(path), scale) for path, scale in map(parse_spec, specs)]
    Installed(pipe, loaded, found, plan.sample).install()
    return pipe


def call_options(pipe: Any) -> dict[str, Any]:
    """Arguments for a call of the pipeline with which it draws as `t2ialign sample` does: steps, guidance,
    side; eta of DDIM.

    Raises:
        UserError: no adapters of ours are (any longer) on this pipeline.
    """
    return installed_on(pipe).call_options()


def remove_adapters(pipe: Any) -> None:
    """Take all adapters off again: the pipeline is the stock one of its base model (its scheduler stays).

    Raises:
        UserError: none are on it.
    """
    installed_on(pipe).remove()
