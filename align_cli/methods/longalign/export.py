"""Adapters of LongAlign for other tools: the LoRAs of all stages as one, text adapter, official files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from align_cli.adapters import Adapter
from align_cli.errors import UserError
from align_cli.exporting import Job, Part, Report, Trained
from align_cli.exporting.compare import Largest, writing
from align_cli.methods.longalign.adapter import TextAdapter
from align_cli.methods.longalign.config import ADAPTER, EARLIER, OWN
from align_cli.methods.longalign.lora_file import to_list
from align_cli.methods.longalign.release import BELOW, FAMILIES, PLAIN, read_release
from align_cli.models.parts import outline
from align_cli.models.states import LORA_A, by_group


def trained(adapter: Adapter) -> Trained:
    """The denoiser's LoRA, those of all stages stacked; the text adapter beside it.

    Raises:
        UserError: it holds no LoRA.
    """
    states = by_group(adapter.state)
    if OWN not in states:
        raise UserError(f"adapter {adapter.path} is damaged: it holds no LoRA of its own stage ({OWN}.*)")
    loras = {name: states[name] for name in (*EARLIER, OWN) if name in states}

    def beside(folder: Path) -> Report:
        report = _write_adapter(states[ADAPTER], folder) if ADAPTER in states else Report()
        whole = ", and as a whole through T5 and the text adapter" if ADAPTER in states else ""
        report.notes.append(
            f"t2ialign reads captions sentence by sentence, beyond 77 tokens{whole}; a LoRA file cannot say "
            "so: with the plain text of other tools the LoRA works, but not as it was trained"
        )
        if len(loras) > 1:
            ranks = ", ".join(
                f"{adapter.info.stage if name == OWN else name} ({_rank(state)})"
                for name, state in loras.items()
            )
            report.notes.append(f"the LoRAs of all stages are one here, whose rank is their sum: {ranks}")
        return report

    groups = dict.fromkeys(loras, OWN) | {ADAPTER: f"{ADAPTER}/"}
    part = Part(OWN, stacked(list(loras.values())), 1.0)
    return Trained([part], [], whole=False, beside=beside, groups=groups)


def stacked(loras: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One LoRA (alpha = rank) that adds what several (alpha = rank) on the same layers add together:
    rows of A below each other, columns of B side by side.
    """
    return {
        key: torch.cat([lora[key] for lora in loras], dim=0 if key.endswith(LORA_A) else 1)
        for key in loras[0]
    }


def _rank(state: Mapping[str, Tensor]) -> int:
    return next(len(value) for key, value in state.items() if key.endswith(LORA_A))


def _write_adapter(state: Mapping[str, Tensor], folder: Path) -> Report:
    """The text adapter in the official form, float32, opened again."""
    into = len(state["norm1.weight"])
    between, out = len(state["norm2.weight"]), len(state["ff2.net.2.bias"])
    module = TextAdapter(into, between, out)
    module.load(dict(state), "the adapter")
    with writing(folder / ADAPTER):
        module.to_folder(folder / ADAPTER)
    largest = Largest()
    largest.tensors(TextAdapter.from_folder(folder / ADAPTER).state_dict(), state)
    said = f"the text adapter ({into}, {between}, {out}) in the official form, float32"
    return Report(
        written={f"{ADAPTER}/": said}, check=[largest.line("text adapter read again", torch.float32)]
    )


def write_official(job: Job) -> Report:
    """The text adapter, `lora_vis.pt`, and the LoRAs of later stages, read again as an import does.

    Raises:
        UserError: a model that the official code does not have; no text adapter; stages in another order.
    """
    info, states = job.adapter.info, by_group(job.adapter.state)
    if info.family not in FAMILIES:
        raise UserError(
            f"the official code of LongAlign knows Stable Diffusion 1.x and 2.x; this adapter is for "
            f"{info.family}: export it with --to diffusers, peft, kohya or comfyui"
        )
    if ADAPTER not in states:
        raise UserError(
            "the official code of LongAlign reads T5 through a text adapter, and this adapter was trained "
            "without: export it with --to diffusers, peft, kohya or comfyui"
        )
    below = tuple(name for name in EARLIER if name in states)
    if below != BELOW[info.stage]:
        raise UserError(
            f"the official code has stage {info.stage} on {' and '.join(BELOW[info.stage]) or 'nothing'}, "
            f"here it is on {' and '.join(below) or 'nothing'}: export it with --to diffusers, peft, kohya "
            "or comfyui"
        )
    report = _write_adapter(states[ADAPTER], job.folder)
    unet = outline(job.model, OWN)
    for name in (*BELOW[info.stage], OWN):
        stage = info.stage if name == OWN else name
        file = job.folder / PLAIN[stage]
        with writing(file):
            torch.save(to_list(states[name], unet, job.dtype), file)
        dtype = str(job.dtype).removeprefix("torch.")
        report.written[file.name] = f"LoRA of stage {stage}, rank {_rank(states[name])}, {dtype}"
    largest = Largest()
    largest.tensors(read_release(job.folder, job.model)[1], job.adapter.state)
    report.check.append(largest.line("read again as released files", job.dtype))
    if job.dtype != torch.float16:
        report.notes.append("the released files of LongAlign are float16: --dtype float16 writes them so")
    return report
