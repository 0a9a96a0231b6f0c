"""DPT: features of a UNet, one step of stage tune, and the self-correcting path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import RobertaTokenizerFast

from align_cli.data.grounded import Grounded
from align_cli.diffusion.process import NoiseProcess
from align_cli.diffusion.rollout import rollout
from align_cli.methods.base import StepContext
from align_cli.methods.dpt.method import DPT, GROUND, PICTURES_OF_ONE, POSITIVE, TEXTS_OF_ONE
from align_cli.methods.dpt.release import own_key
from align_cli.models.base import TextCond
from align_cli.models.features import blocks, observe
from align_cli.models.roberta import PhraseReader
from align_cli.models.unet import unet_predict
from golden_checks.dpt_discriminator import config_of, roberta_of, weights_of
from golden_checks.lines import Kind, Line, close, same

SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
    "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip


class GivenModel:
    """A UNet with given texts."""

    family, model_id, vae_factor, latent_channels = "sd15", "given", 1, 4
    denoiser_part = "unet"
    device = encoder_device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, unet: nn.Module, told: Tensor, summaries: Tensor) -> None:
        self.denoiser, self.told, self.summaries = unet, told, summaries
        self.summary_width = summaries.shape[-1]
        self.process = NoiseProcess.from_scheduler_config(SCHEDULE)
        self.critics: list[Any] = []
        self.calls: list[tuple[Tensor, Tensor]] = []

    def summarised(self, prompts: list[str]) -> tuple[TextCond, Tensor]:
        return TextCond(self.told[: len(prompts)]), self.summaries[: len(prompts)]

    def predict(self, z: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        said = unet_predict(self.denoiser, z, t, cond)
        self.calls.append((z.detach(), said.detach()))
        return said


def unet_of(settings: dict[str, Any], x: dict[str, Tensor]) -> nn.Module:
    """The UNet of a case."""
    unet = UNet2DConditionModel(**settings).requires_grad_(False).eval()
    unet.load_state_dict({k.removeprefix("unet."): v for k, v in x.items() if k.startswith("unet.")})
    return unet


@torch.no_grad()
def unet_features(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    x, tol = load_file(folder / "tensors.safetensors"), case["tolerance"]
    unet = unet_of(case["config"]["unet"], x)

    def call() -> Tensor:
        return unet_predict(unet, x["latents"], x["timesteps"], TextCond(x["text"]))

    def line(name: str, value: Tensor) -> Line:
        return close(name, value, x[name], atol=tol["atol"], rtol=tol["rtol"])

    names = list(blocks(unet))
    yield same("names", [f"feat.{name}" for name in names], sorted_like(x, names))
    seen, prediction = observe(unet, names, call, to_end=slice(None))
    assert prediction is not None
    for name, value in seen.items():
        yield line(f"feat.{name}", value)
    yield line("noise_pred", prediction)
    seen, nothing = observe(unet, ["up1"], call)
    yield same("stopped at up1", nothing, None)
    yield line("sample_when_stopped_at_up1", seen["up1"])
    seen, some = observe(unet, ["up1"], call, to_end=slice(1, None, 2))
    assert some is not None
    yield close("noise_pred, second row alone", some, x["noise_pred"][1:], atol=tol["atol"], rtol=tol["rtol"])
    yield close("feat.up1, both rows", seen["up1"], x["feat.up1"], atol=tol["atol"], rtol=tol["rtol"])


def sorted_like(x: dict[str, Tensor], names: list[str]) -> list[str]:
    """The features of a case, in our order."""
    there = [key for key in x if key.startswith("feat.")]
    return sorted(there, key=lambda key: names.index(key.removeprefix("feat.")))


def train_step(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    x, tol, facts = load_file(folder / "tensors.safetensors"), case["tolerance"], case["config"]
    own, text = weights_of(x)
    told = torch.stack([x[f"text.{name}"] for name in ("object", "whole", "neg", "rand")], 1)
    pooled = [x[f"pooled.{name}"] for name in ("whole", "neg", "rand")]
    summaries = torch.stack([torch.zeros_like(pooled[0]), *pooled], 1)
    model = GivenModel(unet_of(facts["unet"], x), told.flatten(0, 1), summaries.flatten(0, 1))
    config = config_of(
        facts["adapter"],
        stage="tune",
        feature=facts["unet_feature"],
        lora_rank=facts["lora_rank"],
        dropout=0.0,
        no_object_weight=facts["eos_coef"],
        temperature=facts["temperature"],
    )
    method = DPT(model, config)  # type: ignore[arg-type]
    tokenizer = RobertaTokenizerFast.from_pretrained(folder.parent / "tokenizer")
    method.use_phrases(PhraseReader(tokenizer, roberta_of(facts["roberta"], text)))
    lora = {"unet." + k.removeprefix("lora."): v for k, v in x.items() if k.startswith("lora.")}
    method.load_state(named(own | lora))
    latents = torch.stack([x[f"latents.{name}"] for name in ("pos", "neg", "rand")], 1)
    boxes = x["target_boxes"].split(x["target_sizes"].tolist())
    pixels = torch.zeros(3, 1, 1)
    grounded = [
        Grounded(caption, box, [[tuple(s) for s in one] for one in spans], "", "", pixels, pixels, (1, 1))
        for caption, box, spans in zip(case["captions"], boxes, case["tokens_positive"], strict=True)
    ]

    def line(name: str, value: Tensor) -> Line:
        return close(name, value, x[name], atol=tol["atol"], rtol=tol["rtol"])

    given = latents, x["timesteps"], x["noise"], TextCond(model.told)
    with torch.no_grad(), method.lora.attached():  # type: ignore[union-attr]
        states, prediction = method.look(*given)
        assert prediction is not None
        yield line("noise_pred", prediction)
        said = method.discriminator.grounding(method.of(states, GROUND))
        yield line("pred_logits", said.logits)
        yield line("pred_boxes", said.boxes)
        one = {
            p: method.discriminator.matching(method.of(states, p))[0] for p in method.passes if p != GROUND
        }
        yield line("q_whole", one[POSITIVE])
        yield line("img_cond_different_txt", torch.stack([one[p] for p in TEXTS_OF_ONE], 1))
        yield line("different_img_cond_same_txt", torch.stack([one[p] for p in PICTURES_OF_ONE], 1))

    def backward(loss: Tensor, group: str | None = None, **options: Any) -> None:
        total.append(loss.detach())
        loss.backward(**options)

    total: list[Tensor] = []
    ctx = StepContext(step=0, rng=torch.Generator().manual_seed(0), backward=backward)
    with method.lora.attached():  # type: ignore[union-attr]
        found = method.learn(grounded, *given, summaries, ctx)
    yield line("total", total[0][None])
    names = {
        "class": "ce", "box": "bbox", "giou": "giou", "align": "contrastive_align", "i2t": "contrastive_i2t",
        "t2i": "contrastive_t2i", "denoise": "mse",
    }  # fmt: skip
    for ours, theirs in names.items():
        yield line(f"loss.loss_{theirs}", torch.tensor([found[f"loss/{ours}"]]))
    yield line("loss.cardinality_error", torch.tensor([found["probe/cardinality"]]))

    weights = parameters(method)
    (group,) = method.trainables().values()
    yield same("parameters", len(group), len(weights))
    norms: dict[str, float] = dict.fromkeys(case["grad_norm_per_group"], 0.0)
    for name, p in weights.items():
        assert p.grad is not None
        norms[group_of(name)] += float(p.grad.square().sum())
    for key, expected in case["grad_norm_per_group"].items():
        got = torch.tensor(norms[key]).sqrt()
        yield close(
            f"grad_norm_per_group.{key}", got, torch.tensor(expected), atol=tol["atol"], rtol=tol["rtol"]
        )
    chosen = [key.removeprefix("grad.") for key in x if key.startswith("grad.")]
    ours_of = {name: own_key(name) or "" for name in chosen}
    for name, key in ours_of.items():
        yield line(f"grad.{name}", weights[key].grad)  # type: ignore[arg-type]
    facts = facts["optimizer"]
    optimizer = torch.optim.AdamW(
        group, facts["lr"], tuple(facts["betas"]), facts["eps"], weight_decay=facts["weight_decay"]
    )
    yield line("grad_norm_total", nn.utils.clip_grad_norm_(group, facts["clip_norm"])[None])
    optimizer.step()
    after = tol["after_step"]
    for name, key in ours_of.items():
        full = f"after_step.{name}"
        yield close(full, weights[key], x[full], atol=after["atol"], rtol=after["rtol"])


def named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors by the keys of our artefact."""
    return {own_key(key) or key: value for key, value in state.items()}


def parameters(method: DPT) -> dict[str, nn.Parameter]:
    """Key of the artefact -> trained parameter."""
    found = {f"discriminator.{name}": p for name, p in method.discriminator.named_parameters()}
    assert method.lora is not None
    return found | {f"unet.{name}": p for name, p in method.lora.weights.items()}


def group_of(name: str) -> str:
    """The group of a parameter in a case's table of norms."""
    first, second, third = [*name.split("."), ""][:3]
    if first == "unet":
        return f"unet_lora_{second}"
    return f"{second}.{third}" if second == "transformer" else second


def self_correction(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    x, tol, facts = load_file(folder / "tensors.safetensors"), case["tolerance"], case["config"]
    own, _ = weights_of(x)
    unet = unet_of(facts["unet"], x)
    free, told = x["text_sequence"].chunk(2)
    model = GivenModel(unet, told, x["text_pooled"].chunk(2)[1])
    config = config_of(
        facts["adapter"],
        feature=facts["adapter"]["unet_feature"],
        phrase_dim=len(own["contrastive_align_projection_image.bias"]),
    )
    method = DPT(model, config)  # type: ignore[arg-type]
    method.load_state(named(own))
    climb = method.judge(["given"] * len(told))
    steps, eta = facts["num_steps"], facts["correction_factor"]
    path = model.process.timesteps(steps)
    yield same("timesteps", path.tolist(), x["timesteps"].tolist())

    def line(name: str, value: Tensor) -> Line:
        return close(name, value, x[name], atol=tol["atol"], rtol=tol["rtol"])

    lines: list[Line] = []
    latents: list[Tensor] = []

    def correct(z: Tensor, t: Tensor) -> Tensor:
        i = path.tolist().index(int(t))
        score, slope = climb(z, t)
        lines.append(line(f"step{i}.score_sum", score.sum()[None]))
        lines.append(line(f"step{i}.grad_cond", slope))
        if i:
            lines.append(line(f"step{i - 1}.latent_out", z))
        else:
            lines.append(line("step0.corrected_input", z + eta * slope))
        latents.append(z)
        return eta * slope

    def drawn(end: str) -> Tensor:
        return rollout(
            model.predict,
            model.process,
            x["initial_latent"],
            steps=steps,
            cond=TextCond(told),
            uncond=TextCond(free),
            guidance=facts["guidance_scale"],
            grad_steps=frozenset(),
            callback=noticed,
            correct=correct,
            end=end,
        )

    def noticed(i: int) -> None:
        if i == 0:
            free_eps, told_eps = model.calls[-1][1].chunk(2)
            lines.append(line("step0.eps_uncond", free_eps))
            lines.append(line("step0.eps_cond", told_eps))

    yield line("decoded_latent_unscaled", drawn("before"))
    lines.clear()
    drawn("z")
    yield from lines
    # the official code takes the last step to alphas_cumprod[t - 1000 // N] with a negative index, which is
    # the noisy end, and throws it away; ours ends at a clean latent, so only its prediction can be compared
    z = latents[-1]
    free_eps, told_eps = model.calls[-1][1].chunk(2)
    eps = free_eps + facts["guidance_scale"] * (told_eps - free_eps)
    x0, _ = model.process.to_x0_eps(eps, z, int(path[-1]))
    abar = model.process.alphas_cumprod[int(path[-1]) - 1000 // steps]
    yield line(f"step{steps - 1}.latent_out", abar.sqrt() * x0 + (1 - abar).sqrt() * eps)


def _case(name: str) -> Any:
    return lambda _, case: case.get("case", "").startswith(name)


KINDS = [
    Kind("dpt", _case("which UNet activations are features"), unet_features),
    Kind("dpt", _case("one stage-2 training step"), train_step),
    Kind("dpt", _case("inference-time self-correction loop"), self_correction),
]
