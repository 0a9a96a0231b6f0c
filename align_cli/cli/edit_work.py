"""The edits of one command: names of their files, which are finished, the model at work, sheets. No torch at
import.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align_cli.cli.drawing import SHEET
from align_cli.errors import UserError
from align_cli.settings import EditSettings

if TYPE_CHECKING:
    import numpy as np

    from align_cli.data.edits import EditRequest
    from align_cli.drawing import Plan
    from align_cli.models.base import BaseModel
    from align_cli.pictures import Note

SHEET_ROWS = 50
"""Edits on a contact sheet at most."""


@dataclass(frozen=True)
class Job:
    """One edit to make. number: of its request, from 0. variants: edited, or base and aligned."""

    number: int
    request: EditRequest
    seed: int
    variants: tuple[str, ...]

    @property
    def stem(self) -> str:
        """Number, name of the picture, words of the target prompt, seed."""
        name = self.request.image.stem if self.request.image is not None else ""
        parts = [f"{self.number + 1:03d}", _slug(name, 24), _slug(self.request.tgt, 40), f"seed{self.seed}"]
        return "-".join(part for part in parts if part)

    def result(self, variant: str) -> str:
        """File name of the edited picture."""
        return f"{self.stem}-{variant}.png"

    @property
    def source(self) -> str:
        """File name of a drawn source."""
        return f"{self.stem}-source.png"

    @property
    def before_after(self) -> str:
        """File name of source and results side by side."""
        return f"{self.stem}-before-after.png"

    @property
    def files(self) -> list[str]:
        """Everything that is written for it."""
        drawn = [self.source] * (self.request.image is None)
        return [*drawn, *map(self.result, self.variants), self.before_after]


@dataclass
class Work:
    """All edits of one command: which are finished, the pictures on disk, and the model that makes them."""

    model: BaseModel
    plan: Plan
    settings: EditSettings
    folder: Path
    jobs: list[Job]

    def __post_init__(self) -> None:
        self.finished: set[Path] = set()
        self.sizes: dict[Job, tuple[int, int]] = {}  # filled by `check`

    @property
    def side(self) -> int:
        """Pixels of the square that pictures are resized to, -1 if they are not."""
        return self.settings.image_size or self.model.image_size

    def size(self, job: Job) -> tuple[int, int]:
        """Pixels (width, height) that an edit is made at."""
        from align_cli.data.edits import fitted_size

        if job.request.image is None:
            side = self.side if self.side > 0 else self.model.image_size
            return side, side
        factor = self.model.size_factor
        return fitted_size(*job.request.size, self.side, keep_aspect=self.settings.keep_aspect, factor=factor)

    def check(self) -> None:
        """UserError for steps or sizes that the model cannot work with."""
        from align_cli.editing import check_size, check_steps

        check_steps(self.model, self.settings)
        self.sizes = {job: self.size(job) for job in self.jobs}
        for job, size in self.sizes.items():
            try:
                check_size(self.model, *size)
            except UserError as error:
                raise UserError(
                    f"{job.request.where}: {error}" if job.request.where else str(error)
                ) from None

    # ------------------------------------------------------------ what is there already

    def facts(self, job: Job, variant: str) -> dict[str, object]:
        """PNG text of a result, or of a drawn source (variant "source")."""
        drawing = ", ".join(f"{k} {v}" for k, v in vars(self._drawing()).items() if k != "batch_size")
        held = self.plan.model
        model: dict[str, object] = {"model": held.name, "dtype": str(self.model.dtype).removeprefix("torch.")}
        model |= held.others() | held.reading_in_use()
        common = {"seed": job.seed, **model, "software": "t2ialign"}
        if variant == "source":
            return {"prompt": job.request.src, "sampling": drawing, "adapter": "none", **common}
        specs = zip(self.plan.adapters, self.plan.infos, strict=True)
        used = ", ".join(f"{spec} sha256:{info.sha256}" for spec, info in specs)
        drawn, image = job.request.image is None, job.request.image and job.request.image.name
        return {
            "prompt": job.request.tgt,
            "source prompt": job.request.src,
            "source": f"drawn: {drawing}" if drawn else f"{image} sha256:{job.request.digest}",
            "size": "{} x {}".format(*self.sizes[job]),
            "editing": ", ".join(f"{k} {v}" for k, v in vars(self.settings).items() if k != "batch_size"),
            "adapter": used if used and variant != "base" else "none",
            **common,
        }

    def look_for_finished(self) -> None:
        """Take note of the pictures that are there. UserError if one was made from something else."""
        for job in self.jobs:
            for variant in ("source", *job.variants):
                path = self.folder / (job.source if variant == "source" else job.result(variant))
                if path.exists() and (variant != "source" or job.request.image is None):
                    self._compare(path, self.facts(job, variant))
                    self.finished.add(path)

    @staticmethod
    def _compare(path: Path, facts: Mapping[str, object]) -> None:
        from align_cli.pictures import read_metadata

        try:
            found = read_metadata(path)
        except (OSError, SyntaxError, ValueError):
            raise UserError(f"cannot resume: {path} is no picture; remove it") from None
        for key, value in facts.items():
            if found.get(key) != str(value):
                raise UserError(
                    f"cannot resume: {path} was made with another {key} ({found.get(key, 'none')!r}, now "
                    f"{str(value)!r}); choose another folder with --out, or replace it with --overwrite"
                )

    def kept(self) -> str:
        """What is there when the work is broken off, and how to go on."""
        done = [all(self.folder / job.result(v) in self.finished for v in job.variants) for job in self.jobs]
        return (
            f"{sum(done)} of {len(self.jobs)} edits are finished and kept; go on with the same command, "
            f"--resume and --out {shlex.quote(str(self.folder))}"
        )

    # ------------------------------------------------------------ making

    def run(self) -> None:
        """Draw sources, edit, and put before and after side by side; each file appears complete."""
        self._draw_sources()
        for variant in self.jobs[0].variants:
            self._edit(variant)
        for job in self.jobs:
            if not (self.folder / job.before_after).exists():  # an earlier run was stopped just there
                self._sheet([self._row(job)], self.folder / job.before_after)
        if len(self.jobs) > 1:
            self._sheet([self._row(job) for job in self.jobs[:SHEET_ROWS]], self.folder / SHEET)
            if len(self.jobs) > SHEET_ROWS:
                typer.echo(f"note: the contact sheet shows the first {SHEET_ROWS} edits", err=True)

    def _drawing(self) -> Any:
        side = self.side if self.side > 0 else 0
        return replace(self.plan.sample, image_size=side)

    def _draw_sources(self) -> None:
        """The base model draws what no file gives."""
        from align_cli.cli.progress import DrawingProgress
        from align_cli.pictures import save_png, to_uint8
        from align_cli.sampling import sample

        todo = [
            j for j in self.jobs if j.request.image is None and self.folder / j.source not in self.finished
        ]
        for job in todo:
            s = self.plan.sample
            typer.echo(
                f"no --image: {self.plan.model.name} draws the source from --src-prompt ({s.sampler}, "
                f"{s.steps} steps, guidance {s.guidance:g}, seed {job.seed}), kept as {job.source}",
                err=True,
            )
            with DrawingProgress() as progress:

                def report(done: int, total: int, progress: DrawingProgress = progress) -> None:
                    progress("source", done, total)

                drawn = sample(self.model, [job.request.src], self._drawing(), [job.seed], report)
            save_png(to_uint8(drawn)[0], self.folder / job.source, self.facts(job, "source"))

    def _edit(self, variant: str) -> None:
        from align_cli import editing
        from align_cli.adapters import attach
        from align_cli.cli.progress import DrawingProgress
        from align_cli.pictures import save_png

        todo = [job for job in self.jobs if self.folder / job.result(variant) not in self.finished]
        if len(todo) < len(self.jobs):
            typer.echo(f"{variant}: {len(self.jobs) - len(todo)} of {len(self.jobs)} are finished", err=True)
        if not todo:
            return
        steps, done = max(1, self.settings.n_start), 0
        with (
            nullcontext() if variant == "base" else attach(self.model, self.plan.adapters),
            DrawingProgress() as progress,
        ):
            for group in self._groups(todo):

                def report(step: int, _total: int, before: int = done) -> None:
                    progress(f"{variant} pictures", before * steps + step, len(todo) * steps)

                edited = editing.edit(
                    self.model,
                    self._sources(group),
                    [job.request.src for job in group],
                    [job.request.tgt for job in group],
                    self.settings,
                    [job.seed for job in group],
                    report,
                )
                for job, picture in zip(group, edited, strict=True):
                    save_png(picture, self.folder / job.result(variant), self.facts(job, variant))
                    self.finished.add(self.folder / job.result(variant))
                    if variant == job.variants[-1]:
                        self._sheet([self._row(job)], self.folder / job.before_after)
                done += len(group)

    def _groups(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Neighbours of one size that are edited in the same calls."""
        from align_cli.editing import edits_at_once

        group: list[Job] = []
        for job in jobs:
            if group and (
                self.sizes[job] != self.sizes[group[0]] or len(group) == edits_at_once(self.settings)
            ):
                yield group
                group = []
            group.append(job)
        if group:
            yield group

    def _sources(self, jobs: Sequence[Job]) -> np.ndarray:
        """(N, H, W, 3) uint8 at the size of the edit."""
        import numpy as np

        from align_cli.data.edits import open_picture, resized

        pictures = []
        for job in jobs:
            path = job.request.image or self.folder / job.source
            pictures.append(np.asarray(resized(open_picture(path, job.request.where), self.sizes[job])))
        return np.stack(pictures)

    # ------------------------------------------------------------ side by side

    def _row(self, job: Job) -> tuple[list[np.ndarray], list[Note], Job]:
        """Source and results of one edit, and what the oracle says about them (shapes world only)."""
        import numpy as np

        from align_cli.data.edits import open_picture
        from align_cli.evaluation.benchmarks import check_pictures

        results = [np.asarray(open_picture(self.folder / job.result(v))) for v in job.variants]
        row = [*self._sources([job]), *results]
        asked = [job.request.src] + [job.request.tgt] * len(results)
        square = all(picture.shape == (self.model.image_size,) * 2 + (3,) for picture in row)
        return row, check_pictures(self.model, row, asked) if square else [], job

    def _sheet(self, rows: Sequence[tuple[list[np.ndarray], list[Note], Job]], path: Path) -> None:
        from align_cli.pictures import Note, contact_sheet

        variants = self.jobs[0].variants
        noted = any(notes for _, notes, _ in rows)
        contact_sheet(
            [row for row, _, _ in rows],
            [f"{job.request.src} -> {job.request.tgt}" for _, _, job in rows],
            path,
            headers=["before", *(variants if len(variants) > 1 else ["after"])],
            notes=[notes or [Note("")] * len(row) for row, notes, _ in rows] if noted else (),
            title=f"{self.plan.model.name}: {describe(self.settings)}, seed {rows[0][2].seed}"
            + (f"; adapter {', '.join(self.plan.adapters)}" if self.plan.adapters else ""),
            metadata={"software": "t2ialign", "model": self.plan.model.name},
        )


def describe(s: EditSettings) -> str:
    more = f", {s.n_min} of them under the target alone" * bool(s.n_min) + f", {s.n_avg} noises" * (
        s.n_avg > 1
    )
    return (
        f"FlowEdit, the last {s.n_start} of {s.steps} steps{more}, guidance of the "
        f"source {s.src_guidance:g}, of the target {s.tgt_guidance:g} (as {s.convention} counts)"
    )


def _slug(text: str, length: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].rstrip("-")
