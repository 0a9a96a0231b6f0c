"""TextCraftor: preprocessing of pictures, the four rewards and their gradients, with tiny towers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from align_cli.diffusion.process import NoiseProcess
from align_cli.diffusion.rollout import rollout
from align_cli.methods.base import Batch, StepContext
from align_cli.methods.textcraftor.config import TextCraftorConfig
from align_cli.methods.textcraftor.method import TextCraftor
from align_cli.models.base import TextCond
from align_cli.models.conditioning import StepText
from align_cli.models.unet import UNetModel
from align_cli.rewards import preprocess
from align_cli.rewards.aesthetic import OFFICIAL_HEAD, Aesthetic, AestheticHead, head_hash
from align_cli.rewards.clip import ClipReward
from align_cli.rewards.preprocess import TEXTCRAFTOR, Preprocess
from align_cli.rewards.towers import build, clip_config, from_open_clip
from align_cli.rewards.weights import fill
from golden_checks.lines import Kind, Line, compare, same

PREPROCESSING, REWARDS, GRADIENTS = 1e-6, 1e-4, 1e-3
"""Tolerances of the case file: absolute, relative, relative L2."""
CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
HEAD = "sac_logos_ava1_l14_linearMSE"
START, END = "<|startoftext|>", "<|endoftext|>"


def textcraftor(folder: Path, case: dict[str, Any]) -> Iterator[Line]:
    for name, facts in case["cases"].items():
        check = CASES.get(name)
        if check is None:
            yield Line(f"{name} (not written yet)", math.inf, 0.0)
            continue
        for line in check(folder, case, load_file(folder / facts["file"])):
            yield Line(f"{name}/{line.quantity}", line.error, line.tol)


def absolute(quantity: str, got: Tensor, expected: Tensor) -> Line:
    """Largest difference against the absolute tolerance of preprocessing."""
    line = compare(quantity, got, expected, 1.0)
    return Line(line.quantity, line.error, PREPROCESSING if math.isfinite(line.error) else 0.0)


def exact(quantity: str, got: Tensor, expected: Tensor) -> Line:
    return compare(quantity, got, expected, 0.0)


def distance(quantity: str, got: Tensor, expected: Tensor) -> Line:
    """Relative L2 error, as the case file wants gradients compared."""
    line = compare(quantity, got, expected, GRADIENTS)
    if not math.isfinite(line.error):  # other shapes
        return line
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    return Line(quantity, float(error), GRADIENTS)


# ---------------------------------------------------------------- pictures


def check_preprocess(folder: Path, case: dict[str, Any], x: dict[str, Tensor]) -> Iterator[Line]:
    image = (x["image_uint8"].float() / 255).requires_grad_()
    output = TEXTCRAFTOR(image, x["output"].shape[-1])
    yield absolute("output", output, x["output"])
    weights = torch.linspace(-1, 1, output.numel()).reshape_as(output)
    (output * weights).sum().backward()
    rows, columns = x["grad_rows0_32"].shape[-2:]
    assert image.grad is not None
    yield distance("grad_rows0_32", image.grad[:, :, :rows, :columns], x["grad_rows0_32"])


def check_eval_preprocess(folder: Path, case: dict[str, Any], x: dict[str, Tensor]) -> Iterator[Line]:
    size = case["cases"]["eval_preprocess"]["target_size"]
    prompt = case["params"]["prompts"][0]
    for key in sorted(k for k in x if k.endswith("_uint8_hwc")):
        n = key.removeprefix("image").removesuffix("_uint8_hwc")
        image = x[key].permute(2, 0, 1)[None].float() / 255
        yield exact(f"clip_pil_{n}", preprocess.SHORTEST(image, size)[0], x[f"clip_pil_{n}"])
        for short, way in (("aa", preprocess.LONGEST), ("noaa", preprocess.LONGEST_PLAIN)):
            yield exact(f"hps_{short}_{n}", way(image, size)[0], x[f"hps_{short}_{n}"])
            hps = open_clip_reward(folder, case, "hps", way)
            score = hps.score(image, [prompt])
            yield compare(f"hps_score_{short}_{n}", score, x[f"hps_score_{short}_{n}"], REWARDS)


# ---------------------------------------------------------------- rewards


def check_rewards(folder: Path, case: dict[str, Any], x: dict[str, Tensor]) -> Iterator[Line]:
    prompts, times = case["params"]["prompts"], case["reward_multipliers"]
    clip = open_clip_reward(folder, case, "clipg", TEXTCRAFTOR)
    hps = open_clip_reward(folder, case, "hps", TEXTCRAFTOR)
    pick, aesthetic = pick_reward(folder, case), aesthetic_reward(folder, case)
    yield same_ids(clip, case, x["input_ids"])

    def scores(image: Tensor) -> dict[str, tuple[str, Tensor, float]]:
        """short name -> (tensor of the case, its value, factor of its mean in the loss)."""
        return {
            "clip": ("clip_per_sample", clip.score(image, prompts), -100 * times["clip"]),
            "pick": ("pick_matrix", pick.matrix(image, prompts), -times["pickscore"]),
            "hps": ("hps_per_sample", hps.score(image, prompts), -100 * times["hpsv2"]),
            "aes": ("aes_per_sample", aesthetic.score(image, prompts)[:, None], -3 * times["aesthetic"]),
        }

    pixels = TEXTCRAFTOR(x["image"], aesthetic.size)
    with torch.no_grad():
        features = aesthetic.tower(pixel_values=pixels).image_embeds
    yield compare("aes_features", features, x["aes_features"], REWARDS)
    published = load_file(folder / f"{HEAD}.safetensors")
    yield same("hash of the published head", head_hash(published), OFFICIAL_HEAD)
    for short in ("clip", "pick", "hps", "aes", "total"):
        image = x["image"].clone().requires_grad_()
        found = scores(image)
        if short != "total":
            key, value, _ = found[short]
            yield compare(key, value, x[key], REWARDS)
        parts = found.values() if short == "total" else [found[short]]
        loss = torch.stack([value.mean() * factor for _, value, factor in parts]).sum()
        yield compare(f"{short}_loss", loss, x[f"{short}_loss"], REWARDS)
        (gradient,) = torch.autograd.grad(loss, image)
        yield distance(f"grad_{short}", gradient, x[f"grad_{short}"])
    yield compare("pick diagonal", pick.score(x["image"], prompts), x["pick_matrix"].diagonal(), REWARDS)


def same_ids(reward: ClipReward, case: dict[str, Any], expected: Tensor) -> Line:
    """Our tokenizer gives the case's ids."""
    options = {"padding": "max_length", "max_length": reward.limit, "return_tensors": "pt"}
    ids = reward.tokenizer(case["params"]["prompts"], **options)["input_ids"]
    return exact("input_ids", ids, expected)


def toy_tokenizer() -> CLIPTokenizer:
    """The case's tokenizer: CLIP's bytes without merges, start 512, end 513."""
    base = list(bytes_to_unicode().values())
    tokens = base + [c + "</w>" for c in base] + [START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=77,
    )


def config_of(case: dict[str, Any], name: str) -> dict[str, Any]:
    return next(value for key, value in case["configs"].items() if key.split(" (")[0] == name)


def facts(name: str) -> dict[str, str]:
    return {"name": name, "version": "tiny", "source": "golden", "scale": ""}


def open_clip_reward(folder: Path, case: dict[str, Any], name: str, way: Preprocess) -> ClipReward:
    """A reward whose weights are in open_clip's layout."""
    state = from_open_clip(load_file(folder / f"{name}_weights.safetensors"))
    model = build(clip_config(config_of(case, name)), state, name, **CPU)
    return ClipReward(model=model, tokenizer=toy_tokenizer(), way=way, **facts(name))


def pick_reward(folder: Path, case: dict[str, Any]) -> ClipReward:
    config = CLIPConfig(**config_of(case, "pick"))
    model = build(config, load_file(folder / "pick_weights.safetensors"), "pick", **CPU)
    return ClipReward(
        model=model, tokenizer=toy_tokenizer(), way=TEXTCRAFTOR, scaled=True, **facts("pickscore")
    )


def aesthetic_reward(folder: Path, case: dict[str, Any]) -> Aesthetic:
    vision = config_of(case, "aesthetic tower")
    config = CLIPConfig(vision_config=vision, projection_dim=vision["projection_dim"])
    state = load_file(folder / "aes_tower_hf_weights.safetensors")
    tower = build(config, state, "tower", vision_only=True, **CPU)
    with torch.device("meta"):
        head = AestheticHead(vision["projection_dim"])
    fill(head, load_file(folder / f"{HEAD}.safetensors"), "head", **CPU)
    return Aesthetic(tower=tower, head=head, way=TEXTCRAFTOR, **facts("aesthetic"))


# ---------------------------------------------------------------- drawing and training


def base_model(folder: Path, case: dict[str, Any]) -> UNetModel:
    """The case's pipeline with the frozen text encoder."""
    text = CLIPTextModel(CLIPTextConfig(**config_of(case, "text encoders")))
    unet = UNet2DConditionModel(**config_of(case, "unet"))
    vae = AutoencoderKL(**config_of(case, "vae"))
    frozen = load_file(folder / "text_encoder_frozen_weights.safetensors")
    text.load_state_dict({name.removeprefix("text_model."): value for name, value in frozen.items()})
    unet.load_state_dict(load_file(folder / "unet_weights.safetensors"))
    found = vae.load_state_dict(load_file(folder / "vae_weights.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in found.missing_keys)
    return UNetModel(
        model_id="golden",
        tokenizer=toy_tokenizer(),
        text_encoder=text,
        vae=vae,
        unet=unet,
        process=NoiseProcess.from_scheduler_config(config_of(case, "scheduler")),
    )


def tuned_method(folder: Path, case: dict[str, Any], **options: Any) -> TextCraftor:
    """Our method on the case's model, holding the case's tuned text encoder."""
    times = case["reward_multipliers"]
    weights = {
        "clip-g14": 100 * times["clip"],
        "aesthetic": 3 * times["aesthetic"],
        "pickscore": times["pickscore"],
        "hpsv2": 100 * times["hpsv2"],
    }
    config = TextCraftorConfig(
        rewards=weights, pickscore_pairing="batch", grad_steps=case["params"]["K"], **options
    )
    method = TextCraftor(base_model(folder, case), config)
    tuned = load_file(folder / "text_encoder_tuned_weights.safetensors")
    method.load_state(
        {f"text_encoder.{name.removeprefix('module.text_model.')}": value for name, value in tuned.items()}
    )
    return method


class Given:
    """Ready embeddings, (2B, L, D), unconditional half first, as what an adapter makes of the text."""

    def __init__(self, embeddings: Tensor, tuned_steps: int, scale: float = 1.0) -> None:
        self.empty, self.text = embeddings.chunk(2)
        self.tuned_steps, self.scale = tuned_steps, scale

    def first_step(self, steps: int) -> int:
        return TextCraftorConfig(literal_split=True).first_tuned(steps, self.tuned_steps)

    def encode(self, prompts: list[str]) -> TextCond:
        return TextCond(self.text)

    def uncond(self, batch: int) -> TextCond:
        return TextCond(self.empty)


def check_sampling(folder: Path, case: dict[str, Any], x: dict[str, Tensor]) -> Iterator[Line]:
    prompts, grad_steps = case["params"]["prompts"], case["params"]["K"]
    method = tuned_method(folder, case)
    model, steps = method.model, len(x["timesteps"])
    assert isinstance(model.process, NoiseProcess)
    yield compare("alphas_cumprod", model.process.alphas_cumprod, x["alphas_cumprod"], REWARDS)
    last = torch.tensor(model.process.final_alpha_cumprod)
    yield compare("final_alpha_cumprod", last, x["final_alpha_cumprod"], REWARDS)
    for key in ("timesteps", "timesteps_alt"):
        yield exact(key, model.process.timesteps(len(x[key]), "lead"), x[key])
    with torch.no_grad():
        frozen = torch.cat([model.uncond(len(prompts)).tokens, model.encode_text(prompts).tokens])
        with method.attach(model):
            change = model.text_changes[0]
            tuned = torch.cat([change.uncond(len(prompts)).tokens, change.encode(prompts).tokens])
    yield compare("frozen_embeds", frozen, x["frozen_embeds"], REWARDS)
    yield compare("tuned_embeds", tuned, x["tuned_embeds"], REWARDS)

    def draw(change: Given, steps: int, gradient: bool = False) -> tuple[Tensor, list[Tensor]]:
        predictions: list[Tensor] = []

        def predict(z: Tensor, t: Tensor, cond: TextCond) -> Tensor:
            found = model.predict(z, t, cond)
            u, c = found.detach().chunk(2)
            predictions.append(u + method.config.guidance * (c - u))
            return found

        model.text_changes.append(change)
        try:
            text = StepText(model, prompts, steps)
            z = rollout(
                predict,
                model.process,
                x["latents_init"],
                steps=steps,
                guidance=method.config.guidance,
                spacing="lead",
                cond=text.cond,
                uncond=text.uncond,
                grad_steps=frozenset(range(change.first_step(steps), steps)) if gradient else frozenset(),
            )
        finally:
            model.text_changes.remove(change)
        return z, predictions

    leaf = x["tuned_embeds"].clone().requires_grad_()
    final, noises = draw(Given(leaf, grad_steps), steps, gradient=True)
    yield compare("guided_noise_per_step", torch.stack(noises), x["guided_noise_per_step"], REWARDS)
    yield compare("latents_final", final, x["latents_final"], REWARDS)
    image = model.decode(final)
    yield compare("image", image, x["image"], REWARDS)
    for key, value, weights in (
        ("latent", final, x["latent_loss_weights"]),
        ("image", image, x["image_loss_weights"]),
    ):
        loss = (value * weights).mean()
        yield compare(f"loss_{key}", loss, x[f"loss_{key}"], REWARDS)
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        yield distance(f"grad_tuned_embeds_{key}_loss", gradient, x[f"grad_tuned_embeds_{key}_loss"])
    tuned_embeds = x["tuned_embeds"]
    for key, change, count in (
        ("latents_w1_k15", Given(tuned_embeds, 15), steps),
        ("latents_w04_k15", Given(tuned_embeds, 15, 0.4), steps),
        ("latents_w1_k25", Given(tuned_embeds, 25), steps),
        ("latents_mix_k15", Given(x["weighted_prompt"], 15), steps),
        ("latents_alt_k15", Given(tuned_embeds, 15), len(x["timesteps_alt"])),
    ):
        yield compare(key, draw(change, count)[0], x[key], REWARDS)


def check_train_step(folder: Path, case: dict[str, Any], x: dict[str, Tensor]) -> Iterator[Line]:
    prompts, lr = case["params"]["prompts"], case["params"]["lr"]
    method = tuned_method(folder, case)
    rewards = {
        "clip-g14": open_clip_reward(folder, case, "clipg", TEXTCRAFTOR),
        "aesthetic": aesthetic_reward(folder, case),
        "pickscore": pick_reward(folder, case),
        "hpsv2": open_clip_reward(folder, case, "hps", TEXTCRAFTOR),
    }
    short = {"clip-g14": "clip", "aesthetic": "aes", "pickscore": "pick", "hpsv2": "hps"}
    weights = method.config.rewards
    method.use_rewards(rewards)
    parameters = method.tunings["text_encoder"].module.named_parameters()  # type: ignore[union-attr]
    named = {f"text_model.{name}": p for name, p in parameters}
    optimizer = torch.optim.AdamW(named.values(), lr=lr, weight_decay=0.01)
    for i in range(2):
        ctx = StepContext(step=i, rng=torch.Generator(), backward=lambda loss: loss.backward())
        values = method.climb(Batch(prompts), x[f"latents_init_{i}"], ctx)
        for name, key in short.items():
            loss = torch.tensor(-weights[name] * values[f"reward/{name}"])
            yield compare(f"{key}_loss_{i}", loss, x[f"{key}_loss_{i}"], REWARDS)
        yield compare(f"total_loss_{i}", torch.tensor(values["loss"]), x[f"total_loss_{i}"], REWARDS)
        if i == 0:
            for key in sorted(k for k in x if k.startswith("grad")):
                kind, _, name = key.partition(".")
                gradient = named[name].grad
                assert gradient is not None
                if kind == "gradnorm":
                    yield compare(key, gradient.norm(), x[key], GRADIENTS)
                else:
                    yield distance(key, gradient, x[key])
        optimizer.step()
        optimizer.zero_grad()
    for key in sorted(k for k in x if k.startswith("after.")):
        got = named[key.removeprefix("after.")].detach()
        yield Line(key, float((got - x[key]).abs().max()), 0.05 * lr)


Check = Callable[[Path, dict[str, Any], dict[str, Tensor]], Iterator[Line]]
CASES: dict[str, Check] = {
    "preprocess": check_preprocess,
    "eval_preprocess": check_eval_preprocess,
    "rewards": check_rewards,
    "sampling": check_sampling,
    "train_step": check_train_step,
}
KINDS = [Kind("textcraftor", lambda _, case: "reward_multipliers" in case, textcraftor)]
