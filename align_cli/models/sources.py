"""Where the files of a model are: a hub repository, a local diffusers folder, or a folder of the package.

`find(name)` gives a Source that knows its model_index.json, `with_parts(source, parts)` one with their files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from align_cli import registry
from align_cli.errors import UserError, first_line
from align_cli.hub import fetch, reachable

INDEX = "model_index.json"
"""What makes a folder a diffusers pipeline."""

DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
"""Base names of the weight files that the two libraries write."""

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")

TOKENIZER_FILES = (
    "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.json",
    "spiece.model",
)  # fmt: skip
"""Files of a CLIP or T5 tokenizer; not every pipeline has each."""


@dataclass(frozen=True)
class Source:
    """A model's files. index: its model_index.json, empty for a single module. files: paths below `folder`.

    fetch: brings one file of a hub repository into `folder`, None if the repository lacks it; None for
    folders of this machine.
    """

    label: str
    folder: Path
    index: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    fetch: Callable[[str], Path | None] | None = None
    embedded: bool = False

    def names(self, part: str) -> bool:
        """Whether the pipeline says that it has this part."""
        entry = self.index.get(part)
        return isinstance(entry, list) and bool(entry) and entry[0] is not None


def find(name: str) -> Source:
    """The pipeline called `name`; of a hub model only model_index.json is fetched as yet.

    Raises:
        UserError: unknown name; no pipeline; the hub refuses, or is out of reach and nothing is cached.
    """
    source = _find(name)
    if not source.index:
        if source.fetch is not None:
            raise UserError(f"the hub model {source.label} is no diffusers pipeline: it has no {INDEX}")
        raise UserError(
            f"{source.label} is no diffusers pipeline folder: it has no {INDEX} (and unet/, vae/, ... "
            "beside it)"
        )
    return source


def find_module(name: str, part: str, *, half: bool, advice: str = "") -> tuple[Source, str]:
    """A single module, with its files there: a folder or hub repository that holds nothing else, or `part` of
    a pipeline or of a folder that holds parts of one (as training scripts save them).

    advice: what the user may do where the hub does not give it; "" names another --model.
    Returns:
        The source and the folder of the module in it, "" or "unet/".
    """
    source = _find(name, advice)
    if source.index or ("config.json" not in source.files and f"{part}/config.json" in source.files):
        return with_parts(source, [part], half=half), f"{part}/"
    return _with_module(source, "", stem_of(part), half), ""


def find_config(name: str, part: str, *, advice: str = "") -> tuple[Source, str]:
    """As `find_module`, but the configuration alone is fetched from a hub repository, no weights."""
    source = _find(name, advice)
    within = source.index or ("config.json" not in source.files and f"{part}/config.json" in source.files)
    prefix = f"{part}/" if within else ""
    _bring(source, f"{prefix}config.json")
    return _listed(source), prefix


def with_parts(source: Source, parts: Collection[str], *, half: bool) -> Source:
    """The source with the weights, configurations and tokenizers of `parts` there, fetched from the hub if
    need be: one set of weights per part. half: the fp16 files are enough.
    """
    for part in parts:
        if part in TOKENIZERS:
            source = with_tokenizer(source, f"{part}/")
        else:
            source = _with_module(source, f"{part}/", stem_of(part), half)
    return _listed(source)


def with_tokenizer(source: Source, prefix: str) -> Source:
    """The source with the files of a tokenizer there, of those that it has. prefix: "" or "tokenizer/"."""
    for file in TOKENIZER_FILES:
        _bring(source, f"{prefix}{file}")
    return _listed(source)


def with_config(source: Source, part: str) -> Source:
    """The source with the configuration of one part there, and not its weights."""
    _bring(source, f"{part}/config.json")
    return _listed(source)


def stem_of(part: str) -> str:
    """Base name of the weight files of a part."""
    return TRANSFORMERS_STEM if part in TEXT_ENCODERS else DIFFUSERS_STEM


def weight_file(source: Source, prefix: str, stem: str, *, half: bool) -> str | None:
    """The best weight file, or index of shards, of a module among the source's files; None if there is none.

    Raises:
        UserError: a shard that the index names is not there.
    """
    found = next((c for c in weight_choices(prefix, stem, half) if c in source.files), None)
    if found is not None:
        lacking = [file for file in shards(source, found) if file not in source.files]
        if lacking:
            raise UserError(
                f"{source.label} is incomplete: no {lacking[0]} in {source.folder}"
                + (f" ({len(lacking)} shards are missing)" if len(lacking) > 1 else "")
            )
    return found


def weight_choices(prefix: str, stem: str, half: bool) -> list[str]:
    """Names of a module's weights, the best first: safetensors before pickle, the wanted precision before the
    other, one file before shards.
    """
    order = (".fp16", "") if half else ("", ".fp16")
    pickle = "pytorch_model" if stem == TRANSFORMERS_STEM else stem
    return [
        f"{prefix}{name}"
        for base, ending in ((stem, "safetensors"), (pickle, "bin"))
        for variant in order
        for name in (f"{base}{variant}.{ending}", f"{base}.{ending}.index{variant}.json")
    ]


def shards(source: Source, file: str) -> list[str]:
    """The weight files that an index names; a weight file itself names none."""
    if not file.endswith(".json"):
        return []
    names = read_json(source.folder / file, source.label).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{source.label}: {source.folder / file} names no weights")
    folder = file.rpartition("/")[0]
    return sorted({f"{folder}/{name}" if folder else str(name) for name in names.values()})


def read_json(path: Path, label: str) -> dict[str, Any]:
    """Content of a JSON object file. UserError if it is not there, or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{label} is no diffusers pipeline: no {path.name} in {path.parent}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{label}: {path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{label}: {path} is not a JSON object")
    return content


# ---------------------------------------------------------------- this machine


def _find(name: str, advice: str = "") -> Source:
    """Whatever is called `name`, a pipeline or not. advice: see `find_module`."""
    where = registry.model_source(name)
    if where.startswith("embedded:"):
        folder = registry.WEIGHTS / where.removeprefix("embedded:")
        if not any((folder / file).is_file() for file in (INDEX, "config.json")):
            raise UserError(
                f"the embedded model {folder.name} is not in this installation ({folder} is missing); "
                "reinstall t2ialign"
            )
        return replace(_local(name, folder), embedded=True)
    folder = Path(where).expanduser()
    return _local(str(where), folder) if folder.is_dir() else _hub(name, where, advice)


def _local(label: str, folder: Path) -> Source:
    index = read_json(folder / INDEX, label) if (folder / INDEX).is_file() else {}
    return _listed(Source(label, folder, index))


def _listed(source: Source) -> Source:
    """The source with the files that are there now."""
    there = (p for p in source.folder.rglob("*") if p.is_file())
    return replace(source, files=tuple(p.relative_to(source.folder).as_posix() for p in there))


# ---------------------------------------------------------------- the hub


def _hub(name: str, repo: str, advice: str = "") -> Source:
    """A hub repository of which model_index.json, or else config.json, is there.

    What the local cache holds is taken from there; without network only that is seen.
    """
    label = repo if name == repo else f"{name} ({repo})"
    online = reachable()  # asked once: huggingface_hub would retry every file for half a minute
    other = advice or "pass a local folder with --model /path/to/folder"
    ask = partial(fetch, label, repo, online=online, advice=other)
    index = ask(INDEX)
    first = index or ask("config.json")
    if first is None:
        if online:
            raise UserError(f"the hub model {label} is no diffusers pipeline: it has no {INDEX}")
        other = advice or (
            "pass a local diffusers folder with --model /path/to/folder, or the built-in --model tiny-sd15"
        )
        raise UserError(f"model {label} is not in the local cache and the hub cannot be reached; {other}")
    folder = first.parent
    revision = folder.name  # the commit, so that all files are of one version

    def fetch_file(file: str) -> Path | None:
        return ask(file, revision=revision)

    content = read_json(index, label) if index is not None else {}
    source = Source(label, folder, content, fetch=fetch_file)
    if content:
        _bring(source, "scheduler/scheduler_config.json")
    return _listed(source)


def _with_module(source: Source, prefix: str, stem: str, half: bool) -> Source:
    """The source with one module's configuration and weights there."""
    if source.fetch is not None:
        _bring(source, f"{prefix}config.json")
        for choice in weight_choices(prefix, stem, half):
            if _bring(source, choice):
                for file in shards(source, choice):
                    _bring(source, file)
                break
    return _listed(source)


def _bring(source: Source, file: str) -> bool:
    """Whether a file is there, once it has been asked for from the hub."""
    return source.fetch is not None and source.fetch(file) is not None
