"""`eval --attention`: what the pictures of every arm look at, for the first prompts, and what that says.

    attention/ARM/00000.safetensors    maps (E, S, S) float32 of a picture; its metadata say which run, arm,
                                       prompt and words they are of

The maps come from drawing these pictures once more, from the same noise; the pictures themselves stay as
they are. So they can be asked for later, of an evaluation that is done.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from align_cli.adapters import parse_spec, read_adapter
from align_cli.errors import UserError
from align_cli.evaluation.arms import Arm
from align_cli.evaluation.attention import LAYERS, Attention, check, masks_of, sample
from align_cli.evaluation.compare import Design, Metric, compare, means
from align_cli.evaluation.drawing import Progress, my_share
from align_cli.evaluation.guard import in_words
from align_cli.evaluation.heat import words_of
from align_cli.evaluation.maps import read_maps, write_maps
from align_cli.evaluation.outcome import comparison_row, mean_row, plain
from align_cli.evaluation.store import ATTENTION, Item, Store, read_picture
from align_cli.grounding.entities import Entity, EntityReader
from align_cli.grounding.masks import Masker
from align_cli.models.base import BaseModel
from align_cli.settings import SampleSettings
from align_cli.training.distributed import Ranks

INSIDE, AREA = "attention/inside", "attention/area"
"""Share of an entity's attention that lies on its noun, and share of the picture that this takes."""


@dataclass(frozen=True)
class Looking:
    """num: prompts that are looked at, the first ones, one picture each. reader: of their words. masker: what
    finds their nouns in the pictures; None for maps without numbers of that.
    """

    num: int
    reader: EntityReader
    masker: Masker | None = None

    def items(self, items: Sequence[Item]) -> list[Item]:
        """Those of all items that are looked at."""
        return [item for item in items if item.number < self.num and item.k == 0]

    def entities(self, items: Sequence[Item]) -> list[list[Entity]]:
        """Of every item. UserError for a prompt that the parser cannot read."""
        return [self.reader.shown(item.row.text) for item in items]


def check_arms(model: BaseModel, arms: Sequence[Arm]) -> None:
    """UserError if an arm has no attention that could be shown."""
    for arm in arms:
        with arm.at_work(model):
            check(model)


def find_unseen(
    looking: Looking, store: Store, arms: Sequence[Arm], items: Sequence[Item], ranks: Ranks
) -> dict[str, list[int]]:
    """Arm -> positions in `looking.items` of the pictures without maps, the same answer on every process.

    Raises:
        UserError: maps of another run lie there; see `Looking.entities`.
    """
    found: dict[str, list[int]] = {}
    own = looking.items(items)

    def find() -> None:
        pairs = list(zip(own, looking.entities(own), strict=True))
        for arm in arms:
            seen = [_read(store, arm.name, item, entities) for item, entities in pairs]
            found[arm.name] = [i for i, maps in enumerate(seen) if maps is None]

    ranks.on_main(find)
    return dict(ranks.objects(found)[0])


def look(
    looking: Looking,
    model: BaseModel,
    arms: Sequence[Arm],
    items: Sequence[Item],
    settings: SampleSettings,
    store: Store,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Draw what is not seen yet, and keep its maps.

    Args:
        progress: called with "attention ARM" and the number of pictures.
    Raises:
        UserError: an arm without cross-attention, or a file that cannot be written.
    """
    own, size = looking.items(items), settings.batch_size
    entities = looking.entities(own)
    unseen = find_unseen(looking, store, arms, items, ranks)

    def mine() -> None:
        for arm in arms:
            wanted = set(unseen[arm.name])
            with arm.at_work(model):
                check(model)
                for b in my_share(unseen[arm.name], size, ranks):
                    rows = range(b * size, min((b + 1) * size, len(own)))
                    _, seen = sample(
                        model,
                        [own[i].row.text for i in rows],
                        [entities[i] for i in rows],
                        arm.drawing(settings),
                        [own[i].seed for i in rows],
                    )
                    new = [(own[i], one) for i, one in zip(rows, seen, strict=True) if i in wanted]
                    for item, one in new:
                        _write(store, arm.name, item, one)
                    progress(f"attention {arm.name}", len(new) * ranks.world_size)

    ranks.on_all(mine)


def seen_results(
    looking: Looking,
    store: Store,
    arms: Sequence[Arm],
    baseline: str,
    items: Sequence[Item],
    clusters: Sequence[Hashable],
    interval: str,
    unit: str,
    seed: int = 0,
) -> dict[str, Any]:
    """What results.json says of attention: `items` with words, files and numbers of every arm; where nouns
    are found in pictures, `means` and `comparisons` over all entities that every compared arm shows, and
    these in `words`.

    Args:
        clusters: of `looking.items`, as in `stats.paired`. unit: what is counted, in words.
    """
    own = looking.items(items)
    rows: list[dict[str, Any]] = []
    values: dict[str, dict[str, list[float]]] = {m: {a.name: [] for a in arms} for m in (INSIDE, AREA)}
    names: list[Hashable] = []
    for item, entities, cluster in zip(own, looking.entities(own), clusters, strict=True):
        shares: dict[str, list[dict[str, float | None]]] = {}
        for arm in arms:
            maps = _read(store, arm.name, item, entities)
            if maps is None:
                raise UserError(f"{_path(store, arm.name, item)} is gone; go on with --resume")
            picture, masks = store.path(arm.name, item), None
            if looking.masker is not None and entities:
                masks = masks_of(looking.masker, read_picture(picture), entities)
            shares[arm.name] = Attention(tuple(entities), maps).shares(masks)
            for metric, key in ((INSIDE, "inside"), (AREA, "area")):
                numbers = [share[key] for share in shares[arm.name]]
                values[metric][arm.name] += [np.nan if x is None else x for x in numbers]
        names += [cluster] * len(entities)
        rows.append({
            "id": item.row.id,
            "prompt": item.row.text,
            "words": [words_of(entity) for entity in entities],
            "files": {arm.name: _relative(_path(store, arm.name, item), store) for arm in arms},
            "images": {arm.name: _relative(store.path(arm.name, item), store) for arm in arms},
            "shares": shares,
        })  # fmt: skip
    found: dict[str, Any] = {
        "parser": looking.reader.parser.name, "layers": LAYERS, "prompts": len(own), "means": [],
        "comparisons": [], "words": [], "items": rows,
    }  # fmt: skip
    if looking.masker is not None and names:
        table = {m: {arm: np.array(x) for arm, x in by.items()} for m, by in values.items()}
        metrics = [Metric(name, "attention", name == INSIDE, True) for name in (INSIDE, AREA)]
        design = Design(
            arms=tuple(arm.name for arm in arms),
            baseline=baseline,
            clusters=names,
            groups=[{} for _ in names],
            present={arm: ~np.isnan(x) for arm, x in table[INSIDE].items()},
            interval=interval,
            seed=seed,
        )
        compared = compare(table, metrics, design)
        found["means"] = [mean_row(mean) for mean in means(table, metrics, design)]
        trained = {arm.name: ("attention",) if _trained(arm) else () for arm in arms}
        found["comparisons"] = [comparison_row(c, (*trained[c.arm], *trained[baseline])) for c in compared]
        found["words"] = in_words(compared, baseline, dict.fromkeys(trained, ()), [], unit)
        found["words"] += [
            f"{arm} was trained to attend to where things are (attribute concentration of comat): a gain of "
            "attention/inside says that training worked, not that pictures are better"
            for arm, what in trained.items()
            if what
        ]
    return dict(plain(found))


def _trained(arm: Arm) -> bool:
    """Whether CoMat's attribute concentration is among what an arm was trained for."""
    for spec in arm.adapters:
        info = read_adapter(parse_spec(spec)[0])[1]
        section = info.config.get("comat", {}) if info.method == "comat" else None
        if isinstance(section, Mapping) and section.get("attention_steps", 1):
            return bool(section.get("token_weight", 1) or section.get("pixel_weight", 1))
    return False


def _path(store: Store, arm: str, item: Item) -> Path:
    return store.folder / ATTENTION / arm / f"{item.stem}.safetensors"


def _relative(path: Path, store: Store) -> str:
    return path.relative_to(store.folder).as_posix()


def _facts(store: Store, arm: str, item: Item) -> dict[str, str]:
    return {"run": store.run, "arm": arm, "seed": str(item.seed), "prompt": item.row.text}


def _tokens(entities: Sequence[Entity]) -> str:
    return json.dumps([[words_of(entity), *entity.positions] for entity in entities])


def _write(store: Store, arm: str, item: Item, seen: Attention) -> None:
    facts = {**_facts(store, arm, item), "entities": _tokens(seen.entities), "software": "t2ialign"}
    write_maps(_path(store, arm, item), seen.maps, facts)


def _read(store: Store, arm: str, item: Item, entities: Sequence[Entity]) -> np.ndarray | None:
    """The maps of a picture; None where they are not there, cut off, or of other words (another parser).

    Raises:
        UserError: they are of another run.
    """
    path = _path(store, arm, item)
    try:
        facts, maps = read_maps(path)
    except (OSError, SafetensorError):
        return None
    for key, wanted in _facts(store, arm, item).items():
        if facts.get(key) != wanted:
            raise UserError(
                f"{path} is not of this run: its {key} is {facts.get(key, 'not said')!r}, not {wanted!r}; "
                "remove it, or choose another --out"
            )
    return maps if facts.get("entities") == _tokens(entities) else None
