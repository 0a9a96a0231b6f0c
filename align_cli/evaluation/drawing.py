"""Every arm draws the same prompts from the same noise, picture by picture into a store.

The pictures are drawn in batches that depend on nothing but their order: batch b holds the items from b * B
to (b + 1) * B, on any number of processes and after any number of stops. A batch of which some pictures are
missing is drawn as a whole, because the last bit of a picture depends on the size of its batch; the pictures
that are there stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from align_cli.evaluation.arms import Arm
from align_cli.evaluation.store import Item, Store
from align_cli.models.base import BaseModel
from align_cli.pictures import to_uint8
from align_cli.sampling import sample
from align_cli.settings import SampleSettings
from align_cli.training.distributed import Ranks

Progress = Callable[[str, int], None]
"""Called as (what, how many more are done)."""


def my_share(missing: Sequence[int], size: int, ranks: Ranks) -> list[int]:
    """Numbers of the batches with missing items that this process does: every world_size-th one.

    missing: positions of items, as the main process sees them, the same on every process.
    """
    batches = sorted({i // size for i in missing})
    return batches[ranks.rank :: ranks.world_size]


def find_missing(
    store: Store, arms: Sequence[Arm], items: Sequence[Item], ranks: Ranks
) -> dict[str, list[int]]:
    """Arm -> positions of the pictures that are to be drawn, the same answer on every process.

    Raises:
        UserError: a picture of another run lies there.
    """
    found: dict[str, list[int]] = {}
    ranks.on_main(lambda: found.update({arm.name: store.missing(arm.name, items) for arm in arms}))
    return dict(ranks.objects(found)[0])


def draw(
    model: BaseModel,
    arms: Sequence[Arm],
    items: Sequence[Item],
    settings: SampleSettings,
    store: Store,
    ranks: Ranks,
    missing: Mapping[str, Sequence[int]],
    progress: Progress,
) -> None:
    """Draw what is missing.

    Args:
        missing: of `find_missing`.
        progress: called with "drawing ARM" and the number of new pictures, of all processes as far as one
            can tell.
    Raises:
        UserError: an adapter does not fit, or a picture cannot be written.
    """
    size = settings.batch_size

    def mine() -> None:
        for arm in arms:
            wanted = set(missing[arm.name])
            drawing = arm.drawing(settings)
            own = picture_facts(model, arm, drawing)
            with arm.at_work(model):
                for b in my_share(missing[arm.name], size, ranks):
                    batch = items[b * size : (b + 1) * size]
                    drawn = sample(
                        model, [item.row.text for item in batch], drawing, [item.seed for item in batch]
                    )
                    new = 0
                    for i, (item, picture) in enumerate(zip(batch, to_uint8(drawn), strict=True)):
                        if b * size + i in wanted:
                            store.save(arm.name, item, picture, own)
                            new += 1
                    progress(f"drawing {arm.name}", new * ranks.world_size)

    ranks.on_all(mine)  # nobody goes on before all are done


def picture_facts(model: BaseModel, arm: Arm, settings: SampleSettings) -> dict[str, object]:
    """What the metadata of an arm's pictures say besides what the store says."""
    pairs = zip(arm.adapters, arm.hashes, strict=True)
    return {
        "model": model.model_id,
        **({"unet": model.denoiser_id} if model.denoiser_id else {}),
        "sampling": settings.words(),
        "software": "t2ialign",
        "adapter": ", ".join(f"{spec} sha256:{sha}" for spec, sha in pairs) or "none",
    }
