"""What `t2ialign encode` does: say how many bytes, write them, look them over. No torch at import."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from align_cli.errors import UserError
from align_cli.launched import is_main

if TYPE_CHECKING:
    from align_cli.data.cache import Cache, Index, Shapes
    from align_cli.data.encoding import Request, Rows


class Work(Protocol):
    """What is to be stored, and what makes it."""

    @property
    def request(self) -> Request: ...

    def prepare(self) -> tuple[Rows, dict[str, Any]]:
        """What makes the rows, and what a manifest will say about it. Loads the model."""
        ...

    def outline(self) -> tuple[Shapes, Index, int]:
        """Shapes, captions and number of items, if possible without a model's files."""
        ...

    def words(self) -> list[str]:
        """What is stored, in lines."""
        ...

    def less(self) -> str:
        """What the user may do where the disk has no room."""
        ...

    def train_command(self, folder: Path) -> str:
        """What to type to train from the folder."""
        ...


def work_of(request: Request) -> Work:
    """Pictures of a dataset, or pictures that the model draws."""
    from align_cli.cli.encode_drawn import DrawnWork
    from align_cli.cli.encode_pictures import PictureWork
    from align_cli.data.drawn import DrawRequest

    return DrawnWork(request) if isinstance(request, DrawRequest) else PictureWork(request)


# ---------------------------------------------------------------- what will be written


def settings_text(request: Request, origin: Mapping[str, str], otherwise: str) -> str:
    """Every setting with its value and its origin, in columns. otherwise: the origin of those without one."""
    from align_cli.cli.text import columns

    held = {key: value for key, value in asdict(request).items() if not key.startswith("own_")}
    values: dict[str, Any] = {}
    for key, value in held.items():
        section = {"seed": "train.", "batch_size": "train."}.get(key, "")
        own = {f"{key}.{name}": x for name, x in value.items()} if isinstance(value, dict) else {}
        values |= own or {f"{section}{key}": value}
    values.pop("sample.batch_size", None)  # the same as train.batch_size
    rows = [(key, json.dumps(value), origin.get(key, otherwise)) for key, value in values.items()]
    return columns([("setting", "value", "origin"), *rows]) + "\n"


def plan_text(work: Work, shapes: Shapes, index: Index, items: int) -> str:
    """Sizes per item and in total, with their arithmetic, as lines."""
    from align_cli.cli.text import columns
    from align_cli.data.cache import plan
    from align_cli.data.encoding import plan_arguments
    from align_cli.data.filling import size_text

    request = work.request
    shards = plan(shapes, **plan_arguments(request, items, len(index.captions)))
    kinds = Counter(shard.kind for shard in shards)
    fields = {"images": shapes.image_fields(request.posterior), "captions": shapes.caption_fields()}
    rows = {"images": items, "captions": len(index.captions)}
    table = [("", "tensors", "bytes each", "rows", "shards", "bytes")]
    for kind, count in kinds.items():
        tensors = ", ".join(f"{f.name} {'x'.join(map(str, f.shape))} {f.dtype}" for f in fields[kind])
        each = sum(f.row_bytes for f in fields[kind])
        total = sum(shard.bytes for shard in shards if shard.kind == kind)
        table.append((kind, tensors, f"{each:,}", f"{rows[kind]:,}", str(count), size_text(total)))
    total = sum(shard.bytes for shard in shards) + len(index.to_text().encode())
    return "\n".join(
        [
            *work.words(),
            columns(table),
            f"in all {total:,} bytes ({size_text(total)}), {total / items:,.0f} per item",
        ]
    )


def dry_run(
    request: Request, settings: str, folder: Path, gpu: str | None, mfu: float | None, *, costs: bool = True
) -> None:
    """Print the settings, the plan, and what the work costs; write nothing."""
    from align_cli.cli.planned import say_encode
    from align_cli.data.filling import free_bytes, size_text

    work = work_of(request)
    shapes, index, items = work.outline()
    typer.echo(settings)
    typer.echo(plan_text(work, shapes, index, items))
    typer.echo(f"output folder: {folder}, {size_text(free_bytes(folder))} free")
    if costs:
        say_encode(request, shapes, items, len(index.captions), gpu, mfu)


# ---------------------------------------------------------------- the work


def fill(request: Request, folder: Path, *, resume: bool, overwrite: bool, content: bool) -> None:
    from align_cli.cli.progress import CountingProgress
    from align_cli.data.filling import Filling, free_bytes, resume_command, size_text

    main = is_main()
    work = work_of(request)
    encoder, about = work.prepare()
    if main:
        typer.echo(plan_text(work, encoder.shapes, encoder.index, about["num_examples"]))
    with Filling(
        folder, about, encoder.index, resume=resume, overwrite=overwrite, content=content, less=work.less()
    ) as filling:
        cache = filling.cache
        for problem in filling.repaired.values():
            typer.echo(f"{problem}: encoding it again", err=True)
        if cache.complete:
            if main:
                typer.echo(f"{folder} already holds these encodings, complete; nothing to do")
            return
        if main:
            missing = len(cache.plan) - len(cache.shards)
            joined = ", together with other processes" if filling.others else ""
            typer.echo(
                f"writing {missing} of {len(cache.plan)} shards, {filling.missing_bytes():,} bytes "
                f"({size_text(filling.missing_bytes())}), to {folder} ({size_text(free_bytes(folder))} "
                f"free){joined}"
            )
        totals, done = _rows(cache)
        try:
            with CountingProgress(totals, done, quiet=not main) as progress:
                filling.run(
                    encoder,
                    progress,
                    lambda n: progress.say(f"waiting for {n} shards that other processes write"),
                )
        except KeyboardInterrupt:
            finished = f"{len(filling.cache.shards)} of {len(cache.plan)} shards are finished and kept"
            typer.echo(f"stopped: {finished}; go on with: {resume_command(folder)}", err=True)
            raise typer.Exit(130) from None
    if main:
        typer.echo(f"encodings: {folder}")
        typer.echo(f"train from them: {work.train_command(folder)}")


def _rows(cache: Cache) -> tuple[Counter[str], Counter[str]]:
    """Rows of every kind: all, and those of finished shards."""
    totals: Counter[str] = Counter()
    done: Counter[str] = Counter()
    for shard in cache.plan:
        totals[shard.kind] += shard.stop - shard.start
        done[shard.kind] += shard.stop - shard.start if shard.name in cache.shards else 0
    return totals, done


def verify(folder: Path, request: Request, samples: int) -> None:
    """Print what is wrong; exit code 1 if something is."""
    from align_cli.cli.progress import CountingProgress
    from align_cli.data.cache import Cache, differences, identity
    from align_cli.data.filling import changed_shards, compare

    cache = Cache.read(folder)
    problems = dict(cache.damaged())
    looked = len(cache.shards) - len(problems)
    with CountingProgress({"shards": looked} if looked else {}, {}) as progress:
        problems |= changed_shards(cache, lambda _name: progress("shards", 1))
    _ = cache.index
    for problem in problems.values():
        typer.echo(f"BAD   {problem}")
    unfinished = len(cache.plan) - len(cache.shards)
    if unfinished:
        typer.echo(f"BAD   {unfinished} of {len(cache.plan)} shards are not written yet")
    typer.echo(f"{len(cache.shards) - len(problems)} of {len(cache.plan)} shards are whole (sha256)")
    good = not problems and not unfinished
    if samples:
        encoder, about = work_of(request).prepare()
        if why := differences(cache.about, identity(about)):
            raise UserError(f"the encodings in {folder} were made with {'; '.join(why)}")
        found = compare(cache, encoder, samples, list(problems))
        if found.identical == found.rows:
            typer.echo(f"encoded again: {found.rows} rows, all with the same bits")
        else:
            word = "ok, rounding" if found.ok else "BAD"
            typer.echo(
                f"encoded again: {found.rows} rows, {found.identical} with the same bits, largest difference "
                f"{found.worst:.2g} of the largest number in {found.where} ({word}; made on "
                f"{cache.about['made_on']})"
            )
        good = good and found.ok
    if not good:
        typer.echo(f"repair with: t2ialign encode --resume --verify --out {shlex.quote(str(folder))}")
        raise typer.Exit(1)
