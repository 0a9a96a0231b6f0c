"""Adapters at work in a pipeline of diffusers, and off again.

Tokens and LoRA are in the denoiser, by the methods' own `attach`. Texts are read in `encode_prompt`, which is
wrapped; embeddings that begin at some step are put in by a hook on the denoiser.

Letters: B prompts, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from align_cli.adapters import Adapter, restore
from align_cli.errors import UserError
from align_cli.models.base import BaseModel, TextChange, TextCond
from align_cli.models.conditioning import mix
from align_cli.models.sd3 import SD3Model
from align_cli.models.sources import TEXT_ENCODERS
from align_cli.settings import SampleSettings

HELD = "_t2ialign_adapters"
"""Attribute of a pipeline: its `Installed`."""
STOCK_LENGTH = 256
"""max_sequence_length of SD3's pipeline if none is given."""


@dataclass(frozen=True)
class Told:
    """What one call says of its prompts. own: as the base model reads them, the prompts' rows and those of
    the unconditional branch, which is None without guidance. changed: the same as each text change has it.
    """

    own: tuple[TextCond, TextCond | None]
    changed: list[tuple[TextChange, tuple[TextCond, TextCond | None]]]

    def at(self, active: Sequence[TextChange]) -> tuple[TextCond, TextCond | None]:
        """With these changes mixed in, in the dtype of the base model's."""
        terms = [(change.scale, both) for change, both in self.changed if change in active]
        cond = _like(self.own[0], mix(self.own[0], [(scale, both[0]) for scale, both in terms]))
        if self.own[1] is None:
            return cond, None
        others = [(scale, both[1]) for scale, both in terms if both[1] is not None]
        return cond, _like(self.own[1], mix(self.own[1], others))


class Installed:
    """The adapters of one pipeline."""

    def __init__(
        self,
        pipe: Any,
        model: BaseModel,
        adapters: Sequence[tuple[Adapter, float]],
        settings: SampleSettings,
    ) -> None:
        """model: of the very modules of the pipeline. adapters: each with its scale."""
        self.pipe, self.model, self.adapters, self.settings = pipe, model, list(adapters), settings
        self.denoiser = model.denoiser
        self.modules = [self.denoiser, *model.encoders]
        self.names = TEXT_ENCODERS[: len(model.encoders)]
        self.stock = pipe.encode_prompt
        self.parameters = signature(self.stock)
        self.stack, self.at_work = ExitStack(), False
        self.told: Told | None = None
        self.where = self._where()

    # ------------------------------------------------------------ on and off

    def install(self) -> None:
        """Put everything to work. UserError for an adapter that does not fit."""
        self._enter()
        # before the hooks of methods, which may change the text that it knows the call by
        self.hook = self.denoiser.register_forward_pre_hook(self._tell, prepend=True, with_kwargs=True)
        self.pipe.encode_prompt = self.encode
        setattr(self.pipe, HELD, self)

    def remove(self) -> None:
        """Leave the pipeline as if it had never been."""
        self._leave()
        self.hook.remove()
        del self.pipe.encode_prompt
        delattr(self.pipe, HELD)

    def call_options(self) -> dict[str, Any]:
        """See `align_cli.pipelines.call_options`."""
        side = self.settings.image_size or self.model.image_size
        found = {
            "num_inference_steps": self.settings.steps,
            "guidance_scale": self.settings.guidance,
            "height": side,
            "width": side,
        }
        return found | ({"eta": self.settings.eta} if self.settings.sampler == "ddim" else {})

    def _enter(self) -> None:
        device, dtype = self.where
        self.model.device = self.model.encoder_device = device
        self.model.dtype = dtype
        with ExitStack() as stack:
            methods = [(restore(adapter, self.model), scale) for adapter, scale in self.adapters]
            for method, scale in methods:
                stack.enter_context(method.attach(self.model, scale))
            self.stack = stack.pop_all()
        self.at_work = True

    def _leave(self) -> None:
        """Adapters off. The modules' own weights come back where the moved ones are now."""
        places = [(p, p.device, p.dtype) for module in self.modules for p in module.parameters()]
        self.at_work = False
        self.stack.close()
        for p, device, dtype in places:
            p.data = p.data.to(device, dtype)

    def _where(self) -> tuple[torch.device, torch.dtype]:
        device = self.pipe._execution_device
        weight = next(self.denoiser.parameters())
        if weight.device.type == "meta":
            raise UserError(
                "adapters move weights, which enable_sequential_cpu_offload keeps away; take "
                "pipe.enable_model_cpu_offload()"
            )
        return torch.device(device), weight.dtype

    def _follow(self) -> None:
        """Adapters to where the pipeline is now, and to its dtype."""
        now = self._where()
        if now == self.where and self.at_work:  # if not, it failed before, and must not draw without them
            return
        if any(getattr(module, "peft_config", None) for module in self.modules):
            raise UserError(
                "the pipeline has moved to another device or dtype since LoRA was loaded on top of the "
                "adapters; move it before load_lora_weights, or call unload_lora_weights"
            )
        self._leave()
        self.where = now
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, when it was loaded
            self._enter()

    # ------------------------------------------------------------ text

    def encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """In place of the pipeline's `encode_prompt`: with all text changes at work, whichever step they are
        for. Embeddings that are given come back as they are.
        """
        self._follow()
        call = self.parameters.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        own, changed = self._read(given), []
        for change in self.model.text_changes:
            if change.scale:
                with change.at_work(), self._encoders_of_model():
                    changed.append((change, self._read(given)))
        self.told = Told(own, changed)
        cond, uncond = self.told.at([change for change, _ in changed])
        tokens = None if uncond is None else uncond.tokens
        if self.model.family in ("sdxl", "sd3"):
            return cond.tokens, tokens, cond.pooled, None if uncond is None else uncond.pooled
        return cond.tokens, tokens

    def _read(self, given: dict[str, Any]) -> tuple[TextCond, TextCond | None]:
        """The prompts as the model reads them now."""
        if self.model.reader is not None:
            return self._read_segments(given)
        length = {}
        if isinstance(self.model, SD3Model) and given["max_sequence_length"] == STOCK_LENGTH:
            length = {"max_sequence_length": self.model.t5_length}
        tokens, empty, *pooled = self.stock(**{**given, **length})
        more = pooled or (None, None)
        return TextCond(tokens, more[0]), None if empty is None else TextCond(empty, more[1])

    def _read_segments(self, given: dict[str, Any]) -> tuple[TextCond, TextCond | None]:
        """By sentences; what is given as embeddings is taken as it is."""
        for name in ("prompt_2", "negative_prompt_2", "clip_skip"):
            if given.get(name) is not None:
                raise UserError(
                    f"{name} does not apply: this pipeline reads prompts sentence by sentence, all text "
                    "encoders the same; leave it out, or take the adapter off with remove_adapters"
                )
        count = int(given["num_images_per_prompt"])
        cond = _given(given, "")
        if cond is None:
            cond = self.model.encode_text(_listed(given["prompt"]))
        uncond = None
        if given["do_classifier_free_guidance"]:
            uncond = _given(given, "negative_")
            if uncond is None:
                uncond = self._negative(given["negative_prompt"], len(cond))
        return _repeated(cond, count), None if uncond is None else _repeated(uncond, count)

    def _negative(self, negative: str | list[str] | None, batch: int) -> TextCond:
        if negative is None:
            return self.model.uncond(batch)
        texts = [negative] * batch if isinstance(negative, str) else list(negative)
        if len(texts) != batch:
            raise ValueError(f"{len(texts)} negative prompts for {batch} prompts")
        return self.model.encode_text(texts)

    @contextmanager
    def _encoders_of_model(self) -> Iterator[None]:
        """Inside, the pipeline reads with the text encoders that stand in for its own in the model."""
        before = {name: getattr(self.pipe, name) for name in self.names}
        try:
            for name, module in zip(self.names, self.model.encoders, strict=True):
                if module is not before[name]:
                    setattr(self.pipe, name, nn.Module.to(module, self.where[0]))
            yield
        finally:
            for name, module in before.items():
                if getattr(self.pipe, name) is not module:
                    setattr(self.pipe, name, module)

    # ------------------------------------------------------------ steps

    def _tell(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before every call of the denoiser: the text without those changes that begin later.

        Embeddings that a callback has put there are left alone.
        """
        if self.told is None or not self.told.changed:
            return None
        path = self.pipe.scheduler.timesteps
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        at = (path == t.flatten()[0].to(path.device)).nonzero()
        if not len(at):
            return None
        changes = [change for change, _ in self.told.changed]
        active = [change for change in changes if int(at[0]) >= self._first(change, len(path))]
        if len(active) == len(changes):
            return None
        full, now = self.told.at(changes), self.told.at(active)
        for there, instead in ((_rows(full), _rows(now)), (full[0], now[0])):
            if _same(kwargs["encoder_hidden_states"], there.tokens):
                return args, _with_text(kwargs, instead)
        return None

    def _first(self, change: TextChange, steps: int) -> int:
        return change.first_step(steps) if self.settings.from_step < 0 else self.settings.from_step


def installed_on(pipe: Any) -> Installed:
    """What `load_pipeline` put on a pipeline. UserError if there is nothing."""
    found = getattr(pipe, HELD, None)
    if not isinstance(found, Installed):
        raise UserError(
            f"this {type(pipe).__name__} has no adapters of t2ialign: it did not come from "
            "align_cli.load_pipeline, or they were removed"
        )
    return found


def _with_text(kwargs: dict[str, Any], text: TextCond) -> dict[str, Any]:
    """Arguments of a denoiser of any family with another text."""
    changed = {**kwargs, "encoder_hidden_states": text.tokens}
    if "pooled_projections" in kwargs:
        changed["pooled_projections"] = text.pooled
    elif text.pooled is not None:
        changed["added_cond_kwargs"] = {**kwargs["added_cond_kwargs"], "text_embeds": text.pooled}
    return changed


def _rows(both: tuple[TextCond, TextCond | None]) -> TextCond:
    """As a pipeline gives them to the denoiser: the unconditional half first."""
    return both[0] if both[1] is None else TextCond.cat([both[1], both[0]])


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.device, one.dtype))


def _like(own: TextCond, text: TextCond) -> TextCond:
    """`text` on the device and in the dtype of `own`."""
    pooled = None if text.pooled is None else text.pooled.to(cast("Tensor", own.pooled))
    return TextCond(text.tokens.to(own.tokens), pooled)


def _given(given: dict[str, Any], which: str) -> TextCond | None:
    tokens = given[f"{which}prompt_embeds"]
    return None if tokens is None else TextCond(tokens, given.get(f"{which}pooled_prompt_embeds"))


def _repeated(text: TextCond, count: int) -> TextCond:
    """Every row `count` times, one after the other."""
    pooled = None if text.pooled is None else text.pooled.repeat_interleave(count, dim=0)
    return TextCond(text.tokens.repeat_interleave(count, dim=0), pooled)


def _listed(prompt: str | Sequence[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)
