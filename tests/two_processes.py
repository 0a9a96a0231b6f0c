"""What each of two processes does in test_distributed.py; started with the variables that a launcher sets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn
from training_helpers import LinearMap, Points, scripted, settings

from align_cli.errors import UserError
from align_cli.launched import is_main
from align_cli.training.distributed import Ranks, leave_group, rank_device
from align_cli.training.learner import Learner
from align_cli.training.loop import train
from align_cli.training.order import SliceOrder, batches

CONFIG = {"method": "linear", "train": {"lr": 0.05}}
GRADIENTS = "gradients.pt"
SHARDED = "sharded"
"""Second word of the command line for runs whose frozen weights are spread over the processes."""


def fit(method, data, run, out: Path) -> None:
    """Train; with frozen weights spread over the processes where the command line says so."""
    if SHARDED in sys.argv[2:]:
        from align_cli.models.sharding import shard_frozen

        shard_frozen(method.model)
    average = Ranks.average_gradients

    def noted(ranks, parameters, flags):
        """The gradients of the first step, as the optimiser gets them, are kept."""
        sums = average(ranks, parameters, flags)
        if ranks.main and not (out / GRADIENTS).exists():
            torch.save([None if p.grad is None else p.grad.clone() for p in parameters], out / GRADIENTS)
        return sums

    Ranks.average_gradients = noted
    try:
        train(method, data, run, out, config={"method": method.name})
    finally:
        Ranks.average_gradients = average


def gathering(ranks: Ranks) -> dict[str, object]:
    x = torch.full((2, 3), float(ranks.rank + 1), requires_grad=True)
    both = ranks.gather(x)
    (both * torch.arange(1.0, 5.0)[:, None]).sum().backward()
    return {"gathered": both[:, 0].tolist(), "own_gradient": x.grad[:, 0].tolist()}


def averaging(ranks: Ranks) -> dict[str, object]:
    """One parameter with a gradient everywhere, one on rank 1 only, one nowhere."""
    p, q, r = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    p.grad = torch.full((2,), float(ranks.rank))
    if ranks.rank == 1:
        q.grad = torch.full((2,), 4.0)
    flags = ranks.average_gradients([p, q, r], [float(ranks.rank), 1.0])
    return {"flags": flags, "p": p.grad.tolist(), "q": q.grad.tolist(), "r": r.grad is None}


def failing(ranks: Ranks) -> str:
    def work() -> None:
        raise UserError("the disk is full")

    try:
        ranks.on_main(work)
    except UserError as error:
        return str(error)
    return "no error"


def shown(ranks: Ranks) -> float:
    """The loss of a first step, as the display shows it."""
    run, data = settings(), Points()
    order = SliceOrder(
        len(data), batch_size=run.batch_size, seed=run.seed, start=0, stop=1, rank=ranks.rank,
        world_size=ranks.world_size,
    )  # fmt: skip
    return Learner(LinearMap(), run).step(0, batches(data, order, num_workers=0, pin=False))[1]


def disagreeing(ranks: Ranks) -> dict[str, object]:
    """What is said where every process sees another number, and where they see the same."""
    try:
        ranks.agreed(4 * ranks.rank, "step to go on from")
    except UserError as error:
        return {"differs": str(error), "same": ranks.agreed(7, "step to go on from")}
    return {}


def tracked(out: Path) -> list[int]:
    """The steps that a tracker of accelerate is told; the processes work together afterwards."""
    import accelerate
    from accelerate.tracking import GeneralTracker

    from align_cli.training import loop

    steps: list[int] = []

    class Told(GeneralTracker):
        name, requires_logging_directory, tracker = "told", False, None

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **options):
            steps.append(step)

    loop.tracker_available = lambda _name: None  # none is installed
    loop.Accelerator = lambda **_options: accelerate.Accelerator(log_with=Told())
    train(LinearMap(), Points(), settings(steps=3, tracker="tensorboard"), out, config=CONFIG)
    loop.Accelerator = accelerate.Accelerator
    return steps


def guarded(out: Path) -> dict[str, object]:
    """A run that keeps its best step, 6 of 12; what this process holds afterwards."""
    method, asked = LinearMap(), []
    guard = scripted(seen=asked, keep="best")
    result = train(method, Points(), settings(), out, config=CONFIG, guard=guard)
    return {"kept": result.kept_step, "weight": method.weight.tolist(), "asked": len(asked)}


def softrepa(model_folder: str, out: Path) -> list[list[float]]:
    """Three steps of the real method on a tiny model; returns its trained tensors."""
    from align_cli.methods.softrepa.config import SoftREPAConfig
    from align_cli.methods.softrepa.method import SoftREPA
    from align_cli.models.loading import load_model
    from align_cli.settings import DataSettings, ModelSettings
    from align_cli.shapes.dataset import ShapesDataset

    model = load_model(ModelSettings(name=model_folder, device="cpu"))
    method = SoftREPA(model, SoftREPAConfig(temperature=0.3, use_t_table=True, init="bos+noise"), seed=3)
    data = ShapesDataset(DataSettings(num_examples=16), seed=3)
    fit(method, data, settings(steps=3, lr=1e-3), out)
    return [value.flatten().tolist() for value in method.state().values()]


def textcraftor(model_folder: str, out: Path) -> list[list[float]]:
    """Three steps on two rewards, one of them over the whole batch; returns the trained tensors."""
    from reward_helpers import save_clip, tiny_clip

    from align_cli.methods.textcraftor.config import TextCraftorConfig
    from align_cli.methods.textcraftor.method import TextCraftor
    from align_cli.models.loading import load_model
    from align_cli.settings import DataSettings, ModelSettings
    from align_cli.shapes.dataset import ShapesDataset

    rank = "0" if is_main() else "1"
    folder = save_clip(out.parent / f"pick-{out.name}-{rank}", tiny_clip(), safe=False)
    config = TextCraftorConfig(
        rewards={"tiny-clip": 10.0, "pickscore": 1.0},
        reward_weights={"pickscore": str(folder)},
        pickscore_pairing="batch",
        steps=4,
        grad_steps=2,
        lora_rank=2,
    )
    model = load_model(ModelSettings(name=model_folder, device="cpu"))
    method = TextCraftor(model, config, seed=3)
    data = ShapesDataset(DataSettings(num_examples=16), seed=3)
    fit(method, data, settings(steps=3, lr=1e-3), out)
    return [value.flatten().tolist() for value in method.state().values()]


def dpt(model_folder: str, out: Path) -> list[list[float]]:
    """Three steps of stage tune, with dropout; returns the trained tensors."""
    from align_cli.methods.dpt.config import DPTConfig
    from align_cli.methods.dpt.method import DPT
    from align_cli.models.loading import load_model
    from align_cli.settings import DataSettings, ModelSettings
    from align_cli.shapes.grounded import GroundedShapes

    config = DPTConfig(
        stage="tune",
        hidden_dim=16,
        num_heads=4,
        feedforward_dim=24,
        num_matching_queries=3,
        num_grounding_queries=5,
        phrase_encoder="embedded:tiny-roberta",
        lora_rank=2,
    )
    model = load_model(ModelSettings(name=model_folder, device="cpu"))
    method = DPT(model, config, seed=3)
    run = settings(steps=3, lr=1e-3, adam_eps=1e-3)  # of the smallest gradients even the sign is rounding
    method.check(run)
    data = GroundedShapes(DataSettings(num_examples=16), seed=3)
    fit(method, data, run, out)
    return [value.flatten().tolist() for value in method.state().values()]


class Halves:
    """A masker: the first noun is on the left, the second on the right, a third nowhere."""

    def masks(self, images, nouns):
        masks = torch.zeros(3, *images.shape[-2:], dtype=torch.bool)
        side = images.shape[-1] // 2
        masks[0, :, :side], masks[1, :, side:] = True, True
        return [masks[: len(names)] for names in nouns]


def comat(model_folder: str, out: Path) -> list[list[float]]:
    """Three steps with all three losses; returns the tensors of LoRA and discriminator."""
    from align_cli.methods.comat.config import CoMatConfig
    from align_cli.methods.comat.method import CoMat
    from align_cli.models.loading import load_model
    from align_cli.settings import DataSettings, ModelSettings
    from align_cli.shapes.dataset import ShapesDataset

    config = CoMatConfig(
        lora_rank=2,
        steps=6,
        grad_steps=2,
        rewards={"tiny-blip": 1.0},
        token_weight=0.1,
        pixel_weight=0.1,
        parser="shapes",
        masker="shapes",
        real="drawn",
        lr_discriminator=1e-3,
    )
    model = load_model(ModelSettings(name=model_folder, device="cpu"))
    method = CoMat(model, config, seed=3)
    run = settings(steps=3, lr=1e-3, adam_eps=1e-3)  # of the smallest gradients even the sign is rounding
    method.check(run)
    method.look_for_nouns(method.reader, Halves())  # the oracle finds nothing in what this model draws
    # with this seed the second of two processes meets no noun in the first step
    data = ShapesDataset(DataSettings(num_examples=16, mixture="pairs"), seed=27)
    fit(method, data, run, out)
    trained = [*method.state().values(), *method.discriminator.parameters()]
    return [value.detach().flatten().tolist() for value in trained]


LONGALIGN = ("align", "reward", "lcm")


def longalign(model_folder: str, out: Path, stage: str) -> list[list[float]]:
    """Three steps of a stage, with every dropout; returns the trained tensors."""
    from align_cli.methods.longalign.config import LongAlignConfig
    from align_cli.methods.longalign.method import LongAlign
    from align_cli.models.loading import load_model
    from align_cli.settings import DataSettings, ModelSettings
    from align_cli.shapes.dataset import ShapesDataset

    config = LongAlignConfig(
        stage=stage,
        t5="embedded:tiny-t5",
        token_length=64,
        adapter_width=24,
        lora_rank=2,
        rewards={"tiny-denscore": 10.0},
        reward_preprocessing="official",
        steps=4,
        grad_stride=2,
    )
    model = load_model(ModelSettings(name=model_folder, device="cpu"))
    method = LongAlign(model, config, seed=3)
    run = settings(steps=3, lr=1e-3, adam_eps=1e-3)  # of the smallest gradients even the sign is rounding
    method.check(run)
    data = ShapesDataset(DataSettings(num_examples=16, mixture="long"), seed=3)
    fit(method, data, run, out)
    return [value.flatten().tolist() for value in method.state().values()]


def sharded(out: Path, model_folder: str) -> None:
    """The methods whose frozen weights may be spread; how many numbers of the UNet this process holds."""
    from align_cli.models.loading import load_model
    from align_cli.models.sharding import shard_frozen
    from align_cli.settings import ModelSettings

    torch.set_num_threads(1)
    ranks = Ranks(torch.device(rank_device("cpu")))
    found: dict[str, object] = {}
    for name, run in {"softrepa": softrepa, "textcraftor": textcraftor, "dpt": dpt}.items():
        found[name] = run(model_folder, out / name)
    for stage in LONGALIGN:
        found[stage] = longalign(model_folder, out / stage, stage)
    model = load_model(ModelSettings(name=model_folder, device="cpu"))
    found["all"] = sum(p.numel() for p in model.denoiser.parameters())
    shard_frozen(model)
    found["held"] = sum(p.to_local().numel() for p in model.denoiser.parameters())
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(found))
    leave_group()


def main(out: Path, model_folder: str) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(torch.device(rank_device("cpu")))
    found = {"world": ranks.world_size, "error": failing(ranks)} | gathering(ranks) | averaging(ranks)
    changes = {"log_every": 5, "accumulation": 2}

    def stop(ctx, loss):
        import os
        import signal

        if ctx.step == 6 and ranks.rank == 1:  # one process is told, all stop
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    first = train(LinearMap(hook=stop), Points(), settings(**changes), out / "two", config=CONFIG)
    method = LinearMap()
    last = train(method, Points(), settings(**changes), out / "two", config=CONFIG, resume=True)
    found |= {
        "stopped": first.step,
        "signal": first.signal,
        "step": last.step,
        "weight": method.weight.tolist(),
        "main": is_main(),
    }

    def bad(ctx, loss):
        return loss * float("nan") if ctx.step == 1 and ranks.rank == 1 else loss

    try:
        train(LinearMap(hook=bad), Points(), settings(), out / "bad", config=CONFIG)
    except UserError as error:
        found["bad"] = str(error)
    found["tracked"] = tracked(out / "tracked")
    found["agreed"] = disagreeing(ranks)
    found["shown"] = shown(ranks)
    found["guarded"] = guarded(out / "guarded")
    found["softrepa"] = softrepa(model_folder, out / "softrepa")
    found["textcraftor"] = textcraftor(model_folder, out / "textcraftor")
    found["dpt"] = dpt(model_folder, out / "dpt")
    found["comat"] = comat(model_folder, out / "comat")
    for stage in LONGALIGN:
        found[stage] = longalign(model_folder, out / stage, stage)
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(found))
    leave_group()


if __name__ == "__main__":
    (sharded if SHARDED in sys.argv[2:] else main)(Path(sys.argv[1]), sys.argv[2])
