"""What one training step costs: the method's own step, in the training loop's own frame, without numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from align_cli import config, registry
from align_cli.errors import UserError, first_line
from align_cli.methods.base import Method
from align_cli.models.base import BaseModel
from align_cli.models.empty import MODE, without_weights
from align_cli.planning.batch import planned_batch
from align_cli.planning.counting import Counting, WithoutNumbers
from align_cli.planning.model import planned_model
from align_cli.planning.stand_ins import give_stand_ins, hold_more
from align_cli.training.learner import Learner

UNCOUNTABLE = (UnsupportedFakeTensorException, DynamicOutputShapeException, DataDependentOutputException)


@dataclass(frozen=True)
class StepPlan:
    """Of one process with the whole global batch. Bytes and FLOPs of one optimiser step.

    trained: group -> parameters. frozen: module -> parameters. weights: bytes of everything that is there
    before the step and is no optimiser state. flops: by part, none where the step could not be counted.
    uncounted: what is not in it, in words.
    """

    trained: dict[str, int]
    frozen: dict[str, int]
    weights: int
    gradients: int
    optimizer: int
    peak: int
    flops: dict[str, int]
    state_bytes: int
    uncounted: list[str] = field(default_factory=list)

    @property
    def activations(self) -> int:
        """Bytes at the peak beside weights, gradients and optimiser states."""
        return max(0, self.peak - self.weights - self.gradients - self.optimizer)


def plan_step(resolved: config.Resolved, *, as_gpu: bool) -> StepPlan:
    """UserError for what training would refuse, too."""
    method_class = registry.load(registry.METHODS, resolved.method)
    settings = replace(resolved.train, num_threads=0, tracker="none")
    counting, uncounted = Counting(), list[str]()
    with WithoutNumbers(as_gpu=as_gpu), without_weights():
        with MODE, counting:
            model = planned_model(resolved.model, counting, as_gpu=as_gpu)
            if model.family not in method_class.families:
                raise UserError(
                    f"{resolved.method} does not train models of the family {model.family}; "
                    f"it trains {', '.join(sorted(method_class.families))}"
                )
            if settings.gradient_checkpointing:
                cast("Any", model.denoiser).enable_gradient_checkpointing()
            method: Method = method_class(model, resolved.method_config, seed=settings.seed)
            uncounted += give_stand_ins(method, counting)
            method.check(settings)
            hold_more(method, counting)
            batch, notes = planned_batch(resolved, model)
            uncounted += notes
        with counting:
            learner = Learner(method, settings)
            weights = counting.count.held
            _warm(learner, as_gpu)
            optimizer = counting.count.held - weights
            counting.count.peak = counting.count.held
            counting.count.flops.clear()
            try:
                learner.step(0, repeat(batch))
            except UNCOUNTABLE as error:
                uncounted.insert(0, f"the step, which needs numbers that are not there: {first_line(error)}")
    groups = {name: sum(p.numel() for p in group) for name, group in learner.groups.items()}
    return StepPlan(
        trained=groups,
        frozen=_frozen(model, learner.parameters),
        weights=weights,
        gradients=sum(p.nbytes for p in learner.parameters),
        optimizer=optimizer,
        peak=counting.count.peak,
        flops=dict(counting.count.flops),
        state_bytes=sum(x.nbytes for x in _state(method)),
        uncounted=uncounted,
    )


def _warm(learner: Learner, as_gpu: bool) -> None:
    """Optimiser states as they are from the second step on. On a GPU all tensors are updated at once."""
    for name, optimizer in learner.optimizers.items():
        for group in optimizer.param_groups:
            group["foreach"] = as_gpu
        for p in learner.groups[name]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _state(method: Method) -> list[torch.Tensor]:
    with MODE:
        return list(method.state().values())


def _frozen(model: BaseModel, trained: list[nn.Parameter]) -> dict[str, int]:
    """Module of the pipeline -> its frozen parameters."""
    own = set(trained)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    modules = {"transformer" if model.family == "sd3" else "unet": model.denoiser, "vae": model.vae}
    modules |= dict(zip(names, model.encoders, strict=False))
    found = {name: sum(p.numel() for p in m.parameters() if p not in own) for name, m in modules.items()}
    return {name: count for name, count in found.items() if count}
