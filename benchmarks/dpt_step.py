"""One DPT step of stage tune against the straightforward form: the loop of the official code, in which each
of the six passes is a call of the UNet of its own (five stop at the feature, one runs to the end) and a call
of the discriminator. Also what self-correction costs. Random weights; time, peak memory, difference of loss
and gradient, in one run.

    python benchmarks/dpt_step.py --size small medium --batch 4 --threads 1
    python benchmarks/dpt_step.py --size real --batch 8 --device cuda

Memory is what the step allocates on top of weights and inputs (gradients included). Times are medians of
steps taken in turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from parts import RandomModel, facts, in_turns, peak_memory
from torch import Tensor

from align_cli.data.grounded import Grounded
from align_cli.diffusion.rollout import rollout
from align_cli.methods.base import StepContext
from align_cli.methods.dpt import method as dpt
from align_cli.methods.dpt.config import DPTConfig
from align_cli.models.base import TextCond
from align_cli.models.features import observe
from align_cli.models.roberta import load_roberta

SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_dim": 128, "num_heads": 4, "feedforward_dim": 256, "num_grounding_queries": 12},
    "medium": {},
    "real": {},
}
EXPRESSIONS = ("a red circle", "two blue squares", "a green triangle")


def one_by_one(
    method: dpt.DPT, latents: Tensor, t: Tensor, eps: Tensor, cond: TextCond
) -> tuple[Tensor, Tensor | None]:
    """`DPT.look`, as train_stage2.py does it."""
    states, prediction = [], None
    for one in method.passes:
        z = method.model.process.add_noise(latents[:, dpt.PICTURES.index(one.picture)], eps, t)
        text = cond[list(range(dpt.TEXTS.index(one.text), len(cond), len(dpt.TEXTS)))]
        to_end = slice(None) if one == dpt.POSITIVE else None
        call = lambda z=z, text=text: method.model.predict(z, t, text)  # noqa: E731
        seen, some = observe(method.model.denoiser, method.names, call, to_end=to_end)
        prediction = some if one == dpt.POSITIVE else prediction
        states.append(method.discriminator(method.discriminator.features(seen), t))
    return torch.stack(states, 2).flatten(1, 2), prediction


@contextmanager
def nothing_shared(*_: Any) -> Any:
    yield


FORMS = ("straightforward", "ours", "ours, nothing shared before the text")


def measure(size: str, options: argparse.Namespace) -> list[dict[str, object]]:
    model: Any = RandomModel(size, options.device)
    config = DPTConfig(stage="tune", dropout=0.0, phrase_encoder="embedded:tiny-roberta", **SIZES[size])
    method = dpt.DPT(model, config)
    method.use_phrases(load_roberta(config.phrase_encoder, device=model.device, dtype=torch.float32))
    lora = method.lora
    assert lora is not None
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.02)
    count, side = options.batch, int(model.denoiser.config.sample_size)
    latents = torch.randn(count, 3, 4, side, side, generator=g).to(model.device)
    eps = torch.randn(count, 4, side, side, generator=g).to(model.device)
    t = torch.randint(1000, (count,), generator=g).to(model.device)
    told = [grounded(EXPRESSIONS[i % 3], g) for i in range(count)]
    cond, summaries = model.summarised(["a " * (i + 1) for i in range(4 * count)])
    own_look, own_sharing = method.look, dpt.alike_at_first

    def step(form: str) -> float:
        for p in method.trainables()["dpt"]:
            p.grad = None
        method.look = own_look  # type: ignore[method-assign]
        if form == "straightforward":
            method.look = lambda *given: one_by_one(method, *given)  # type: ignore[method-assign]
        dpt.alike_at_first = own_sharing if form == "ours" else nothing_shared  # type: ignore[assignment]
        ctx = StepContext(step=0, rng=torch.Generator(), backward=lambda loss: loss.backward())
        with lora.attached():
            given = told, latents, t, eps, cond, summaries.unflatten(0, (count, -1)), ctx
            return method.learn(*given)["loss"]

    def gradient() -> Tensor:
        return torch.cat([p.grad.flatten() for p in method.trainables()["dpt"] if p.grad is not None])

    rows, grads, losses = [], {}, {}
    for form in FORMS:  # warm, too
        losses[form], grads[form] = step(form), gradient()
    times = in_turns({form: lambda form=form: step(form) for form in FORMS}, options.repeat)  # type: ignore[misc]
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
                "loss_difference": abs(losses[form] - losses[FORMS[0]]),
                "gradient_difference": float((grads[form] - grads[FORMS[0]]).norm() / grads[FORMS[0]].norm()),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    dpt.alike_at_first = own_sharing
    return [*rows, *correcting(method, eps, cond[:count], size, options)]


def grounded(expression: str, g: torch.Generator) -> Grounded:
    """An expression with a box or two."""
    number = 2 if expression.startswith("two") else 1
    boxes = torch.rand(number, 4, generator=g) * 0.2 + 0.4
    spans = [[(0, len(expression))]] * number
    none = torch.zeros(3, 1, 1)
    return Grounded(expression, boxes, spans, "", "", none, none, (1, 1))


def correcting(
    method: dpt.DPT, noise: Tensor, cond: TextCond, size: str, options: argparse.Namespace
) -> list[dict[str, object]]:
    """Drawing with and without self-correction."""
    uncond, climb = method.model.summarised(["b"] * len(cond))[0], method.judge(["a"] * len(cond))

    def draw(correct: Callable[[Tensor, Tensor], Tensor] | None) -> Tensor:
        return rollout(
            method.model.predict, method.model.process, noise, steps=4, cond=cond, uncond=uncond,
            guidance=7.5, grad_steps=frozenset(), correct=correct,
        )  # fmt: skip

    runs = {
        "drawing": lambda: draw(None),
        "self-correcting": lambda: draw(lambda z, t: 0.5 * climb(z, t)[1]),
    }
    for run in runs.values():
        run()
    times = in_turns(runs, options.repeat)
    rows: list[dict[str, object]] = []
    for name, seconds in times.items():
        row = {"size": size, "batch": len(cond), "form": name, "seconds": round(seconds / 4, 4)}
        rows.append({**row, "time_ratio": round(seconds / times["drawing"], 3)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["small"], choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=4)
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
