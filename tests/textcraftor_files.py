"""Files of TextCraftor for tests: official ones of a tiny model, adapters with random trained values."""

from __future__ import annotations

from pathlib import Path

import torch

from align_cli import config
from align_cli.adapters import save_adapter
from align_cli.methods.textcraftor.method import TextCraftor


def changed(module: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """The parameters of a module, each moved by about a tenth."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: (p + 0.1 * torch.randn(p.shape, generator=g) * p.norm() / p.numel() ** 0.5).detach()
        for name, p in module.named_parameters()
    }


def official(part: str, state: dict[str, torch.Tensor], prefix: str | None = None) -> dict[str, torch.Tensor]:
    """Keys as the official training writes them; prefix: another one in place of `module.text_model.`."""
    if prefix is None:
        prefix = "module.text_model." if part == "text_encoder" else "module."
    return {prefix + key: value for key, value in state.items()}


def tuned(model, seed: int = 0, **options: object) -> tuple[TextCraftor, config.Resolved]:
    """The method with random trained values, loud enough to be seen, and its configuration."""
    flags = {"model.name": model.model_id, **{f"textcraftor.{key}": v for key, v in options.items()}}
    resolved = config.resolve("textcraftor", preset=config.NO_PRESET, flags=flags)
    method = TextCraftor(model, resolved.method_config, seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tuning in method.tunings.values():
            for p in tuning.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=g) * p.norm().clamp(min=0.5) / p.numel() ** 0.5)
    return method, resolved


def save_tuned(folder: Path, model, seed: int = 0, **options: object) -> TextCraftor:
    """An adapter folder of `tuned`; returns the method."""
    method, resolved = tuned(model, seed, **options)
    save_adapter(
        folder, method, resolved.to_dict(), resolved.origin, stage=resolved.method_config.stage, step=3
    )
    return method
