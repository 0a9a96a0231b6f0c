"""From a model's name to a frozen model: hub id, local diffusers folder, or a model that ships in the
package.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.utils import logging as transformers_logging

from align_cli.devices import pick_device
from align_cli.diffusion.flow import FlowProcess
from align_cli.diffusion.process import NoiseProcess
from align_cli.errors import UserError, first_line
from align_cli.models.architectures import SDXL as SDXL
from align_cli.models.base import BaseModel
from align_cli.models.frozen import FrozenModel
from align_cli.models.sd3 import SD3Model
from align_cli.models.sdxl import SDXLModel
from align_cli.models.segments import SegmentReader
from align_cli.models.sources import (
    DENOISERS,
    DIFFUSERS_STEM,
    TOKENIZERS,
    Source,
    find,
    find_module,
    read_json,
    stem_of,
    weight_file,
    with_config,
    with_parts,
)
from align_cli.models.unet import UNetModel
from align_cli.registry import model_id as model_id
from align_cli.settings import ModelSettings

LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
"""What the libraries raise for damaged, absent or misfitting files."""

WITHOUT_WEIGHTS: ContextVar[bool] = ContextVar("WITHOUT_WEIGHTS", default=False)
"""Whether models and encoders get fake weights, to count with, in place of theirs; see `empty`."""


@dataclass(frozen=True)
class Family:
    """What a pipeline consists of: the class of each part that is loaded, and what makes a model of them.

    Safety checkers, feature extractors and image encoders never are loaded.
    """

    title: str
    denoiser: str
    parts: dict[str, Any]
    process: Callable[[dict[str, Any]], Any]
    build: Callable[[Parts], FrozenModel]


@dataclass(frozen=True)
class Parts:
    """The loaded parts of one pipeline, by name, and all else that its model is made of."""

    modules: dict[str, Any]
    process: Any
    settings: ModelSettings
    source: Source

    @property
    def label(self) -> str:
        """Who to blame if the denoiser does not fit the rest."""
        return self.settings.unet or self.source.label


def load_model(settings: ModelSettings, *, encoders_only: bool = False, empty: bool = False) -> BaseModel:
    """The frozen base model that `settings` names, in its dtype and on its devices.

    encoders_only: the denoiser is an outline without weights, which are neither read nor fetched; `predict`
    does not work then. (One that settings.unet names is read all the same.)
    empty: no part has weights, only fake ones to count with (see `empty.empty_model`); needs no device.
    Every part goes straight to its own device. A setting that does nothing for this model, and a pipeline
    without T5, are warnings.
    Raises:
        UserError: unknown name; no network and not cached; no diffusers folder; a pipeline of another family;
        missing, damaged or misfitting weights; a device that is not there.
    """
    if empty or WITHOUT_WEIGHTS.get():
        from align_cli.models.empty import empty_model

        return empty_model(settings)
    device = pick_device(settings.device)
    beside = _encoder_home(settings.encoder_device, device)
    source = find(settings.name)
    kind = pipeline_kind(source)
    family = FAMILIES[kind]
    scheduler = read_json(source.folder / "scheduler" / "scheduler_config.json", source.label)
    try:
        process = family.process(scheduler)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source.label}/scheduler: {error}") from error
    other = {family.denoiser: settings.unet, "vae": settings.vae}
    wanted = {p: c for p, c in family.parts.items() if not other.get(p) and wanted_part(p, source, settings)}
    outline = family.denoiser if encoders_only and family.denoiser in wanted else ""
    half = settings.dtype != "float32"
    source = with_parts(source, [part for part in wanted if part != outline], half=half)
    if outline:
        source = with_config(source, outline)
    dtype = getattr(torch, settings.dtype)
    modules: dict[str, Any] = {}
    with quiet():
        for part, cls in family.parts.items():
            if other.get(part):
                modules[part] = _other_module(cls, part, other[part], dtype)
            elif part == outline:
                modules[part] = _outline(cls, source, part, dtype)
            elif part in wanted:
                modules[part] = (
                    load_tokenizer(cls, source, part)
                    if part in TOKENIZERS
                    else _own_part(cls, source, part, kind, dtype)
                )
    for part, module in modules.items():
        if part not in (*TOKENIZERS, outline):
            modules[part] = module.to(device if part == family.denoiser else beside)
    if settings.t5_length != ModelSettings().t5_length and "text_encoder_3" not in family.parts:
        warnings.warn(f"model.t5_length has no effect: {source.label} has no T5", stacklevel=2)
    if device.type == "cpu" and family.denoiser == "unet":
        # the layout of oneDNN's convolutions: 1.3x faster
        modules["unet"] = modules["unet"].to(memory_format=torch.channels_last)
    model = family.build(Parts(modules, process, settings, source))
    model.device = device  # an outline is nowhere
    finished(model, settings)
    if settings.encoder_device == "offload":
        if device.type == "cpu":
            warnings.warn("model.encoder_device offload has no effect: the model is on the CPU", stacklevel=2)
        model.offload_encoders()
    return model


def finished(model: FrozenModel, settings: ModelSettings) -> FrozenModel:
    """The model with what settings say of it besides its modules."""
    model.denoiser_id = settings.unet
    if settings.text == "segments":
        model.reader = SegmentReader(model, length=settings.segment_length, splitter=settings.splitter)
    return model


def pipeline_kind(source: Source) -> str:
    """`_class_name` of a pipeline, of a family that is supported. UserError for another."""
    kind = str(source.index.get("_class_name"))
    if kind not in FAMILIES:
        known = ", ".join(f"{family.title} ({name})" for name, family in FAMILIES.items())
        raise UserError(f"{source.label} holds a {kind}; supported are {known}")
    return kind


def wanted_part(part: str, source: Source, settings: ModelSettings) -> bool:
    """Whether a part is to be loaded: all but the T5 that is not there, or that the user leaves out."""
    if part not in ("text_encoder_3", "tokenizer_3"):
        return True
    return settings.t5_length > 0 and source.names("text_encoder_3")


def _encoder_home(name: str, device: torch.device) -> torch.device:
    """Where text encoders and autoencoder are put. name: model.encoder_device; device: the denoiser's."""
    if name == "offload":
        return torch.device("cpu")
    return pick_device(name, "--encoder-device cpu or offload") if name else device


# ---------------------------------------------------------------- parts


def load_part_of(cls: Any, source: Source, part: str, dtype: torch.dtype) -> nn.Module:
    """One module of a pipeline, complete: no missing and no misfitting weights."""
    weight = weight_file(source, f"{part}/", stem_of(part), half=dtype != torch.float32)
    if weight is None or f"{part}/config.json" not in source.files:
        lacking = "config.json" if weight else f"{stem_of(part)}.safetensors (or .bin)"
        advice = "; set model.t5_length = 0 to go without T5" if part == "text_encoder_3" else ""
        raise UserError(f"{source.label} is incomplete: no {part}/{lacking} in {source.folder}{advice}")
    name = weight.rpartition("/")[2]
    return load_weights(cls, source.folder / part, name, dtype, f"{part} of {source.label}")


def _outline(cls: Any, source: Source, part: str, dtype: torch.dtype) -> nn.Module:
    """A module of the pipeline's configuration without weights, on torch's meta device."""
    config = read_json(source.folder / part / "config.json", source.label)
    try:
        return nn.Module.to(outline_of(cls, config), dtype)  # diffusers' own `to` warns
    except LOAD_ERRORS as error:
        raise UserError(f"cannot read the {part} of {source.label}: {first_line(error)}") from error


def outline_of(cls: Any, config: dict[str, Any]) -> nn.Module:
    """A module of that configuration without weights, on torch's meta device."""
    with torch.device("meta"):
        if cls in DIFFUSERS_CLASSES:
            return cast("nn.Module", cls.from_config(config))
        return cast("nn.Module", cls(cls.config_class.from_dict(config)))


def load_weights(cls: Any, folder: Path, weight: str, dtype: torch.dtype, what: str) -> nn.Module:
    """A module of a folder, complete. weight: the file, or the index of its shards. what: for errors."""
    options = {
        "torch_dtype" if cls in DIFFUSERS_CLASSES else "dtype": dtype,
        "variant": "fp16" if ".fp16." in weight else None,
        "use_safetensors": ".safetensors" in weight,
    }
    try:
        module, info = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load the {what} from {folder / weight}: {first_line(error)}") from error
    lacking = sorted([*info["missing_keys"], *(str(k) for k in info.get("mismatched_keys", ()))])
    if lacking:
        raise UserError(f"the {what} lacks {len(lacking)} weights in {folder / weight}, first {lacking[0]}")
    result: nn.Module = module
    return result


def load_tokenizer(cls: Any, source: Source, part: str) -> Any:
    """part: the folder of the tokenizer in the source, "" for the source's own."""
    try:
        return cls.from_pretrained(source.folder, subfolder=part, local_files_only=True)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load the {part} of {source.label}: {first_line(error)}") from error


def _other_module(cls: Any, part: str, name: str, dtype: torch.dtype) -> nn.Module:
    """A denoiser or autoencoder from elsewhere: its own folder or hub repository, or a pipeline's."""
    setting = f"model.{'vae' if part == 'vae' else 'unet'} {name}"
    half = dtype != torch.float32
    flag = f"--set model.vae={name}" if part == "vae" else f"--unet {name}"
    try:
        source, prefix = find_module(name, part, half=half, advice="name a local folder with it")
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if f"{prefix}config.json" not in source.files:
        others = [p for p in DENOISERS if p != part and source.names(p)]
        held = f"a {source.index[others[0]][1]}" if others and part != "vae" else "none"
        raise UserError(f"{setting}: a {cls.__name__} is wanted here, and {source.label} holds {held}")
    found = read_json(source.folder / prefix / "config.json", setting).get("_class_name")
    if found not in (None, cls.__name__):
        raise UserError(f"{setting}: a {cls.__name__} is wanted here, and {source.label} holds a {found}")
    weight = weight_file(source, prefix, DIFFUSERS_STEM, half=half)
    if weight is None:
        raise UserError(f"{setting}: no {DIFFUSERS_STEM}.safetensors (or .bin) beside config.json")
    return load_weights(cls, source.folder / prefix, weight.rpartition("/")[2], dtype, f"{part} {name}")


def _own_part(cls: Any, source: Source, part: str, kind: str, dtype: torch.dtype) -> nn.Module:
    if part == "vae" and "vae/config.json" in source.files:
        dtype = part_dtype(kind, part, read_json(source.folder / part / "config.json", source.label), dtype)
    return load_part_of(cls, source, part, dtype)


def part_dtype(kind: str, part: str, config: dict[str, Any], dtype: torch.dtype) -> torch.dtype:
    """float32 for an autoencoder of SDXL that overflows in float16 (force_upcast), as in diffusers; else
    `dtype`. config: of the part.
    """
    upcast = kind == SDXL and part == "vae" and dtype == torch.float16 and config.get("force_upcast", True)
    return torch.float32 if upcast else dtype


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of the libraries inside."""
    shown = [log for log in (transformers_logging, diffusers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


# ---------------------------------------------------------------- families


def _unet_model(parts: Parts) -> FrozenModel:
    unet, vae, text = (parts.modules[name] for name in ("unet", "vae", "text_encoder"))
    if unet.config.addition_embed_type is not None:
        raise UserError(f"the UNet of {parts.label} is one of SDXL; it needs the rest of an SDXL pipeline")
    _check_widths("UNet", parts.label, "text", unet.config.cross_attention_dim, text.config.hidden_size)
    _check_channels("UNet", parts.label, unet, vae)
    return UNetModel(
        model_id=model_id(parts.settings.name),
        tokenizer=parts.modules["tokenizer"],
        text_encoder=text,
        vae=vae,
        unet=unet,
        process=parts.process,
    )


def _sdxl_model(parts: Parts) -> FrozenModel:
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    unet, vae, text, text_2 = (parts.modules[name] for name in names)
    config = unet.config
    if config.addition_embed_type != "text_time":
        raise UserError(f"the UNet of {parts.label} is not one of SDXL: it takes no pooled text")
    both = text.config.hidden_size + text_2.config.hidden_size
    _check_widths("UNet", parts.label, "text", config.cross_attention_dim, both)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    _check_widths("UNet", parts.label, "pooled text", pooled, text_2.config.projection_dim)
    _check_channels("UNet", parts.label, unet, vae)
    return SDXLModel(
        model_id=model_id(parts.settings.name),
        tokenizers=(parts.modules["tokenizer"], parts.modules["tokenizer_2"]),
        text_encoders=(text, text_2),
        vae=vae,
        unet=unet,
        process=parts.process,
        zeros_for_empty=bool(parts.source.index.get("force_zeros_for_empty_prompt", True)),
    )


def _sd3_model(parts: Parts) -> FrozenModel:
    names = ("transformer", "vae", "text_encoder", "text_encoder_2")
    transformer, vae, text, text_2 = (parts.modules[name] for name in names)
    config, t5 = transformer.config, parts.modules.get("text_encoder_3")
    side_by_side = text.config.hidden_size + text_2.config.hidden_size
    if side_by_side > config.joint_attention_dim:
        raise UserError(
            f"the transformer of {parts.label} reads {config.joint_attention_dim}-wide text, but the CLIP "
            f"encoders give {side_by_side}"
        )
    if t5 is not None:
        _check_widths("transformer", parts.label, "T5 text", config.joint_attention_dim, t5.config.d_model)
    pooled = text.config.projection_dim + text_2.config.projection_dim
    _check_widths("transformer", parts.label, "pooled text", config.pooled_projection_dim, pooled)
    _check_channels("transformer", parts.label, transformer, vae)
    if not parts.source.names("text_encoder_3") and not parts.source.embedded:
        warnings.warn(
            f"{parts.source.label} has no T5 (text_encoder_3); zeros stand in its place", stacklevel=3
        )
    return SD3Model(
        model_id=model_id(parts.settings.name),
        tokenizers=(parts.modules["tokenizer"], parts.modules["tokenizer_2"]),
        text_encoders=(text, text_2),
        t5=None if t5 is None else (parts.modules["tokenizer_3"], t5),
        t5_length=parts.settings.t5_length,
        vae=vae,
        transformer=transformer,
        process=parts.process,
    )


def _check_widths(denoiser: str, label: str, what: str, read: int, given: int) -> None:
    if read != given:
        raise UserError(
            f"the {denoiser} of {label} reads {read}-wide {what}, but the text encoder gives {given}"
        )


def _check_channels(name: str, label: str, denoiser: Any, vae: Any) -> None:
    channels, latent = denoiser.config.in_channels, vae.config.latent_channels
    if channels != latent:
        raise UserError(
            f"the {name} of {label} reads {channels} channels, but the autoencoder has {latent} (an "
            "inpainting model?)"
        )
    if vae.config.latents_mean is not None or vae.config.latents_std is not None:
        raise UserError(f"the autoencoder beside {label} scales its channels one by one; that is unsupported")


DIFFUSERS_CLASSES = (AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel)

_UNET_FAMILY = Family(
    "Stable Diffusion 1.x and 2.x",
    "unet",
    {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
    },
    NoiseProcess.from_scheduler_config,
    _unet_model,
)

FAMILIES = {
    "StableDiffusionPipeline": _UNET_FAMILY,
    "StableDiffusionImg2ImgPipeline": _UNET_FAMILY,
    SDXL: Family(
        "Stable Diffusion XL",
        "unet",
        {
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
            "tokenizer": CLIPTokenizer,
            "tokenizer_2": CLIPTokenizer,
        },
        NoiseProcess.from_scheduler_config,
        _sdxl_model,
    ),
    "StableDiffusion3Pipeline": Family(
        "Stable Diffusion 3 and 3.5",
        "transformer",
        {
            "transformer": SD3Transformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
            "text_encoder_3": T5EncoderModel,
            "tokenizer": CLIPTokenizer,
            "tokenizer_2": CLIPTokenizer,
            "tokenizer_3": T5TokenizerFast,
        },
        FlowProcess.from_scheduler_config,
        _sd3_model,
    ),
}
"""`_class_name` of a pipeline -> its family."""
