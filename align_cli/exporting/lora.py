"""LoRA for peft and for the pipelines of diffusers, tried on the real base model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from align_cli import registry
from align_cli.adapters import restore
from align_cli.errors import UserError
from align_cli.exporting import Job, Part, Report
from align_cli.exporting.compare import Largest, compare_outputs, outputs, silent, writing
from align_cli.exporting.lowrank import low_rank
from align_cli.models.base import BaseModel
from align_cli.models.loading import load_model, quiet
from align_cli.models.lora import change
from align_cli.models.parts import LEVEL, is_flat, pipeline_class
from align_cli.models.sources import DENOISERS, TEXT_ENCODERS
from align_cli.models.states import LORA_B
from align_cli.models.tuning import tuning_like

NAME = "default"
"""Of the adapter inside the library: peft's own default."""
FILE = "pytorch_lora_weights.safetensors"
"""What `load_lora_weights` looks for in a folder."""

Modules = Mapping[str, nn.Module]
"""Part of the pipeline -> the base model's module."""


def write_peft(job: Job) -> Report:
    """A PEFT folder per part: adapter_config.json and adapter_model.safetensors.

    Raises:
        UserError: all weights were trained and no rank is given.
    """
    whole = next((part.name for part in job.parts if not part.lora), None)
    if whole and not job.rank:
        raise UserError(
            f"all weights of the {whole} were trained, and a PEFT folder holds LoRA: name a rank, for "
            "example --rank 64, or take --to diffusers for all weights"
        )
    return tried(job, job.parts, _save_peft, _open_peft)


def write_pipeline_lora(job: Job, parts: Sequence[Part]) -> Report:
    """One file that `load_lora_weights` of the model's pipeline reads, of those `parts` of the job.

    Raises:
        UserError: a text encoder that diffusers takes no LoRA for.
    """
    if any(part.name == TEXT_ENCODERS[2] for part in parts):
        raise UserError(f"diffusers takes no LoRA for {TEXT_ENCODERS[2]} (T5); take --to peft")
    return tried(job, parts, _save_pipeline, opening(FILE))


def tried(
    job: Job,
    parts: Sequence[Part],
    save: Callable[[Job, Sequence[Part], Modules], dict[str, str]],
    open_again: Callable[[Job, Sequence[Part], Modules], None],
) -> Report:
    """Write `parts` as LoRA, open them on the base model, and compare with the adapter at work there.

    save: writes into job.folder and says what. open_again: puts what was written to work on the modules.
    """
    with quiet():
        model = load_model(job.settings)
    modules, report = modules_of(model), Report()
    stray = [part.name for part in job.parts if part.name not in modules]
    if stray:
        raise UserError(f"the adapter holds a {stray[0]}, which {job.model} does not have")
    denoiser = any(part.name in DENOISERS for part in job.parts)
    own = outputs(model, denoiser=denoiser)
    with _at_work(job, model, modules):
        adapted = outputs(model, denoiser=denoiser)
    written = []
    for part in parts:
        if not part.lora:
            part, shares, lines = low_rank(part, modules[part.name], job.rank)
            report.left_out |= shares
            report.notes += lines
        written.append(part)
    with writing(job.folder), silent():
        report.written |= save(job, written, modules)
    with silent(), quiet():
        open_again(job, written, modules)
    largest = Largest()
    for part in written:
        for layer in part.layers:
            a, b = part.factors(layer)
            opened: Any = modules[part.name].get_submodule(layer)
            largest.tensor(opened.get_delta_weight(NAME), change(a, b) * (part.factor or 1.0))
    report.check.append(largest.line("opened by the library, changes of weights", job.dtype, slack=16))
    _put_whole([part for part in job.parts if part not in parts], modules)
    exact = all(part.lora for part in parts)
    again = outputs(model, denoiser=denoiser)
    report.check += compare_outputs(own, adapted, again, "at work", exact=exact)
    return report


@contextmanager
def _at_work(job: Job, model: BaseModel, modules: Modules) -> Iterator[None]:
    """The adapter at work; where its parts are not all of it, these alone."""
    with ExitStack() as stack:
        if job.whole:
            stack.enter_context(restore(job.adapter, model).attach(model))
        else:
            for part in job.parts:
                try:
                    tuning = tuning_like(modules[part.name], part.state)
                    tuning.load_state(part.state)
                except ValueError as error:
                    raise UserError(
                        f"the {part.name} of the adapter does not fit {job.model}: {error}"
                    ) from error
                stack.enter_context(tuning.attached(part.factor or 1.0))
        yield


def modules_of(model: BaseModel) -> dict[str, nn.Module]:
    """Part of the pipeline -> module: text encoders and denoiser."""
    named = dict(zip(TEXT_ENCODERS, model.encoders, strict=False))
    return named | {DENOISERS[model.family == "sd3"]: model.denoiser}


def _put_whole(parts: Sequence[Part], modules: Modules) -> None:
    """Trained weights in place of the base model's, for what is exported otherwise beside the LoRA."""
    for part in parts:
        for name, p in modules[part.name].named_parameters():
            p.data = part.state[name]


# ---------------------------------------------------------------- peft


def _save_peft(job: Job, parts: Sequence[Part], modules: Modules) -> dict[str, str]:
    where = registry.model_source(job.model)
    hub = None if where.startswith("embedded:") or Path(where).expanduser().is_dir() else where
    said = {}
    for part in parts:
        folder = job.folder / part.name
        alpha = (part.factor or 1.0) * part.rank
        LoraConfig(
            r=part.rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
            target_modules=part.layers,
            base_model_name_or_path=hub,
            inference_mode=True,
        ).save_pretrained(folder)
        state = {f"base_model.model.{key}": x for key, x in cast(part.state, job.dtype).items()}
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        said[part.name] = (
            f"LoRA of rank {part.rank} on {len(part.layers)} layers; peft opens it with "
            f"PeftModel.from_pretrained({part.name}, FOLDER)"
        )
        if is_flat(modules[part.name]):
            said[part.name] += " on transformers >= 5.6"
    return said


def _open_peft(job: Job, parts: Sequence[Part], modules: Modules) -> None:
    for part in parts:
        PeftModel.from_pretrained(modules[part.name], str(job.folder / part.name), adapter_name=NAME)


# ---------------------------------------------------------------- diffusers


def _save_pipeline(job: Job, parts: Sequence[Part], modules: Modules) -> dict[str, str]:
    """The library's own layout; it has no place for alpha, so that B is multiplied by alpha / rank."""
    cls = _pipeline(job)
    layers = {}
    for part in parts:
        # all versions of the libraries read the keys with this level, also those that do not have it
        level = LEVEL if is_flat(modules[part.name]) else ""
        scaled = {k: x * (part.factor or 1.0) if k.endswith(LORA_B) else x for k, x in part.state.items()}
        state = {f"{level}{key}": x for key, x in cast(scaled, job.dtype).items()}
        # of a transformer the library renames some layers and not others, and does not read the mixture
        own = part.name == "transformer"
        layers[f"{part.name}_lora_layers"] = state if own else convert_state_dict_to_diffusers(state)
    cls.save_lora_weights(job.folder, weight_name=FILE, **layers)
    names = " and ".join(f"{part.name} (rank {part.rank}, {len(part.layers)} layers)" for part in parts)
    return {FILE: f"LoRA of {names}; {cls.__name__}.load_lora_weights(FOLDER)"}


def opening(file: str) -> Callable[[Job, Sequence[Part], Modules], None]:
    """For `tried`: `load_lora_weights` of the model's pipeline, of this file in the folder of the job."""

    def open_again(job: Job, _: Sequence[Part], modules: Modules) -> None:
        cls = _pipeline(job)
        required = [
            p.name
            for p in inspect.signature(cls.__init__).parameters.values()
            if p.name != "self" and p.default is inspect.Parameter.empty
        ]
        options = {name: modules.get(name) for name in required}
        checker = {"requires_safety_checker": False} if "safety_checker" in required else {}
        cls(**options, **checker).load_lora_weights(job.folder, weight_name=file, adapter_name=NAME)

    return open_again


def _pipeline(job: Job) -> Any:
    return getattr(diffusers, pipeline_class(job.model))


def cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype).contiguous() for key, value in state.items()}
