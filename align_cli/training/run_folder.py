"""The output folder of a run: what lies in it, who may write to it, with which settings it may go on. No
torch.

config.toml, run.json    the resolved settings with their origins, for people and for machines
checkpoints/             see checkpoint.py
metrics.jsonl            one line per train.log_every steps, and one per guard.every steps
best/                    see guard.py
grids/, tracker/         sample grids; the files of train.tracker
adapter/, result.json, before-after.png    the result
eval/                    the paired evaluation that closes the run, as `t2ialign eval` writes it
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from align_cli.config import class_default
from align_cli.errors import UserError, unknown
from align_cli.files import LOCK, blocking, part_path
from align_cli.launched import again

FORMAT = 1
CONFIG, RUN, METRICS, CHECKPOINTS = "config.toml", "run.json", "metrics.jsonl", "checkpoints"
GRIDS, TRACKER, ADAPTER, RESULT, PICTURE = "grids", "tracker", "adapter", "result.json", "before-after.png"
EVALUATION, BEST = "eval", "best"
OURS = (RUN, CONFIG, METRICS, CHECKPOINTS, GRIDS, TRACKER, ADAPTER, RESULT, PICTURE, EVALUATION, BEST)
"""Everything a run writes; --overwrite removes these names and nothing else."""

FREE = frozenset(
    {
        "model.device",
        "model.encoder_device",
        "data.path",
        "data.cache",
        "data.num_workers",
        "train.steps",
        "train.save_every",
        "train.keep_checkpoints",
        "train.grid_every",
        "train.tracker",
        "train.num_threads",
        "train.shard",
        "guard.keep",
    }
)
"""Settings that may differ when a run goes on; data of another path or cache need the same fingerprint."""
ALLOW, DATA, START, WEIGHTS = "--allow-change", "data", "start", "weights"
"""The flag that lets settings differ, its words for the content of the data, of the adapter of --from and of
the base model."""
CONTENTS = frozenset({START, WEIGHTS})
"""Keys of run.json's configuration that are no settings: hashes of what the settings name."""
FREE_SECTIONS = ("sample", "edit", "eval")
WATCHED = ("sample.", "eval.kinds")
"""Beginnings of free settings that the guard measures with: measurements of two settings are not compared."""


def check(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder before anything is loaded.

    Raises:
        UserError: it holds a run and neither `resume` nor `overwrite` is given, it holds none to resume, it
            holds other things and `overwrite` is not given, it is a file, or it cannot be written to.
    """
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite removes it; give one of them")
    try:
        held = [name for name in OURS if (out / name).exists()] if out.is_dir() else []
        foreign = out.is_dir() and not held and any(not _unfinished(p.name) for p in out.iterdir())
        blocked = blocking(out)
    except OSError as error:
        raise UserError(
            f"cannot look into {out}: {error.strerror}; choose another folder with --out"
        ) from error
    if blocked is not None:
        raise UserError(f"{blocked} is a file, not a folder; choose another output folder with --out")
    if held and not (resume or overwrite):
        raise UserError(
            f"{out} already holds a run ({held[0]}); go on with --resume, replace it with --overwrite, "
            f"or choose another folder with --out"
        )
    if foreign and not (resume or overwrite):
        raise UserError(
            f"{out} is not empty and holds no run; choose another folder with --out, or give --overwrite, "
            f"which leaves other files alone"
        )
    if resume and RUN not in held:
        raise UserError(
            f"{out} holds no run to resume; leave --resume away to start one, or name it with --out"
        )
    try:
        made = make(out)
        TemporaryFile(dir=out).close()
        for path in reversed(made):
            path.rmdir()
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; choose another folder with --out"
        ) from error


def _unfinished(name: str) -> bool:
    """Whether that is a file with which a run begins, or began: the lock, the first files half-written."""
    return name == LOCK or name in (part_path(Path(file)).name for file in (RUN, CONFIG))


def make(folder: Path) -> list[Path]:
    """Make a folder with its parents; returns those that were missing, outermost first."""
    missing = [p for p in (*reversed(folder.parents), folder) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def clear(out: Path) -> None:
    """Remove an earlier run: our own names only."""
    for name in OURS:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_run(out: Path) -> dict[str, Any]:
    """The content of run.json.

    Raises:
        UserError: missing, damaged or of a later version.
    """
    path = out / RUN
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        fmt, config = raw["format"], raw["config"]
    except FileNotFoundError:
        raise UserError(f"{out} holds no run to resume; leave --resume away to start one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); start again with --overwrite") from error
    if not isinstance(fmt, int) or fmt > FORMAT or not isinstance(config, dict):
        raise UserError(f"{path} has format {fmt}, this t2ialign reads up to {FORMAT}; update t2ialign")
    return dict(raw)


def run_text(
    config: Mapping[str, Any],
    origin: Mapping[str, str],
    fingerprint: str,
    versions: Mapping[str, str],
    changes: Sequence[Change] = (),
) -> str:
    """The content of run.json."""
    raw = {
        "format": FORMAT, "data_fingerprint": fingerprint, "versions": dict(versions), "config": dict(config),
        "origin": dict(origin), "changes": [asdict(change) for change in changes],
    }  # fmt: skip
    return json.dumps(raw, indent=2) + "\n"


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    values: dict[str, Any] = {}
    for section, part in config.items():
        if isinstance(part, Mapping):
            values.update({f"{section}.{key}": value for key, value in part.items()})
        else:
            values[section] = part
    return values


@dataclass(frozen=True)
class Change:
    """A setting that --allow-change let differ. step: finished steps when the run went on with it."""

    step: int
    key: str
    before: Any
    now: Any

    @property
    def origin(self) -> str:
        """Where the setting's value came from."""
        return f"changed at step {self.step} from {self.before!r} with {ALLOW}"


def origins(changes: Sequence[Change]) -> dict[str, str]:
    """Setting -> where its value came from, for those that were changed."""
    found: dict[str, str] = {}
    for change in changes:
        before = f"{found[change.key]}, " if change.key in found else ""
        found[change.key] = before + change.origin
    return found


def changes_in(raw: Mapping[str, Any], start: int) -> list[Change]:
    """The changes that run.json holds, for a run that goes on at step `start`: what was changed later, of
    which no checkpoint is left, holds from there on.
    """
    found = [Change(**row) for row in raw.get("changes", [])]
    return [replace(change, step=min(change.step, start)) for change in found]


def check_allowed(allowed: Sequence[str], known: Collection[str]) -> None:
    """UserError for a KEY of --allow-change that is no setting, with the nearest one."""
    for key in allowed:
        if key not in known and key not in (DATA, START, WEIGHTS):
            ends = sorted(k for k in known if k.rpartition(".")[2] == key)
            if ends:
                raise UserError(f"{ALLOW}: unknown key {key!r}; did you mean {' or '.join(map(repr, ends))}?")
            raise unknown("key", key, [*known, DATA, START, WEIGHTS], where=ALLOW)


def check_same(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    saved_data: str,
    data: str,
    out: Path,
    allowed: Collection[str] = (),
) -> list[tuple[str, Any, Any]]:
    """Refuse to go on with other settings or data than the run began with. Sections that the version which
    began it did not have are free, single settings that it did not have are at their defaults.

    Args:
        allowed: settings that may differ; DATA, START and WEIGHTS for contents.
    Returns:
        (key, before, now) of the allowed ones that do.
    Raises:
        UserError: naming all others that differ, with both values.
    """
    before, after = flat(saved), flat(now)
    sections = {section for section, part in now.items() if isinstance(part, Mapping)} - saved.keys()
    found = []
    for key in sorted(before.keys() | after.keys()):
        whole_run = key == "train.steps" and after.get("train.lr_schedule") == "cosine"
        watched = bool(after.get("guard.every")) and key.startswith(WATCHED) and key != "sample.batch_size"
        section = key.partition(".")[0]
        free = (key in FREE and not whole_run) or (section in FREE_SECTIONS and not watched)
        if free or section in sections or (key == START and key not in before):
            continue
        first = before.get(key, class_default(key))
        if first != after.get(key):
            found.append((key, first, after.get(key)))
    if saved_data != data:
        found.append((DATA, saved_data, data))
    if refused := [change for change in found if _allowed_as(change[0]) not in allowed]:
        pairs = "; ".join(f"{_word(key)}: {first!r} -> {then!r}" for key, first, then in refused)
        flags = " ".join(f"{ALLOW} {name}" for name in dict.fromkeys(_allowed_as(key) for key, *_ in refused))
        raise UserError(
            f"{out} was begun with other settings: {pairs}; a resumed run keeps its settings: give those it "
            f"was begun with, start a new run with another --out, or let them differ with {flags}"
        )
    return found


def _allowed_as(key: str) -> str:
    """What --allow-change calls a key: whichever part of the base model differs, it is `weights`."""
    return WEIGHTS if key.startswith(f"{WEIGHTS}.") else key


def _word(key: str) -> str:
    words = {
        DATA: "data (fingerprint of its content)",
        START: "start (sha256 of the adapter of --from)",
        WEIGHTS: f"{key} (sha256 of that part of the base model)",
    }
    return words.get(_allowed_as(key), key)


def resume_command(method: str, out: Path) -> str:
    """What to type to go on."""
    return f"t2ialign train {method} --resume --out {shlex.quote(str(out))}{again()}"
