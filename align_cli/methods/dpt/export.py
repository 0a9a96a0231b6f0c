"""Adapters of DPT for other tools: the UNet's LoRA, the discriminator beside it, and the official file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file

from align_cli import config
from align_cli.adapters import Adapter
from align_cli.errors import UserError
from align_cli.exporting import Job, Part, Report, Trained, other_formats
from align_cli.exporting.compare import Largest, writing
from align_cli.methods.dpt.config import DISCRIMINATOR, DPTConfig
from align_cli.methods.dpt.release import FAMILIES, FILE, MATCHING_QUERIES, official_state, read_state
from align_cli.models.sources import DENOISERS
from align_cli.models.states import by_group

BESIDE = "discriminator.safetensors"
OPTIONS = {
    "feature": ("--unet_feature", "up1"),
    "hidden_dim": ("--hidden_dim", 256),
    "num_heads": ("--nheads", 8),
    "feedforward_dim": ("--dim_feedforward", 2048),
    "num_encoder_layers": ("--enc_layers", 1),
    "num_decoder_layers": ("--dec_layers", 1),
    "pre_norm": ("--pre_norm", False),
    "position": ("--position_embedding", "sine"),
    "num_matching_queries": ("--num_queries_matching", MATCHING_QUERIES),
    "num_grounding_queries": ("--num_queries_rec", 100),
    "phrase_dim": ("--contrastive_loss_hdim", 64),
    "lora_rank": ("--lora_rank", 4),
}  # fmt: skip
"""Setting -> option of the official code that a file needs, and what that is if it is not given."""


def trained(adapter: Adapter) -> Trained:
    """The LoRA of the denoiser, none of stage probe; the discriminator beside it.

    Raises:
        UserError: it holds no discriminator.
    """
    groups = by_group(adapter.state)
    if DISCRIMINATOR not in groups:
        raise UserError(f"adapter {adapter.path} is damaged: it holds no discriminator ({DISCRIMINATOR}.*)")

    def beside(folder: Path) -> Report:
        with writing(folder / BESIDE):
            save_file({key: x.contiguous() for key, x in groups[DISCRIMINATOR].items()}, folder / BESIDE)
        return Report(
            written={BESIDE: "the discriminator, with the official names of its tensors, float32"},
            notes=[
                "the LoRA works without the discriminator, which t2ialign uses for --self-correct and for "
                "eval dpt-probe: no other tool does"
            ],
        )

    parts = [Part(name, state, 1.0) for name, state in groups.items() if name in DENOISERS]
    return Trained(parts, [], whole=False, beside=beside, groups={DISCRIMINATOR: BESIDE})


def write_official(job: Job) -> Report:
    """`pytorch_model.bin` with discriminator and LoRA, read again as an import does.

    Raises:
        UserError: a model that the official code does not have; a rank.
    """
    info, state = job.adapter.info, job.adapter.state
    if info.family not in FAMILIES:
        raise UserError(
            f"the official code of DPT knows Stable Diffusion 1.x and 2.x; this adapter is for {info.family}"
            f": export it with --to {other_formats(info.family)}"
        )
    if job.rank:
        raise UserError("the LoRA of an official file has the rank that was trained; leave --rank out")
    report = Report()
    with writing(job.folder / FILE):
        torch.save(official_state(state, job.dtype), job.folder / FILE)
    parts = f"discriminator and LoRA of rank {job.parts[0].rank}" if job.parts else "discriminator"
    dtype = str(job.dtype).removeprefix("torch.")
    report.written[FILE] = f"{parts}, the official file, {dtype}"
    largest = Largest()
    largest.tensors(read_state(job.folder / FILE), state)
    report.check.append(largest.line("read again as a released file", job.dtype))
    report.notes += _unsaid(job.adapter, bool(job.parts))
    return report


def _unsaid(adapter: Adapter, tuned: bool) -> list[str]:
    """A line with what the official code has to be told, if it is not what it takes for granted."""
    raw: Mapping[str, object] = {**adapter.info.config, "method": adapter.info.method}
    found = config.Resolved.from_dict(raw, where=f"adapter {adapter.path}: config").method_config
    c = cast("DPTConfig", found)
    given = [
        f"{option} {value}"
        for name, (option, usual) in OPTIONS.items()
        if (value := getattr(c, name)) not in (usual, "") and (tuned or name != "lora_rank")
    ]
    return [f"the file does not tell the official code: {' '.join(given)}"] if given else []
