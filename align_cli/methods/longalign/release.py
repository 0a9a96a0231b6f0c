"""The official LongAlign files: a text adapter, the LoRA of stage align, and that of a later stage on top.

The published ones are `s28750_adapter/`, `s28750_lora_vis.pt` and `sd15-reward-3750.pt`. A LoRA says nothing
about itself: which stage it is of, its name tells. The files of the stages below lie in the same folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from align_cli import config, registry
from align_cli.adapters import NOT_RECORDED, OFFICIAL, AdapterInfo, load_pickle
from align_cli.errors import UserError
from align_cli.methods.longalign.adapter import CONFIG, LAVI_BRIDGE, TextAdapter
from align_cli.methods.longalign.lora_file import from_list
from align_cli.models.loading import model_id
from align_cli.models.parts import family_of, outline
from align_cli.models.states import LORA_A

BELOW: dict[str, tuple[str, ...]] = {
    "align": (), "reward": ("align",), "lcm": ("align",), "reward-lcm": ("align", "lcm"),
}  # fmt: skip
"""Stage -> the stages whose LoRAs are merged below its own, in that order. Source: official scripts."""
NAMES = (
    ("reward[-_]?lcm", "reward-lcm"), ("reward", "reward"), ("lcm", "lcm"), ("lora_vis|align", "align"),
)  # fmt: skip
"""What the name of a file holds -> its stage; the first that fits."""
PLAIN = {"align": "lora_vis.pt", "reward": "reward.pt", "lcm": "lcm.pt", "reward-lcm": "reward-lcm.pt"}
"""Stage -> the name without a step, which is taken where there are several. The first is official."""
FAMILIES = ("sd15", "sd21")
STEP = re.compile(r"^s(\d+)_|-(\d+)$")
"""The step in an official name, before the suffix: s28750_lora_vis, sd15-reward-3750."""

IMPORTED = "imported file"
T5, TINY_T5 = "google-t5/t5-large", "embedded:tiny-t5"
"""The one of the official code, and that in the company of the embedded models."""
WITH_CAPTIONS: dict[str, object] = {"longalign.caption_dropout": 0.0}
COMMANDS: dict[str, dict[str, object]] = {
    "align": {"longalign.caption_dropout": 0.1, "longalign.loss": "l2"},
    "reward": WITH_CAPTIONS | {"longalign.steps": 50, "longalign.guidance": 7.5, "longalign.grad_stride": 10},
    "lcm": WITH_CAPTIONS | {"longalign.loss": "huber", "longalign.skip": 20, "longalign.guidance": 7.5},
    "reward-lcm": WITH_CAPTIONS | {"longalign.steps": 4, "longalign.grad_stride": 1},
}
"""Stage -> what the official commands and scripts set."""
EVERY: dict[str, object] = {"longalign.token_length": 240, "longalign.splitter": "official"}
UNIPC: dict[str, object] = {
    "sample.sampler": "unipc", "sample.spacing": "linspace", "sample.steps": 25, "sample.guidance": 7.5,
}  # fmt: skip
LCM: dict[str, object] = {
    "sample.sampler": "lcm", "sample.spacing": "lcm", "sample.steps": 4, "sample.guidance": 1.0,
}  # fmt: skip
"""How sample.py draws, without and with stage lcm below."""


@dataclass(frozen=True)
class Release:
    """What lies together. loras: stage -> file, from the lowest to the stage itself, which is the last.
    adapter: folder of the text adapter.
    """

    loras: dict[str, Path]
    adapter: Path

    @property
    def stage(self) -> str:
        return list(self.loras)[-1]


def read_release(path: Path, model: str) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """What official files hold, as the content of an adapter.

    Args:
        path: a folder with the LoRAs and the text adapter, of which the highest stage is taken; or a LoRA,
        beside which those of the stages below it and the text adapter lie. model: base model that they were
        trained on.
    Raises:
        UserError: something is missing, could be several files, or does not fit the model.
    """
    family = family_of(model)
    if family not in FAMILIES:
        raise UserError(
            f"released files of LongAlign are for Stable Diffusion 1.x, and {model} is of the family "
            f"{family}; name their base model with --model"
        )
    release = find(path)
    unet = outline(model, "unet")
    state: dict[str, Tensor] = {}
    for stage, file in release.loras.items():
        group = "unet" if stage == release.stage else stage
        lora = from_list(load_pickle(file, ()), unet, str(file))
        state |= {f"{group}.{key}": value for key, value in lora.items()}
    adapter = _adapter(release.adapter, unet, model)
    state |= {f"adapter.{key}": value.detach().contiguous() for key, value in adapter.state_dict().items()}
    ranks = (len(x) for key, x in state.items() if key.startswith("unet.") and key.endswith(LORA_A))
    values: dict[str, object] = {
        "longalign.stage": release.stage,
        "longalign.lora_rank": next(ranks),
        "longalign.adapter_width": adapter.int_dim,
    }
    if registry.is_embedded(model):
        values["longalign.t5"] = TINY_T5
    official = EVERY | COMMANDS[release.stage] | (LCM if "lcm" in release.loras else UNIPC)
    if adapter.in_dim == LAVI_BRIDGE[0]:
        official["longalign.t5"] = T5
    resolved = config.resolve("longalign", preset=config.NO_PRESET, flags=values | official)
    known = dict.fromkeys(official, OFFICIAL) | dict.fromkeys(values, IMPORTED)
    held = resolved.to_dict()
    sections = ("longalign", "sample")
    files = [*(file.name for file in release.loras.values()), f"{release.adapter.name}/"]
    info = AdapterInfo(
        method="longalign",
        stage=release.stage,
        model_id=model_id(model),
        family=family,
        step=_step(release.loras[release.stage]),
        source=f"official release, imported from {', '.join(files[:-1])} and {files[-1]}",
        config={"method": "longalign"} | {section: held[section] for section in sections},
        origin={
            key: known.get(key, NOT_RECORDED) for key in resolved.origin if key.partition(".")[0] in sections
        },
    )
    return info, state


def find(path: Path) -> Release:
    """The files of a release. Raises: see `read_release`."""
    folder = path if path.is_dir() else path.parent
    there: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.pt")):
        there.setdefault(stage_of(file) or "", []).append(file)
    if path.is_dir():
        stage = _top(path, {stage for stage in there if stage})
        file = _only(folder, stage, there[stage])
    else:
        stage, file = stage_of(path) or "", path
        if not stage:
            raise UserError(
                f"the name of {path} does not tell its stage; rename it: {', '.join(PLAIN.values())}, or any "
                "name with one of these words"
            )
    loras = {below: _only(folder, below, there.get(below, []), above=file.name) for below in BELOW[stage]}
    loras[stage] = file
    return Release(loras, _adapter_folder(folder, next(iter(loras.values()))))


def stage_of(file: Path) -> str | None:
    """What the name tells."""
    return next((stage for sign, stage in NAMES if re.search(sign, file.stem.lower())), None)


def _top(folder: Path, stages: set[str]) -> str:
    """The stage that no other one stands on."""
    if not stages:
        alone = " alone: start a training from it with --set longalign.text_adapter=FOLDER"
        what = f"a text adapter{alone}" if (folder / CONFIG).exists() else "no *.pt of LongAlign"
        raise UserError(f"{folder} holds {what}; expected for example {PLAIN['align']} and adapter/")
    tops = [s for s in BELOW if s in stages and not any(s in BELOW[other] for other in stages)]
    if len(tops) > 1:
        raise UserError(f"{folder} holds stages that exclude each other ({', '.join(tops)}): name one's file")
    return tops[0]


def _only(folder: Path, stage: str, files: list[Path], *, above: str = "") -> Path:
    """The one file of a stage. above: what stands on it."""
    plain = [file for file in files if file.name == PLAIN[stage]] or files
    if len(plain) == 1:
        return plain[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{folder} holds several files of stage {stage} ({names}); keep one, or name the file"
        )
    raise UserError(
        f"{above} stands on the LoRA of stage {stage}, which {folder} does not hold: put it there too, as "
        f"{PLAIN[stage]}"
    )


def _adapter_folder(folder: Path, lora: Path) -> Path:
    """That of the same step as the LoRA of the lowest stage, else `adapter`, else the only one."""
    there = sorted(p for p in folder.glob("*adapter") if p.is_dir())
    same = lora.name.replace("lora_vis.pt", "adapter")
    for name in (same, "adapter"):
        if folder / name in there:
            return folder / name
    if len(there) == 1:
        return there[0]
    held = f"several ({', '.join(p.name for p in there)})" if there else "none"
    raise UserError(
        f"{lora.name} was trained with a text adapter, a folder such as adapter/ or {same}/ with {CONFIG}; "
        f"{folder} holds {held}"
    )


def _adapter(folder: Path, unet: nn.Module, model: str) -> TextAdapter:
    adapter = TextAdapter.from_folder(folder)
    found: Any = unet.config
    width = found.cross_attention_dim
    if adapter.out_dim != width:
        raise UserError(
            f"{folder} makes text of width {adapter.out_dim}, and the UNet of {model} reads {width}; name "
            "its base model with --model"
        )
    return adapter


def _step(file: Path) -> int:
    found = STEP.search(file.stem)
    return int(found[1] or found[2]) if found else 0
