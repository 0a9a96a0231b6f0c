"""The trained artefact: a folder with `adapter.safetensors` (only what was trained) and `adapter.json`; see
docs/adapter-format.md.

    save_adapter -> folder -> load_adapter -> attach(model, ["folder", "other@0.7"])

Officially released files are imported into the same format. Importing this costs no torch.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from safetensors import SafetensorError

import align_cli
from align_cli import config as configs
from align_cli import registry
from align_cli.errors import UserError
from align_cli.files import clear_stale, file_errors

if TYPE_CHECKING:
    from torch import Tensor

    from align_cli.methods.base import Method
    from align_cli.models.base import BaseModel

FORMAT_VERSION = 1
"""Version of the folder's layout that this code writes; it reads this one and older ones."""
TENSORS, INFO = "adapter.safetensors", "adapter.json"
PACKAGES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """The content of adapter.json.

    model_id, family: the base model that it was trained on. config, origin: the resolved configuration of the
    run and the layer each value came from. shapes: tensor name -> shape. sha256: of the tensor file.
    seconds: of training, those of the stages that it stands on included; 0 where that is not known.
    """

    format_version: int = FORMAT_VERSION
    method: str
    stage: str = ""
    model_id: str
    family: str
    step: int = 0
    seed: int = 0
    seconds: float = 0.0
    source: str = ""
    data_fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    sha256: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: what adapter.json says, and the tensors on the CPU."""

    path: Path
    info: AdapterInfo
    state: dict[str, Tensor]


# ---------------------------------------------------------------- write


def save_adapter(
    folder: Path,
    method: Method,
    config: Mapping[str, Any],
    origin: Mapping[str, str],
    *,
    step: int = 0,
    seed: int | None = None,
    seconds: float = 0.0,
    stage: str = "",
    data_fingerprint: str = "",
    overwrite: bool = True,
) -> AdapterInfo:
    """Write what `method` has trained.

    Args:
        folder: appears complete or not at all. overwrite: replace what is there.
        config, origin: `Resolved.to_dict()` and `.origin` of the run. seed: None takes train.seed. seconds:
        see AdapterInfo.
    Raises:
        UserError: the folder exists, or cannot be written.
    """
    if seed is None:
        seed = int(config.get("train", {}).get("seed", 0))
    info = AdapterInfo(
        method=method.name,
        stage=stage,
        model_id=method.model.model_id,
        family=method.model.family,
        step=step,
        seed=seed,
        seconds=round(seconds, 2),
        data_fingerprint=data_fingerprint,
        config=dict(config),
        origin=dict(origin),
    )
    return write_adapter(folder, info, method.state(), overwrite=overwrite)


def write_adapter(
    folder: Path, info: AdapterInfo, state: Mapping[str, Tensor], *, overwrite: bool = False
) -> AdapterInfo:
    """Write tensors and facts; versions, shapes and sha256 are filled in. Returns what adapter.json holds."""
    from safetensors.torch import save

    folder = Path(folder)
    if not overwrite:
        refuse_existing(folder)
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    content = save(tensors)
    found = {name: _version(name) for name in PACKAGES}
    info = AdapterInfo(
        **{
            **asdict(info),
            "versions": {"t2ialign": align_cli.__version__, **found},
            "shapes": {name: list(t.shape) for name, t in tensors.items()},
            "sha256": sha256(content).hexdigest(),
        }
    )
    text = json.dumps(asdict(info), indent=2) + "\n"
    fresh = folder.parent / f".{folder.name}.new-{os.getpid()}"
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    try:
        with file_errors(
            f"cannot write the adapter to {folder}",
            "make room, then give the command again (train: with --resume)",
        ):
            folder.parent.mkdir(parents=True, exist_ok=True)
            clear_stale(folder)
            fresh.mkdir()
            _write(fresh / TENSORS, content)
            _write(fresh / INFO, text.encode())
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return info


def refuse_existing(folder: Path) -> None:
    """UserError if there is something where an adapter is to be written."""
    if Path(folder).exists():
        raise UserError(f"{folder} exists already; name another folder with --out")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# ---------------------------------------------------------------- read


def load_adapter(path: Path | str) -> Adapter:
    """Read an adapter folder; nothing but tensors is unpickled.

    Raises:
        UserError: as `read_adapter`; tensors that cannot be read.
    """
    folder, info, content = read_adapter(path)
    from safetensors.torch import load

    try:
        return Adapter(folder, info, load(content))
    except SafetensorError as error:
        raise UserError(f"adapter {path} is damaged: {TENSORS}: {error}") from error


def load_adapter_of(path: str, method: str, family: str, where: str) -> Adapter:
    """`load_adapter`, of one method and family only. where: the setting that names it, for the UserError."""
    adapter = load_adapter(path)
    info = adapter.info
    if info.method != method or info.family != family:
        raise UserError(
            f"{where} {path}: an adapter of {info.method} for the family {info.family}; training starts from "
            f"one of {method} for {family}"
        )
    return adapter


def read_adapter(path: Path | str) -> tuple[Path, AdapterInfo, bytes]:
    """Folder, facts and tensor file of an adapter, without torch.

    path: the folder; or, where there is none of that name, the name of a published adapter (`index.locate`).
    Raises:
        UserError: no such folder; no adapter; a newer format; a truncated or altered tensor file.
    """
    folder = Path(path).expanduser()
    near = ""
    if not folder.exists():
        from align_cli import index  # what fetches over the network costs time to import

        if located := index.locate(str(path)):
            folder, path = located, f"{path} ({located})"
        else:
            near = index.names_near(str(path))
    if not folder.is_dir():
        what = "is a file; an adapter is a folder" if folder.exists() else "does not exist"
        raise UserError(f"adapter {path} {what} ({INFO} and {TENSORS}){near}")
    if not (folder / INFO).exists() and (folder / "adapter" / INFO).exists():
        folder = folder / "adapter"  # the folder of a training run
    info = _read_info(folder)
    try:
        content = (folder / TENSORS).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"adapter {path} is incomplete: no {TENSORS}") from error
    except OSError as error:
        raise UserError(f"adapter {path}: cannot read {TENSORS}: {error.strerror}") from error
    if sha256(content).hexdigest() != info.sha256:
        raise UserError(
            f"adapter {path} is damaged: {TENSORS} ({len(content)} bytes) is truncated or altered, "
            "its sha256 is not the "
            f"one in {INFO}"
        )
    return folder, info, content


def _read_info(folder: Path) -> AdapterInfo:
    try:
        raw = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no adapter folder: it has no {INFO}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"adapter {folder} is damaged: {INFO}: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("format_version"), int):
        raise UserError(f"{folder} is no adapter folder: {INFO} has no format_version")
    if raw["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"adapter {folder} has format {raw['format_version']}; this t2ialign "
            f"{align_cli.__version__} reads up to "
            f"{FORMAT_VERSION}: upgrade t2ialign"
        )
    known = {f.name: f for f in fields(AdapterInfo)}
    for name in ("method", "model_id", "family", "sha256"):
        if name not in raw:
            raise UserError(f"adapter {folder} is damaged: {INFO} lacks {name}")
        if not (isinstance(raw[name], str) and raw[name]):
            raise UserError(
                f"adapter {folder} is damaged: {name} of {INFO} must be a text that is not empty, "
                f"got {raw[name]!r}"
            )
    for name in ("config", "origin", "versions", "shapes"):
        if not isinstance(raw.get(name, {}), dict):
            raise UserError(f"adapter {folder} is damaged: {name} of {INFO} is not an object")
    return AdapterInfo(**{name: value for name, value in raw.items() if name in known})


def parse_spec(spec: str) -> tuple[str, float]:
    """ "PATH" or "PATH@0.7" -> (path, scale). A folder whose own name holds the @ is taken as it is.

    Raises:
        UserError: a scale that is not a finite number >= 0.
    """
    path, at, text = spec.rpartition("@")
    if not at or not path or Path(spec).expanduser().exists():
        return spec, 1.0
    try:
        scale = float(text)
    except ValueError as error:
        from align_cli import index  # what fetches over the network costs time to import

        if "/" in text or not (Path(path).expanduser().exists() or index.knows(path)):
            return spec, 1.0  # an @ inside a path that does not exist: loading names it
        raise UserError(f"adapter {spec}: the scale after @ must be a number, got {text!r}") from error
    if not (math.isfinite(scale) and scale >= 0):
        raise UserError(f"adapter {spec}: the scale after @ must be a finite number >= 0, got {text}")
    return path, scale


# ---------------------------------------------------------------- use


def restore(adapter: Adapter, model: BaseModel) -> Method:
    """The trained method of an adapter, on `model`.

    Raises:
        UserError: unknown method; another family; tensors that do not fit the method or the model.
    """
    info = adapter.info
    cls: type[Method] = registry.load(registry.METHODS, info.method)
    if info.family != model.family:
        raise UserError(
            f"adapter {adapter.path} was trained on {info.model_id} (family {info.family}) and does not fit "
            f"{model.model_id} (family {model.family})"
        )
    if info.model_id != model.model_id:
        warnings.warn(
            f"adapter {adapter.path} was trained on {info.model_id} and is used on {model.model_id}, "
            f"a model of the same family",
            stacklevel=2,
        )
    _note_other_reading(adapter, model)
    _note_other_denoiser(adapter, model)
    where = f"adapter {adapter.path}: config"
    settings = configs.Resolved.from_dict({**info.config, "method": info.method}, where=where).method_config
    method = cls(model, settings)
    try:
        method.load_state(adapter.state)
    except ValueError as error:
        raise UserError(f"adapter {adapter.path} does not fit {model.model_id}: {error}") from error
    return method


def _note_other_denoiser(adapter: Adapter, model: BaseModel) -> None:
    """A warning if the adapter was trained on a denoiser from elsewhere, and this is none or another one, or
    the other way round.
    """
    saved = str(adapter.info.config.get("model", {}).get("unet", ""))
    if adapter.info.model_id != model.model_id or saved == model.denoiser_id:
        return
    theirs, ours = (
        f"the denoiser {name}" if name else "the model's own" for name in (saved, model.denoiser_id)
    )
    advice = f"; give --unet {saved} to draw as it was trained" if saved else ""
    warnings.warn(
        f"adapter {adapter.path} was trained on {theirs} and is used on {ours}{advice}", stacklevel=3
    )


def _note_other_reading(adapter: Adapter, model: BaseModel) -> None:
    """A warning if the adapter was trained on prompts that were read in another way than they are now."""
    saved = adapter.info.config.get("model", {}).get("text", "plain")
    now = "plain" if model.reader is None else "segments"
    if saved != now:
        warnings.warn(
            f"adapter {adapter.path} was trained with model.text {saved} and is used with {now}; give --text "
            f"{saved} to draw as it was trained",
            stacklevel=3,
        )


@contextmanager
def attach(model: BaseModel, specs: Sequence[str]) -> Iterator[None]:
    """All adapters at work on `model` inside the `with` block: "PATH" or "PATH@SCALE" each, the first is
    innermost.

    Raises:
        UserError: one of them does not load or does not fit; then none is attached.
    """
    found = [(restore(load_adapter(path), model), scale) for path, scale in map(parse_spec, specs)]
    with ExitStack() as stack:
        for method, scale in found:
            stack.enter_context(method.attach(model, scale))
        yield


# ---------------------------------------------------------------- import


def import_official(method: str, path: Path | str, model: str, out: Path, *, source: str = "") -> AdapterInfo:
    """Turn officially released files into an adapter folder.

    Args:
        path: the released file, or the folder that holds it. model: alias of the base model that it was made
        for.
        out: adapter folder to write; must not exist. source: where the files are from; "" for their names.
    Raises:
        UserError: a method without importer; no such file; a file of another kind or for another model.
    """
    registry.path_of(registry.METHODS, method)
    if method not in IMPORTERS:
        raise UserError(
            f"there is no importer for released files of {method} (there is: {', '.join(IMPORTERS)})"
        )
    registry.model_source(model)
    refuse_existing(out)
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{path} does not exist; give the released file or the folder that holds it")
    info, state = registry.load(IMPORTERS, method)(place, model)
    return write_adapter(out, replace(info, source=source or info.source), state)


IMPORTERS = registry.Table(
    "importer",
    {
        "comat": "align_cli.methods.comat.release:read_release",
        "dpt": "align_cli.methods.dpt.release:read_release",
        "longalign": "align_cli.methods.longalign.release:read_release",
        "softrepa": "align_cli.methods.softrepa.release:read_release",
        "textcraftor": "align_cli.methods.textcraftor.release:read_release",
    },
)
"""Method -> function (path, model name) -> (AdapterInfo, state)."""


OFFICIAL = "official command; not recorded in the released file"
"""Origin of settings that the official commands tell."""
NOT_RECORDED = "default; how the released file was trained is not recorded in it"
"""Origin of settings that an official file says nothing about."""


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file. UserError if it is damaged."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


UNREADABLE = (
    OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError,
    pickle.UnpicklingError,
)  # fmt: skip
"""What unpickling raises for a file that is something else."""


def load_pickle(path: Path, allowed: Sequence[type]) -> Any:
    """A `.pth` file, unpickled with weights_only=True; of classes, only `allowed` may occur. Tensors are read
    from the disk when they are used. UserError if it is damaged.
    """
    import torch

    with torch.serialization.safe_globals(list(allowed)):
        try:
            # files of old versions of torch are no archives and cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist") from error
        except UNREADABLE as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{path} is no PyTorch file that can be read safely: {reason}") from error
