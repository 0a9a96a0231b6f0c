"""`t2ialign encode`: compute latents and text encodings once, for training to read. No torch at import."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_cli import config, registry
from align_cli.cli import options
from align_cli.errors import UserError

if TYPE_CHECKING:
    from align_cli.data.base import Dataset
    from align_cli.data.cache import Cache, Index, Shapes
    from align_cli.data.encoding import Encoder, Request
    from align_cli.models.base import BaseModel

METHOD = "softrepa"
"""Whose presets say how a model is trained, where the command does not."""


def encode(
    model: Annotated[
        str | None, typer.Option("--model", help="Alias, hub id or folder. Default: tiny-sd15.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="Whose model and data to take. Default: the model's.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, section.key=value; repeatable.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Dataset: shapes or coco.")] = None,
    data_path: Annotated[Path | None, typer.Option("--data-path", help="Folder of the dataset.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N items.")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", min=8, help="Pixels per side.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16.")] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout", help="exact (default), or captions: pictures only, text is encoded in the loop."
        ),
    ] = None,
    posterior: Annotated[
        str | None,
        typer.Option(
            "--posterior", help="mean-std (default; epochs draw afresh), or sample: one frozen draw."
        ),
    ] = None,
    captions: Annotated[
        str | None, typer.Option("--captions", help="Per item: first, random (one; default) or all.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Rows per encoder call. The run's own gives the run's bits."),
    ] = None,
    shard_items: Annotated[int | None, typer.Option("--shard-items", help="Rows per file; 256.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of random captions and draws.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = None,
    encoder_device: options.EncoderDevice = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder. Default: encodings/DATA-MODEL-SIZE.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Finish what is missing, repair what is cut off.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the encodings in the folder.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every shard, encode some items again; writes nothing.")
    ] = False,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="--verify: items to encode again; 0: hashes only.")
    ] = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the bytes; write nothing.")] = False,
) -> None:
    """Encode a dataset once: latents and text, in files that training reads with --cache.

    Settings come from the model's preset, as in training. Several of these commands, or torchrun, may fill
    one folder together. --resume and --verify take the folder's own settings.
    """
    from align_cli.data.filling import check_folder

    if overwrite and (resume or verify):
        raise UserError("--resume and --verify need the encodings that --overwrite removes; give one of them")
    flags = {
        "model.name": model, "model.dtype": dtype, "model.device": device,
        "model.encoder_device": encoder_device, "data.name": data,
        "data.path": None if data_path is None else data_path.expanduser().resolve(),
        "data.image_size": image_size, "data.num_examples": limit, "train.batch_size": batch_size,
        "train.seed": seed,
    }  # fmt: skip
    how = {"layout": layout, "posterior": posterior, "captions": captions, "shard_items": shard_items}
    given = {key: value for key, value in how.items() if value is not None}
    fresh = not (resume or verify) or out is None or preset is not None or bool(sets)
    if fresh:
        request = _request(preset, sets or [], flags, given)
        folder = out or Path("encodings") / default_name(request)
    else:
        assert out is not None
        folder, request = out, _saved_request(out, flags, given)
    if verify and not resume:
        _verify(folder, request, samples)
        return
    if overwrite and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"--overwrite is for one process: remove {folder} first, then start several without it"
        )
    check_folder(folder, resume=resume)
    if dry_run:
        _dry_run(request, folder)
        return
    _fill(request, folder, resume=resume, overwrite=overwrite, content=verify)


# ---------------------------------------------------------------- settings


def _request(preset: str | None, sets: list[str], flags: dict[str, Any], given: dict[str, Any]) -> Request:
    """What to encode, from the preset of the model, --set and flags."""
    from align_cli.cli.drawing import preset_of
    from align_cli.data.encoding import Request
    from align_cli.settings import ModelSettings

    chosen = preset or preset_of(flags["model.name"] or ModelSettings().name) or config.NO_PRESET
    method = chosen.partition("/")[0] if "/" in chosen else METHOD
    found = config.resolve(method, preset=chosen, sets=sets, flags=flags)
    return Request(
        model=found.model,
        data=found.data,
        seed=found.train.seed,
        batch_size=found.train.batch_size,
        **given,
    )


def _saved_request(folder: Path, flags: dict[str, Any], given: dict[str, Any]) -> Request:
    """The settings of the encodings in a folder, with flags above them."""
    from align_cli.data.cache import MANIFEST, Cache
    from align_cli.data.encoding import Request

    saved = Request.from_json(Cache.read(folder).about["settings"], str(folder / MANIFEST))

    def part(section: str) -> dict[str, Any]:
        return {
            key.partition(".")[2]: str(value) if isinstance(value, Path) else value
            for key, value in flags.items()
            if key.startswith(f"{section}.") and value is not None
        }

    model, data = replace(saved.model, **part("model")), replace(saved.data, **part("data"))
    return replace(saved, model=model, data=data, **part("train"), **given)


def default_name(request: Request) -> str:
    """coco-sd3-512; the size is left out where the dataset knows it itself."""
    tail = Path(request.model.name.rstrip("/")).name.removeprefix("embedded:")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", tail).strip("-.") or "model"
    size = "" if request.data.name == "shapes" else f"-{request.data.image_size}"
    return f"{request.data.name}-{slug}{size}"


# ---------------------------------------------------------------- what will be written


def plan_text(request: Request, shapes: Shapes, index: Index, items: int) -> str:
    """Sizes per item and in total, with their arithmetic, as lines."""
    from align_cli.cli.text import columns
    from align_cli.data.cache import plan
    from align_cli.data.encoding import plan_arguments
    from align_cli.data.filling import size_text

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
    notes = {
        "exact": "layout exact: the loss has the bits of encoding on the fly at the same batch size",
        "captions": "layout captions: pictures only; training encodes the text in its loop",
    }
    drawn = {
        "mean-std": "posterior mean-std: every epoch draws its latents afresh",
        "sample": "posterior sample: one frozen draw per picture, every epoch sees the same",
    }
    return "\n".join(
        [
            f"{request.data.name} with {request.model.name}, captions: {request.captions}",
            notes[request.layout],
            drawn[request.posterior],
            columns(table),
            f"in all {total:,} bytes ({size_text(total)}), {total / items:,.0f} per item",
        ]
    )


def _dataset(request: Request) -> Dataset:
    dataset: Dataset = registry.load(registry.DATASETS, request.data.name)(
        replace(request.data, cache=""), seed=request.seed, split="train"
    )
    return dataset


def _model(request: Request) -> BaseModel:
    from align_cli.models.loading import load_model
    from align_cli.training.distributed import on_rank

    model = load_model(on_rank(request.model))
    if request.data.name != "shapes" and request.data.image_size % model.size_factor:
        raise UserError(
            f"--image-size {request.data.image_size} is no multiple of {model.size_factor}, as "
            f"{request.model.name} needs"
        )
    return model


def _dry_run(request: Request, folder: Path) -> None:
    from align_cli.data.cache import known_shapes
    from align_cli.data.encoding import make_index, measure
    from align_cli.data.filling import free_bytes, size_text

    dataset = _dataset(request)
    index = make_index(dataset, request)
    held = request.model
    shapes = known_shapes(held.name, request.data.image_size, held.dtype, held.t5_length)
    if shapes is None:
        from align_cli.training.order import item_rng

        pixels = dataset.get(0, item_rng(request.seed, 0, 0)).pixels
        assert pixels is not None
        shapes = measure(_model(request), pixels).shapes
    typer.echo(plan_text(request, shapes, index, len(dataset)))
    typer.echo(f"output folder: {folder}, {size_text(free_bytes(folder))} free")


# ---------------------------------------------------------------- the work


def _prepare(request: Request) -> tuple[Encoder, dict[str, Any]]:
    """The encoder, and what a manifest will say about it."""
    from align_cli.data.encoding import Encoder, describe, make_index, measure
    from align_cli.training.order import item_rng

    dataset = _dataset(request)
    index = make_index(dataset, request)
    pixels = dataset.get(0, item_rng(request.seed, 0, 0)).pixels
    if pixels is None:
        raise UserError(f"{request.data.name} has captions only; there is nothing to encode for training")
    model = _model(request)
    measured = measure(model, pixels)
    about = describe(request, dataset, index, model, measured)
    return Encoder(model, dataset, index, measured.shapes, request), about


def _fill(request: Request, folder: Path, *, resume: bool, overwrite: bool, content: bool) -> None:
    from align_cli.cli.progress import CountingProgress
    from align_cli.data.filling import Filling, free_bytes, size_text

    main = int(os.environ.get("RANK", "0")) == 0
    encoder, about = _prepare(request)
    if main:
        items = about["num_examples"]
        typer.echo(plan_text(request, encoder.shapes, encoder.index, items))
    with Filling(
        folder, about, encoder.index, resume=resume, overwrite=overwrite, content=content
    ) as filling:
        cache = filling.cache
        for problem in filling.repaired.values():
            typer.echo(f"{problem}: encoding it again", err=True)
        if cache.complete:
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
            typer.echo(
                f"stopped: {finished}; go on with: t2ialign encode --resume --out {shlex.quote(str(folder))}",
                err=True,
            )
            raise typer.Exit(130) from None
    if main:
        typer.echo(f"encodings: {folder}")
        typer.echo(
            f"train from them: t2ialign train {METHOD} --model {shlex.quote(request.model.name)} --data "
            f"{request.data.name} --cache {shlex.quote(str(folder))}"
        )


def _rows(cache: Cache) -> tuple[Counter[str], Counter[str]]:
    """Rows of every kind: all, and those of finished shards."""
    totals: Counter[str] = Counter()
    done: Counter[str] = Counter()
    for shard in cache.plan:
        totals[shard.kind] += shard.stop - shard.start
        done[shard.kind] += shard.stop - shard.start if shard.name in cache.shards else 0
    return totals, done


def _verify(folder: Path, request: Request, samples: int) -> None:
    """Print what is wrong; exit code 1 if something is."""
    from align_cli.cli.progress import CountingProgress
    from align_cli.data.cache import NOT_IDENTITY, Cache, differences
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
        encoder, about = _prepare(request)
        wanted = {key: value for key, value in about.items() if key not in NOT_IDENTITY}
        if why := differences(cache.about, wanted):
            raise UserError(f"the encodings in {folder} were made with {why[0]}")
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
