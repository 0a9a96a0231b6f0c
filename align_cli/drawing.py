"""What a picture is drawn with: model, adapters, settings, decided from what was recorded, presets and flags.
No torch at import.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_cli import config, packaged, registry
from align_cli.adapters import INFO, AdapterInfo, parse_spec, read_adapter
from align_cli.errors import UserError
from align_cli.launched import tell
from align_cli.settings import OWN_SPACING, ModelSettings, SampleSettings

if TYPE_CHECKING:
    from align_cli.models.base import BaseModel

DEFAULTS = "the defaults"
CRITIC = "dpt"
"""The method whose adapters can correct a picture in the making."""


@dataclass(frozen=True)
class Plan:
    """A decided drawing. adapters: the specs as typed ("PATH@0.7"). infos: what their folders say.

    origin: in words, where the sampling settings come from. open_keys: those of sampler and spacing that
    nobody chose, so that the model's own holds. own_dtype: nobody chose a dtype on the command line.
    """

    model: ModelSettings
    sample: SampleSettings
    adapters: list[str]
    infos: list[AdapterInfo]
    origin: str
    open_keys: frozenset[str]
    own_dtype: bool

    def load(
        self, stacks: Sequence[Sequence[str]] | None = None, *, quiet: bool = False
    ) -> tuple[BaseModel, Plan]:
        """The model on the device of this process, with a look whether every adapter fits it, and the plan
        with nothing left open.

        stacks: of adapters that are drawn with; None for all of them in one. quiet: the user knows already.
        """
        if not quiet:
            tell(f"loading {self.model.name} ...")  # what takes the first seconds
        from align_cli.adapters import attach
        from align_cli.models.loading import load_model, pick_device
        from align_cli.sampling import check_settings, own_settings
        from align_cli.training.distributed import on_rank

        settings = on_rank(self.model)
        if self.own_dtype and pick_device(settings.device).type == "cpu":
            settings = replace(settings, dtype="float32")  # half precision on a CPU is slower, not faster
        model = load_model(settings)
        text = critics = False
        for stack in [self.adapters] if stacks is None else stacks:
            with attach(
                model, stack
            ):  # before the settings, which may come from an adapter that does not fit
                text |= bool(model.text_changes)
                critics |= bool(model.critics)
        if self.sample.from_step >= 0 and not text:
            raise UserError(
                "--from-step says when adapters on text encoders begin to work, but "
                + ("none of the adapters is one" if self.adapters else "there is no --adapter")
            )
        if self.sample.self_correct and not critics:
            raise UserError(
                "--self-correct follows the score of an adapter of dpt, and "
                + ("none of the adapters is one" if self.adapters else "there is no --adapter")
            )
        for spec, info in zip(self.adapters, self.infos, strict=True):
            if info.method == CRITIC and info.stage == "probe" and not (self.sample.self_correct or quiet):
                tell(
                    f"note: adapter {spec} holds a discriminator alone, which changes no picture without "
                    "--self-correct"
                )
        drawing = own_settings(model, self.sample, self.open_keys)
        check_settings(model, drawing)
        if drawing.sampler == "lcm" and drawing.guidance == 0:
            tell("note: --guidance 0 leaves out the prompt; the guidance 0 of LCM pipelines is --guidance 1")
        return model, replace(self, model=settings, sample=drawing)

    def describe(self) -> str:
        """One line: what is drawn with which settings, and where they come from."""
        return f"{self._settings()}, as {self.origin}"

    def title(self) -> str:
        """One line for a picture: what is drawn with which settings and adapters."""
        return self._settings() + (f"; adapter {', '.join(self.adapters)}" if self.adapters else "")

    def _settings(self) -> str:
        s = self.sample
        spacing = "" if s.sampler == "euler" else f" ({s.spacing})"
        other = "".join(f", {key} {name}" for key, name in self.model.others().items())
        text = "" if self.model.text == "plain" else f", text by {self.model.text}"
        scale = f"{s.self_correct:g} ({s.correction})"
        corrected = f", self-correction {scale}: one more pass, forward and back, in every step"
        return (
            f"{self.model.name}{other}: {s.sampler}, {s.steps} steps{spacing}, guidance {s.guidance:g}{text}"
            f"{corrected if s.self_correct else ''}"
        )


def make_plan(
    model: str | None, adapters: list[str], model_flags: Mapping[str, Any], flags: Mapping[str, Any]
) -> Plan:
    """Settings in layers: those recorded with the first adapter, or the preset of the model, or the class
    defaults; above them the flags.

    Args:
        model: alias, hub id or folder; None takes the base model of the first adapter, or the embedded one.
        adapters: "PATH" or "PATH@SCALE" each.
        model_flags, flags: fields of ModelSettings and SampleSettings; None means not given.
    Raises:
        UserError: an unknown model, an adapter that is damaged or not there, an impossible value.
    """
    infos = [read_adapter(parse_spec(spec)[0])[1] for spec in adapters]
    base, drawing, origin, layers = _recorded(model, infos[0] if infos else None, adapters)
    given = {key: value for key, value in flags.items() if value is not None}
    if given:
        origin += ", with " + ", ".join(config.flag_name(f"sample.{key}") for key in given)
    held = {key: value for key, value in model_flags.items() if value is not None}
    sampler = given.get("sampler", drawing.sampler)
    # a spacing that was chosen for one of these two samplers says nothing of the other
    anew = sampler != drawing.sampler and not OWN_SPACING.keys().isdisjoint((sampler, drawing.sampler))
    spacing = OWN_SPACING.get(sampler, SampleSettings.spacing) if anew else drawing.spacing
    base, drawing = replace(base, **held), replace(drawing, **{"spacing": spacing, **given})
    _check_files(base.name, drawing)
    return Plan(
        model=base,
        sample=drawing,
        adapters=adapters,
        infos=infos,
        origin=origin,
        open_keys=frozenset(
            key
            for key in ("sampler", "spacing")
            if key not in given
            and (layers.get(f"sample.{key}", "default") == "default" or (anew and key == "spacing"))
        ),
        own_dtype="dtype" not in held,
    )


def _recorded(
    model: str | None, info: AdapterInfo | None, adapters: list[str]
) -> tuple[ModelSettings, SampleSettings, str, Mapping[str, str]]:
    """Model and sampling settings before flags, where they come from, and the layer of every value."""
    name = model or ModelSettings().name
    if model is None and info is not None:
        name = info.model_id
        try:
            registry.model_source(name)
        except UserError as error:
            raise UserError(
                f"adapter {adapters[0]}: model_id of {INFO}: {error}; name the base model with --model"
            ) from error
    registry.model_source(name)
    if info is not None and "sample" in info.config:
        raw = {**info.config, "method": info.method}
        saved = config.Resolved.from_dict(raw, info.origin, where=f"adapter {adapters[0]}: config")
        same = name in (info.model_id, saved.model.name)
        held = replace(saved.model if same else ModelSettings(**saved.model.reading()), name=name)
        # where it was trained says nothing about this machine
        held = replace(held, device="auto", encoder_device="")
        return held, saved.sample, f"recorded in {adapters[0]}", saved.origin
    preset = preset_of(name)
    if preset is None:
        return ModelSettings(name=name), SampleSettings(), DEFAULTS, {}
    found = config.resolve(preset.partition("/")[0], preset=preset)
    return replace(found.model, name=name), found.sample, f"preset {preset}", found.origin


def preset_of(model: str, method: str = "") -> str | None:
    """The preset `<method>/<alias>` made for this model, of `method` if it has one, else of the method that
    is registered first: what a model draws with does not change when another method gets a preset.
    """
    source = registry.model_source(model)
    aliases = [alias for alias, target in registry.MODELS.items() if target == source]
    there = packaged.list_presets()
    return next((p for m in (method, *registry.METHODS) for a in aliases if (p := f"{m}/{a}") in there), None)


def _check_files(model: str, sample: SampleSettings) -> None:
    """Refuse what the model cannot draw with, as far as its JSON files lie on this machine: a look of no
    cost before the weights are loaded, after which `sampling.check_settings` knows for certain.
    """
    scheduler, vae = (
        _read_json(model, f"{part}.json") for part in ("scheduler/scheduler_config", "vae/config")
    )
    try:
        facts = 2 ** (len(vae["block_out_channels"]) - 1), int(scheduler["num_train_timesteps"])
    except (KeyError, TypeError, ValueError):
        return
    sample.check_model(model, *facts)


def _read_json(model: str, file: str) -> Any:
    """Content of a file of a model: embedded, a folder, or in the hub's cache. None if it is not there."""
    source = registry.model_source(model)
    folder = Path(source).expanduser()
    if source.startswith("embedded:"):
        folder = registry.WEIGHTS / source.removeprefix("embedded:")
    try:
        if folder.is_dir():
            return json.loads((folder / file).read_text(encoding="utf-8"))
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(source, file)
        return json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, str) else None
    except (OSError, ValueError):
        return None  # loading the model tells what is wrong with it
