"""`t2ialign eval dpt-probe`: discriminators of DPT as a measure of the models that they look at. No torch at
import.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from align_cli import config, registry
from align_cli.adapters import AdapterInfo, load_adapter, parse_spec, restore
from align_cli.cli.eval_plan import Asked, default_name
from align_cli.cli.text import say_loading
from align_cli.drawing import Plan, make_plan
from align_cli.errors import UserError
from align_cli.evaluation.arms import check_name
from align_cli.evaluation.store import ABOUT, REPORT, RESULTS, Store, check_folder
from align_cli.files import only_writer
from align_cli.launched import world_size
from align_cli.settings import DataSettings

if TYPE_CHECKING:
    from align_cli.cli.progress import CountingProgress
    from align_cli.data.base import Dataset
    from align_cli.evaluation.probing import Progress
    from align_cli.evaluation.probing_outcome import Arm
    from align_cli.methods.dpt.method import DPT
    from align_cli.models.base import BaseModel

NAME, METHOD = "dpt-probe", "dpt"
NUM, GALLERY, BATCH, SPLIT, SHAPES = 512, 100, 32, "test", "shapes"
SHOWN = 48
"""Items whose pictures are in the report."""
TAKEN = frozenset(
    {"benchmark", "adapters", "n", "seed", "split", "data_path", "interval", "as_json", "out", "overwrite",
     "model_flags", "sample_flags"}
)  # fmt: skip
"""Fields of `Asked` that mean something here."""
MODEL_FLAGS, SAMPLE_FLAGS = ("device", "encoder_device", "dtype", "unet"), ("batch_size",)


@dataclass(frozen=True)
class Decided:
    """What is asked. plans: name of the arm -> its plan, of one adapter each. data: of all, but for the size
    of the picture, which is each model's. identity: of `Store`.
    """

    plans: dict[str, Plan]
    data: DataSettings
    n: int
    gallery: int
    batch_size: int
    seed: int
    split: str
    interval: str
    identity: dict[str, Any]
    folder: Path
    overwrite: bool


def evaluate(asked: Asked, data: str | None, gallery: int | None) -> None:
    """Measure, write and print. data, gallery: of the command line, None where not given.

    Raises:
        UserError: options that mean nothing here, adapters of another method, no data, a folder that is not
        to be written to.
    """
    _check_options(asked)
    decided = decide(asked, data, gallery)
    with only_writer(decided.folder):
        _evaluate(asked, decided)


def _evaluate(asked: Asked, decided: Decided) -> None:
    say_loading(", ".join(dict.fromkeys(plan.model.name for plan in decided.plans.values())))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    store = Store(decided.folder, decided.identity)
    begun = time.perf_counter()
    arms = _ask(decided)
    seconds = {NAME: time.perf_counter() - begun}
    command = ["t2ialign", *sys.argv[1:]]
    store.begin(command, created, resume=False, overwrite=decided.overwrite)
    _write(decided, arms, {"command": command, "created": created, "seconds": seconds}, as_json=asked.as_json)


# ---------------------------------------------------------------- decide


def refuse_elsewhere(benchmark: str, data: str | None, gallery: int | None) -> None:
    """UserError for the options of this benchmark that were given with another one."""
    for flag, value in (("--data", data), ("--gallery", gallery)):
        if value is not None:
            raise UserError(f"{flag} is for t2ialign eval {NAME}; it means nothing to {benchmark}")


def decide(asked: Asked, data: str | None, gallery: int | None) -> Decided:
    """All that can be decided without weights."""
    if not asked.adapters:
        raise UserError(
            f"eval {NAME} measures models through their discriminators: name one with --adapter, trained "
            "with t2ialign train dpt --stage probe"
        )
    flags = {key: asked.model_flags[key] for key in MODEL_FLAGS}
    plans: dict[str, Plan] = {}
    for spec in asked.adapters:
        plan = make_plan(None, [spec], flags, {})
        if plan.infos[0].method != METHOD:
            raise UserError(
                f"adapter {spec} is of {plan.infos[0].method}; eval {NAME} needs the discriminator of an "
                f"adapter of {METHOD}, trained with t2ialign train dpt --stage probe"
            )
        plans[_name(spec, plans)] = plan
    first = next(iter(plans.values()))
    settings = _data(asked, first, data)
    split, n = asked.split or SPLIT, asked.n or NUM
    if settings.name == SHAPES:
        settings = replace(settings, num_examples=n)
    size = GALLERY if gallery is None else gallery
    about = {
        "benchmark": {"name": NAME, "split": split, "n": n, "gallery": size},
        "data": asdict(replace(settings, image_size=DataSettings.image_size, num_workers=0)),
        "seed": asked.seed,
        "arms": {
            name: {"adapters": plan.adapters, "sha256": [plan.infos[0].sha256], "model": plan.model.facts()}
            for name, plan in plans.items()
        },
    }
    folder = asked.out or Path("runs") / default_name(NAME, about)
    # a folder that is named by what fixes the run is this run's: the same command makes it anew
    overwrite = asked.overwrite or (asked.out is None and (folder / ABOUT).exists())
    if not overwrite and (folder / ABOUT).exists():
        raise UserError(
            f"{folder} already holds an evaluation; replace it with --overwrite, or choose another folder "
            "with --out"
        )
    check_folder(folder, resume=False, overwrite=overwrite)
    return Decided(
        plans=plans,
        data=settings,
        n=n,
        gallery=size,
        batch_size=asked.sample_flags["batch_size"] or BATCH,
        seed=asked.seed,
        split=split,
        interval=asked.interval or "t",
        identity=about,
        folder=folder,
        overwrite=overwrite,
    )


def _check_options(asked: Asked) -> None:
    """UserError for what was given and means nothing here."""
    if world_size() > 1:
        raise UserError(
            f"eval {NAME} runs in one process; start it without --num-processes, torchrun and accelerate"
        )
    given = {key: value for key, value in vars(asked).items() if key not in TAKEN}
    given |= {key: value for key, value in asked.model_flags.items() if key not in MODEL_FLAGS}
    given |= {key: value for key, value in asked.sample_flags.items() if key not in SAMPLE_FLAGS}
    names = {"adapters": "adapter", "arms": "arm", "kinds": "kind"}
    for key, value in given.items():
        if value not in (None, [], False):
            flag = f"--{names.get(key, key).replace('_', '-')}"
            why = "; every adapter brings its base model" if key == "model" else ""
            raise UserError(f"{flag} means nothing to eval {NAME}{why}")
    if asked.sample_flags["batch_size"] is not None and asked.sample_flags["batch_size"] < 1:
        raise UserError(f"--batch-size must be >= 1, got {asked.sample_flags['batch_size']}")


def _name(spec: str, taken: Mapping[str, Plan]) -> str:
    """Of an arm: that of the adapter's folder, or of the run that it lies in."""
    path = Path(parse_spec(spec)[0]).expanduser().resolve()
    word = path.parent.name if path.name == "adapter" else path.name
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", word).strip("-._")[:36] or METHOD
    names = (base, *(f"{base}-{k}" for k in range(2, len(taken) + 2)))
    name = next(name for name in names if name not in taken)
    check_name(name, "--adapter")
    return name


def _data(asked: Asked, plan: Plan, data: str | None) -> DataSettings:
    """The dataset of --data, else the one that the first adapter was trained on, else that of its model; with
    the settings of the training, if it was the same one.
    """
    held = _trained_on(plan.infos[0])
    own = held.name if held is not None and held.name in registry.GROUNDED else None
    model_own = SHAPES if registry.is_embedded(plan.model.name) else "refcoco"
    name = data or own or model_own
    registry.path_of(registry.GROUNDED, name)
    usual = DataSettings(name=name, interpolation="bilinear")  # as DPT's data are resized
    settings = held if held is not None and held.name == name else usual
    if name == SHAPES and asked.data_path is not None:
        raise UserError("--data-path means nothing to the shapes dataset, which is generated")
    path = settings.path if asked.data_path is None else str(asked.data_path)
    return replace(settings, path=path, cache="", num_examples=0)


def _trained_on(info: AdapterInfo) -> DataSettings | None:
    """The data settings that an adapter was trained with, None where it does not say."""
    if "data" not in info.config:
        return None
    return config.Resolved.from_dict({**info.config, "method": info.method}, where="adapter: config").data


# ---------------------------------------------------------------- work


def _ask(decided: Decided) -> list[Arm]:
    """Every adapter in turn, on its own base model."""
    from align_cli.cli.progress import CountingProgress
    from align_cli.evaluation.probing import PROBING, RETRIEVAL, Setting, chosen, gallery_rows, probe
    from align_cli.evaluation.probing_outcome import Arm

    arms: list[Arm] = []
    indices: list[int] | None = None
    for name, plan in decided.plans.items():
        with _at_work(plan) as (method, model):
            dataset = _dataset(decided, model)
            if indices is None:
                indices = chosen(dataset, decided.n, decided.seed)
            timestep = method.config.eval_timestep
            setting = Setting(decided.seed, timestep, decided.gallery, decided.batch_size, SHOWN)
            rows = gallery_rows(len(indices), decided.gallery)
            totals = {f"{name}: {PROBING}": len(indices)} | ({f"{name}: {RETRIEVAL}": rows} if rows else {})
            with CountingProgress(totals, {}) as bar:
                probed = probe(method, model, dataset, indices, setting, _named(bar, name))
            facts = {
                "id": model.model_id,
                "family": model.family,
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": str(model.device),
            }
            arms.append(Arm(name, plan.adapters[0], plan.infos[0].sha256, facts, timestep, probed))
    return arms


def _named(bar: CountingProgress, name: str) -> Progress:
    return lambda what, more: bar(f"{name}: {what}", more)


@contextmanager
def _at_work(plan: Plan) -> Iterator[tuple[DPT, BaseModel]]:
    """The adapter at work on its base model."""
    path, scale = parse_spec(plan.adapters[0])
    model, _ = plan.load([], quiet=True)
    method = cast("DPT", restore(load_adapter(path), model))
    with method.attach(model, scale):
        yield method, model


def _dataset(decided: Decided, model: BaseModel) -> Dataset:
    """The dataset with pictures of the model's size. UserError if it has none of that size."""
    name = decided.data.name
    settings = replace(decided.data, image_size=model.image_size)
    dataset: Dataset = registry.load(registry.GROUNDED, name)(
        settings, seed=decided.seed, split=decided.split, pictures=True
    )
    if name == SHAPES:
        from align_cli.shapes.world import SIZE

        if model.image_size != SIZE:
            raise UserError(
                f"the shapes dataset has pictures of {SIZE} px, and {model.model_id} works with "
                f"{model.image_size} px; take --data refcoco"
            )
    return dataset


def _write(decided: Decided, arms: Sequence[Arm], facts: dict[str, Any], *, as_json: bool) -> None:
    """Files, then what is printed."""
    from align_cli.evaluation.engine import peak_memory
    from align_cli.evaluation.outcome import write
    from align_cli.evaluation.probing_outcome import outcome, shown
    from align_cli.evaluation.report import write_report
    from align_cli.evaluation.tables import print_results

    process, gpu = peak_memory()
    folder = decided.folder
    source = f"{decided.data.name}, split {decided.split}"
    results = outcome(
        arms,
        folder,
        seed=decided.seed,
        data={"source": source, "settings": decided.identity["data"]},
        interval=decided.interval,
        facts={**facts, "memory": {"process": process, "gpu": gpu}},
    )
    write(folder, results)
    write_report(shown(results), folder, folder / REPORT)
    if as_json:
        typer.echo(json.dumps(results, indent=1, allow_nan=False))
        return
    print_results(results)
    typer.echo(f"numbers: {folder / RESULTS}\nreport: {folder / REPORT}")
