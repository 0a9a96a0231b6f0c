"""Read the officially released SoftREPA tokens (and those that the official training scripts write)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align_cli import config, registry
from align_cli.adapters import NOT_RECORDED, OFFICIAL, AdapterInfo, load_pickle, load_safetensors
from align_cli.errors import UserError
from align_cli.methods.softrepa.config import TABLE_ROWS
from align_cli.models.sources import find, read_json
from align_cli.models.unet import SD21_WIDTH, unet_family

TOKENS, TABLE = "dc_tokens", "dc_t_tokens"
"""Stems of the official files, and names of the trained tensors."""


@dataclass(frozen=True)
class Base:
    """What a base model says about its tokens. text: width of its text encodings; stream: width of the text
    stream of an MMDiT, 0 for a UNet.
    """

    family: str
    text: int
    stream: int = 0

    def shapes(self) -> str:
        """Allowed shapes of dc_tokens, in words."""
        if self.stream:
            return f"[layers, n, {self.text}] or [layers, n, {self.stream}]"
        return f"[n, {self.text}]"

    def fits(self, tokens: Tensor) -> bool:
        """Whether dc_tokens can be of this model."""
        if self.stream:
            return tokens.ndim == 3 and tokens.shape[-1] in (self.text, self.stream)
        return tokens.ndim == 2 and tokens.shape[-1] == self.text


BASES = {
    "sd14": Base("sd15", 768),
    "sd15": Base("sd15", 768),
    "sd21-base": Base(unet_family(SD21_WIDTH), SD21_WIDTH),
    "sdxl": Base("sdxl", 2048),
    "sd3": Base("sd3", 4096, 1536),
    "sd35-medium": Base("sd3", 4096, 1536),
}
"""The aliases, so that importing needs no weights."""
PIPELINES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionImg2ImgPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
}
"""`_class_name` of a pipeline -> its family (sd15 for sd21, too)."""
STAGES = {"sdxl": "TTF"}
"""Stages of the released tokens where they are not TFF, by family. Source: run_eval.sh, --apply_dc."""
INITS = {"sd15": "bos"}
"""What training started from where that is not normal, by family. Source: train.py."""


def read_release(path: Path, model: str) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """What an official file or folder holds, as the content of an adapter.

    Args:
        path: dc_tokens*.pth (a table dc_t_tokens* of the same suffix beside it belongs to it),
        tokens.safetensors, or a folder with either. model: base model that they were trained on.
    Raises:
        UserError: nothing of the kind there, several of the kind, or tensors for another model.
    """
    state = read_tensors(path)
    base = _base(model)
    tokens, table = state[TOKENS], state.get(TABLE)
    if not base.fits(tokens):
        kind = " (SD3)" if tokens.ndim == 3 else {2048: " (SDXL)"}.get(tokens.shape[-1], "")
        raise UserError(
            f"{path} holds tokens of shape {list(tokens.shape)}{kind}, but {model} needs {base.shapes()}; "
            "name their base model with --model"
        )
    width = len(tokens) * base.stream if base.stream else base.text
    if table is not None and table.shape != (TABLE_ROWS, width):
        raise UserError(f"{path}: the table has shape {list(table.shape)}, expected [{TABLE_ROWS}, {width}]")
    values: dict[str, object] = {
        "softrepa.num_tokens": tokens.shape[-2],
        "softrepa.use_t_table": table is not None,
    }
    official: dict[str, object] = {"softrepa.init": INITS.get(base.family, "normal")}
    if base.stream:
        values["softrepa.num_layers"] = len(tokens)
        values["softrepa.token_space"] = "text" if tokens.shape[-1] == base.text else "projected"
    else:
        official["softrepa.stages"] = STAGES.get(base.family, "TFF")
    resolved = config.resolve("softrepa", preset=config.NO_PRESET, flags=values | official)
    known = dict.fromkeys(values, "imported file") | dict.fromkeys(official, OFFICIAL)
    info = AdapterInfo(
        method="softrepa",
        model_id=model,
        family=base.family,
        source=f"official release, imported from {path.name}",
        # nothing about model, drawing and editing: those are for the model's preset to say
        config={"method": "softrepa", "softrepa": resolved.to_dict()["softrepa"]},
        origin={key: known.get(key, NOT_RECORDED) for key in resolved.origin if key.startswith("softrepa.")},
    )
    return info, state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """dc_tokens and, where there is one, dc_t_tokens, float32, in their official shapes (of any base
    model).
    """
    file = _choose(path) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} does not exist; give a dc_tokens*.pth file or the folder that holds it")
    if file.suffix == ".safetensors":
        state = load_safetensors(file)
        if TOKENS not in state or state.keys() - {TOKENS, TABLE}:
            raise UserError(f"{file} holds {', '.join(sorted(state))}; expected {TOKENS} and perhaps {TABLE}")
        return {name: tensor.float() for name, tensor in state.items()}
    if not file.name.startswith(TOKENS):
        raise UserError(
            f"{file} is no released SoftREPA file: expected {TOKENS}*.pth (a {TABLE}*.pth beside it joins it)"
        )
    state = {TOKENS: read_pth(file)}
    table = file.with_name(file.name.replace(TOKENS, TABLE, 1))
    if table.is_file():
        state[TABLE] = read_pth(table)
    return state


def read_pth(file: Path) -> Tensor:
    """One official .pth: a bare Parameter or tensor, or a pickled nn.Embedding module, of which the weight is
    taken.
    """
    content: Any = load_pickle(file, (nn.modules.sparse.Embedding, set))
    tensor = content.weight if isinstance(content, nn.Embedding) else content
    if not isinstance(tensor, Tensor) or not torch.is_floating_point(tensor):
        raise UserError(
            f"{file} holds a {type(content).__name__}, expected a tensor of floats or an Embedding"
        )
    if not torch.isfinite(tensor).all():
        raise UserError(f"{file} holds values that are not finite")
    return tensor.detach().float().contiguous()


def _choose(folder: Path) -> Path:
    """The tokens of a folder: the released name, else the best of a training run, else the only one."""
    for name in (f"{TOKENS}.pth", "tokens.safetensors", f"{TOKENS}_best.pth"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob(f"{TOKENS}*.pth"))
    if len(found) != 1:
        names = ", ".join(f.name for f in found)
        what = f"several files, name one: {names}" if found else f"no {TOKENS}*.pth and no tokens.safetensors"
        raise UserError(f"{folder} has {what}")
    return found[0]


def _base(model: str) -> Base:
    """The widths of a base model; of another one than the aliases from its configuration, without weights."""
    where = registry.model_source(model)
    for alias, base in BASES.items():
        if registry.MODELS.get(alias) == where:
            return base
    source = find(model)
    kind = str(source.index.get("_class_name"))
    part = "transformer" if source.names("transformer") else "unet"
    if kind not in PIPELINES or not source.names(part):
        raise UserError(f"{source.label} holds a {kind}; soft tokens are for {', '.join(PIPELINES)}")
    if source.fetch is not None:
        source.fetch(f"{part}/config.json")
    widths = read_json(source.folder / part / "config.json", source.label)
    try:
        if part == "transformer":
            return Base("sd3", int(widths["joint_attention_dim"]), int(widths["caption_projection_dim"]))
        text = int(widths["cross_attention_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source.label}/{part}/config.json does not tell the width of its text") from error
    return Base("sdxl" if PIPELINES[kind] == "sdxl" else unet_family(text), text)
