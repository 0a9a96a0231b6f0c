"""Scorers that are transformers models with their own processor, read by transformers itself."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor

from align_cli.errors import UserError, first_line
from align_cli.hub import reachable
from align_cli.rewards.base import Request
from align_cli.rewards.places import option, place

LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError)
"""What transformers raises for absent, damaged or unsupported models, and for missing packages."""


def pretrained(request: Request, source: str, cls: Any, what: str) -> tuple[Any, Any]:
    """The frozen model and its processor from `source`, a hub id or a folder of transformers.

    Args:
        cls: an Auto class of transformers. what: that the source should be, in words.
    Raises:
        UserError: not there; of another kind; its processor needs a package that is not installed.
    """
    at = place(request.name, source, source)
    if at.folder is None and at.find("config.json") is None:
        raise UserError(f"{request.name}: no configuration: {at.lacking('config.json')}")
    where = str(at.folder or at.repo)
    options = {"local_files_only": at.folder is not None or not reachable()}
    try:
        processor = AutoProcessor.from_pretrained(where, **options)
        model = cls.from_pretrained(where, dtype=request.dtype, **options)
    except LOAD_ERRORS as error:
        raise UserError(
            f"{request.name}: {source} cannot be loaded as {what}: "
            f"{first_line(error)}; name a hub id or a local folder with {option(request.name)}"
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UserError(f"{request.name}: {source} has no processor of pictures and text")
    return model.to(request.device).eval().requires_grad_(False), processor
