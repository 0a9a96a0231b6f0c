"""`t2ialign encode`: compute latents and text encodings once, for training to read; or let the model draw
latents. No torch at import.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_cli import config
from align_cli.checks import one_of
from align_cli.cli import options, planned
from align_cli.cli.launching import launched_several
from align_cli.errors import UserError
from align_cli.launched import world_size

if TYPE_CHECKING:
    from align_cli.data.encoding import Request

METHOD = "softrepa"
"""Whose presets say how a model is trained, where the command does not."""
PICTURES = "pictures"
"""--for that is not said: the pictures of the dataset."""


def encode(
    purpose: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="NAME",
            help="pictures (default): those of the dataset; comat: latents that the model draws for its "
            "captions.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="NAME", help="Alias, hub id or folder. Default: tiny-sd15, which is built in."
        ),
    ] = None,
    unet: options.Unet = None,
    preset: options.Preset = None,
    sets: options.Sets = None,
    data: options.Data = None,
    data_path: options.DataPath = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N items.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", metavar="PIXELS", min=8, help="Pixels per side.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="--for: denoising steps. Default: 50.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", metavar="X", help="--for: guidance scale. Default: 7.5.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", metavar="NAME", help="--for: as in sample. Default: ddpm (SD3: euler)."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            metavar="NAME",
            help="exact (default): pictures and text; captions: pictures only, training encodes the text.",
        ),
    ] = None,
    posterior: Annotated[
        str | None,
        typer.Option(
            "--posterior",
            metavar="NAME",
            help="mean-std (default): every epoch draws its latents afresh; sample: one frozen draw.",
        ),
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option("--captions", metavar="NAME", help="Per item: first, random (one, default) or all."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            help="Rows per encoder call; that of training gives its bits. --for: pictures at once (8).",
        ),
    ] = None,
    shard_items: Annotated[
        int | None, typer.Option("--shard-items", metavar="N", help="Rows per file. Default: 256; --for: 64.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="SEED", min=0, help="Seed of random captions and draws.")
    ] = None,
    device: options.Device = None,
    encoder_device: options.EncoderDevice = None,
    dtype: options.Dtype = None,
    text: options.Text = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Default: encodings/DATA-MODEL-SIZE; --for: encodings/NAME-DATA-MODEL.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Write the shards that are missing or cut off, and no others.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the encodings in the folder.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every shard and encode some items again; write nothing.")
    ] = False,
    samples: Annotated[
        int,
        typer.Option("--samples", metavar="N", min=0, help="--verify: items to encode again; 0: hash only."),
    ] = 8,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print how many bytes it would be, and the costs; write nothing."),
    ] = False,
    num_processes: options.NumProcesses = 1,
    gpu: planned.GpuName = None,
    mfu: planned.Mfu = None,
    no_costs: planned.NoCosts = False,
) -> None:
    """Encode a dataset once: latents and text, in files that 't2ialign train --cache FOLDER' reads.

    Settings come from the preset of the model, as in training. Says first how many bytes it will write.
    With --for comat the model draws every caption, with CoMat's official settings unless flags say otherwise.
    --num-processes, or several of these commands, fill one folder together. --resume and --verify take the
    folder's own settings; together they also find and repair shards whose content has changed.
    """
    from align_cli.cli import encode_work
    from align_cli.data.filling import check_folder

    planned.check_options(dry_run, gpu, mfu, no_costs=no_costs)
    if overwrite and (resume or verify):
        raise UserError("--resume and --verify need the encodings that --overwrite removes; give one of them")
    if verify and not resume and num_processes > 1:
        raise UserError("--verify alone writes nothing and is for one process; leave --num-processes away")
    if not dry_run and launched_several(num_processes):
        return
    again = resume or verify
    wanted = purpose or (_saved_purpose(out) if again and out is not None else PICTURES)
    drawn = {"sample.steps": steps, "sample.guidance": guidance, "sample.sampler": sampler}
    how = {"layout": layout, "posterior": posterior, "captions": captions, "shard_items": shard_items}
    _check_options(wanted, drawn, how)
    flags = {
        "model.name": model, "model.dtype": dtype, "model.text": text, "model.device": device,
        "model.encoder_device": encoder_device, "model.unet": unet, "data.name": data,
        "data.path": None if data_path is None else data_path.expanduser().resolve(),
        "data.num_examples": limit, "train.batch_size": batch_size, "train.seed": seed,
        "data.image_size" if wanted == PICTURES else "sample.image_size": image_size, **drawn,
    }  # fmt: skip
    given = {key: value for key, value in how.items() if value is not None}
    if not again or out is None or preset is not None or sets:
        request, origin = _request(wanted, preset, sets or [], flags, given)
        folder, otherwise = out or Path("encodings") / default_name(request), "default"
    else:
        folder, request = out, _saved_request(out, wanted, flags, given)
        origin, otherwise = _flags_in(flags, given), f"encodings in {out}"
    if verify and not resume:
        encode_work.verify(folder, request, samples)
        return
    if overwrite and world_size() > 1:
        raise UserError(
            f"--overwrite is for one process: remove {folder} first, then start several without it"
        )
    check_folder(folder, resume=resume, overwrite=overwrite)
    if dry_run:
        settings = encode_work.settings_text(request, origin, otherwise)
        encode_work.dry_run(request, settings, folder, gpu, mfu, costs=not no_costs)
        return
    encode_work.fill(request, folder, resume=resume, overwrite=overwrite, content=verify)


def _check_options(wanted: str, drawn: dict[str, Any], how: dict[str, Any]) -> None:
    """UserError for an unknown --for, and for options that mean nothing with this one."""
    from align_cli.data.drawn import PURPOSES

    one_of("--for", wanted, (PICTURES, *PURPOSES))
    idle = {config.flag_name(key): value for key, value in drawn.items()}
    reason = "says how the model draws; give --for comat, or leave it away"
    if wanted != PICTURES:
        idle = {f"--{key}": how[key] for key in ("layout", "posterior")}
        reason = f"is for pictures that are encoded, and --for {wanted} lets the model draw; leave it away"
    for flag, value in idle.items():
        if value is not None:
            raise UserError(f"{flag} {reason}")


def _request(
    wanted: str, preset: str | None, sets: list[str], flags: dict[str, Any], given: dict[str, Any]
) -> tuple[Request, dict[str, str]]:
    """What to encode or to draw, from the preset of the model, --set and flags; setting -> its origin."""
    from align_cli.data.drawn import PURPOSES, DrawRequest
    from align_cli.data.encoding import Request
    from align_cli.settings import ModelSettings

    chosen = preset or own_preset(flags["model.name"] or ModelSettings().name, wanted)
    method = chosen.partition("/")[0] if "/" in chosen else METHOD
    found = config.resolve(method, preset=chosen, sets=sets, flags=flags)
    origin = found.origin | _flags_in(flags, given)
    if wanted == PICTURES:
        request = Request(
            model=found.model,
            data=found.data,
            seed=found.train.seed,
            batch_size=found.train.batch_size,
            **given,
        )
        return request, origin
    said = {key: value for key, value, origin in found.values() if origin.startswith("--")}
    drawing: dict[str, Any] = {
        f.name: said[key] for f in fields(found.sample) if (key := f"sample.{f.name}") in said
    }
    purpose = PURPOSES[wanted]  # presets say how pictures are drawn that people look at, not these
    data = found.data
    if data.name != "shapes" and "data.num_examples" not in said:
        data = replace(data, num_examples=0)  # a preset means its own data by it, and a list is drawn whole
        origin["data.num_examples"] = f"--for {wanted}"
    chosen_here = {f"sample.{f.name}" for f in fields(found.sample)} - said.keys()
    origin |= dict.fromkeys(chosen_here, f"--for {wanted}")
    if not flags["train.batch_size"]:
        origin["train.batch_size"] = origin["sample.batch_size"]
    request = DrawRequest(
        model=found.model,
        data=data,
        seed=found.train.seed,
        batch_size=flags["train.batch_size"] or drawing.get("batch_size", purpose.batch_size),
        purpose=wanted,
        sample=replace(purpose.settings(), **drawing),
        own_spacing="spacing" not in drawing,
        own_sampler="sampler" not in drawing,
        **given,
    )
    return request, origin


def _flags_in(flags: dict[str, Any], given: dict[str, Any]) -> dict[str, str]:
    """Setting -> the flag that says it, of those that were given."""
    said = {key: value for key, value in (flags | given).items() if value is not None}
    return {key: "--limit" if key == "data.num_examples" else config.flag_name(key) for key in said}


def own_preset(model: str, method: str = "") -> str:
    """The preset made for a model, of this method if it has one; or the name of no preset."""
    from align_cli.drawing import preset_of

    return preset_of(model, method) or config.NO_PRESET


def _saved_purpose(folder: Path) -> str:
    """--for of what is in a folder."""
    from align_cli.data.cache import Cache

    return str(Cache.read(folder).about.get("for", PICTURES))


def _saved_request(folder: Path, wanted: str, flags: dict[str, Any], given: dict[str, Any]) -> Request:
    """The settings of the encodings in a folder, with flags above them."""
    from align_cli.data.cache import MANIFEST, Cache
    from align_cli.data.drawn import DrawRequest, saved_request

    if wanted != (there := _saved_purpose(folder)):
        raise UserError(
            f"{folder} was made with --for {there}, now it is {wanted}; leave --for away, or choose another "
            "--out"
        )
    saved = saved_request(Cache.read(folder).about.get("settings", {}), str(folder / MANIFEST))

    def part(section: str) -> dict[str, Any]:
        return {
            key.partition(".")[2]: str(value) if isinstance(value, Path) else value
            for key, value in flags.items()
            if key.startswith(f"{section}.") and value is not None
        }

    model, data = replace(saved.model, **part("model")), replace(saved.data, **part("data"))
    if isinstance(saved, DrawRequest):
        saved = replace(saved, sample=replace(saved.sample, **part("sample")))
    return replace(saved, model=model, data=data, **part("train"), **given)


def default_name(request: Request) -> str:
    """coco-sd3-512; the size is left out where the dataset knows it itself. comat-prompts-sd15."""
    from align_cli.data.drawn import DrawRequest

    tail = Path(request.model.name.rstrip("/")).name.removeprefix("embedded:")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", tail).strip("-.") or "model"
    if isinstance(request, DrawRequest):
        return f"{request.purpose}-{request.data.name}-{slug}"
    size = "" if request.data.name == "shapes" else f"-{request.data.image_size}"
    return f"{request.data.name}-{slug}{size}"
