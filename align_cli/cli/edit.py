"""`t2ialign edit`: change what a picture shows, with adapters or without. No torch at import."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align_cli import config
from align_cli.cli import options
from align_cli.cli.drawing import SHEET
from align_cli.errors import UserError
from align_cli.launched import world_size
from align_cli.settings import EditSettings

if TYPE_CHECKING:
    from align_cli.data.edits import EditRequest
    from align_cli.drawing import Plan

FOLDER = "edits"


def edit(
    image: Annotated[
        Path | None,
        typer.Option("--image", metavar="FILE", help="Picture to edit. Default: drawn from --src-prompt."),
    ] = None,
    src_prompt: Annotated[
        str | None, typer.Option("--src-prompt", metavar="TEXT", help="What the picture shows.")
    ] = None,
    tgt_prompt: Annotated[
        str | None, typer.Option("--tgt-prompt", metavar="TEXT", help="What it is to show.")
    ] = None,
    edits: Annotated[
        Path | None,
        typer.Option(
            "--list", metavar="FILE", help="Many edits: JSON list of {prompt, img_path, tgt_prompt}."
        ),
    ] = None,
    model: options.Model = None,
    unet: options.Unet = None,
    adapter: options.Adapters = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Edit with the base model, too, and put it beside.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", help="Steps of the whole path from noise."),
    ] = None,
    n_start: Annotated[
        int | None,
        typer.Option("--n-start", metavar="N", help="How many of the last are run; fewer change less."),
    ] = None,
    n_min: Annotated[
        int | None,
        typer.Option("--n-min", metavar="N", help="Of those, how many of the last follow the target alone."),
    ] = None,
    n_avg: Annotated[
        int | None, typer.Option("--n-avg", metavar="N", help="Noises averaged in every step.")
    ] = None,
    src_guidance: Annotated[
        float | None, typer.Option("--src-guidance", metavar="X", help="Guidance scale of the source prompt.")
    ] = None,
    tgt_guidance: Annotated[
        float | None, typer.Option("--tgt-guidance", metavar="X", help="Guidance scale of the target prompt.")
    ] = None,
    convention: Annotated[
        str | None,
        typer.Option(
            "--convention",
            metavar="NAME",
            help="Of the target's guidance s: softrepa, v + s (v - u), or flowedit, u + s (v - u).",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size", metavar="PIXELS", help="Pixels per side; 0: the model's; -1: the picture's."
        ),
    ] = None,
    keep_aspect: Annotated[
        bool | None,
        typer.Option("--keep-aspect/--square", help="Keep the picture's aspect ratio, or squeeze it."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", help="Rows of one denoiser call; an edit has up to 4."),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="SEED", min=0, max=2**63 - 1, help="Seed of every edit.")
    ] = 42,
    device: options.Device = None,
    encoder_device: options.EncoderDevice = None,
    dtype: options.Dtype = None,
    text: options.Text = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Folder for the pictures. Default: edits."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the finished edits in the folder, make the others.")
    ] = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Change a picture from what one prompt says to what another says (FlowEdit).

    Writes the edited picture, and before and after side by side. Settings come from the adapter, else from
    the preset of the model; flags go above them. Official values on SD3 without SoftREPA's tokens:
    --n-start 33 --tgt-guidance 13.5.
    """
    from align_cli.cli.drawing import choose_folder, make_folder, note_long_prompts
    from align_cli.cli.edit_work import Job, Work, describe
    from align_cli.drawing import make_plan

    if world_size() > 1:
        raise UserError("edit runs in one process; start it without torchrun and accelerate")
    requests = _requests(image, src_prompt, tgt_prompt, edits)
    if compare and not adapter:
        raise UserError("--compare edits with the base model beside the aligned; name one with --adapter")
    if resume and overwrite:
        raise UserError("--resume keeps finished edits and --overwrite replaces them; give one of them")
    devices = {"device": device, "encoder_device": encoder_device}
    plan = make_plan(model, adapter or [], {**devices, "dtype": dtype, "text": text, "unet": unet}, {})
    flags = {
        "steps": steps, "n_start": n_start, "n_min": n_min, "n_avg": n_avg, "src_guidance": src_guidance,
        "tgt_guidance": tgt_guidance, "convention": convention, "image_size": image_size,
        "keep_aspect": keep_aspect, "batch_size": batch_size,
    }  # fmt: skip
    settings, origin = edit_settings(plan, flags)
    if settings.keep_aspect and all(r.image is None for r in requests):
        warnings.warn("--keep-aspect has no effect: the source is drawn, and square", stacklevel=2)
    variants = ("base", "aligned") if compare else ("edited",)
    jobs = [Job(k, r, seed, variants) for k, r in enumerate(requests)]
    names = [name for job in jobs for name in job.files] + [SHEET] * (len(jobs) > 1)
    folder = _resumed_folder(out) if resume else choose_folder(out, FOLDER, names, overwrite)
    loaded, plan = plan.load()
    work = Work(loaded, plan, settings, folder, jobs)
    work.check()
    make_folder(folder)
    if resume:
        work.look_for_finished()
    typer.echo(f"{plan.model.name}: {describe(settings)}, as {origin}", err=True)
    note_long_prompts(loaded, (t for r in requests for t in (r.src, r.tgt)))
    try:
        work.run()
    except KeyboardInterrupt:
        typer.echo(f"stopped: {work.kept()}", err=True)
        raise typer.Exit(130) from None
    except UserError as error:
        raise UserError(f"{error}; {work.kept()}") from error
    typer.echo(f"{len(jobs)} edit{'s' * (len(jobs) > 1)} in {folder}")
    if len(jobs) == 1:
        typer.echo(f"before and after: {folder / jobs[0].before_after}")
    else:
        typer.echo(f"contact sheet: {folder / SHEET}")


def edit_settings(plan: Plan, flags: Mapping[str, Any]) -> tuple[EditSettings, str]:
    """Settings in layers, and in words where they come from: those that were chosen for the first adapter,
    else those of the model's preset, else the class defaults; above them the flags (None: not given).

    Raises:
        UserError: an impossible value.
    """
    from align_cli.drawing import DEFAULTS, preset_of

    info = plan.infos[0] if plan.infos else None
    preset = preset_of(plan.model.name)
    if info is not None and "edit" in info.config and _chose_editing(info.origin):
        where = f"adapter {plan.adapters[0]}: config"
        saved = config.Resolved.from_dict({**info.config, "method": info.method}, info.origin, where=where)
        settings, origin = saved.edit, f"adapter {plan.adapters[0]}"
    elif preset is not None:
        resolved = config.resolve(preset.partition("/")[0], preset=preset)
        settings = resolved.edit
        origin = f"preset {preset}" if _chose_editing(resolved.origin) else DEFAULTS
    else:
        settings, origin = EditSettings(), DEFAULTS
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        changed = replace(settings, **given)
    except UserError as error:
        words = str(error).replace(",", " ").split()
        other = next((key for key in vars(settings) if f"edit.{key}" in words and key not in given), None)
        if other is None:
            raise
        flag = config.flag_name(f"edit.{other}")
        raise UserError(f"{error}; edit.{other} is that of {origin}: give {flag}, too") from error
    if given:
        origin += ", with " + ", ".join(config.flag_name(f"edit.{key}") for key in given)
    return changed, origin


def _chose_editing(origin: Mapping[str, str]) -> bool:
    """Whether a preset, a file or a flag says how pictures are edited, by the layer of every setting. Where
    none does, settings are class defaults, which were made for SD3.
    """
    return any(key.startswith("edit.") and layer != "default" for key, layer in origin.items())


def _resumed_folder(out: Path | None) -> Path:
    """The folder of --resume. UserError if it is none."""
    folder = out or Path(FOLDER)
    if folder.is_dir():
        return folder
    what = "is not a folder" if folder.exists() else "does not exist"
    raise UserError(
        f"nothing to resume: {folder} {what}; leave --resume away to begin, or name the folder with --out"
    )


def _requests(image: Path | None, src: str | None, tgt: str | None, edits: Path | None) -> list[EditRequest]:
    from align_cli.data.edits import read_list, request

    if edits is not None:
        if image is not None or src is not None or tgt is not None:
            raise UserError("--list names pictures and prompts itself; leave --image and the prompts away")
        return read_list(edits)
    for name, text in {"--src-prompt": src, "--tgt-prompt": tgt}.items():
        if text is None:
            raise UserError(
                f"{name} is missing; for example --src-prompt 'a red circle' --tgt-prompt 'a blue circle', "
                f"or many edits with --list FILE.json"
            )
    return [request(str(src), str(tgt), image)]
