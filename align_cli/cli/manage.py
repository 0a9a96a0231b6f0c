"""`t2ialign presets` and `t2ialign adapters`: look at what is there. No torch at import."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from align_cli import packaged
from align_cli.cli.text import columns

presets_app = typer.Typer(help="Look at the packaged presets.")
adapters_app = typer.Typer(help="Look at trained adapters, import released ones, export to other tools.")

AdapterFolder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Adapter folder, or a name of 'adapters list'.")
]


@presets_app.command("list")
def presets_list() -> None:
    """Every preset: its name and what it is."""
    typer.echo(
        columns((name, preset_title(packaged.read_preset(name)[1])) for name in packaged.list_presets())
    )


@presets_app.command("show")
def presets_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a preset, for example softrepa/sd15.")],
) -> None:
    """The text of one preset, with the source of every value."""
    typer.echo(packaged.read_preset(name)[1].rstrip("\n"))


def preset_title(text: str) -> str:
    """First comment line of a preset."""
    first = text.lstrip().partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


@adapters_app.command("list")
def adapters_list() -> None:
    """The adapters that every --adapter takes by name: packaged ones, and officially published ones with
    which of them are cached.
    """
    from align_cli import index
    from align_cli.packaged import packaged_adapters

    rows = [("name", "base model", "size", "here", "licence", "published on")]
    for name, folder in packaged_adapters().items():
        size = sum(path.stat().st_size for path in folder.iterdir())
        rows.append((name, folder.parent.name, _size(size), "packaged", "", ""))
    for entry in index.read_index().values():
        here = "cached" if entry.cached else "no"
        rows.append((entry.name, entry.model, _size(entry.size), here, entry.licence, entry.source))
    typer.echo(columns(rows))
    typer.echo(f"cache: {index.cache_folder()}")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


@adapters_app.command("info")
def adapters_info(
    path: AdapterFolder,
) -> None:
    """What an adapter folder holds: method, base model, tensors, and the configuration of its training."""
    from align_cli.adapters import load_adapter

    adapter = load_adapter(path)
    facts = asdict(adapter.info)
    saved, origin = facts.pop("config"), facts.pop("origin")
    del facts["shapes"]  # the tensors tell
    rows: list[tuple[str, ...]] = [
        (key, _fact(value)) for key, value in facts.items() if value not in ("", {})
    ]
    rows.append(("trained values", f"{sum(t.numel() for t in adapter.state.values()):,}"))
    for name, tensor in adapter.state.items():
        rows.append(("tensor", name, f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"))
    for section, content in saved.items():
        for key, value in content.items() if isinstance(content, dict) else ():
            name = f"{section}.{key}"
            rows.append(("config", name, str(value), origin.pop(name, "")))
    # what is left is of no setting: other content of data, weights or the adapter of --from
    rows += [("content", name, said) for name, said in origin.items()]
    typer.echo(columns(rows))


@adapters_app.command("import")
def adapters_import(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            help="softrepa, longalign, textcraftor, dpt or comat: what it was released for.",
        ),
    ],
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="The released file, or the folder that holds it.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Adapter folder to write; must not exist.")
    ],
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="Base model that it was trained on.")
    ] = "sd15",
) -> None:
    """Turn an officially released file into an adapter folder."""
    from align_cli.adapters import import_official

    import_official(method, path, model, out)
    typer.echo(f"wrote {out}")
    typer.echo(f"look at it with: t2ialign adapters info {out}")


@adapters_app.command("export")
def adapters_export(
    adapter: AdapterFolder,
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="diffusers, peft, kohya, comfyui or official.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write; must not exist.")],
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="R", min=1, help="Write all trained weights as LoRA of this rank."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Base model. Default: the adapter's own.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="float32, float16 or bfloat16.")
    ] = "float32",
) -> None:
    """Write an adapter as files of other tools, and open them again to compare."""
    from align_cli.exporting import export

    report = export(adapter, to, out, model=model, rank=rank or 0, dtype=dtype)
    for name, words in report.written.items():
        typer.echo(f"wrote {out / name}: {words}")
    if report.left_out:
        typer.echo(columns(("left out", layer, f"{share:.2%}") for layer, share in report.left_out.items()))
    typer.echo(columns(report.table()))
    for text in report.notes:
        typer.echo(f"note: {text}")
    for text in report.check:
        typer.echo(f"check: {text}")


Licence = Annotated[
    str, typer.Option("--licence", metavar="ID", help="Licence for the card, as the hub calls it: mit, ...")
]
Public = Annotated[
    bool, typer.Option("--public", help="Make a new repository public. Default: private, as only you see it.")
]


@adapters_app.command("card")
def adapters_card(path: AdapterFolder, licence: Licence = "") -> None:
    """The model card that 'adapters push' uploads: README.md with what the adapter's folder says."""
    from align_cli.publishing import card

    typer.echo(card(path, licence=licence), nl=False)


@adapters_app.command("push")
def adapters_push(
    path: AdapterFolder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the model hub.")],
    public: Public = False,
    licence: Licence = "",
) -> None:
    """Upload an adapter with its model card to the model hub; the folder stays as it is."""
    from align_cli.adapters import read_adapter
    from align_cli.publishing import check, push

    read_adapter(path)  # before anything is asked of the hub
    target = check(repo)
    address = push(path, target, public=public, licence=licence)
    typer.echo(f"pushed {path} to {target.name}: {address}")


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value))
    return str(value)
