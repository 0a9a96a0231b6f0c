"""Models without weights, to count with: torch's fake tensors of the right shapes in the real modules, from
configurations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from align_cli.errors import UserError, first_line
from align_cli.models.architectures import ARCHITECTURES, ROBERTA_BASE, T5_LARGE
from align_cli.models.base import BaseModel
from align_cli.models.encoders import EncoderKind
from align_cli.models.loading import (
    FAMILIES,
    LOAD_ERRORS,
    WITHOUT_WEIGHTS,
    Parts,
    finished,
    load_tokenizer,
    outline_of,
    part_dtype,
    pipeline_kind,
    wanted_part,
)
from align_cli.models.sources import (
    TOKENIZERS,
    Source,
    find,
    find_config,
    read_json,
    with_config,
    with_tokenizer,
)
from align_cli.settings import ModelSettings

HOST = torch.device("cpu")
"""Where fake tensors say that they are, so that every operator and autocast work on any machine."""
MODE = FakeTensorMode(allow_non_fake_inputs=True)
"""Of all fake tensors: those of two modes do not mix."""


class Encoding(dict[str, Tensor]):
    """What a tokenizer gives."""

    def to(self, _device: object) -> Encoding:
        """The same: there is one device."""
        return self

    def char_to_token(self, _row: int, _char: int) -> int:
        """Some token of the text."""
        return 1


class NoTokenizer:
    """A tokenizer without vocabulary: as many tokens as a model reads at most, all of them 0."""

    pad_token_id = bos_token_id = 0
    eos_token_id = 1

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def __len__(self) -> int:
        return 0

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        max_length: int | None = None,
        return_tensors: str = "",
        **_options: Any,
    ) -> Encoding:
        length = min(max_length or self.model_max_length, self.model_max_length)
        if isinstance(texts, str):
            return Encoding(input_ids=torch.zeros(length, dtype=torch.int64))
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        return Encoding(input_ids=ids, attention_mask=torch.ones_like(ids))


def fake_tensor(x: Tensor) -> FakeTensor:
    """A fake tensor like this one, which may be on the meta device."""
    return FakeTensor(MODE, x.to("meta"), HOST)


def faked(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module on the meta device with fake parameters and buffers in place; floating point ones in `dtype`,
    frozen, in eval mode.
    """
    made: dict[Tensor, Tensor] = {}
    for part in module.modules():
        both: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for held in both:
            for name, x in held.items():
                if x is None:
                    continue
                if x not in made:
                    cast = x.detach().to(dtype) if x.is_floating_point() else x.detach()
                    fake = fake_tensor(cast)
                    made[x] = nn.Parameter(fake, requires_grad=False) if held is part._parameters else fake
                held[name] = made[x]
    return module.eval()


def empty_module(cls: Any, config: dict[str, Any], dtype: torch.dtype, what: str) -> nn.Module:
    """A module of that configuration with fake weights. UserError about `what` if it is damaged."""
    try:
        return faked(outline_of(cls, config), dtype)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot read the configuration of the {what}: {first_line(error)}") from error


def empty_model(settings: ModelSettings) -> BaseModel:
    """The base model that `settings` names, with fake weights: of models with a packaged architecture without
    any file, of others from their configurations.

    Raises:
        UserError: as `loading.load_model`, but for weights.
    """
    known = ARCHITECTURES.get(settings.name)
    if known is None:
        source = find(settings.name)
        kind = pipeline_kind(source)
        scheduler = read_json(source.folder / "scheduler" / "scheduler_config.json", source.label)
    else:
        index = {"_class_name": known.pipeline} | {part: ["", ""] for part in known.parts}
        source, kind, scheduler = Source(settings.name, Path(), index), known.pipeline, known.scheduler
    family = FAMILIES[kind]
    other = {family.denoiser: settings.unet, "vae": settings.vae}
    dtype = getattr(torch, settings.dtype)
    told = {} if known is None else known.parts
    modules: dict[str, Any] = {}
    for part, cls in family.parts.items():
        if not wanted_part(part, source, settings):
            continue
        if part in TOKENIZERS:
            modules[part] = _tokenizer(cls, source, part, told.get(part))
            continue
        config = _config(source, part, told.get(part), other.get(part, ""))
        held = dtype if other.get(part) else part_dtype(kind, part, config, dtype)
        modules[part] = empty_module(cls, config, held, f"{part} of {source.label}")
    try:
        process = family.process(scheduler)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source.label}/scheduler: {error}") from error
    return finished(family.build(Parts(modules, process, settings, source)), settings)


def _tokenizer(cls: Any, source: Source, part: str, known: dict[str, Any] | None) -> Any:
    if known is not None:
        return NoTokenizer(int(known["model_max_length"]))
    return load_tokenizer(cls, with_tokenizer(source, f"{part}/"), part)


def _config(source: Source, part: str, known: dict[str, Any] | None, other: str) -> dict[str, Any]:
    """Of a part from elsewhere (`other`) that is not on this machine: that of the pipeline's own, which it
    has to be like anyhow.
    """
    if other:
        try:
            found, prefix = find_config(other, part, advice="name a local folder")
            return read_json(found.folder / prefix / "config.json", found.label)
        except UserError:
            if known is None or Path(other).is_absolute():
                raise
    if known is not None:
        return known
    source = with_config(source, part)
    return read_json(source.folder / part / "config.json", source.label)


def empty_encoder(kind: EncoderKind, name: str, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """Tokenizer and encoder of `encoders.load_encoder`, from a configuration that is there or packaged; a
    tokenizer that is not there says as many tokens as it may. UserError if neither is.
    """
    packaged = ENCODERS.get(name)
    try:
        source, prefix = find_config(name, kind.part, advice=kind.how)
        config = read_json(source.folder / prefix / "config.json", source.label)
        words = kind.words if prefix else ""
        tokenizer = load_tokenizer(
            kind.tokenizer, with_tokenizer(source, f"{words}/" if words else ""), words
        )
    except UserError:
        if packaged is None:
            raise
        config, tokenizer = packaged, NoTokenizer(512)
    return tokenizer, empty_module(kind.encoder, config, dtype, f"{kind.title} {name}")


ENCODERS = {"google-t5/t5-large": T5_LARGE, "FacebookAI/roberta-base": ROBERTA_BASE}
"""Hub id -> packaged configuration."""


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, everything that is loaded is without weights, and modules with fake tensors can change dtype:
    torch's own way swaps what a parameter object holds, which fake tensors do not allow.
    """

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            apply(child, fn)
        with torch.no_grad():
            for name, p in self._parameters.items():
                if p is not None and (new := fn(p)) is not p:
                    self._parameters[name] = nn.Parameter(new, p.requires_grad)
            for name, x in self._buffers.items():
                self._buffers[name] = None if x is None else fn(x)
        return self

    before, flag = nn.Module._apply, WITHOUT_WEIGHTS.set(True)
    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]
        WITHOUT_WEIGHTS.reset(flag)
