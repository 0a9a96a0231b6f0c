"""`t2ialign sample`: draw pictures, with adapters or without. No torch at import."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align_cli.cli import options
from align_cli.cli.drawing import SHEET
from align_cli.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from align_cli.cli.drawing import Plan
    from align_cli.models.base import BaseModel


def sample(
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to draw; repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Text file, one prompt per line, UTF-8."),
    ] = None,
    model: options.Model = None,
    unet: options.Unet = None,
    adapter: options.Adapters = None,
    compare: Annotated[bool, typer.Option("--compare", help="Draw the base beside the aligned.")] = False,
    n: Annotated[
        int, typer.Option("--n", metavar="N", min=1, help="Pictures per prompt: seeds SEED, SEED + 1, ...")
    ] = 1,
    seed: Annotated[
        int, typer.Option("--seed", metavar="SEED", min=0, max=2**63 - 2**20, help="Seed of the first.")
    ] = 42,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    spacing: options.Spacing = None,
    eta: options.Eta = None,
    from_step: options.FromStep = None,
    self_correct: Annotated[
        float | None,
        typer.Option(
            "--self-correct",
            metavar="X",
            help="Adapters of dpt: follow their score by this scale in every step (official 0.5).",
        ),
    ] = None,
    correction: options.Correction = None,
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", metavar="PIXELS", help="Pixels per side; 0: the model's."),
    ] = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    encoder_device: options.EncoderDevice = None,
    dtype: options.Dtype = None,
    text: options.Text = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Folder for the pictures. Default: samples."),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Draw pictures: one PNG each, and a contact sheet of all.

    The same prompt, seed and settings give the same picture. Sampling settings come from the adapter,
    else from the preset of the model; flags go above them.
    """
    from align_cli.cli.drawing import choose_folder, make_folder, make_plan

    texts = _texts(prompt or [], prompts)
    if compare and not adapter:
        raise UserError("--compare draws the base beside the aligned model; name an adapter with --adapter")
    flags = {
        "steps": steps, "guidance": guidance, "sampler": sampler, "spacing": spacing, "eta": eta,
        "image_size": image_size, "batch_size": batch_size, "from_step": from_step,
        "self_correct": self_correct, "correction": correction,
    }  # fmt: skip
    devices = {"device": device, "encoder_device": encoder_device}
    plan = make_plan(model, adapter or [], {**devices, "dtype": dtype, "text": text, "unet": unet}, flags)
    if correction is not None and not plan.sample.self_correct:
        raise UserError("--correction says what self-correction moves; give its scale with --self-correct")
    variants = ["base", "aligned"] if compare else [""]
    jobs = [Job(k, text, seed + i, v) for k, text in enumerate(texts) for i in range(n) for v in variants]
    folder = choose_folder(out, "samples", [SHEET, *(job.file for job in jobs)], overwrite)
    loaded, plan = plan.load()
    make_folder(folder)
    typer.echo(plan.describe(), err=True)
    pictures = _draw(loaded, plan, jobs)
    _write(loaded, plan, jobs, pictures, folder)
    typer.echo(f"{len(jobs)} picture{'s' * (len(jobs) > 1)} in {folder}")
    typer.echo(f"contact sheet: {folder / SHEET}")


@dataclass(frozen=True)
class Job:
    """One picture to draw. number: of its prompt. variant: base, aligned, or "" if there is only one."""

    number: int
    prompt: str
    seed: int
    variant: str

    @property
    def file(self) -> str:
        """Its file name: number and words of the prompt, seed, variant."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:48].rstrip("-")
        parts = [f"{self.number + 1:03d}", words, f"seed{self.seed}", self.variant]
        return "-".join(part for part in parts if part) + ".png"


def _texts(given: list[str], path: Path | None) -> list[str]:
    from align_cli.data.prompts import read_prompts

    texts = [text.strip() for text in given]
    if not all(texts):
        raise UserError("--prompt is empty; write what to draw, for example --prompt 'a red circle'")
    if path is not None:
        texts += read_prompts(path)
    if not texts:
        raise UserError("nothing to draw; give --prompt 'a red circle' or --prompts FILE")
    return texts


def _draw(model: BaseModel, plan: Plan, jobs: list[Job]) -> list[np.ndarray]:
    """(H, W, 3) uint8 per job, in the order of jobs."""
    from align_cli import sampling
    from align_cli.adapters import attach
    from align_cli.cli.drawing import note_long_prompts
    from align_cli.cli.progress import DrawingProgress
    from align_cli.pictures import to_uint8

    pictures: dict[Job, np.ndarray] = {}
    with DrawingProgress() as progress:
        for variant in dict.fromkeys(job.variant for job in jobs):
            part = [job for job in jobs if job.variant == variant]
            name = variant or "pictures"

            def report(done: int, total: int, name: str = name) -> None:
                progress(name, done, total)

            with nullcontext() if variant == "base" else attach(model, plan.adapters):
                if variant != "base":  # an adapter may read more of a prompt than the model does
                    note_long_prompts(model, [job.prompt for job in part])
                drawn = sampling.sample(
                    model, [job.prompt for job in part], plan.sample, [job.seed for job in part], report
                )
            pictures.update(zip(part, to_uint8(drawn), strict=True))
    return [pictures[job] for job in jobs]


def _write(model: BaseModel, plan: Plan, jobs: list[Job], pictures: list[np.ndarray], folder: Path) -> None:
    """One PNG per job and the contact sheet: a row per prompt, seeds (and base, aligned) side by side."""
    from align_cli.evaluation.benchmarks import check_pictures
    from align_cli.pictures import contact_sheet, save_png

    used = ", ".join(
        f"{spec} sha256:{info.sha256}" for spec, info in zip(plan.adapters, plan.infos, strict=True)
    )
    held = {"model": plan.model.name, **plan.model.others(), **plan.model.reading_in_use()}
    common = {**held, "sampling": plan.sample.words(), "software": "t2ialign"}
    for job, picture in zip(jobs, pictures, strict=True):
        facts = {"prompt": job.prompt, "seed": job.seed, **common}
        save_png(
            picture,
            folder / job.file,
            facts if job.variant == "base" else {**facts, "adapter": used or "none"},
        )
    numbers = sorted({job.number for job in jobs})
    rows = {k: [i for i, job in enumerate(jobs) if job.number == k] for k in numbers}
    notes = check_pictures(model, pictures, [job.prompt for job in jobs])
    contact_sheet(
        [[pictures[i] for i in row] for row in rows.values()],
        [jobs[row[0]].prompt for row in rows.values()],
        folder / SHEET,
        headers=[f"{job.variant or 'seed'} {job.seed}" for job in jobs if job.number == 0],
        notes=[[notes[i] for i in row] for row in rows.values()] if notes else (),
        title=plan.title(),
        metadata=common,
    )
