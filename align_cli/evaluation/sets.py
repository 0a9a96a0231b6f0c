"""The prompts of the benchmarks: parti, hpsv2, coco, shapes, and any file. No torch at import.

Each function takes the options of `t2ialign eval` and returns a PromptSet; registry.BENCHMARKS names them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from align_cli import registry
from align_cli.errors import UserError, first_line, unknown
from align_cli.evaluation.prompts import FORMATS, PromptRow, PromptSet, read_prompts
from align_cli.settings import EvalSettings

PARTI_HUB, PARTI_FILE = "nateraw/parti-prompts", "PartiPrompts.tsv"
PARTI_GROUPS = ("Category", "Challenge")
PARTI_SIZE = 1632
HPSV2_HUB, HPSV2_FOLDER = "zhwang/HPDv2", "benchmark"
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
HPSV2_SIZE = 800
"""Prompts of each style."""
COCO_FILE = "captions_val2017.json"
NO_FID = (
    "FID and LPIPS are left out: their libraries (clean-fid, torch-fidelity, lpips) need torchvision; "
    "run one of them on the folder of pictures, in an environment of its own"
)


@dataclass(frozen=True, kw_only=True)
class SetOptions:
    """What the user says about the prompts; a benchmark refuses what means nothing to it.

    prompts: a file or folder of prompts. data_path: a folder of data (COCO). column: of a table, the one with
    the prompts. num, seed, split, kinds: of prompts that are made here (the shapes world).
    """

    prompts: Path | None = None
    data_path: Path | None = None
    column: str | None = None
    num: int | None = None
    seed: int = 0
    split: str | None = None
    kinds: tuple[str, ...] | None = None

    def check(self, benchmark: str, *allowed: str) -> None:
        """UserError for an option that is given but means nothing to the benchmark; `seed` always does."""
        flags = {"num": "--n", **{f.name: f"--{f.name.replace('_', '-')}" for f in fields(self)[:3]}}
        flags |= {"split": "--split", "kinds": "--kind"}
        for name, flag in flags.items():
            if getattr(self, name) is not None and name not in allowed:
                takes = ", ".join(flags[a] for a in allowed)
                raise UserError(
                    f"{flag} means nothing to {benchmark}" + (f"; it takes {takes}" if takes else "")
                )


def load_set(name: str, options: SetOptions) -> PromptSet:
    """The prompts of a benchmark, or of a file.

    Raises:
        UserError: no such benchmark or file, an option it does not take, or bad content.
    """
    if name in registry.BENCHMARKS:
        found: PromptSet = registry.load(registry.BENCHMARKS, name)(options)
        return found
    path = Path(name).expanduser()
    if path.suffix.lower() in FORMATS or path.exists() or "/" in name or os.sep in name:
        options.check(name, "column")
        return read_prompts(path, column=options.column)
    error = unknown("benchmark", name, registry.BENCHMARKS)
    raise UserError(f"{error}; or name a file that ends in {', '.join(FORMATS)}")


def parti(options: SetOptions) -> PromptSet:
    """PartiPrompts (P2): 1,632 prompts, grouped by category and by challenge; Note is kept in `extra`.

    From `--prompts` (the TSV of google-research/parti, quoting off), else from the hub's mirror. Blanks
    around prompts are kept, as there.
    """
    options.check("parti", "prompts", "column")
    advice = f"pass --prompts {PARTI_FILE} (from google-research/parti)"
    path = options.prompts or _hub_file("parti", PARTI_HUB, PARTI_FILE, advice)
    found = read_prompts(path, name="parti", column=options.column)
    if lacking := [name for name in PARTI_GROUPS if name not in found.group_names]:
        raise UserError(
            f"{path} has no column {lacking[0]}; --prompts of parti wants {PARTI_FILE}; draw other prompts "
            f"with t2ialign eval {path}"
        )
    rows = (
        replace(row, groups={k: row.groups[k] for k in PARTI_GROUPS if k in row.groups}) for row in found.rows
    )
    return replace(found, rows=tuple(rows), notes=(*found.notes, *_size_note(path, len(found), PARTI_SIZE)))


def hpsv2(options: SetOptions) -> PromptSet:
    """The HPSv2 benchmark: four styles of 800 prompts. A row's id is the official picture without its ending,
    "anime/00000".

    From the four JSON files in the folder `--prompts`, else from where the hpsv2 package keeps them, else
    from the hub.
    """
    options.check("hpsv2", "prompts")
    rows: list[PromptRow] = []
    notes: list[str] = []
    for style in HPSV2_STYLES:
        path = _hpsv2_file(style, options.prompts)
        found = read_prompts(path)
        notes += [*found.notes, *_size_note(path, len(found), HPSV2_SIZE)]
        rows += [
            PromptRow(f"{style}/{i:05d}", row.text, {"Style": style}) for i, row in enumerate(found.rows)
        ]
    return PromptSet("hpsv2", str(path.parent), tuple(rows), notes=tuple(notes))


def _hpsv2_file(style: str, folder: Path | None) -> Path:
    """The JSON file of a style. Source of the places: hpsv2 1.2.0, utils.py."""
    file = f"{style}.json"
    names = ", ".join(f"{s}.json" for s in HPSV2_STYLES)
    if folder is not None:
        path = folder.expanduser() / file
        if not path.is_file():
            raise UserError(f"no {file} in {folder}; --prompts of hpsv2 wants a folder with {names}")
        return path
    root = Path(os.environ.get("HPS_ROOT") or "~/.cache/hpsv2").expanduser()
    path = root / "datasets" / "benchmark" / file
    if path.is_file():
        return path
    advice = f"pass --prompts FOLDER with {names} (from {HPSV2_FOLDER}/ of {HPSV2_HUB})"
    return _hub_file("hpsv2", HPSV2_HUB, f"{HPSV2_FOLDER}/{file}", advice)


def coco(options: SetOptions) -> PromptSet:
    """COCO val2017: the first caption of every image, in the order of the image ids. A row's id is the
    image's. Source: SoftREPA's evaluation.

    From annotations/captions_val2017.json of `--data-path`, or the file `--prompts` itself. The pictures are
    not needed.
    """
    from align_cli.data.coco import find_root, read_captions

    options.check("coco", "prompts", "data_path")
    path = options.prompts
    if path is None:
        if options.data_path is None:
            raise UserError(
                f"coco needs the captions of val2017: --data-path FOLDER with annotations/{COCO_FILE}, or "
                f"--prompts {COCO_FILE}"
            )
        path = find_root(str(options.data_path)) / "annotations" / COCO_FILE
    ids, files, captions = read_captions(path)
    rows = (
        PromptRow(str(i), texts[0], extra={"file": file})
        for i, file, texts in zip(ids, files, captions, strict=True)
    )
    return PromptSet("coco", str(path), tuple(rows), notes=(NO_FID,))


def shapes(options: SetOptions) -> PromptSet:
    """Prompts of the shapes world with held-out compositions, grouped by kind; the scorer is `shapes`."""
    from align_cli.evaluation.benchmarks import ShapesBenchmark
    from align_cli.shapes.world import SIZE

    options.check("shapes", "num", "split", "kinds")
    num = EvalSettings().num_prompts if options.num is None else options.num
    split = options.split or "test"
    scenes = ShapesBenchmark().prompts(num, options.seed, split=split, kinds=options.kinds)
    rows = tuple(PromptRow(str(i), p.text, {"Kind": p.kind}) for i, p in enumerate(scenes))
    source = f"the shapes world, {split} split, seed {options.seed}"
    if options.kinds not in (None, EvalSettings().kinds):
        source += f", {', '.join(options.kinds or ())} prompts"
    return PromptSet("shapes", source, rows, scenes=tuple(scenes), image_size=SIZE)


def _size_note(path: Path, found: int, official: int) -> list[str]:
    if found == official:
        return []
    return [f"{path} holds {found} prompts, the official file {official}"]


def _hub_file(benchmark: str, repo: str, file: str, advice: str) -> Path:
    """A file of a hub dataset, from the local cache or fetched; a UserError ends in `advice`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from align_cli import hub

    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", local_files_only=not hub.reachable()))
    except LocalEntryNotFoundError:
        reason = "it is not in the local cache, and the hub cannot be reached"
    except (HfHubHTTPError, OSError) as error:
        reason = first_line(error)
    raise UserError(f"cannot get {file} of {repo} for {benchmark}: {reason}; {advice}")
