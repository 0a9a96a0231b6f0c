"""Name -> dotted path tables, imported on first use. Importing this costs no torch."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from align_cli.errors import UserError, unknown


class Table(dict[str, str]):
    """A table of one kind of thing: name -> "package.module:attribute"."""

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        super().__init__(entries)
        self.kind = kind


METHODS = Table(
    "method",
    {
        "comat": "align_cli.methods.comat.method:CoMat",
        "dpt": "align_cli.methods.dpt.method:DPT",
        "longalign": "align_cli.methods.longalign.method:LongAlign",
        "softrepa": "align_cli.methods.softrepa.method:SoftREPA",
        "textcraftor": "align_cli.methods.textcraftor.method:TextCraftor",
    },
)
"""Classes that follow `align_cli.methods.base.Method`."""

METHOD_CONFIGS = Table(
    "method",
    {
        "comat": "align_cli.methods.comat.config:CoMatConfig",
        "dpt": "align_cli.methods.dpt.config:DPTConfig",
        "longalign": "align_cli.methods.longalign.config:LongAlignConfig",
        "softrepa": "align_cli.methods.softrepa.config:SoftREPAConfig",
        "textcraftor": "align_cli.methods.textcraftor.config:TextCraftorConfig",
    },
)
"""Their frozen config dataclasses; importing one costs no torch."""

DATASETS = Table(
    "dataset",
    {
        "captions": "align_cli.data.captioned_images:CaptionedImages",
        "coco": "align_cli.data.coco:CocoDataset",
        "latents": "align_cli.data.latents:DrawnLatents",
        "prompts": "align_cli.data.prompt_lists:PromptDataset",
        "shapes": "align_cli.shapes.dataset:ShapesDataset",
    },
)
"""Classes that follow `align_cli.data.base.Dataset`."""

GROUNDED = Table(
    "dataset",
    {
        "refcoco": "align_cli.data.refcoco:RefCoco",
        "shapes": "align_cli.shapes.grounded:GroundedShapes",
    },
)
"""Datasets whose examples have a `data.grounded.Grounded`, for methods that learn to tell pictures and texts
apart."""

LATENTS = frozenset({"latents"})
"""Datasets of captions with latents that a model drew for them."""

CAPTIONS_ONLY = frozenset({"prompts"}) | LATENTS
"""Datasets without pictures."""

BENCHMARKS = Table(
    "benchmark",
    {
        "coco": "align_cli.evaluation.sets:coco",
        "geneval": "align_cli.evaluation.geneval:geneval",
        "geneval-shapes": "align_cli.evaluation.geneval_shapes:geneval_shapes",
        "hpsv2": "align_cli.evaluation.sets:hpsv2",
        "parti": "align_cli.evaluation.sets:parti",
        "shapes": "align_cli.evaluation.sets:shapes",
    },
)
"""Functions `(evaluation.sets.SetOptions) -> PromptSet`: the prompts of the benchmarks of `t2ialign eval`."""

REWARDS = Table(
    "reward",
    {
        "aesthetic": "align_cli.rewards.aesthetic:build_aesthetic",
        "blip-caption": "align_cli.rewards.blip_caption:build_blip_caption",
        "clip": "align_cli.rewards.clip:build_clip",
        "clip-b32": "align_cli.rewards.clip:build_clip",
        "clip-g14": "align_cli.rewards.clip:build_clip",
        "denscore": "align_cli.rewards.denscore:build_denscore",
        "git-caption": "align_cli.rewards.git_caption:build_git_caption",
        "hpsv2": "align_cli.rewards.clip:build_clip",
        "hpsv2.1": "align_cli.rewards.clip:build_clip",
        "imagereward": "align_cli.rewards.imagereward:build_imagereward",
        "pickscore": "align_cli.rewards.clip:build_clip",
        "shapes": "align_cli.rewards.shapes:build_shapes",
        "tiny-blip": "align_cli.rewards.blip_caption:build_blip_caption",
        "tiny-clip": "align_cli.rewards.clip:build_clip",
        "tiny-denscore": "align_cli.rewards.denscore:build_denscore",
        "vlm-caption": "align_cli.rewards.vlm_caption:build_vlm_caption",
        "vqascore": "align_cli.rewards.vqascore:build_vqascore",
    },
)
"""Functions `build(request: rewards.base.Request) -> rewards.base.Reward`, called by
`rewards.loading.load_reward`.
"""

MASKERS = Table(
    "masker",
    {
        "grounded-sam": "align_cli.grounding.detection:build_grounded_sam",
        "shapes": "align_cli.shapes.masks:build_shapes_masker",
    },
)
"""Functions `build(request: grounding.masks.MaskRequest) -> grounding.masks.Masker`."""

MODELS = Table(
    "model",
    {
        "sd14": "CompVis/stable-diffusion-v1-4",
        "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sd21-base": "stabilityai/stable-diffusion-2-1-base",
        "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
        "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
        "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
        "tiny-sd15": "embedded:tiny-sd15",
        "tiny-sd3": "embedded:tiny-sd3",
        "tiny-sdxl": "embedded:tiny-sdxl",
    },
)
"""Alias -> hub id, or "embedded:" and a folder of align_cli/shapes/weights; `model_source` reads it."""


WEIGHTS = Path(__file__).resolve().parent / "shapes" / "weights"
"""Folder of the embedded models, one subfolder each."""


def path_of(table: Table, name: str) -> str:
    """What the table says about `name`; UserError listing the known names and the nearest."""
    if name not in table:
        raise unknown(table.kind, name, table)
    return table[name]


def load(table: Table, name: str) -> Any:
    """The registered class or function, imported on first use. UserError for an unknown name."""
    module, _, attribute = path_of(table, name).partition(":")
    return getattr(import_module(module), attribute)


def model_source(name: str) -> str:
    """Where a model name leads: hub id, "embedded:NAME", or the path of an existing folder as it was given.

    UserError for a bare word that is neither an alias nor a folder.
    """
    if name in MODELS:
        return MODELS[name]
    if name.startswith("embedded:") or Path(name).expanduser().is_dir():
        return name
    if name.startswith(("/", "./", "../", "~")):
        raise UserError(f"model folder {name!r} does not exist")
    if name.count("/") == 1 and all(name.split("/")):
        return name
    raise unknown("model", name, MODELS)


def model_id(name: str) -> str:
    """What the user named as a model; folders as absolute paths, so that adapters find them from anywhere."""
    if name in MODELS or not name:
        return name
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def dataset_table(name: str, *, grounded: bool = False) -> Table:
    """Where the dataset `name` is registered: in GROUNDED for methods that learn to tell pictures and texts
    apart, in DATASETS for all other work.

    UserError for an unknown name, and for one that is in the other table only; both list the names.
    """
    table, other = (GROUNDED, DATASETS) if grounded else (DATASETS, GROUNDED)
    if name in other and name not in table:
        lack = "has no boxes and no false captions and pictures, which this method learns from"
        use = "is for methods that learn to tell pictures and texts apart"
        names = ", ".join(table)
        raise UserError(f"the {name} dataset {lack if grounded else use}; name another with --data ({names})")
    path_of(table, name)
    return table


def no_pictures(dataset: str, wants: str) -> UserError:
    """What is said of a dataset of captions alone. wants: who works with pictures, in words."""
    others = ", ".join(sorted(DATASETS.keys() - CAPTIONS_ONLY))
    held = "latents that a model drew" if dataset in LATENTS else "captions only"
    return UserError(f"{wants}, and the {dataset} dataset has {held}; name another with --data ({others})")


def is_embedded(name: str) -> bool:
    """Whether a model name leads to one of the models inside this package, which draw the shapes world."""
    return model_source(name).startswith("embedded:")
