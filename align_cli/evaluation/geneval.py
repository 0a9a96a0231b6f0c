"""GenEval: official prompts in, official folder of pictures out, the official evaluator's results back.

The evaluator needs a detector (mmdet 2.x) that does not run beside today's torch: it runs elsewhere, on the
folder that `write_folder` makes. The shapes world has a twin without a detector, geneval_shapes.py.
Source: djghosh13/geneval, diffusers_generate.py, evaluate_images.py and summary_scores.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_cli.errors import UserError, unknown
from align_cli.evaluation.prompts import PromptRow, PromptSet, read_records
from align_cli.evaluation.sets import SetOptions
from align_cli.files import file_errors, write_text

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
METADATA = "evaluation_metadata.jsonl"
PER_PROMPT = 4
"""Official pictures of each prompt."""
TASK = "Task"
"""Name of the grouping."""

Place = tuple[int, int]
"""(row of the prompt set, picture of that prompt), both from 0."""


def geneval(options: SetOptions) -> PromptSet:
    """GenEval's prompts, grouped by task; a row's id is its official folder ("00012"), its record is `extra`.

    Raises:
        UserError: no `--prompts` with the official JSONL, or a record that is none of GenEval's.
    """
    options.check("geneval", "prompts")
    if options.prompts is None:
        raise UserError(
            f"geneval needs --prompts {METADATA} (folder prompts/ of djghosh13/geneval); its twin on the "
            f"shapes world needs no file: t2ialign eval geneval-shapes"
        )
    rows: list[PromptRow] = []
    for where, record in read_records(options.prompts):
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or "tag" not in record:
            raise UserError(f"{options.prompts}, {where}: no record of GenEval with tag, include and prompt")
        if record["tag"] not in TASKS:
            raise unknown("task", str(record["tag"]), TASKS, where=f"{options.prompts}, {where}")
        rows.append(PromptRow(f"{len(rows):05d}", record["prompt"], {TASK: record["tag"]}, record))
    return PromptSet("geneval", str(options.prompts), tuple(rows))


def write_folder(prompts: PromptSet, pictures: Mapping[Place, Path], out: Path) -> None:
    """The folder that the official evaluator reads: {id}/metadata.jsonl and {id}/samples/0000.png, ...

    Args:
        prompts: from `geneval` or `geneval_shapes`. pictures: PNG files; they are copied.
    Raises:
        UserError: a picture is not there, or the folder cannot be written.
    """
    for (i, k), path in pictures.items():
        row = prompts.rows[i]
        samples = out / row.id / "samples"
        with file_errors(f"cannot write the pictures of GenEval to {out}", "choose another folder"):
            samples.mkdir(parents=True, exist_ok=True)
            write_text(out / row.id / "metadata.jsonl", json.dumps(row.extra))
            if not path.is_file():
                raise UserError(f"no picture {path} (prompt {row.id} of {prompts.source})")
            shutil.copyfile(path, samples / f"{k:04d}.png")


def read_results(path: Path, prompts: PromptSet, *, per_prompt: int | None = None) -> dict[Place, bool]:
    """What the official evaluator wrote about the pictures of `write_folder`: which are correct.

    Args:
        path: its results.jsonl. per_prompt: pictures that every prompt must have; None for any number.
    Raises:
        UserError: a line that is no result, or of other prompts; a picture twice, or missing (named).
    """
    number = {row.id: i for i, row in enumerate(prompts.rows)}
    found: dict[Place, bool] = {}
    for where, record in read_records(path):
        place, correct = _result(record, f"{path}, {where}", prompts, number)
        if place in found:
            raise UserError(f"{path}, {where}: a second result of {record['filename']}")
        found[place] = correct
    if per_prompt is not None:
        missing = [
            f"{row.id}/samples/{k:04d}.png"
            for i, row in enumerate(prompts.rows)
            for k in range(per_prompt)
            if (i, k) not in found
        ]
        if missing:
            raise UserError(
                f"{path} lacks {len(missing)} of {len(prompts) * per_prompt} pictures, the first is "
                f"{missing[0]}"
            )
    return found


def _result(record: Any, where: str, prompts: PromptSet, number: Mapping[str, int]) -> tuple[Place, bool]:
    """Place and verdict of one line."""
    wanted = ("filename", "tag", "prompt", "correct")
    if not isinstance(record, dict) or any(key not in record for key in wanted):
        raise UserError(f"{where}: no result of GenEval's evaluator with {', '.join(wanted)}")
    match = re.search(r"(\d+)[/\\]samples[/\\](\d+)\.png$", str(record["filename"]))
    if match is None or match[1] not in number:
        raise UserError(f"{where}: {record['filename']!r} is no picture of {prompts.source}")
    i = number[match[1]]
    row = prompts.rows[i]
    if (record["prompt"], record["tag"]) != (row.text, row.groups[TASK]):
        raise UserError(
            f"{where}: {record['prompt']!r} ({record['tag']}), but prompt {row.id} of {prompts.source} is "
            f"{row.text!r} ({row.groups[TASK]})"
        )
    if record["correct"] not in (True, False):
        raise UserError(f"{where}: correct must be true or false, got {record['correct']!r}")
    return (i, int(match[2])), bool(record["correct"])
