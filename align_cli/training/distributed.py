"""The processes of a run: who am I, averages over all, and things that one process does for all.

Processes are started by `--num-processes`, torchrun or `accelerate launch`; accelerate sets up the group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import patch_environment
from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.launched import world_size
from align_cli.settings import ModelSettings

BUCKET = 1 << 24
"""Gradient numbers per all-reduce (64 MiB): bounds the extra memory for large trained models."""
PATIENCE = timedelta(days=1)
"""So long the others wait while one measures, draws or saves; NCCL's own ten minutes would end the run."""


def rank_device(device: str) -> str:
    """`device` for this process: one GPU each where several processes are launched, else as it is.

    Raises:
        UserError: more processes on this machine than GPUs.
    """
    local = os.environ.get("LOCAL_RANK")
    several = world_size() > 1 and local is not None
    if not several or not (device == "cuda" or (device == "auto" and torch.cuda.is_available())):
        return device
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        raise UserError(
            f"{here} processes need {here} GPUs, one each, and this machine has {gpus}; start at most {gpus} "
            "processes on it, or give --device cpu"
        )
    return f"cuda:{local}"


def on_rank(model: ModelSettings) -> ModelSettings:
    """`model` with the devices of this process. An encoder_device cuda:N is the same for every process."""
    return replace(model, device=rank_device(model.device), encoder_device=rank_device(model.encoder_device))


def without_plugins() -> AbstractContextManager[None]:
    """Inside, accelerate sets up neither DeepSpeed nor FSDP nor a precision, whatever `accelerate launch` was
    told: it would want the package deepspeed, and have transformers load later models in parts.
    """
    names = ("accelerate_use_deepspeed", "accelerate_use_fsdp")
    plugins: AbstractContextManager[None] = patch_environment(
        **dict.fromkeys(names, "false"), accelerate_mixed_precision="no"
    )
    return plugins


class Ranks:
    """This process among all processes of the run."""

    def __init__(self, device: torch.device) -> None:
        if world_size() > 1 and device.type == "cuda" and str(device) != rank_device("cuda"):
            raise UserError(
                f"--device {device} is one GPU, {world_size()} processes need one each; give --device cuda"
            )
        several = {"timeout": PATIENCE} if world_size() > 1 else {}
        if several and device.type == "cpu":
            PartialState(cpu=True, **several)  # gloo, on a machine with GPUs too
        with without_plugins():
            state = PartialState(**several)
        self.device = device
        self.rank, self.world_size = int(state.process_index), int(state.num_processes)
        self.main = self.rank == 0

    @classmethod
    def alone(cls, device: torch.device) -> Ranks:
        """This process on its own, whatever group it belongs or belonged to."""
        ranks = cls.__new__(cls)
        ranks.device, ranks.rank, ranks.world_size, ranks.main = device, 0, 1, True
        return ranks

    def gather(self, x: Tensor) -> Tensor:
        """(B, ...) of every rank -> (world_size * B, ...), in rank order; gradients to this rank's rows."""
        if self.world_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.detach().contiguous())
        parts[self.rank] = x
        return torch.cat(parts)

    def average_gradients(self, parameters: Sequence[nn.Parameter], flags: Sequence[float]) -> list[float]:
        """Replace every gradient by its mean over ranks; returns the sums of `flags` over ranks.

        A parameter without a gradient counts as zero where other ranks have one; where none has, it has none.
        """
        if self.world_size == 1:
            return list(flags)
        head = [*flags, *(float(p.grad is not None) for p in parameters)]
        sums = torch.tensor(head, dtype=torch.float32, device=self.device)
        dist.all_reduce(sums)
        totals = sums.tolist()
        wanted = [p for p, count in zip(parameters, totals[len(flags) :], strict=True) if count]
        bucket: list[nn.Parameter] = []
        for p in wanted:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            bucket.append(p)
            if sum(q.numel() for q in bucket) >= BUCKET:
                self._average(bucket)
                bucket = []
        if bucket:
            self._average(bucket)
        return totals[: len(flags)]

    def _average(self, bucket: list[nn.Parameter]) -> None:
        grads = [p.grad for p in bucket if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        flat /= self.world_size
        for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view_as(g))

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors of all ranks with those of rank 0."""
        for x in tensors if self.world_size > 1 else ():
            dist.broadcast(x.detach(), src=0)

    def objects(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def agreed(self, value: int, what: str) -> int:
        """`value`, once all ranks have it. UserError where theirs differ, which a folder that they do not
        share, or do not see alike yet, is the reason of.
        """
        values = self.objects(value)
        if len(set(values)) > 1:
            raise UserError(
                f"the processes do not see the same {what} ({', '.join(map(str, values))}); --out has to be "
                "a folder that all of them share; try again"
            )
        return value

    def on_main(self, work: Callable[[], None]) -> None:
        """Rank 0 does `work`, the others wait; a `UserError` of it is raised on all."""
        message: str | None = None
        if self.main:
            try:
                work()
            except UserError as error:
                if self.world_size == 1:
                    raise
                message = str(error)
        if self.world_size > 1:
            box = [message]
            dist.broadcast_object_list(box, src=0)
            if box[0] is not None:
                raise UserError(box[0])

    def on_all(self, work: Callable[[], None]) -> None:
        """Every rank does its share of `work`; a `UserError` of any of them is raised on all, once all are
        done, so that none waits for one that is gone.
        """
        message: str | None = None
        try:
            work()
        except UserError as error:
            if self.world_size == 1:
                raise
            message = str(error)
        if found := next((m for m in self.objects(message) if m is not None), None):
            raise UserError(found)


def leave_group() -> None:
    """Leave the process group, after all ranks are done with it; nothing if there is none."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
