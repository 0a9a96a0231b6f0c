"""Adapters of CoMat for other tools: the UNet's LoRA, and the official file."""

from __future__ import annotations

from safetensors.torch import save_file

from align_cli.adapters import Adapter
from align_cli.errors import UserError
from align_cli.exporting import Job, Part, Report, Trained
from align_cli.exporting.compare import Largest, writing
from align_cli.exporting.lora import cast
from align_cli.methods.comat.method import LORA
from align_cli.methods.comat.release import FILE, official_key, read_release
from align_cli.models.states import by_group

FAMILIES = ("sd15", "sdxl")
"""Of the official code."""


def trained(adapter: Adapter) -> Trained:
    """The LoRA of the UNet. UserError if it holds none."""
    groups = by_group(adapter.state)
    if LORA not in groups:
        raise UserError(f"adapter {adapter.path} is damaged: it holds no LoRA ({LORA}.*)")
    return Trained([Part(LORA, groups[LORA], 1.0)], [])


def write_official(job: Job) -> Report:
    """`pytorch_lora_weights.safetensors`, read again as an import does.

    Raises:
        UserError: a model that the official code does not have.
    """
    if job.adapter.info.family not in FAMILIES:
        raise UserError(
            f"the official code of CoMat knows Stable Diffusion 1.5 and XL; this adapter is for "
            f"{job.adapter.info.family}: export it with --to diffusers, peft, kohya or comfyui"
        )
    (part,) = job.parts
    file, report, largest = job.folder / FILE, Report(), Largest()
    with writing(file):
        tensors = {official_key(key): x for key, x in part.state.items()}
        save_file(cast(tensors, job.dtype), file, metadata={"format": "pt"})
    dtype = str(job.dtype).removeprefix("torch.")
    report.written[FILE] = (
        f"LoRA of rank {part.rank} on {len(part.layers)} layers, the official file, {dtype}"
    )
    largest.tensors(read_release(file, job.model)[1], job.adapter.state)
    report.check.append(largest.line("read again as a released file", job.dtype))
    report.notes.append(
        "the official keys begin with unet.unet., which diffusers does not read; --to diffusers does it"
    )
    return report
