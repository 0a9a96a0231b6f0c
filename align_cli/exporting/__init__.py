"""Trained adapters as files of other tools: `t2ialign adapters export`. Importing this costs no torch.

A method says what it trained as `Part`s, one per module of the pipeline; a format writes parts, opens what it
wrote with the library that it is for, and compares. EXPORTERS tells which method can be written as what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from align_cli import registry
from align_cli.adapters import Adapter, load_adapter, refuse_existing
from align_cli.checks import one_of
from align_cli.config import Resolved
from align_cli.errors import UserError
from align_cli.files import new_folder
from align_cli.models.states import LORA_A, LORA_B
from align_cli.settings import ModelSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Part:
    """What was trained of one module of a pipeline.

    name: of the module as in diffusers: text_encoder, unet, ... state: parameter -> value of all parameters;
    or, of a LoRA, "<layer>.lora_A.weight" (rank, in) and "<layer>.lora_B.weight" (out, rank) per layer, of a
    convolution (rank, in, h, w) and (out, rank, 1, 1).
    factor: alpha / rank of a LoRA, by which B A is multiplied; None for all parameters.
    """

    name: str
    state: dict[str, Tensor]
    factor: float | None = None

    @property
    def lora(self) -> bool:
        """Whether it is a low-rank addition."""
        return self.factor is not None

    @property
    def rank(self) -> int:
        """Of a LoRA."""
        return next(len(value) for key, value in self.state.items() if key.endswith(LORA_A))

    @property
    def layers(self) -> list[str]:
        """Of a LoRA: the layers that it adds to."""
        return [key.removesuffix(LORA_A) for key in self.state if key.endswith(LORA_A)]

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Of a LoRA: A and B of a layer."""
        return self.state[layer + LORA_A], self.state[layer + LORA_B]


@dataclass(frozen=True)
class Trained:
    """What an adapter holds, for other tools. parts: of the pipeline. notes: what no other tool's file can
    hold. whole: whether the parts at work are all that the adapter does. beside: writes what else of it has
    a form of its own, into the folder of the export; official files hold that themselves. groups: first word
    of the adapter's keys -> part that they are in, or file that `beside` writes; of those that are not named
    as the part itself.
    """

    parts: list[Part]
    notes: list[str]
    whole: bool = True
    beside: Callable[[Path], Report] | None = None
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One export. parts, whole: see `Trained`. settings: of the base model. folder: to write into. rank: of
    the factors of what was trained as all parameters; 0 for none. dtype: of what is written.
    """

    adapter: Adapter
    parts: tuple[Part, ...]
    whole: bool
    settings: ModelSettings
    folder: Path
    rank: int
    dtype: torch.dtype

    @property
    def model(self) -> str:
        """The base model's name."""
        return self.settings.name


def other_formats(family: str) -> str:
    """What LoRA of a denoiser is written as where an official file cannot hold it, in words."""
    return "diffusers, peft or comfyui" if family == "sd3" else "diffusers, peft, kohya or comfyui"


@dataclass
class Report:
    """What an exporter did. written: file or folder -> what it is and what opens it. left_out: layer -> share
    of its change that the rank leaves out. notes: what is lost or different. check: the comparison of what
    was opened again. layers: part -> layers that were written as LoRA. used: key of the adapter -> module or
    file that it was written to; unused: key of the adapter -> reason; together they are all of its keys.
    """

    written: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    check: list[str] = field(default_factory=list)
    layers: dict[str, list[str]] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)

    def add(self, other: Report) -> None:
        """Append another report."""
        self.written |= other.written
        self.left_out |= other.left_out
        self.notes += other.notes
        self.check += other.check
        self.layers |= other.layers
        self.used |= other.used
        self.unused |= other.unused

    def table(self) -> list[tuple[str, ...]]:
        """Rows of keys, used and unused, counted by where they went or why they did not."""
        used, unused = (Counter(of.values()) for of in (self.used, self.unused))
        rows: list[tuple[str, ...]] = [("used", _keys(n), f"-> {where}") for where, n in used.items()]
        return rows + [("unused", _keys(n), why) for why, n in unused.items()]


PARTS = registry.Table(
    "exported method",
    {
        "comat": "align_cli.methods.comat.export:trained",
        "dpt": "align_cli.methods.dpt.export:trained",
        "longalign": "align_cli.methods.longalign.export:trained",
        "textcraftor": "align_cli.methods.textcraftor.export:trained",
    },
)
"""Method -> function (Adapter) -> Trained."""

LIBRARIES = {
    "diffusers": "align_cli.exporting.pipelines:write_diffusers",
    "peft": "align_cli.exporting.lora:write_peft",
    "kohya": "align_cli.exporting.kohya:write_kohya",
    "comfyui": "align_cli.exporting.comfyui:write_comfyui",
}
"""Formats for every method with parts."""
OFFICIAL = "official"
EXPORTERS: dict[str, registry.Table] = {
    method: registry.Table(
        f"export format of {method}",
        {**LIBRARIES, OFFICIAL: f"align_cli.methods.{method}.export:write_official"},
    )
    for method in PARTS
}
"""Method -> format -> function (Job) -> Report. UserError for parts that the format cannot hold."""


def export(
    path: Path | str, form: str, out: Path, *, model: str | None = None, rank: int = 0, dtype: str = "float32"
) -> Report:
    """Write a trained adapter in another tool's format, and open it again.

    Args:
        path: adapter folder. form: one of EXPORTERS. out: folder to write; must not exist. model: base model,
        None for the adapter's own. rank: write what was trained as all weights as LoRA factors of this rank.
    Raises:
        UserError: an adapter that is damaged, or cannot be written so; base weights that are needed and not
        there; what was written does not hold what was trained. Then nothing is written.
    """
    refuse_existing(out)
    one_of("--dtype", dtype, DTYPES)
    if rank < 0:
        raise UserError(f"--rank must be >= 1, got {rank}")
    adapter = load_adapter(path)
    method = adapter.info.method
    registry.path_of(registry.METHODS, method)
    if method not in EXPORTERS:
        raise UserError(f"adapters of {method} cannot be exported (those of {', '.join(EXPORTERS)} can)")
    write = registry.load(EXPORTERS[method], form)
    trained: Trained = registry.load(PARTS, method)(adapter)
    parts = trained.parts
    if not parts and form != OFFICIAL:
        stage = f" (stage {adapter.info.stage})" if adapter.info.stage else ""
        raise UserError(
            f"adapter {path}{stage} changes nothing of the model itself, so that --to {form} has nothing to "
            "hold; take --to official"
        )
    if rank and parts and all(part.lora for part in parts):
        raise UserError(f"adapter {path} is LoRA of rank {parts[0].rank} already; leave --rank out")
    settings = _base(adapter, parts, model)
    import torch

    with new_folder(out) as folder:
        job = Job(adapter, tuple(parts), trained.whole, settings, folder, rank, getattr(torch, dtype))
        report: Report = write(job)
        if trained.beside is not None and form != OFFICIAL:
            report.add(trained.beside(folder))
    report.notes += trained.notes
    _account(report, adapter, trained, official=form == OFFICIAL)
    return report


def _account(report: Report, adapter: Adapter, trained: Trained, *, official: bool) -> None:
    """Where every key of the adapter went."""
    parts = {part.name: part for part in trained.parts}
    for key in adapter.state:
        group, _, name = key.partition(".")
        where = trained.groups.get(group, group)
        part = parts.get(where)
        if official:
            report.used[key] = "official files"
        elif part is None or part.lora or where not in report.layers:
            report.used[key] = where
        elif name.removesuffix(".weight") in report.layers[where]:
            report.used[key] = f"{where}, as LoRA"
        else:
            report.unused[key] = f"of the {where}: LoRA holds changed weights of linear layers alone"


def _keys(count: int) -> str:
    return f"{count} key{'s' * (count > 1)}"


def _base(adapter: Adapter, parts: list[Part], model: str | None) -> ModelSettings:
    """The base model as it was trained on, or another one, float32 on the CPU."""
    info = adapter.info
    settings = ModelSettings()
    if model is None and "model" in info.config:
        raw = {**info.config, "method": info.method}
        settings = Resolved.from_dict(raw, where=f"adapter {adapter.path}: config").model
    name = model or info.model_id
    registry.model_source(name)
    idle_t5 = info.family == "sd3" and not any(part.name == "text_encoder_3" for part in parts)
    return replace(
        settings,
        name=name,
        dtype="float32",
        device="cpu",
        encoder_device="",
        t5_length=0 if idle_t5 else settings.t5_length,
    )
