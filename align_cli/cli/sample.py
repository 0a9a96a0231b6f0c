"""`t2ialign sample`: draw pictures, with adapters or without. No torch at import."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align_cli.cli import options
from align_cli.cli.drawing import SHEET
from align_cli.cli.launching import launched_several
from align_cli.errors import UserError
from align_cli.launched import is_main

if TYPE_CHECKING:
    import numpy as np

    from align_cli.cli.progress import DrawingProgress
    from align_cli.drawing import Plan
    from align_cli.evaluation.attention import Attention
    from align_cli.grounding.entities import Entity
    from align_cli.models.base import BaseModel
    from align_cli.training.distributed import Ranks


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
    attention: Annotated[
        bool,
        typer.Option("--attention", help="Show where every picture looks at the words of its prompt."),
    ] = False,
    parser: options.Parser = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Folder for the pictures. Default: samples."),
    ] = None,
    overwrite: options.Overwrite = False,
    num_processes: options.NumProcesses = 1,
) -> None:
    """Draw pictures: one PNG each, and a contact sheet of all.

    The same prompt, seed and settings give the same picture. Sampling settings come from the adapter,
    else from the preset of the model; flags go above them.
    """
    from align_cli.cli.drawing import choose_folder, make_folder
    from align_cli.drawing import make_plan

    if launched_several(num_processes):
        return
    texts = _texts(prompt or [], prompts)
    if compare and not adapter:
        raise UserError("--compare draws the base beside the aligned model; name an adapter with --adapter")
    if parser is not None and not attention:
        raise UserError("--parser finds the words that --attention shows; give --attention, too")
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
    maps = [attention_file(k, text) for k, text in enumerate(texts)] if attention else []
    files = [SHEET, *(job.file for job in jobs), *maps]
    # one decides, before torch is imported; the others would meet its folder
    folder = choose_folder(out, "samples", files, overwrite) if is_main() else Path()
    loaded, plan = plan.load(quiet=not is_main())
    from align_cli.training.distributed import Ranks, leave_group

    words = _words(loaded, plan, texts, parser or "auto") if attention else None
    ranks = Ranks(loaded.device)
    folder = ranks.objects(folder)[0]
    ranks.on_main(lambda: make_folder(folder))
    if ranks.main:
        typer.echo(plan.describe(), err=True)
    seen: dict[Job, Attention] = {}
    ranks.on_all(lambda: seen.update(_draw(loaded, plan, jobs, words, folder, ranks)))
    seen = {job: one for part in ranks.objects(seen) for job, one in part.items()}
    ranks.on_main(lambda: _finish(loaded, plan, jobs, seen, folder))
    leave_group()


def _finish(model: BaseModel, plan: Plan, jobs: list[Job], seen: dict[Job, Attention], folder: Path) -> None:
    """The sheets of all pictures, and what is printed."""
    from align_cli.evaluation.store import read_picture

    pictures = [read_picture(folder / job.file) for job in jobs]
    _write_sheet(model, plan, jobs, pictures, folder)
    _write_attention(model, plan, jobs, pictures, [seen[job] for job in jobs if job in seen], folder)
    typer.echo(f"{len(jobs)} picture{'s' * (len(jobs) > 1)} in {folder}")
    typer.echo(f"contact sheet: {folder / SHEET}")
    for number, text in sorted({(job.number, job.prompt) for job in seen}):
        typer.echo(f"attention: {folder / attention_file(number, text)}")


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
        return _file(self.number, self.prompt, f"seed{self.seed}", self.variant)


def attention_file(number: int, prompt: str) -> str:
    """File name of what is shown of the attention of a prompt's pictures."""
    return _file(number, prompt, "attention")


def _file(number: int, prompt: str, *more: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
    return "-".join(part for part in (f"{number + 1:03d}", words, *more) if part) + ".png"


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


def _words(model: BaseModel, plan: Plan, texts: list[str], parser: str) -> list[list[Entity]]:
    """The entities of every prompt. UserError, before anything is drawn, where there is nothing to show."""
    from align_cli import registry
    from align_cli.adapters import attach
    from align_cli.evaluation.attention import check, reader_of

    with attach(model, plan.adapters):
        check(model)
    reader = reader_of(model, parser, world=registry.is_embedded(plan.model.name))
    found = [reader.shown(text) for text in texts]
    for text, entities in zip(texts, found, strict=True) if is_main() else ():
        said = f"note: {text!r} has no noun with attributes that is read"
        if not entities:
            typer.echo(f"{said}, and no other word to show the attention of", err=True)
        elif all(len(entity.words) == 1 for entity in entities):
            typer.echo(f"{said}: its words are shown one by one", err=True)
    return found


def _draw(
    model: BaseModel,
    plan: Plan,
    jobs: list[Job],
    words: list[list[Entity]] | None,
    folder: Path,
    ranks: Ranks,
) -> dict[Job, Attention]:
    """Draw and write this process's share: of the batches that one process would draw, every one has its
    turn, so that the bits are those of one process. Returns what is seen of `words`, if they are given.
    """
    from align_cli import sampling
    from align_cli.adapters import attach
    from align_cli.cli.drawing import note_long_prompts
    from align_cli.cli.progress import DrawingProgress
    from align_cli.evaluation import attention
    from align_cli.evaluation.drawing import my_share
    from align_cli.pictures import save_png, to_uint8

    facts = _facts(plan)
    seen: dict[Job, Attention] = {}
    size = plan.sample.batch_size
    with DrawingProgress(quiet=not ranks.main) as progress:
        for variant in dict.fromkeys(job.variant for job in jobs):
            part = [job for job in jobs if job.variant == variant]
            mine = my_share(range(len(part)), size, ranks)
            total = sum(len(part[b * size : (b + 1) * size]) for b in mine) * plan.sample.steps
            done = 0
            with nullcontext() if variant == "base" else attach(model, plan.adapters):
                if variant != "base" and ranks.main:  # an adapter may read more of a prompt than the model
                    note_long_prompts(model, [job.prompt for job in part])
                for b in mine:
                    batch = part[b * size : (b + 1) * size]
                    report = partial(_show, progress, variant or "pictures", total, done)
                    texts, seeds = [job.prompt for job in batch], [job.seed for job in batch]
                    if words is None:
                        drawn = sampling.sample(model, texts, plan.sample, seeds, report)
                    else:
                        own = [words[job.number] for job in batch]
                        drawn, maps = attention.sample(model, texts, own, plan.sample, seeds, report)
                        seen.update(zip(batch, maps, strict=True))
                    for job, picture in zip(batch, to_uint8(drawn), strict=True):
                        save_png(picture, folder / job.file, facts(job))
                    done += len(batch) * plan.sample.steps
    return seen


def _show(progress: DrawingProgress, what: str, total: int, before: int, done: int, _all: int) -> None:
    """Progress of one batch as that of the whole share; before: what the batches before it were."""
    progress(what, before + done, total)


def _facts(plan: Plan) -> Callable[[Job | None], dict[str, object]]:
    """What the metadata of a picture say, or, for None, what is common to all."""
    used = ", ".join(
        f"{spec} sha256:{info.sha256}" for spec, info in zip(plan.adapters, plan.infos, strict=True)
    )
    held = {"model": plan.model.name, **plan.model.others(), **plan.model.reading_in_use()}
    common: dict[str, object] = {**held, "sampling": plan.sample.words(), "software": "t2ialign"}

    def facts(job: Job | None) -> dict[str, object]:
        if job is None:
            return common
        own = {"prompt": job.prompt, "seed": job.seed, **common}
        return own if job.variant == "base" else {**own, "adapter": used or "none"}

    return facts


def _write_sheet(
    model: BaseModel, plan: Plan, jobs: list[Job], pictures: list[np.ndarray], folder: Path
) -> None:
    """The contact sheet: a row per prompt, seeds (and base, aligned) side by side."""
    from align_cli.evaluation.benchmarks import check_pictures
    from align_cli.pictures import contact_sheet

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
        metadata=_facts(plan)(None),
    )


def _write_attention(
    model: BaseModel,
    plan: Plan,
    jobs: list[Job],
    pictures: list[np.ndarray],
    seen: list[Attention],
    folder: Path,
) -> None:
    """A sheet per prompt: base above aligned, seed by seed; the picture, then what it looks at for each of
    the prompt's words.
    """
    from align_cli.evaluation.attention import LAYERS, masks_of
    from align_cli.evaluation.benchmarks import ShapesBenchmark
    from align_cli.evaluation.heat import heat, note_of, words_of
    from align_cli.evaluation.maps import relative
    from align_cli.pictures import Note, contact_sheet

    masker = None
    if ShapesBenchmark().suits(model):
        from align_cli.shapes.masks import ShapesMasker

        masker = ShapesMasker()
    places = sorted(range(len(seen)), key=lambda i: (jobs[i].number, jobs[i].seed))
    for number in sorted({job.number for job in jobs}) if seen else ():
        own = [i for i in places if jobs[i].number == number]
        tiles, notes = [], []
        for i in own:
            entities = seen[i].entities
            masks = masks_of(masker, pictures[i], entities) if masker is not None else None
            tiles.append([pictures[i], *(heat(pictures[i], one) for one in relative(seen[i].maps))])
            shares = zip(entities, seen[i].shares(masks), strict=True)
            notes.append([Note(""), *(note_of(words_of(entity), share) for entity, share in shares)])
        contact_sheet(
            tiles,
            [f"{jobs[i].variant} seed {jobs[i].seed}".strip() for i in own],
            folder / attention_file(number, jobs[own[0]].prompt),
            notes=notes,
            title=f"{jobs[own[0]].prompt}: attention to its words, each relative to its own maximum; mean "
            f"over heads, steps and {LAYERS}; {plan.title()}",
        )
