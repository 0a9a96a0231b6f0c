"""SoftREPA: prediction, training, sampling, editing with tiny denoisers; the officially released tokens."""

from __future__ import annotations

import ast
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from align_cli import adapters
from align_cli.diffusion.flow import FlowProcess
from align_cli.diffusion.process import NoiseProcess, Process
from align_cli.diffusion.rollout import rollout
from align_cli.editing import flowedit
from align_cli.losses import softrepa_logits, softrepa_loss
from align_cli.methods.softrepa.config import SoftREPAConfig
from align_cli.methods.softrepa.method import SoftREPA
from align_cli.methods.softrepa.release import BASES, read_pth, read_tensors
from align_cli.models.base import TextCond
from align_cli.models.sd3 import mmdit_predict
from align_cli.models.sdxl import size_ids
from align_cli.models.unet import unet_predict
from golden_checks.lines import DERIVED, FORWARD, Kind, Line, compare, same

DENOISERS = {"UNet2DConditionModel": UNet2DConditionModel, "SD3Transformer2DModel": SD3Transformer2DModel}
"""`model_class` of a case -> class."""
VAE_FACTOR = 8
"""Pixels per latent of every official model."""
WIDE = 4096
"""Tokens of exactly this width pass SD3's context_embedder. Source: transformer.py."""


class BareModel:
    """The part of `BaseModel` that SoftREPA trains on: a denoiser without text encoders and autoencoder."""

    model_id = "golden"

    def __init__(self, denoiser: Any, process: Process) -> None:
        self.denoiser, self.process = denoiser.eval().requires_grad_(False), process
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.family = "sd15"
        if isinstance(denoiser, SD3Transformer2DModel):
            self.family = "sd3"
        elif denoiser.config.addition_embed_type is not None:
            self.family = "sdxl"

    def predict(self, z_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        if self.family == "sd3":
            return mmdit_predict(self.denoiser, z_t, t, cond)
        if self.family == "sdxl" and cond.time_ids is None:
            cond = replace(cond, time_ids=size_ids(z_t, VAE_FACTOR))
        return unet_predict(self.denoiser, z_t, t, cond)


def load_denoiser(folder: Path, name: str, class_name: str) -> Any:
    cls = DENOISERS[class_name]
    denoiser = cls.from_config(json.loads((folder / f"{name}.config.json").read_text()))
    denoiser.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return denoiser


def scheduler_of(text: str, shift: float | None = None) -> Process:
    """The process of "DDIMScheduler(beta_start=0.00085, ...), remarks"; `shift` of the case comes first."""
    call = ast.parse(text[: text.index(")") + 1], mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    values = {
        k.arg: k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value)
        for k in call.keywords
        if k.arg
    }
    if call.func.id.startswith("FlowMatch"):
        return FlowProcess.from_scheduler_config(values | ({} if shift is None else {"shift": shift}))
    return NoiseProcess.from_scheduler_config(values)


def soft_tokens(
    model: BareModel, tensors: dict[str, Tensor], facts: dict[str, Any], **options: Any
) -> SoftREPA:
    """Our method, holding the case's tokens (and table, if the case uses it)."""
    tokens, table = tensors["dc_tokens"], bool(facts.get("use_dc_t", "dc_t_table" in tensors))
    state = {"dc_tokens": tokens} | ({"dc_t_tokens": tensors["dc_t_table"]} if table else {})
    if model.family == "sd3":
        space = "text" if tokens.shape[-1] == WIDE else "projected"
        options |= {"num_layers": facts.get("n_dc_layers", len(tokens)), "token_space": space}
    else:
        options["stages"] = facts.get("apply_dc", "TTF")
    settings = SoftREPAConfig(num_tokens=tokens.shape[-2], use_t_table=table, init="normal", **options)
    method = SoftREPA(model, settings)  # type: ignore[arg-type]
    method.load_state(state)
    return method


def captions(x: dict[str, Tensor]) -> TextCond:
    """The captions of a training or sampling case."""
    return TextCond(x["prompt_embeds"], x.get("pooled_embeds"), x.get("time_ids"))


def softrepa(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    """Prediction, loss and gradients, sampling, editing with one tiny denoiser."""
    kinds = {
        "output": softrepa_predict,
        "errors": softrepa_train,
        "errors_chunk0": softrepa_train_dist,
        "latent_src": softrepa_edit,
        "latent_out": softrepa_sample,
    }
    for name, facts in case["cases"].items():
        tensors = load_file(folder / facts["file"])
        process = scheduler_of(case["scheduler"], facts["parameters"].get("shift"))
        model = BareModel(load_denoiser(folder, facts["model"], case["model_class"]), process)
        check = next((check for key, check in kinds.items() if key in tensors), None)
        if check is None:
            yield Line(f"{name} (unknown kind)", math.inf, 0.0)
            continue
        for line in check(model, tensors, facts["parameters"]):
            yield Line(f"{name}/{line.quantity}", line.error, line.tol)


def softrepa_predict(model: BareModel, x: dict[str, Tensor], facts: dict[str, Any]) -> Iterator[Line]:
    method = soft_tokens(model, x, facts)
    z = x["hidden_states"] if model.family == "sd3" else x["sample"]
    pooled = x["pooled_projections"] if model.family == "sd3" else x.get("text_embeds")
    cond = TextCond(x["encoder_hidden_states"], pooled, x.get("time_ids"))

    def predict(scale: float) -> Tensor:
        with torch.no_grad(), method.attach(model, scale):  # type: ignore[arg-type]
            return model.predict(z, x["timestep"], cond)

    yield compare("output", predict(1.0 if facts.get("use_dc", True) else 0.0), x["output"], FORWARD)
    for key in ("output_tokens_off", "output_plain_base_model"):
        if key in x:
            with torch.no_grad():
                plain = model.predict(z, x["timestep"], cond)
            yield compare(key, plain, x[key], FORWARD)
            yield compare(key.replace("off", "scale_0"), predict(0.0), x[key], FORWARD)


def softrepa_train(model: BareModel, x: dict[str, Tensor], facts: dict[str, Any]) -> Iterator[Line]:
    """Errors, logits, losses and gradients for every diffusion weight; whole, and one image at a time."""
    latents, texts, t = x["latent"], captions(x), x["t"].reshape(())
    own = torch.arange(len(latents))
    yield compare("logits_of_errors", softrepa_logits(x["errors"]), x["logits"], FORWARD)
    for key in sorted(k for k in x if k.startswith("loss_dw")):
        weight = float(key.removeprefix("loss_dw"))
        yield compare(f"{key}_of_errors", softrepa_loss(x["errors"], dweight=weight), x[key], FORWARD)
        for pairs in (0, len(latents)):
            label = "_by_image" if pairs else ""
            method = soft_tokens(model, x, facts, dweight=weight, pair_chunk=pairs)
            parts: list[Tensor] = []

            def backward(loss: Tensor, parts: list[Tensor] = parts) -> None:
                loss.backward()
                parts.append(loss.detach())

            result = method.contrast(latents, texts, x["noise"], t, own, texts[:0], backward)
            yield compare(f"errors{label}_{key}", result.err_IT, x["errors"], FORWARD)
            yield compare(f"logits{label}_{key}", result.logits_IT, x["logits"], FORWARD)
            yield compare(f"{key}{label}", torch.stack(parts).sum(), x[key], FORWARD)
            for tensor, grad in method.tokens.named_parameters():
                assert grad.grad is not None
                name = f"grad_{tensor}_{key.removeprefix('loss_')}"
                yield compare(f"{name}{label}", grad.grad, x[name], DERIVED)


def softrepa_train_dist(model: BareModel, x: dict[str, Tensor], facts: dict[str, Any]) -> Iterator[Line]:
    """Row chunks of train_dist.py, where the mean over the rows of a chunk is divided by the batch size."""
    latents, texts, t = x["latent"], captions(x), x["t"].reshape(())
    count, rows = len(latents), int(facts["nrows"])
    method = soft_tokens(model, x, facts)
    parts: list[Tensor] = []

    def backward(loss: Tensor) -> None:
        official = loss / count
        official.backward()
        parts.append(official.detach())

    for i, start in enumerate(range(0, count, rows)):
        chunk = slice(start, start + rows)
        noise, own = x["noise_per_chunk"][i : i + 1], torch.arange(count)[chunk]
        result = method.contrast(latents[chunk], texts, noise, t, own, texts[:0], backward)
        yield compare(f"errors_chunk{i}", result.err_IT, x[f"errors_chunk{i}"], FORWARD)
        yield compare(f"loss_chunk{i}", parts[i], x[f"loss_chunk{i}"], FORWARD)
    yield compare("aggregated_loss", torch.stack(parts).sum(), x["aggregated_loss"], FORWARD)
    for tensor, grad in method.tokens.named_parameters():
        assert grad.grad is not None
        yield compare(f"grad_{tensor}", grad.grad, x[f"grad_{tensor}"], DERIVED)


def softrepa_sample(model: BareModel, x: dict[str, Tensor], facts: dict[str, Any]) -> Iterator[Line]:
    steps = len(x["timesteps"])
    yield same_timesteps(model, x)
    cond = captions(x)
    if model.family == "sdxl":  # its unconditional text is zeros
        assert cond.pooled is not None
        uncond = TextCond(torch.zeros_like(cond.tokens), torch.zeros_like(cond.pooled), cond.time_ids)
    else:
        uncond = TextCond(x["null_prompt_embeds"], x.get("null_pooled_embeds"))
    method = soft_tokens(model, x, facts)
    with torch.no_grad(), method.attach(model, 1.0 if facts["use_dc"] else 0.0):  # type: ignore[arg-type]
        z = rollout(
            model.predict,
            model.process,
            x["latent_init"],
            steps=steps,
            cond=cond,
            uncond=uncond,
            guidance=float(x["cfg_scale"]),
            sampler="euler" if isinstance(model.process, FlowProcess) else "ddim",
        )
    yield compare("latent_out", z, x["latent_out"], DERIVED)


def softrepa_edit(model: BareModel, x: dict[str, Tensor], facts: dict[str, Any]) -> Iterator[Line]:
    """FlowEdit with the official guidance of the target."""
    yield same_timesteps(model, x)
    noises = iter(x["noise_per_step"].split(len(x["latent_src"])))
    method = soft_tokens(model, x, facts)
    with method.attach(model, 1.0 if facts["use_dc"] else 0.0):  # type: ignore[arg-type]
        z = flowedit(
            model,
            x["latent_src"],
            TextCond(x["src_prompt_embeds"], x["src_pooled"]),
            TextCond(x["tgt_prompt_embeds"], x["tgt_pooled"]),
            TextCond(x["null_prompt_embeds"], x["null_pooled"]),
            steps=len(x["timesteps"]),
            n_start=int(x["n_start"]),
            src_guidance=float(x["src_cfg_scale"]),
            tgt_guidance=float(x["tar_cfg_scale"]),
            convention="softrepa",
            noise_fn=lambda: next(noises),
        )
    yield same("unused_noises", len(list(noises)), 0)
    yield compare("latent_out", z, x["latent_out"], DERIVED)


def same_timesteps(model: BareModel, x: dict[str, Tensor]) -> Line:
    """Indices exactly; the float timesteps of flow matching within rounding."""
    listed, expected = model.process.timesteps(len(x["timesteps"])), x["timesteps"]
    if expected.is_floating_point():
        return compare("timesteps", listed, expected, FORWARD)
    return same("timesteps", listed.tolist(), expected.tolist())


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
        alias = next((name for name, base in BASES.items() if base.fits(state["dc_tokens"])), None)
        if alias is None:
            yield Line(f"{parent.name} (tokens of no known model)", math.inf, 0.0)
            continue
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "adapter"
            adapters.import_official("softrepa", parent, alias, out)
            loaded = adapters.load_adapter(out)
        yield same(f"{parent.name}/adapter_family", loaded.info.family, BASES[alias].family)
        yield same(f"{parent.name}/adapter_keys", sorted(loaded.state), sorted(state))
        for key, tensor in loaded.state.items():
            yield same(f"{parent.name}/adapter_{key}", torch.equal(tensor, state[key]), True)


def is_softrepa(_folder: Path, case: dict[str, Any]) -> bool:
    """A denoiser with soft tokens."""
    if case.get("model_class") not in DENOISERS or "scheduler" not in case:
        return False
    return any("dc_tokens" in facts.get("tensors", {}) for facts in case.get("cases", {}).values())


def is_released_tokens(_folder: Path, case: dict[str, Any]) -> bool:
    return bool(case) and all(isinstance(v, dict) and "python_type" in v for v in case.values())


KINDS = [
    Kind("softrepa", is_softrepa, softrepa),
    Kind("softrepa", is_released_tokens, released_tokens),
]
