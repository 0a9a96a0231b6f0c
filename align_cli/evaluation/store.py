"""The folder of an evaluation: what lies in it, and whether it is this evaluation's.

    eval.json                      what fixes the run, written first and compared when it goes on
    images/ARM/00000.png           pictures, 00000-0.png and so on where there are several per prompt
    scores/ARM/SCORER.jsonl        see scoring.py
    attention/ARM/00000.safetensors  see looking.py
    results.json, results.csv, report.html
    protocol/ARM.jsonl             see by_protocol.py
    geneval/ARM/00000/             pictures as GenEval's own evaluator wants them

A picture is there completely or not at all, and says in its metadata which run, arm and prompt it is of. No
torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

import align_cli
from align_cli.errors import UserError
from align_cli.evaluation.arms import Arm
from align_cli.evaluation.prompts import PromptRow, PromptSet
from align_cli.files import LOCK, blocking, clear_parts, file_errors, part_path, write_text
from align_cli.pictures import read_metadata, save_png
from align_cli.settings import ModelSettings, SampleSettings

if TYPE_CHECKING:
    from align_cli.models.base import BaseModel

FORMAT = 1
ABOUT, IMAGES, SCORES, ATTENTION = "eval.json", "images", "scores", "attention"
RESULTS, TABLE, REPORT = "results.json", "results.csv", "report.html"
GENEVAL, PROTOCOL = "geneval", "protocol"
OURS = (ABOUT, IMAGES, SCORES, ATTENTION, RESULTS, TABLE, REPORT, GENEVAL, PROTOCOL)
"""Everything an evaluation writes; --overwrite removes these names and nothing else."""
UNSET = "not set"
PICTURE_ERRORS = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What a damaged picture raises."""
READERS = 4
"""Pictures that are read at once."""


@dataclass(frozen=True)
class Item:
    """One picture to be drawn by every arm. number: of its prompt; k: which of the prompt's pictures."""

    row: PromptRow
    number: int
    k: int
    seed: int
    stem: str


def make_items(prompts: PromptSet, per_prompt: int, seed: int) -> list[Item]:
    """`per_prompt` pictures of every prompt, each with its own start noise, the same for every arm."""
    from align_cli.sampling import picture_seeds

    seeds = picture_seeds(seed, len(prompts) * per_prompt)
    return [
        Item(row, i, k, seeds[i * per_prompt + k], f"{i:05d}-{k}" if per_prompt > 1 else f"{i:05d}")
        for i, row in enumerate(prompts.rows)
        for k in range(per_prompt)
    ]


def identity(
    prompts: PromptSet,
    per_prompt: int,
    arms: Sequence[Arm],
    seed: int,
    settings: ModelSettings,
    sample: SampleSettings,
    protocol: str | None = None,
    model: BaseModel | None = None,
) -> dict[str, Any]:
    """What fixes the pictures of a run, as plain JSON. Which device of a kind is this machine's own matter.

    model: None where it is not loaded yet; then the weights and the kind of device are left out.
    """
    about = {
        **identity_of_prompts(prompts, per_prompt),
        "model": settings.facts(),
        "seed": seed,
        "sample": asdict(sample),
        "protocol": protocol,
        "arms": {
            arm.name: {"adapters": list(arm.adapters), "sha256": list(arm.hashes)}
            | ({} if arm.self_correct is None else {"self_correct": arm.self_correct})
            for arm in arms
        },
    }
    if model is None:
        return about
    from align_cli.data.cache import drawing_identity

    return about | {"device": model.device.type, "weights": drawing_identity(model)}


def identity_of_prompts(prompts: PromptSet, per_prompt: int) -> dict[str, Any]:
    """What fixes the items of a run."""
    return {
        "benchmark": {"name": prompts.name, "prompts": len(prompts), "fingerprint": prompts.fingerprint},
        "per_prompt": per_prompt,
    }


class Store:
    """One evaluation's folder. identity: what must be the same when the run goes on, as plain JSON."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.run = sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def begin(self, command: Sequence[str], created: str, *, resume: bool, overwrite: bool) -> None:
        """Write eval.json, or compare the one that is there.

        Raises:
            UserError: the folder holds another run, or an unfinished one that is not to be resumed, or things
                that no evaluation wrote; it cannot be written to.
        """
        check_folder(self.folder, resume=resume, overwrite=overwrite)
        with file_errors(f"cannot write to {self.folder}", "choose another folder with --out"):
            if overwrite:
                _remove(self.folder)
            if resume:
                refuse_other_run(self.folder, self.identity, whole=True)
                clear_parts(self.folder)
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {
                "format": FORMAT,
                "software": f"t2ialign {align_cli.__version__}",
                "created": created,
                "command": list(command),
                "run": self.run,
                "identity": self.identity,
            }
            write_text(self.folder / ABOUT, json.dumps(about, indent=2, allow_nan=False) + "\n")

    def path(self, arm: str, item: Item) -> Path:
        """Where the picture of an item lies."""
        return self.folder / IMAGES / arm / f"{item.stem}.png"

    def save(self, arm: str, item: Item, picture: np.ndarray, facts: Mapping[str, object]) -> None:
        """Write (H, W, 3) uint8, with what it is of. UserError if it cannot be written."""
        own = {
            "prompt": item.row.text,
            "seed": item.seed,
            "arm": arm,
            "id": item.row.id,
            "k": item.k,
            "run": self.run,
        }
        save_png(picture, self.path(arm, item), {**own, **facts})

    def missing(self, arm: str, items: Sequence[Item]) -> list[int]:
        """Positions in `items` of the pictures that have to be drawn: those that are not there, or cut off.

        Raises:
            UserError: a picture that another run drew lies in the place of one of them.
        """
        with ThreadPoolExecutor(READERS) as pool:
            there = list(pool.map(lambda item: self._whole(arm, item), items))
        return [i for i, whole in enumerate(there) if not whole]

    def _whole(self, arm: str, item: Item) -> bool:
        path = self.path(arm, item)
        if not path.exists():
            return False
        try:
            facts = read_metadata(path)
        except PICTURE_ERRORS:
            return False
        wanted = {"run": self.run, "arm": arm, "seed": str(item.seed), "prompt": item.row.text}
        for key, value in wanted.items():
            if facts.get(key) != value:
                raise UserError(
                    f"{path} is no picture of this run: its {key} is {facts.get(key, 'not said')!r}, not "
                    f"{value!r}; remove it, or choose another --out"
                )
        return True


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 (alpha dropped, grey repeated).

    Raises:
        UserError: not there, or no whole picture.
    """
    try:
        with Image.open(path) as file:
            return np.asarray(file.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"no picture {path}") from None
    except PICTURE_ERRORS as error:
        raise UserError(f"{path} is no whole picture: {error}") from None


def read_about(folder: Path) -> dict[str, Any]:
    """The content of eval.json. UserError if there is none, or it cannot be read."""
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] > FORMAT:
            raise UserError(f"{path} has format {about['format']}, this t2ialign reads up to {FORMAT}")
        if not isinstance(about["identity"], dict):
            raise TypeError("identity is no object")
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no evaluation to resume; leave --resume away to start one, or name it with --out"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); start afresh with --overwrite") from None
    found: dict[str, Any] = about
    return found


def refuse_other_run(folder: Path, identity: Mapping[str, Any], *, whole: bool = False) -> None:
    """UserError with all places where the evaluation in `folder` is another one. whole: `identity` is all
    that fixes the run; else what it does not name is passed over.
    """
    saved, now = read_about(folder)["identity"], json.loads(json.dumps(identity))
    if why := differences(saved if whole else _named(saved, now), now):
        raise UserError(
            f"{folder} holds another evaluation: {'; '.join(why)}; pictures of two settings are not mixed: "
            f"give those it was begun with (its command is in eval.json), choose another --out, or replace "
            "it with --overwrite"
        )


def _named(saved: Any, now: Any) -> Any:
    """`saved` without the keys that `now` has not got."""
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        return saved
    return {key: _named(value, now[key]) for key, value in saved.items() if key in now}


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder before anything is loaded.

    Raises:
        UserError: it holds an evaluation and neither `resume` nor `overwrite` is given, it holds none to
            resume, it holds other things and `overwrite` is not given, it is a file, it cannot be written to.
    """
    if resume and overwrite:
        raise UserError("--resume goes on with an evaluation and --overwrite removes it; give one of them")
    blocked = blocking(folder)
    if blocked is not None:
        raise UserError(f"{blocked} is a file, not a folder; choose another folder with --out")
    if resume:
        read_about(folder)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    with file_errors(f"cannot write to {folder}", "choose another folder with --out"):
        TemporaryFile(dir=place).close()  # now, and not after minutes of loading
    if resume or overwrite or not folder.exists():
        return
    with file_errors(f"cannot look into {folder}", "choose another folder with --out"):
        names = {path.name for path in folder.iterdir()}
    if ABOUT in names:
        raise UserError(
            f"{folder} already holds an evaluation; go on with --resume, replace it with --overwrite, or "
            "choose another folder with --out"
        )
    if names - {part_path(Path(ABOUT)).name, LOCK}:
        raise UserError(
            f"{folder} is not empty and holds no evaluation; choose another folder with --out, or give "
            "--overwrite, which leaves files of other names alone"
        )


def _remove(folder: Path) -> None:
    for name in OURS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def differences(saved: Any, now: Any, where: str = "") -> list[str]:
    """In words, all places where two runs differ: "seed: 0 -> 1"."""
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        return [] if saved == now else [f"{where}: {saved!r} -> {now!r}"]
    found = []
    for key in [*saved, *(k for k in now if k not in saved)]:
        inside = f"{where}.{key}" if where else str(key)
        if key in now and key in saved:
            found += differences(saved[key], now[key], inside)
        else:
            found.append(f"{inside}: {saved.get(key, UNSET)!r} -> {now.get(key, UNSET)!r}")
    return found
