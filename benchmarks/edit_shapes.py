"""Edit success of FlowEdit on the shapes world, for a base model and for adapters, over a grid of settings.

    python benchmarks/edit_shapes.py --n 100 --split val --n-start 8 10 12 --tgt-guidance 2 4
    python benchmarks/edit_shapes.py --n 512 --adapter runs/x/adapter --picture edits.png --json edits.json

Source pictures are rendered exactly; one colour or one shape of one object is to change. Printed per setting:
means with 95 % intervals (Wilson's, clustered by composition), and with an adapter the paired difference.
The metrics are those of `align_cli.evaluation.edits.judge_edits`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from align_cli.adapters import attach
from align_cli.cli.edit import edit_settings
from align_cli.cli.progress import DrawingProgress
from align_cli.drawing import make_plan
from align_cli.evaluation.edits import EDIT_METRICS, EditCase, edit_cases, edit_pictures, judge_edits
from align_cli.evaluation.stats import paired, rate
from align_cli.pictures import Note, contact_sheet
from align_cli.settings import EditSettings
from align_cli.shapes.world import render

GRID = ("steps", "n_start", "n_min", "n_avg", "src_guidance", "tgt_guidance", "convention")
SHOWN = 10
"""Edits on the picture: the first of the list, not picked by result."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the adapter's, else tiny-sd15")
    parser.add_argument("--adapter", action="append", default=[], help="folder or FOLDER@SCALE; stacks")
    parser.add_argument("--n", type=int, default=100, help="edits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", help="val to choose settings, test to report")
    parser.add_argument("--device", help="auto, cpu, cuda, ...")
    parser.add_argument("--rows", type=int, default=64, help="rows of one denoiser call")
    parser.add_argument("--picture", type=Path, help="contact sheet of the last setting")
    parser.add_argument("--json", type=Path, help="all numbers")
    for name in GRID:
        kind = {"steps": int, "n_start": int, "n_min": int, "n_avg": int, "convention": str}.get(name, float)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+", help="default: the preset's")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    plan = make_plan(options.model, options.adapter, {"device": options.device}, {})
    standard = edit_settings(plan, {})[0]
    model, plan = plan.load()
    cases = edit_cases(options.n, options.seed, split=options.split)
    kinds = {k: sum(c.before.kind == k for c in cases) for k in ("pair", "triple")}
    print(f"{plan.model.name}, {options.n} edits ({kinds}), split {options.split}, seed {options.seed}")
    print(f"settings where not said: {asdict(standard)}\n")
    lists = {name: getattr(options, name) or [getattr(standard, name)] for name in GRID}
    varied = [name for name, values in lists.items() if len(values) > 1]
    header = [*varied, "model", *EDIT_METRICS, "s/edit"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    results = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        settings = replace(standard, **chosen, batch_size=options.rows)
        label = [str(chosen[name]) for name in varied]
        results.append(one_setting(model, plan.adapters, cases, settings, options, label))
    if options.json:
        facts = {"model": plan.model.name, "adapters": plan.adapters, "n": options.n, "seed": options.seed}
        options.json.write_text(json.dumps({**facts, "split": options.split, "results": results}, indent=2))


def one_setting(
    model: object,
    adapters: list[str],
    cases: list[EditCase],
    settings: EditSettings,
    options: argparse.Namespace,
    label: list[str],
) -> dict[str, object]:
    """Edit, judge, print one row per model (and one of differences); returns the numbers."""
    names = [case.composition for case in cases]
    pictures, values, result = {}, {}, {"settings": asdict(settings)}
    for variant in ("base", *(["aligned"] if adapters else [])):
        start = time.perf_counter()
        with attach(model, adapters) if variant == "aligned" else nullcontext(), DrawingProgress() as bar:

            def report(done: int, total: int, variant: str = variant, bar: DrawingProgress = bar) -> None:
                bar(variant, done, total)

            pictures[variant] = edit_pictures(model, cases, settings, options.seed, report)
        seconds = (time.perf_counter() - start) / len(cases)
        values[variant] = judge_edits(pictures[variant], cases)
        cells = []
        for name in EDIT_METRICS:
            if name == "outside":
                cells.append(f"{values[variant][name].mean():.1f}")
                result[f"{variant}/{name}"] = float(values[variant][name].mean())
                continue
            found = rate(values[variant][name], names)
            cells.append(f"{found.mean:.3f} ({found.low:.3f}-{found.high:.3f})")
            result[f"{variant}/{name}"] = asdict(found)
        print("| " + " | ".join([*label, variant, *cells, f"{seconds:.2f}"]) + " |", flush=True)
    if adapters:
        cells = []
        for name in EDIT_METRICS:
            d = paired(values["base"][name], values["aligned"][name], names)
            cells.append(f"{d.difference:+.3f} ({d.low:+.3f} to {d.high:+.3f})")
            result[f"difference/{name}"] = asdict(d)
        print("| " + " | ".join([*label, "difference", *cells, ""]) + " |", flush=True)
    if options.picture:
        save_picture(options.picture, cases, pictures, values, settings)
    return result


def save_picture(
    path: Path,
    cases: Sequence[EditCase],
    pictures: dict[str, np.ndarray],
    values: dict[str, dict[str, np.ndarray]],
    settings: EditSettings,
) -> None:
    """Contact sheet: source, edited by the base model, edited with the adapter."""
    sources = render([case.before for case in cases[:SHOWN]])
    notes = []
    for i in range(len(sources)):
        row = [Note("")]
        for v in values.values():
            missed = [name for name in ("changed", "kept") if not v[name][i]]
            row.append(Note("not " + ", not ".join(missed) if missed else "changed, kept", not missed))
        notes.append(row)
    contact_sheet(
        [[sources[i], *(p[i] for p in pictures.values())] for i in range(len(sources))],
        [f"{case.src.text} -> {case.tgt.text}" for case in cases[:SHOWN]],
        path,
        headers=["source", *pictures],
        notes=notes,
        title=f"first edits, not picked by result; {settings.convention}, {settings.n_start} of "
        f"{settings.steps} steps, guidance {settings.src_guidance:g} / {settings.tgt_guidance:g}",
    )


if __name__ == "__main__":
    main()
