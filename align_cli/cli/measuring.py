"""What `eval` and the end of `train` share: an evaluation at work, with progress. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from align_cli.evaluation.engine import Evaluation
    from align_cli.evaluation.store import Store
    from align_cli.models.base import BaseModel
    from align_cli.settings import SampleSettings
    from align_cli.training.distributed import Ranks


def measure(
    job: Evaluation,
    store: Store,
    ranks: Ranks,
    model: BaseModel | None,
    sample: SampleSettings | None,
    about: str = "",
) -> dict[str, Any]:
    """Draw and score what is missing; the content of results.json.

    Args:
        model, sample: None for given pictures. about: how pictures are drawn, in words, said at the start.
    """
    from align_cli.cli.progress import CountingProgress
    from align_cli.evaluation import engine
    from align_cli.evaluation.drawing import find_missing
    from align_cli.evaluation.looking import find_unseen

    missing = find_missing(store, job.arms, job.items, ranks) if model is not None else {}
    totals = {f"drawing {name}": len(job.items) for name in missing}
    done = {f"drawing {name}": len(job.items) - len(rows) for name, rows in missing.items()}
    if ranks.main and missing:
        left = sum(map(len, missing.values()))
        if about:
            typer.echo(about, err=True)
        typer.echo(f"{left} of {sum(totals.values())} pictures to draw, in {store.folder}", err=True)
    if job.looking is not None:
        unseen = find_unseen(job.looking, store, job.arms, job.items, ranks)
        totals |= {f"attention {name}": len(rows) for name, rows in unseen.items() if rows}
    given = {arm.name: job.given.get(arm.name, job.items) for arm in job.arms}
    there = sum(picture is not None for of in given.values() for picture in of)
    names = [scorer.name for scorer in job.scorers()] + (["drift"] if len(job.arms) > 1 else [])
    totals |= {f"scoring {name}": there for name in names}
    with CountingProgress(totals, done, quiet=not ranks.main) as bar:

        def progress(what: str, more: int) -> None:
            more = min(more, bar.totals[what] - bar.done[what])  # an estimate where several processes work
            if more:
                bar(what, more)

        return engine.run(job, store, ranks, progress, model, sample, missing)
