"""From a model's name to a frozen model: hub id, local diffusers folder, or a model that ships in the
package.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from align_cli import registry
from align_cli.diffusion.process import NoiseProcess
from align_cli.errors import UserError
from align_cli.models.base import BaseModel
from align_cli.models.unet import UNetModel
from align_cli.settings import ModelSettings

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
"""`_class_name` of the pipelines whose parts are loaded; safety checkers and feature extractors never are."""

BASENAMES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Part -> base name of its weight files."""

TOKENIZER_FILES = (
    "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.json",
)  # fmt: skip
"""Files of a CLIP tokenizer; not every pipeline has each."""

HUB_TIMEOUT = 4.0
"""Seconds until the hub counts as unreachable."""

LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
"""What the libraries raise for damaged, absent or misfitting files."""


@dataclass(frozen=True)
class _Source:
    """Where a pipeline's files are. files: paths below `folder`, present or (hub) still to be fetched."""

    label: str
    folder: Path
    files: tuple[str, ...]


def load_model(settings: ModelSettings) -> BaseModel:
    """The frozen base model that `settings` names, in its dtype and on its device.

    Raises:
        UserError: unknown name; no network and not cached; no diffusers folder; a pipeline of another family;
        missing or damaged weights; a device that is not there.
    """
    device = pick_device(settings.device)
    dtype = getattr(torch, settings.dtype)
    source = locate(settings.name, half=settings.dtype != "float32")
    index = _read_json(source.folder / "model_index.json", source.label)
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(
            f"{source.label} holds a {kind}; supported are Stable Diffusion 1.x and 2.x ({PIPELINES[0]})"
        )
    scheduler = _read_json(source.folder / "scheduler" / "scheduler_config.json", source.label)
    try:
        process = NoiseProcess.from_scheduler_config(scheduler)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source.label}/scheduler: {error}") from error
    with _quiet():
        unet = (
            _load_part(UNet2DConditionModel, source, "unet", dtype)
            if not settings.unet
            else _other_unet(settings.unet, dtype)
        )
        vae = _load_part(AutoencoderKL, source, "vae", dtype)
        text = _load_part(CLIPTextModel, source, "text_encoder", dtype)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(
                source.folder, subfolder="tokenizer", local_files_only=True
            )
        except LOAD_ERRORS as error:
            raise UserError(f"cannot load the tokenizer of {source.label}: {_first_line(error)}") from error
    _check_fit(unet, vae, text, settings.unet or source.label)
    if device.type == "cpu":
        # the layout of oneDNN's convolutions: 1.3x faster
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    return UNetModel(
        model_id=_model_id(settings.name),
        tokenizer=tokenizer,
        text_encoder=text.to(device),
        vae=vae.to(device),
        unet=unet.to(device),
        process=process,
    )


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps -> a device that is there. UserError if it is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; one of auto, cpu, cuda, cuda:N, mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"unsupported device {name!r}; one of auto, cpu, cuda, cuda:N, mps")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            built = "" if torch.version.cuda else "; this torch was built without CUDA"
            raise UserError(
                f"device {name} is not there: torch sees {found} CUDA devices{built}; use --device "
                "cpu or auto"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not there; use --device cpu or auto")
    return device


def locate(name: str, *, half: bool = False) -> _Source:
    """The files of the pipeline called `name`, fetched from the hub if need be. half: the fp16 files are
    enough.
    """
    where = registry.model_source(name)
    if where.startswith("embedded:"):
        folder = registry.WEIGHTS / where.removeprefix("embedded:")
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"the embedded model {folder.name} is not in this installation ({folder} is missing); "
                "reinstall t2ialign"
            )
        return _local(name, folder)
    folder = Path(where).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"{where} is no diffusers pipeline folder: it has no model_index.json (and unet/, "
                "vae/, ... beside it)"
            )
        return _local(str(where), folder)
    return _from_hub(name, where, half)


def _local(label: str, folder: Path) -> _Source:
    files = tuple(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return _Source(label, folder, files)


def _from_hub(name: str, repo: str, half: bool) -> _Source:
    """Fetch what is needed of a hub pipeline: one weight file per part, tokenizer and configurations.

    What the local cache holds is taken from there; without network only that is seen.
    """
    label = repo if name == repo else f"{name} ({repo})"
    reachable = hub_reachable()  # asked once: huggingface_hub would retry every file for half a minute

    def fetch(file: str, revision: str | None = None) -> Path | None:
        return _fetch(label, repo, file, revision, reachable)

    index = fetch("model_index.json")
    if index is None:
        raise UserError(
            f"model {label} is not in the local cache and the hub cannot be reached; pass a local "
            "diffusers folder with "
            f"--model /path/to/folder, or the built-in --model tiny-sd15"
        )
    folder = index.parent
    revision = folder.name  # the commit, so that all files are of one version
    wanted = ["scheduler/scheduler_config.json", *(f"tokenizer/{f}" for f in TOKENIZER_FILES)]
    wanted += [f"{part}/config.json" for part in BASENAMES]
    for part in BASENAMES:
        for choice in _weight_choices(part, half):
            if fetch(choice, revision):
                break
    for file in wanted:
        fetch(file, revision)
    return _local(label, folder)


def hub_reachable() -> bool:
    """Whether the hub answers, within seconds. False under HF_HUB_OFFLINE."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(
            urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT
        ):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False


def _fetch(label: str, repo: str, file: str, revision: str | None, reachable: bool) -> Path | None:
    """One file of a hub repository in the local cache; None if the hub lacks it, or cannot be reached."""
    try:
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=not reachable))
    except GatedRepoError as error:
        raise UserError(
            f"the hub model {label} asks for its licence to be accepted: do so on "
            f"huggingface.co/{repo}, then "
            f"`hf auth login`; or pass a local folder with --model /path/to/folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {label} (or it is private); check the id, or pass a local folder"
        ) from error
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no hub id: {_first_line(error)}") from error
    except EntryNotFoundError as error:
        if file == "model_index.json" and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(f"the hub model {label} is no diffusers pipeline: it has no {file}") from error
        return None
    except OSError as error:
        raise UserError(f"cannot fetch {file} of {label} from the hub: {_first_line(error)}") from error


def _weight_choices(part: str, half: bool) -> list[str]:
    """Names of a part's weights, the best first: safetensors before pickle, the wanted precision before the
    other.
    """
    stem = f"{part}/{BASENAMES[part]}"
    pickle = f"{part}/{'pytorch_model' if part == 'text_encoder' else BASENAMES[part]}"
    order = (".fp16", "") if half else ("", ".fp16")
    return [f"{stem}{v}.safetensors" for v in order] + [f"{pickle}{v}.bin" for v in order]


def _weight_file(files: tuple[str, ...], part: str, half: bool) -> str | None:
    """The best weight file of a part among `files`."""
    return next((choice for choice in _weight_choices(part, half) if choice in files), None)


def _load_part(cls: Any, source: _Source, part: str, dtype: torch.dtype) -> nn.Module:
    """One module of a pipeline folder, complete: no missing and no misfitting weights."""
    weight = _weight_file(source.files, part, half=dtype != torch.float32)
    if weight is None or f"{part}/config.json" not in source.files:
        lacking = "config.json" if weight else f"{BASENAMES[part]}.safetensors (or .bin)"
        raise UserError(f"{source.label} is incomplete: no {part}/{lacking} in {source.folder}")
    return _load_weights(
        cls, source.folder / part, weight.rpartition("/")[2], dtype, f"{part} of {source.label}"
    )


def _load_weights(cls: Any, folder: Path, weight: str, dtype: torch.dtype, what: str) -> nn.Module:
    variant = "fp16" if ".fp16." in weight else None
    dtype_key = "dtype" if cls is CLIPTextModel else "torch_dtype"
    options = {dtype_key: dtype, "variant": variant, "use_safetensors": weight.endswith(".safetensors")}
    try:
        module, info = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load the {what} from {folder / weight}: {_first_line(error)}") from error
    lacking = sorted([*info["missing_keys"], *(str(k) for k in info.get("mismatched_keys", ()))])
    if lacking:
        raise UserError(f"the {what} lacks {len(lacking)} weights in {folder / weight}, first {lacking[0]}")
    result: nn.Module = module
    return result


def _other_unet(name: str, dtype: torch.dtype) -> nn.Module:
    """A separately tuned denoiser: a UNet folder, a pipeline folder, or the hub id of a pipeline."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        files = tuple(f"unet/{p.name}" for p in folder.iterdir())
        weight = _weight_file(files, "unet", half=dtype != torch.float32)
        if weight is None:
            raise UserError(
                f"model.unet {name}: no {BASENAMES['unet']}.safetensors (or .bin) beside config.json"
            )
        return _load_weights(UNet2DConditionModel, folder, weight.rpartition("/")[2], dtype, f"unet {name}")
    return _load_part(UNet2DConditionModel, locate(name, half=dtype != torch.float32), "unet", dtype)


def _check_fit(unet: Any, vae: Any, text: Any, label: str) -> None:
    width, given = unet.config.cross_attention_dim, text.config.hidden_size
    if width != given:
        raise UserError(f"the UNet of {label} reads {width}-wide text, but the text encoder gives {given}")
    channels, latent = unet.config.in_channels, vae.config.latent_channels
    if channels != latent:
        raise UserError(
            f"the UNet of {label} reads {channels} channels, but the autoencoder has {latent} (an "
            "inpainting model?)"
        )


def _model_id(name: str) -> str:
    """What the user named; folders as absolute paths, so that adapters find them from anywhere."""
    if name in registry.MODELS:
        return name
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def _read_json(path: Path, label: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{label} is no diffusers pipeline: no {path.name} in {path.parent}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{label}: {path} cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{label}: {path} is not a JSON object")
    return content


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers inside."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
