"""Adapters of TextCraftor for other tools: their parts, and the official files."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from align_cli import config
from align_cli.adapters import Adapter
from align_cli.errors import UserError
from align_cli.exporting import Job, Part, Report, Trained
from align_cli.exporting.compare import Largest, writing
from align_cli.methods.textcraftor.config import TextCraftorConfig
from align_cli.methods.textcraftor.release import FILES, fit, official_state, read_tensors
from align_cli.models.sources import DENOISERS, TEXT_ENCODERS
from align_cli.models.states import LORA_A, by_group


def trained(adapter: Adapter) -> Trained:
    """Text encoders and denoiser of an adapter, and what their files will not say."""
    where = f"adapter {adapter.path}: config"
    raw = {**adapter.info.config, "method": adapter.info.method}
    settings = config.Resolved.from_dict(raw, where=where)
    c = cast("TextCraftorConfig", settings.method_config)
    states = by_group(adapter.state)
    parts = [_part(name, states[name], c) for name in (*TEXT_ENCODERS, *DENOISERS) if name in states]
    steps = settings.sample.steps
    first = c.first_tuned(steps, c.test_grad_steps)
    if first == 0 or not any(part.name in TEXT_ENCODERS for part in parts):
        return Trained(parts, [])
    note = (
        f"t2ialign uses the tuned text encoder from step {first} of {steps} on and the original one before; "
        "what was written knows no steps and works in all of them"
    )
    return Trained(parts, [note])


def _part(name: str, state: dict[str, Tensor], c: TextCraftorConfig) -> Part:
    ranks = [len(value) for key, value in state.items() if key.endswith(LORA_A)]
    if not ranks:
        return Part(name, state)
    # frozen text encoders that stage unet carries along are scaled by 1, as models.tuning.tuning_like does
    carried = c.stage == "unet" and name in TEXT_ENCODERS
    return Part(name, state, 1.0 if carried else (c.lora_alpha or ranks[0]) / ranks[0])


def write_official(job: Job) -> Report:
    """tc_text.pth and tc_unet.pth with the keys that the official scripts read, read again as an import does.

    Raises:
        UserError: LoRA, text encoders that the official code does not have, another dtype than float32.
    """
    family = job.adapter.info.family
    stray = [part.name for part in job.parts if part.name not in FILES]
    if family not in ("sd15", "sd21") or stray:
        raise UserError(
            f"the official code of TextCraftor knows Stable Diffusion 1.x and 2.x; this adapter is for "
            f"{family}"
            + (f" and holds a {stray[0]}" if stray else "")
            + ": export it with --to diffusers or --to peft"
        )
    if job.rank or any(part.lora for part in job.parts):
        raise UserError(
            "the official files of TextCraftor hold all weights, not LoRA: export LoRA with --to diffusers "
            "or --to peft, and leave --rank out"
        )
    if job.dtype != torch.float32:
        raise UserError("the official files of TextCraftor are float32; leave --dtype out")
    report, largest = Report(), Largest()
    for part in job.parts:
        file = job.folder / FILES[part.name]
        with writing(file):
            torch.save(official_state(part.name, part.state), file)
        again = fit(read_tensors(file), part.name, job.model, file)
        largest.tensors(again, part.state)
        report.written[file.name] = f"the official file of the {part.name}, float32"
    report.check.append(largest.line("read again as a released file", torch.float32))
    return report
