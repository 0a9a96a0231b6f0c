"""Run our functions against golden numbers of the official code.

    python tests/check_golden.py DIR [--only softrepa/sd15 --only softrepa/tokens]

Every case.json below DIR is run; one line per quantity: `method/case/quantity  max_err  tol  ok|FAIL`. Exit
code 1 on any
failure, on a case of unknown kind, or if nothing ran. --only keeps the cases whose folder below DIR starts
with a prefix
(several: repeat it, or separate by commas); a prefix that meets nothing is a failure.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from align_cli import adapters
from align_cli.diffusion.process import NoiseProcess
from align_cli.diffusion.rollout import rollout
from align_cli.errors import UserError
from align_cli.losses import softrepa_logits, softrepa_loss
from align_cli.methods.softrepa.config import SoftREPAConfig
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.methods.softrepa.release import WIDTHS, read_pth, read_tensors
from align_cli.models.base import TextCond
from align_cli.models.unet import unet_predict

FORWARD, DERIVED = 1e-5, 1e-4
"""Tolerances relative to max |expected|: forward passes and losses; sampling and gradients. Source: the case
files.
"""


@dataclass(frozen=True)
class Line:
    """One compared quantity."""

    quantity: str
    error: float
    tol: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tol  # False for NaN


def compare(quantity: str, got: Tensor, expected: Tensor, relative: float) -> Line:
    """Largest absolute difference against relative * max |expected|; infinite if the shapes differ."""
    scale = float(expected.double().abs().max()) if expected.numel() else 0.0
    if got.shape != expected.shape:
        if got.numel() != 1 or expected.numel() != 1:
            return Line(
                f"{quantity} (shape {list(got.shape)}, expected {list(expected.shape)})", math.inf, 0.0
            )
        got = got.reshape(expected.shape)
    error = float((got.detach().double() - expected.double()).abs().max()) if expected.numel() else 0.0
    return Line(quantity, error, relative * scale)


def same(quantity: str, got: object, expected: object) -> Line:
    """Exact equality."""
    text = quantity if got == expected else f"{quantity} (got {got}, expected {expected})"
    return Line(text, 0.0 if got == expected else math.inf, 0.0)


# ---------------------------------------------------------------- SoftREPA on UNets


class BareModel:
    """The part of `BaseModel` that SoftREPA trains on: a UNet without text encoder and autoencoder."""

    family, model_id = "sd15", "golden"

    def __init__(self, unet: UNet2DConditionModel, process: NoiseProcess) -> None:
        self.denoiser, self.process = unet.eval().requires_grad_(False), process
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        return unet_predict(self.denoiser, z_t, t, cond)


def load_unet(folder: Path, name: str) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_config(json.loads((folder / f"{name}.config.json").read_text()))
    unet.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return unet


def scheduler_of(text: str) -> NoiseProcess:
    """The process of "DDIMScheduler(beta_start=0.00085, ...), remarks"."""
    call = ast.parse(text[: text.index(")") + 1], mode="eval").body
    assert isinstance(call, ast.Call)
    values = {
        k.arg: k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value)
        for k in call.keywords
        if k.arg
    }
    return NoiseProcess.from_scheduler_config(values)


def soft_tokens(
    model: BareModel, tensors: dict[str, Tensor], stages: str, *, table: bool, **options: Any
) -> SoftREPA:
    """Our method, holding the case's tokens (and table, if the case uses it)."""
    state = {"dc_tokens": tensors["dc_tokens"]} | ({"dc_t_tokens": tensors["dc_t_table"]} if table else {})
    settings = SoftREPAConfig(
        num_tokens=len(tensors["dc_tokens"]), stages=stages, use_t_table=table, init="normal", **options
    )
    method = SoftREPA(model, settings)
    method.load_state(state)
    return method


def softrepa_unet(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """Prediction, loss and gradients, sampling of one tiny UNet."""
    process = scheduler_of(case["scheduler"])
    kinds = {"output": softrepa_predict, "errors": softrepa_train, "latent_out": softrepa_sample}
    for name, facts in case["cases"].items():
        tensors = load_file(folder / facts["file"])
        model = BareModel(load_unet(folder, facts["model"]), process)
        check = next((check for key, check in kinds.items() if key in tensors), None)
        if check is None:
            yield Line(f"{name} (unknown kind)", math.inf, 0.0)
            continue
        for line in check(model, tensors, facts["parameters"]):
            yield Line(f"{name}/{line.quantity}", line.error, line.tol)


def softrepa_predict(model: BareModel, x: dict[str, Tensor], facts: dict[str, Any]) -> Iterator[Line]:
    method = soft_tokens(model, x, facts["apply_dc"], table=facts["use_dc_t"])
    cond = TextCond(x["encoder_hidden_states"])
    with torch.no_grad():
        with method.attach(model):
            with_tokens = model.predict(x["sample"], x["timestep"], cond)
        plain = model.predict(x["sample"], x["timestep"], cond)
        with method.attach(model, 0.0):
            scaled_to_zero = model.predict(x["sample"], x["timestep"], cond)
    yield compare("output", with_tokens, x["output"], FORWARD)
    yield compare("output_tokens_off", plain, x["output_tokens_off"], FORWARD)
    yield compare("output_tokens_scale_0", scaled_to_zero, x["output_tokens_off"], FORWARD)


def softrepa_train(model: BareModel, x: dict[str, Tensor], facts: dict[str, Any]) -> Iterator[Line]:
    """Errors, logits, losses and gradients for every diffusion weight; whole, and one row at a time."""
    latents, texts = x["latent"], TextCond(x["prompt_embeds"])
    none = TextCond(x["prompt_embeds"][:0])
    own = torch.arange(len(latents))
    yield compare("logits_of_errors", softrepa_logits(x["errors"]), x["logits"], FORWARD)
    for key in sorted(k for k in x if k.startswith("loss_dw")):
        weight = float(key.removeprefix("loss_dw"))
        yield compare(f"{key}_of_errors", softrepa_loss(x["errors"], dweight=weight), x[key], FORWARD)
        for rows in (0, 1):
            label = f"_rows{rows}" if rows else ""
            method = soft_tokens(
                model, x, facts["apply_dc"], table=facts["use_dc_t"], dweight=weight, row_chunk=rows
            )
            parts: list[Tensor] = []

            def backward(loss: Tensor, parts: list[Tensor] = parts) -> None:
                loss.backward()
                parts.append(loss.detach())

            t = x["t"].reshape(())
            result = method.contrast(latents, texts, x["noise"], t, own, none, backward)
            yield compare(f"errors{label}_{key}", result.err_IT, x["errors"], FORWARD)
            yield compare(f"logits{label}_{key}", result.logits_IT, x["logits"], FORWARD)
            yield compare(f"{key}{label}", torch.stack(parts).sum(), x[key], FORWARD)
            for tensor, grad in method.tokens.named_parameters():
                assert grad.grad is not None
                name = f"grad_{tensor}_{key.removeprefix('loss_')}"
                yield compare(f"{name}{label}", grad.grad, x[name], DERIVED)


def softrepa_sample(model: BareModel, x: dict[str, Tensor], facts: dict[str, Any]) -> Iterator[Line]:
    steps = len(x["timesteps"])
    listed = model.process.timesteps(steps)
    yield same("timesteps", listed.tolist(), x["timesteps"].tolist())
    use = facts["use_dc"]
    method = soft_tokens(model, x, facts.get("apply_dc", "TTF"), table=facts.get("use_dc_t", False))
    with torch.no_grad(), method.attach(model, 1.0 if use else 0.0):
        z = rollout(
            model.predict,
            model.process,
            x["latent_init"],
            steps=steps,
            cond=TextCond(x["prompt_embeds"]),
            uncond=TextCond(x["null_prompt_embeds"]),
            guidance=float(x["cfg_scale"]),
        )
    yield compare("latent_out", z, x["latent_out"], DERIVED)


# ---------------------------------------------------------------- released tokens


def released_tokens(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """Official .pth files: read safely, the right numbers, and (where we have the base model) through an
    adapter.
    """
    for name, facts in case.items():
        file = folder / name
        tensor = read_pth(file)
        yield same(f"{name}/shape", list(tensor.shape), facts["shape"])
        yield same(f"{name}/dtype", str(tensor.dtype), facts["dtype"])
        yield same(f"{name}/numel", tensor.numel(), facts["numel"])
        wide = tensor.double()
        found = {"mean": wide.mean(), "std_unbiased": wide.std(), "min": wide.min(), "max": wide.max()}
        for key, value in found.items():
            yield Line(f"{name}/{key}", abs(float(value) - facts[key]), FORWARD * max(abs(facts[key]), 1e-3))
        twin = file.with_name("tokens.safetensors")
        if twin.is_file():
            expected = load_file(twin)[file.stem]
            yield same(f"{name}/safetensors", torch.equal(tensor, expected), True)
    for parent in sorted({(folder / name).parent for name in case}):
        state = read_tensors(parent)
        alias = {768: "sd15"}.get(state["dc_tokens"].shape[-1])
        if alias is None or alias not in WIDTHS:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "adapter"
            adapters.import_official("softrepa", parent, alias, out)
            loaded = adapters.load_adapter(out)
        yield same(f"{parent.name}/adapter_keys", sorted(loaded.state), sorted(state))
        for key, tensor in loaded.state.items():
            yield same(f"{parent.name}/adapter_{key}", torch.equal(tensor, state[key]), True)


# ---------------------------------------------------------------- kinds


def is_softrepa_unet(folder: Path, case: dict[str, Any]) -> bool:
    """A UNet without SDXL's extra embeddings."""
    if case.get("model_class") != "UNet2DConditionModel" or "scheduler" not in case:
        return False
    names = {facts.get("model") for facts in case.get("cases", {}).values()}
    configs = [json.loads((folder / f"{name}.config.json").read_text()) for name in names]
    return bool(configs) and all(c.get("addition_embed_type") is None for c in configs)


def is_released_tokens(folder: Path, case: dict[str, Any]) -> bool:
    return bool(case) and all(isinstance(v, dict) and "python_type" in v for v in case.values())


Check = Callable[[Path, dict[str, Any]], Iterator[Line]]
KINDS: list[tuple[str, Callable[[Path, dict[str, Any]], bool], Check]] = [
    ("softrepa", is_softrepa_unet, softrepa_unet),
    ("softrepa", is_released_tokens, released_tokens),
]
"""(method, does this case belong here, check)."""


def run_case(folder: Path) -> tuple[str, list[Line]]:
    """Method and lines of one case folder. Whatever goes wrong is a failed line, so that all other cases
    still run.
    """
    lines: list[Line] = []
    method = "?"
    try:
        case = json.loads((folder / "case.json").read_text())
        found = next(((m, check) for m, belongs, check in KINDS if belongs(folder, case)), None)
        if found is None:
            return method, [Line("(unknown kind of case)", math.inf, 0.0)]
        method, check = found
        for line in check(folder, case):
            lines.append(line)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AssertionError, UserError) as error:
        traceback.print_exc()
        lines.append(Line(f"(stopped by {type(error).__name__}: {error})", math.inf, 0.0))
    return method, lines or [Line("(nothing compared)", math.inf, 0.0)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", action="append", default=[], metavar="PREFIX", help="folders below DIR")
    options = parser.parse_args(argv)
    prefixes = [p.strip("/") for text in options.only for p in text.split(",") if p.strip("/")]
    torch.manual_seed(0)
    below = {
        p.parent.relative_to(options.folder).as_posix(): p.parent for p in options.folder.rglob("case.json")
    }

    def meets(name: str, prefix: str) -> bool:
        return name == prefix or name.startswith(f"{prefix}/")

    chosen = {n: f for n, f in sorted(below.items()) if not prefixes or any(meets(n, p) for p in prefixes)}
    passed = failed = 0
    for prefix in prefixes:
        if not any(meets(name, prefix) for name in chosen):
            print(f"{prefix}  (no case there)  inf  0  FAIL")
            failed += 1
    for name, folder in chosen.items():
        method, lines = run_case(folder)
        where = (
            name if name.startswith(f"{method}/") or method == "?" else f"{method}/{folder.resolve().name}"
        )
        for line in lines:
            print(f"{where}/{line.quantity}  {line.error:.3e}  {line.tol:.3e}  {'ok' if line.ok else 'FAIL'}")
            passed, failed = passed + line.ok, failed + (not line.ok)
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
