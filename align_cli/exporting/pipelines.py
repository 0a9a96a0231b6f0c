"""Files that diffusers and transformers open: a folder per module of the pipeline, LoRA in one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from align_cli.errors import UserError, first_line
from align_cli.exporting import Job, Part, Report
from align_cli.exporting.compare import Largest, silent, writing
from align_cli.exporting.lora import write_pipeline_lora
from align_cli.models.loading import LOAD_ERRORS, quiet
from align_cli.models.parts import LEVEL, is_diffusers, is_flat, load_part, outline
from align_cli.models.states import check_state


def write_diffusers(job: Job) -> Report:
    """What was trained as all weights as a folder each (of a rank: as LoRA), LoRA as one file."""
    return write_parts(job, _write_whole, lambda parts: write_pipeline_lora(job, parts))


def write_parts(
    job: Job, whole: Callable[[Job, Part], Report], as_lora: Callable[[Sequence[Part]], Report]
) -> Report:
    """`whole` for every part that was trained as all weights, `as_lora` for LoRA, or all if of a rank."""
    report = Report()
    lora = [part for part in job.parts if part.lora or job.rank]
    for part in job.parts:
        if part not in lora:
            report.add(whole(job, part))
    if lora:
        report.add(as_lora(lora))
    return report


def _write_whole(job: Job, part: Part) -> Report:
    """A folder with the module as `from_pretrained` of its class opens it.

    The base model's weights are needed only where the module holds more than its parameters (SD3's table of
    positions). A text encoder is written with the level `text_model.`, which every version of transformers
    reads; from 5.6 on the class itself has none, and 4 would silently open random weights without it.
    """
    module = filled(job, part)
    cls: Any = type(module)
    folder = job.folder / part.name
    state = module.state_dict()
    options: dict[str, Any] = {}
    if is_flat(module):
        named = {f"{LEVEL}{key}": value for key, value in state.items()}
        options = {"state_dict": named, "save_original_format": False}
    with writing(folder), quiet():
        module.save_pretrained(folder, **options)  # type: ignore[operator]
    dtype = {"torch_dtype" if is_diffusers(module) else "dtype": job.dtype}
    try:
        with silent(), quiet():
            opened, info = cls.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, **dtype
            )
    except LOAD_ERRORS as error:
        raise UserError(f"{cls.__name__} does not open what was written: {first_line(error)}") from error
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise UserError(f"{cls.__name__} does not find {len(lacking)} weights, first {lacking[0]}")
    largest = Largest()
    largest.tensors(opened.state_dict(), {**state, **part.state})
    count = sum(value.numel() for value in part.state.values())
    name = str(job.dtype).removeprefix("torch.")
    said = f"{count:,} values, {name}; {cls.__name__}.from_pretrained(FOLDER)"
    line = largest.line(f"{part.name} opened with {cls.__name__}.from_pretrained", job.dtype)
    return Report(written={part.name: said}, check=[line])


def filled(job: Job, part: Part) -> nn.Module:
    """The module with the trained weights, in the dtype of the export."""
    module = outline(job.model, part.name)
    try:
        check_state({name: list(p.shape) for name, p in module.named_parameters()}, part.state)
    except ValueError as error:
        raise UserError(f"the {part.name} of the adapter does not fit {job.model}: {error}") from error
    values = {name: value.to(job.dtype) for name, value in part.state.items()}
    if module.state_dict().keys() == values.keys():
        module.load_state_dict(values, assign=True)
        return module
    module = nn.Module.to(load_part(job.model, part.name), job.dtype)
    for name, p in module.named_parameters():
        p.data = values[name]
    return module
