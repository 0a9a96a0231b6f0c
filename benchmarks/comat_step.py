"""One CoMat step against the straightforward form: the loop of the official code, with a second UNet as
discriminator, the LoRA as a layer of its own in every sampling step, plain softmax in all attention of the
steps that are looked at, whose maps are kept for all tokens, and losses by loops. Random weights, tiny-blip
as captioner; time, peak memory, difference of loss and gradient, in one run.

    python benchmarks/comat_step.py --size small medium --batch 4 --threads 1
    python benchmarks/comat_step.py --size real --batch 4 --steps 50 --rank 128 --device cuda

Memory is what the step allocates on top of weights and inputs (gradients included); the weights of the second
UNet are told apart. Times are medians of steps taken in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from parts import RandomModel, facts, in_turns, peak_memory
from torch import Tensor

from align_cli.diffusion.rollout import rollout
from align_cli.grounding.entities import Entity
from align_cli.losses import mask_at
from align_cli.methods.base import StepContext
from align_cli.methods.comat.config import CoMatConfig
from align_cli.methods.comat.discriminator import LatentDiscriminator
from align_cli.methods.comat.method import CoMat, Plan
from align_cli.models.attention import AttentionMaps, watched
from align_cli.models.base import TextCond
from align_cli.models.frozen import FrozenModel
from align_cli.rewards.loading import load_reward
from align_cli.shapes.build import components

PROMPT = "a red circle left of a blue square"
ENTITIES = [Entity("circle", (2, 3), ("red", "circle")), Entity("square", (7, 8), ("blue", "square"))]
FORMS = ("straightforward", "ours", "ours, LoRA not merged")


class Drawing(RandomModel):
    """With an autoencoder of random weights; its pictures have four times the latents' side."""

    latent_channels, vae_factor, offloaded, reader = 4, 4, False, None
    decode, at_work = FrozenModel.decode, FrozenModel.at_work

    def __init__(self, size: str, device: str) -> None:
        super().__init__(size, device)
        torch.manual_seed(1)
        self.vae = components.vae().to(device).requires_grad_(False).eval()
        self.image_size = int(self.denoiser.config.sample_size) * self.vae_factor


class Fixed:
    """The nouns of the prompt, in the left and in the right half."""

    def entities(self, _: str) -> list[Entity]:
        return ENTITIES

    def masks(self, images: Tensor, nouns: list[list[str]]) -> list[Tensor]:
        masks = torch.zeros(2, *images.shape[-2:], dtype=torch.bool, device=images.device)
        half = images.shape[-1] // 2
        masks[0, :, :half], masks[1, :, half:] = True, True
        return [masks] * len(nouns)


@contextmanager
def plain_attention(unet: Any) -> Iterator[None]:
    before = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor())
    yield
    unet.set_attn_processor(before)


def straightforward(
    method: CoMat,
    other: LatentDiscriminator,
    start: Tensor,
    noise: Callable[[], Tensor],
    plan: Plan,
    real: Tensor,
) -> float:
    """A step as training_script.py does it; gradients stay in the parameters."""
    model, c, count = method.model, method.config, len(start)
    cond, empty = model.encode_text([PROMPT] * count), model.encode_text([""])[[0] * count]
    path = model.process.timesteps(c.steps, "leading")
    looked, kept = {int(path[i]) for i in plan.attention}, []

    def predict(z: Tensor, t: Tensor, text: TextCond) -> Tensor:
        if int(t) not in looked:
            return model.predict(z, t, text)
        with plain_attention(model.denoiser), watched(model.denoiser):
            keep = AttentionMaps()
            told = model.predict(z[count:], t, text[count:], keep)
            kept.append(keep)
            return torch.cat([model.predict(z[:count], t, text[:count]), told])

    with method.lora.attached():
        z = rollout(
            predict, model.process, start, steps=c.steps, guidance=c.guidance, spacing="leading",
            sampler="ddpm", cond=cond, uncond=empty, grad_steps=frozenset(plan.gradient), noise_fn=noise,
        )  # fmt: skip
        pictures = model.decode(z, clamp=False)
        captioner: Any = method.rewards.rewards["tiny-blip"]
        loss = -captioner.batch_score(pictures, [PROMPT] * count)
        with other.at_work():
            for p in other.parameters():
                p.requires_grad_(False)
            loss = loss + c.fidelity_weight * other.fooled(z)
            for p in other.parameters():
                p.requires_grad_(True)
        masks = Fixed().masks(pictures, [[]] * count)
        for maps in kept:
            for layer, found in maps.maps.items():
                small = mask_at(masks[0], int(layer.partition("_")[2]))
                for b in range(count):
                    loss = loss + looped(found, b, small, c) / count
        loss.backward()
    with other.at_work():
        other.told_apart(z, real)[0].backward()
    return float(loss.detach())


def looped(found: list[Tensor], b: int, masks: Tensor, c: CoMatConfig) -> Tensor:
    """Both weighted losses of one layer of one picture, as tc_loss_utils.py has them."""
    token = pixel = torch.zeros((), device=masks.device)
    for entity, mask in zip(ENTITIES, masks, strict=True):
        for one in found:
            for p in entity.positions:
                seen = one[b, ..., p]
                share = ((seen * mask).sum((1, 2)) / seen.sum((1, 2))).mean()
                token = token + (1 - share) ** 2 / len(entity.positions)
        mean = torch.stack([one[b].mean(0) for one in found]).mean(0)
        seen = torch.stack([mean[..., p] for p in entity.positions]).sum(0)
        pixel = pixel + F.binary_cross_entropy(seen.clamp(max=1), mask.float())
    return (c.token_weight * token + c.pixel_weight * pixel) / len(masks)


def measure(size: str, options: argparse.Namespace) -> list[dict[str, object]]:
    model: Any = Drawing(size, options.device)
    config = CoMatConfig(
        lora_rank=options.rank, steps=options.steps, rewards={"tiny-blip": 1.0}, crop=False, token_weight=0.1,
        pixel_weight=0.1, decode_chunk=0,
    )  # fmt: skip
    method = CoMat(model, config)
    method.use_rewards({"tiny-blip": load_reward("tiny-blip", device=options.device)})
    finder: Any = Fixed()
    method.look_for_nouns(finder, finder)
    method.discriminate(model)
    assert method.discriminator is not None
    second = copy.deepcopy(model)
    other = LatentDiscriminator(second, rank=options.rank, timestep=method.discriminator.timestep)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for lora in (method.lora, method.discriminator.lora):
            for p in lora.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
        other.lora.load_state(method.discriminator.lora.state())
        other.head.load_state_dict(method.discriminator.head.state_dict())
    count, side = options.batch, int(model.denoiser.config.sample_size)
    interval = options.steps // 5
    gradient_steps = tuple(interval // 2 + interval * k for k in range(5))
    plan = Plan(gradient_steps, frozenset(gradient_steps[1:4:2]))
    noises = [
        torch.randn(count, 4, side, side, generator=g).to(model.device) for _ in range(options.steps + 1)
    ]
    real = torch.randn(count, 4, side, side, generator=g).to(model.device)
    trained = [*method.lora.parameters(), *method.discriminator.parameters(), *other.parameters()]

    def step(form: str) -> float:
        for p in trained:
            p.grad = None
        left = iter(noises[1:])
        noise = lambda: next(left)  # noqa: E731
        if form == "straightforward":
            return straightforward(method, other, noises[0], noise, plan, real)
        groups = method.trainables()
        ctx = StepContext(
            step=0, rng=torch.Generator(),
            backward=lambda loss, group: torch.autograd.backward(loss, inputs=groups[group]),
        )  # fmt: skip
        model.dtype = torch.float32 if form == "ours" else None  # what decides on merging
        return method.learn([PROMPT] * count, noises[0], noise, plan, real, ctx)["loss"]

    def gradients() -> dict[str, Tensor]:
        own = other if method.discriminator.parameters()[1].grad is None else method.discriminator  # type: ignore[union-attr]
        both = {"generator": method.lora.parameters(), "discriminator": own.parameters()}
        return {k: torch.cat([p.grad.flatten() for p in ps if p.grad is not None]) for k, ps in both.items()}

    losses, grads = {}, {}
    for form in FORMS:  # warm, too
        losses[form], grads[form] = step(form), gradients()
    times = in_turns({form: lambda form=form: step(form) for form in FORMS}, options.repeat)  # type: ignore[misc]
    weights = sum(p.numel() * p.element_size() for p in model.denoiser.parameters())
    rows = []
    for form in FORMS:
        memory = {name: peak_memory(lambda name=name: step(name), model.device) for name in (form, FORMS[0])}
        rows.append(
            {
                "size": size,
                "batch": count,
                "form": form,
                "seconds": round(times[form], 3),
                "time_ratio": round(times[form] / times[FORMS[0]], 3),
                "peak_mib": round(memory[form] / 2**20, 1),
                "memory_ratio": round(memory[form] / memory[FORMS[0]], 3),
                "unet_weights_mib": round(weights * (2 if form == FORMS[0] else 1) / 2**20, 1),
                "loss_difference": abs(losses[form] - losses[FORMS[0]]),
                "gradient_difference": {
                    k: float((x - grads[FORMS[0]][k]).norm() / grads[FORMS[0]][k].norm())
                    for k, x in grads[form].items()
                },
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["small"], choices=("small", "medium", "real"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = facts(options.device, options.threads)
    print(json.dumps(found), flush=True)
    with torch.backends.cudnn.flags(deterministic=True) if options.device != "cpu" else nullcontext():
        rows = [row for size in options.size for row in measure(size, options)]
    if options.json:
        options.json.write_text(json.dumps({"facts": found, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
