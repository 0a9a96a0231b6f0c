"""Trained adapters on the model hub: the model card, and the upload. No torch at import."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from align_cli import registry
from align_cli.adapters import INFO, TENSORS, AdapterInfo, read_adapter
from align_cli.errors import UserError, first_line
from align_cli.files import write_text
from align_cli.training import run_folder

README = "README.md"
PAPERS = {
    "comat": (
        "CoMat: Aligning Text-to-Image Diffusion Model with Image-to-Text Concept Matching",
        "2404.03653",
    ),
    "dpt": ("Discriminative Probing and Tuning for Text-to-Image Generation", "2403.04321"),
    "longalign": ("Improving Long-Text Alignment for Text-to-Image Diffusion Models", "2410.11817"),
    "softrepa": ("Aligning Text to Image in Diffusion Models is Easier Than You Think", "2503.08250"),
    "textcraftor": ("TextCraftor: Your Text Encoder Can be Image Quality Controller", "2403.18978"),
}
"""Method -> title of its paper, and its number on arXiv."""
LOCAL = ("model.device", "model.encoder_device", "data.path", "data.cache", "data.num_workers")
"""Settings that say something of the machine alone."""
_PLACE = re.compile(r"(?<![^\s=:,;'\"(\[{])(?:~[^\s/]*|\.{1,2})?/(?!/)[^\s,;'\")\]}]+")
"""A path inside a text, from the root, a home or the working folder on; no address of the web."""


# ---------------------------------------------------------------- the card


def card(path: Path | str, *, licence: str = "") -> str:
    """README.md of an adapter for the hub, from what its folder and the run around it say.

    licence: identifier of the hub; "" leaves it open.
    Raises:
        UserError: as `read_adapter`; a result.json that cannot be read.
    """
    from huggingface_hub import ModelCardData

    folder, info, content = read_adapter(path)
    info, result = _public_info(info), publishable(_result(folder, info))
    hub = _hub_id(info.model_id)
    tags = ["t2ialign", info.method, "text-to-image", "diffusion"]
    rows = _rows(result)
    data = ModelCardData(
        base_model=hub or None,
        license=licence or None,
        library_name="t2ialign",
        pipeline_tag="text-to-image",
        tags=tags,
        metrics=sorted({row["metric"] for row in rows}) or None,
    )
    stage = f", stage {info.stage}" if info.stage else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {info.method}{stage} for {info.model_id}",
        f"An adapter of t2ialign that was made with {info.method}{stage} for {info.model_id}; it works "
        f"on models of the family {info.family} that have the same shapes.",
        _use(info, hub),
        _facts(info, len(content)),
        _settings(info),
        _evaluation(result, rows),
        _citation(info.method),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _result(folder: Path, info: AdapterInfo) -> dict[str, Any]:
    """result.json of the run that an adapter lies in; empty if it lies in none, without an evaluation if that
    is of another adapter.
    """
    path = folder.parent / run_folder.RESULT
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object")
    if found.get("adapter") != folder.name:
        return {}
    arms = (found.get("evaluation") or {}).get("arms", [])
    return found if any(info.sha256 in arm["hashes"] for arm in arms) else found | {"evaluation": None}


def _hub_id(model: str) -> str:
    """The base model on the hub; "" for one that is not there."""
    name = registry.MODELS.get(model, model)
    local = name.startswith(("embedded:", "/", "."))
    return "" if local or name.count("/") != 1 else name


def publishable(value: Any) -> Any:
    """The same, lists and tables to their ends, with the last word alone of every place on this machine."""
    if isinstance(value, Mapping):
        return {publishable(name): publishable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [publishable(item) for item in value]
    if not isinstance(value, str):
        return value
    kind, _, rest = value.partition(" ")
    if kind == "file" and "/" in rest:  # the origin of a setting; the name may hold blanks
        return f"{kind} {Path(rest).name}"
    if value.startswith(("/", "~", "./", "../")):
        return Path(value).name
    return _PLACE.sub(lambda found: Path(found[0]).name, value)


def _public_info(info: AdapterInfo) -> AdapterInfo:
    """What adapter.json says to others: also without the settings that say something of the machine alone."""
    facts = publishable(asdict(info))
    for key in LOCAL:
        section, _, name = key.partition(".")
        facts["config"].get(section, {}).pop(name, None)
        facts["origin"].pop(key, None)
    return AdapterInfo(**facts)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _use(info: AdapterInfo, hub: str) -> str:
    model = info.model_id if info.model_id in registry.MODELS else hub or "FOLDER_OF_THE_MODEL"
    return (
        "## Use\n\n    hf download THIS/REPOSITORY --local-dir adapter\n"
        f'    t2ialign sample --model {model} --adapter adapter --prompt "a red cube"\n\n'
        f'```python\nimport align_cli\n\npipe = align_cli.load_pipeline("{model}", ["adapter"])\n'
        'picture = pipe("a red cube", **align_cli.call_options(pipe)).images[0]\n```'
    )


def _facts(info: AdapterInfo, size: int) -> str:
    numbers = sum(_product(shape) for shape in info.shapes.values())
    data = info.config.get("data", {})
    rows = {
        "base model": info.model_id,
        "trained values": f"{numbers:,} in {len(info.shapes)} tensors, {size:,} bytes",
        "data": _shown(data["name"]) if "name" in data else "",
        "steps": str(info.step or ""),
        "seed": str(info.seed),
        "training": f"{info.seconds:,.0f} s" if info.seconds else "",
        "source": info.source,
        "versions": ", ".join(f"{name} {version}" for name, version in info.versions.items() if version),
        "sha256": f"`{info.sha256}`",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "## Facts\n\n| | |\n|---|---|\n" + "\n".join(lines)


def _product(shape: list[int]) -> int:
    found = 1
    for n in shape:
        found *= n
    return found


def _settings(info: AdapterInfo) -> str:
    """Settings that someone chose: neither class default, nor preset, nor the model's own."""
    lines = []
    for key, origin in info.origin.items():
        section, _, name = key.partition(".")
        chosen = not origin.startswith(("default", "preset", "the model", "official"))
        if chosen and name in info.config.get(section, {}):
            lines.append(f"| `{key}` | {_shown(info.config[section][name])} | {origin} |")
        elif key in (run_folder.DATA, run_folder.START) or section == run_folder.WEIGHTS:
            lines.append(f"| content of `{key}` | another one | {origin} |")
    presets = sorted({origin for origin in info.origin.values() if origin.startswith("preset")})
    base = f"On top of {', '.join(presets)}" if presets else "On top of the defaults"
    if not info.origin:
        return ""
    if not lines:
        return f"## Settings\n\n{base}, unchanged. All settings are in `{INFO}`."
    table = "| setting | value | from |\n|---|---|---|\n" + "\n".join(lines)
    return f"## Settings\n\n{base}; all settings are in `{INFO}`.\n\n{table}"


def _rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Comparisons over all prompts."""
    evaluation = result.get("evaluation") or {}
    return [row for row in evaluation.get("comparisons", []) if row["group"] is None]


def _evaluation(result: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "## Evaluation\n\nNone was recorded with this adapter."
    found = result["evaluation"]
    benchmark = found["benchmark"]
    lines = [
        f"| {row['metric']} | {row['base']:.3f} | {row['aligned']:.3f} | {row['difference']:+.3f} | "
        f"{row['low']:+.3f} to {row['high']:+.3f} | {row['verdict']} | "
        f"{'held out' if row['held_out'] else 'trained on'} |"
        for row in rows
    ]
    return (
        f"## Evaluation\n\n{benchmark['source']}: base and aligned model drew the same "
        f"{benchmark['prompts']} prompts from the same noise (seed {found['seed']}). The intervals are of "
        "the paired difference, 95 %.\n\n"
        "| metric | base | aligned | difference | interval | verdict | scorer |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(lines)
    )


def _citation(method: str) -> str:
    if method not in PAPERS:
        return ""
    title, number = PAPERS[method]
    place = f",\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}" if number else ""
    return f"## Citation\n\n```bibtex\n@misc{{{method},\n  title = {{{title}}}{place}\n}}\n```"


# ---------------------------------------------------------------- the upload


@dataclass(frozen=True)
class Target:
    """A repository of the hub that may be written to. name: "owner/name"."""

    name: str
    token: str


def check(repo: str) -> Target:
    """Everything that can be known before something is uploaded, or trained for it.

    Raises:
        UserError: an impossible name, no token, a token that the hub does not take, no network.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub: {first_line(error)}; write OWNER/NAME") from error
    token = get_token()
    if not token:
        raise UserError(
            f"cannot push to {repo}: there is no token of the hub; log in with 'hf auth login', or set "
            "HF_TOKEN (with write access)"
        )
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"cannot push to {repo}: HF_HUB_OFFLINE forbids it; unset it")
    with _told(f"cannot push to {repo}"):
        owner = HfApi().whoami(token=token)["name"]
    return Target(repo if "/" in repo else f"{owner}/{repo}", token)


def push(path: Path | str, target: Target, *, public: bool = False, licence: str = "") -> str:
    """Upload an adapter with its card; returns the address of the commit. The folder stays as it is; of
    adapter.json goes what `publishable` leaves of it.

    public: of a repository that does not exist yet; it is private otherwise.
    Raises:
        UserError: as `card`; the hub refuses, or the connection is cut.
    """
    from huggingface_hub import HfApi

    folder, info, _ = read_adapter(path)
    text = card(path, licence=licence)
    api = HfApi(token=target.token)
    with TemporaryDirectory() as place:
        shutil.copyfile(folder / TENSORS, Path(place) / TENSORS)
        write_text(Path(place) / INFO, json.dumps(asdict(_public_info(info)), indent=2) + "\n")
        picture = folder.parent / run_folder.PICTURE
        if _of_public_things(_result(folder, info)) and picture.is_file():
            shutil.copyfile(picture, Path(place) / picture.name)
        (Path(place) / README).write_text(text.replace("THIS/REPOSITORY", target.name), encoding="utf-8")
        with _told(f"cannot push {path} to {target.name}"):
            api.create_repo(target.name, private=not public, exist_ok=True)
            commit = api.upload_folder(
                repo_id=target.name, folder_path=place, commit_message=f"{info.method} for {info.family}"
            )
    return str(commit.commit_url)


def _of_public_things(result: Mapping[str, Any]) -> bool:
    """Whether the run's picture is of this adapter, and its title names no place on this machine."""
    found = result.get("evaluation")
    if not found:
        return False
    named = [result.get("model", ""), found["benchmark"]["source"]]
    return bool(publishable(named) == named)


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """What the hub's client raises inside becomes a `UserError`."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        why = {
            401: "the hub does not take the token; log in again with 'hf auth login'",
            403: "the hub refuses: the token must have write access, and the owner must be you or an "
            "organisation of yours",
        }.get(status, f"the hub says {status}: {first_line(error)}")
        raise UserError(f"{doing}: {why}") from error
    except _connection_errors() as error:
        raise UserError(f"{doing}: the connection failed ({first_line(error)}); try again") from error


def _connection_errors() -> tuple[type[Exception], ...]:
    """What a cut or absent connection raises: OSError, and the error of the library's own HTTP client, whose
    name differs between its versions.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(cls for cls in HfHubHTTPError.__bases__ if issubclass(cls, Exception)))
