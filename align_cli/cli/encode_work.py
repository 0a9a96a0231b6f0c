"""What `t2ialign encode` does: say how many bytes, write them, look them over. No torch at import."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align_cli import config, registry
from align_cli.cli.encode import METHOD, own_preset
from align_cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from align_cli.data.base import Dataset
    from align_cli.data.cache import Cache, Index, Shapes
    from align_cli.data.encoding import Encoder, Request
    from align_cli.models.base import BaseModel


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
    again = {"all": "", "random": " in the first epoch, and later ones see the same captions again",
             "first": ", were the first caption of each the only one"}  # fmt: skip
    same = f"the loss has the bits of encoding on the fly at the same batch size{again[request.captions]}"
    if request.model.text == "segments":  # as many rows of an encoder call as the batch has sentences
        same = f"the text is that of encoding on the fly, up to rounding{again[request.captions]}"
    if request.posterior == "sample":
        same = "all that the text encoders say is stored"
    notes = {
        "exact": f"layout exact: {same}",
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
    """UserError for a dataset without pictures."""
    if request.data.name in registry.CAPTIONS_ONLY:
        raise registry.no_pictures(request.data.name, "encode stores pictures with their captions")
    table = registry.dataset_table(request.data.name)
    dataset: Dataset = registry.load(table, request.data.name)(
        replace(request.data, cache=""), seed=request.seed, split="train"
    )
    return dataset


def _first_picture(dataset: Dataset, request: Request) -> Tensor:
    """Pixels (3, H, W): of the size that all have."""
    from align_cli.training.order import item_rng

    pixels = dataset.get(0, item_rng(request.seed, 0, 0)).pixels
    assert pixels is not None
    return pixels


def _model(request: Request, side: int) -> BaseModel:
    """The model; UserError if it makes no pictures of this side (pixels)."""
    from align_cli.models.loading import load_model
    from align_cli.sampling import check_side
    from align_cli.training.distributed import on_rank

    model = load_model(on_rank(request.model), encoders_only=True)
    check_side(model, side, "--image-size")
    return model


def dry_run(request: Request, folder: Path) -> None:
    from align_cli.data.cache import known_shapes
    from align_cli.data.encoding import make_index, measure
    from align_cli.data.filling import free_bytes, size_text

    dataset = _dataset(request)
    index = make_index(dataset, request)
    held, pixels = request.model, _first_picture(dataset, request)
    rows = {"clip_rows": held.segment_length} if held.text == "segments" else {}
    shapes = known_shapes(held.name, pixels.shape[-1], held.dtype, held.t5_length, held.vae, **rows)
    if shapes is None:
        shapes = measure(_model(request, pixels.shape[-1]), pixels).shapes
    typer.echo(plan_text(request, shapes, index, len(dataset)))
    typer.echo(f"output folder: {folder}, {size_text(free_bytes(folder))} free")


# ---------------------------------------------------------------- the work


def _prepare(request: Request) -> tuple[Encoder, dict[str, Any]]:
    """The encoder, and what a manifest will say about it."""
    from align_cli.data.encoding import Encoder, describe, make_index, measure

    dataset = _dataset(request)
    index, pixels = make_index(dataset, request), _first_picture(dataset, request)
    model = _model(request, pixels.shape[-1])
    measured = measure(model, pixels)
    about = describe(request, dataset, index, model, measured)
    return Encoder(model, dataset, index, measured.shapes, request), about


def fill(request: Request, folder: Path, *, resume: bool, overwrite: bool, content: bool) -> None:
    from align_cli.cli.progress import CountingProgress
    from align_cli.data.filling import Filling, free_bytes, resume_command, size_text

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
        typer.echo(f"train from them: {train_command(request, folder)}")


def train_command(request: Request, folder: Path) -> str:
    """What to type to train from encodings, with every setting of theirs that the model's preset has not."""
    preset = own_preset(request.model.name)
    method = preset.partition("/")[0] if "/" in preset else METHOD
    found = config.resolve(method, preset=preset, flags={"model.name": request.model.name})
    words = ["t2ialign", "train", method, "--model", request.model.name]
    words += [] if "/" in preset else ["--preset", preset]
    words += ["--data", request.data.name, "--cache", str(folder)]
    sized = ("mixture", "num_examples") if request.data.name == "shapes" else ("image_size", "interpolation")
    wanted = {f"model.{key}": getattr(request.model, key) for key in ("dtype", "unet", "vae", "t5_length")}
    wanted |= {f"model.{key}": value for key, value in request.model.reading_in_use().items()}
    wanted |= {f"data.{key}": getattr(request.data, key) for key in sized}
    wanted |= {"train.batch_size": request.batch_size, "train.seed": request.seed}
    own = {key: value for key, value, _ in found.values()}
    try:
        found.method_config.check_train(replace(found.train, batch_size=request.batch_size))
    except UserError:  # rows of one process of several: of these, training counts all
        del wanted["train.batch_size"]
    for key, value in wanted.items():
        if value != own[key]:
            flag = config.flag_name(key) if key.startswith("train.") else ""
            words += [flag, str(value)] if flag else ["--set", f"{key}={value}"]
    return shlex.join(words)


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
