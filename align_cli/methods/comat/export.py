"""Adapters of CoMat for other tools: the UNet's LoRA, and the official file."""

from __future__ import annotations

from safetensors.torch import save_file

from align_cli.adapters import Adapter
from align_cli.errors import UserError
from align_cli.exporting import Job, Part, Report, Trained, other_formats
from align_cli.exporting.compare import Largest, writing
from align_cli.exporting.lora import cast
from align_cli.methods.comat.release import FILE, official_key, read_release
from align_cli.models.sources import DENOISERS
from align_cli.models.states import by_group

FAMILIES = ("sd15", "sdxl")
"""Of the official code."""


def trained(adapter: Adapter) -> Trained:
    """The LoRA of the denoiser. UserError if it holds none."""
    parts = [Part(name, state, 1.0) for name, state in by_group(adapter.state).items() if name in DENOISERS]
    if not parts:
        raise UserError(f"adapter {adapter.path} is damaged: it holds no LoRA ({' or '.join(DENOISERS)}.*)")
    return Trained(parts, [])


def write_official(job: Job) -> Report:
    """`pytorch_lora_weights.safetensors`, read again as an import does.

    Raises:
        UserError: a model that the official code does not have.
    """
    if job.adapter.info.family not in FAMILIES:
        raise UserError(
            f"the official code of CoMat knows Stable Diffusion 1.5 and XL; this adapter is for "
            f"{job.adapter.info.family}: export it with --to {other_formats(job.adapter.info.family)}"
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
