"""One optimiser step: from the losses of a method to its trained tensors, on all ranks, in any precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from align_cli.errors import UserError
from align_cli.methods.base import Batch, Method, StepContext
from align_cli.settings import TrainSettings
from align_cli.training.checkpoint import Checkpoint
from align_cli.training.distributed import Ranks
from align_cli.training.ema import Ema
from align_cli.training.log import Meter, is_loss, shown_loss
from align_cli.training.order import step_seed
from align_cli.training.schedule import lr_at

MIN_LOSS_SCALE = 2.0**-14
"""fp16: below this scale the overflow is no longer a matter of scale."""


class Learner:
    """The trained tensors of a method with all that changes with them: optimisers, loss scale, average.

    groups: name -> trained tensors, parameters: all of them. optimizers: of every group.
    """

    def __init__(
        self, method: Method, settings: TrainSettings, kept: Callable[[], str] = lambda: "nothing is kept"
    ) -> None:
        """kept: says what is left of the training if a step fails, for the message.

        Raises:
            UserError: there is nothing to train, or the device does not know the precision.
        """
        self.method, self.settings, self.kept = method, settings, kept
        self.groups = method.trainables()
        self.parameters = [p for group in self.groups.values() for p in group]
        if not self.parameters:
            raise UserError(f"{method.name} has nothing to train with these settings")
        if wrong := {str(p.dtype) for p in self.parameters} - {"torch.float32"}:
            raise ValueError(
                f"trained tensors must be float32, {method.name} gave {', '.join(sorted(wrong))}"
            )
        self.options = method.group_options()
        self.device = self.parameters[0].device
        if settings.precision == "fp16" and self.device.type == "mps":
            raise UserError("train.precision fp16 is not supported on mps; use bf16 or fp32")
        # The same convolution kernels in every sitting; the backward pass of attention may still differ.
        if self.device.type == "cuda":
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self.ranks = Ranks(self.device)
        self.optimizers = {
            name: torch.optim.AdamW(
                group,
                lr=settings.lr,
                betas=(self._option(name, "adam_beta1"), settings.adam_beta2),
                eps=settings.adam_eps,
                weight_decay=self._option(name, "weight_decay"),
            )
            for name, group in self.groups.items()
        }
        self.scaler = torch.amp.GradScaler(self.device.type) if settings.precision == "fp16" else None
        self.ema = Ema(self.parameters, settings.ema_decay) if settings.ema_decay else None
        self.bad_loss = torch.zeros((), dtype=torch.bool, device=self.device)

    def step(
        self, step: int, stream: Iterator[Batch], asked: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], float, bool]:
        """One optimiser step on the next batches of `stream`.

        Returns what the method reports, the loss to show, which is the mean over ranks, and whether any rank
        was `asked` to stop.

        Raises:
            UserError: a loss or a gradient is not finite; what the data or the method says.
        """
        s = self.settings
        rate = lr_at(s, step)
        slices = Meter()
        for part in range(s.accumulation):
            with self._told(step):
                batch = next(stream).map(lambda x: x.to(self.device, non_blocking=True))
            seed = step_seed(s.seed, step, part)
            torch.manual_seed(seed)  # layers with randomness of their own (dropout) are resumable, too
            ctx = StepContext(
                step=step,
                rng=torch.Generator().manual_seed(seed),
                backward=self._backward,
                gather=self.ranks.gather,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                loss_scale=self.scaler.get_scale() if self.scaler is not None else 1.0,
            )
            with self._told(step), self._autocast():
                slices.add(self.method.step(batch, ctx))
        values = slices.means()
        reported = any(not math.isfinite(v) for k, v in values.items() if is_loss(k))
        flags = [float(reported or bool(self.bad_loss)), float(asked()), shown_loss(values)]
        bad, stop, shown = self.ranks.average_gradients(self.parameters, flags)
        if bad:
            raise self._not_finite("loss", step)
        values |= self._update(step, rate)
        return values, shown / self.ranks.world_size, stop > 0

    @contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """What goes wrong inside, a picture that cannot be read, a reward that is not finite, is told with
        what is kept.
        """
        try:
            yield
        except UserError as error:
            raise UserError(f"{error}; stopped at step {step + 1}, {self.kept()}") from error

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        kinds = {"fp16": torch.float16, "bf16": torch.bfloat16}
        if self.settings.precision not in kinds:
            return nullcontext()
        return torch.autocast(self.device.type, kinds[self.settings.precision])

    def _backward(self, loss: Tensor, group: str | None = None, **options: Any) -> None:
        """`StepContext.backward`: gradients of one loss, of one group only if it is named. A loss that is not
        finite ends the run, with fp16 too: its scaler is for gradients that overflow.
        """
        if loss.ndim:
            raise ValueError(f"ctx.backward wants a loss of shape (), got {tuple(loss.shape)}")
        self.bad_loss |= ~torch.isfinite(loss.detach())
        scaled = loss / self.settings.accumulation
        if self.scaler is not None:
            scaled = self.scaler.scale(scaled)
        inputs = None if group is None else self.groups[group]
        with torch.autocast(self.device.type, enabled=False):
            torch.autograd.backward(scaled, inputs=inputs, **options)

    def _update(self, step: int, rate: float) -> dict[str, float]:
        """Clip and apply the gradients of every group. Returns the norms before clipping."""
        s, norms, used = self.settings, {}, []
        for name, optimizer in self.optimizers.items():
            grads = [p.grad for p in self.groups[name] if p.grad is not None]
            if not grads:
                continue
            for options in optimizer.param_groups:
                options["lr"] = rate * self._option(name, "lr") / s.lr
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm(grads)
            if most := self._option(name, "max_grad_norm"):
                nn.utils.clip_grads_with_norm_(self.groups[name], most, norm)
            norms["grad_norm" if len(self.groups) == 1 else f"{name}/grad_norm"] = float(norm)
            used.append(optimizer)
        if not used:
            raise ValueError(f"{self.method.name}.step gave no gradient at step {step}")
        finite = all(map(math.isfinite, norms.values()))
        if not finite and self.scaler is None:
            raise self._not_finite("gradient", step)
        for optimizer in used:
            if self.scaler is not None:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
            norms["loss_scale"] = self.scaler.get_scale()
            if norms["loss_scale"] < MIN_LOSS_SCALE:
                raise self._not_finite("fp16 gradient", step)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and finite:
            self.ema.update()
        return norms if finite else {"loss_scale": norms["loss_scale"]}

    def _option(self, group: str, key: str) -> float:
        """Setting `key` of the optimiser of a group: the method's own, else that of [train]."""
        return self.options.get(group, {}).get(key, float(getattr(self.settings, key)))

    def _not_finite(self, what: str, step: int) -> UserError:
        return UserError(
            f"the {what} is not finite at step {step + 1} of {self.settings.steps} ({self.method.name}, "
            f"lr {lr_at(self.settings, step):g}, {self.settings.precision}); {self.kept()}. Start a "
            "new run with a lower --lr, --set train.max_grad_norm=1, or --set train.precision=fp32"
        )

    # ------------------------------------------------------------ state

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the parameters are those that the run would give if it ended now."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "trainables": {name: [p.detach().cpu() for p in group] for name, group in self.groups.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "ema": self.ema.state() if self.ema is not None else None,
        }

    def load_state(self, found: Checkpoint, changed: Sequence[str]) -> None:
        """Take over the state of a checkpoint; but for `changed` it is of the same settings."""
        state = found.state
        for name, group in self.groups.items():
            values = state["trainables"].get(name, [])
            if [v.shape for v in values] != [p.shape for p in group]:
                why = f" with {', '.join(changed)} changed: leave --allow-change away" if changed else ""
                raise UserError(
                    f"checkpoint {found.path} does not fit the trained tensors of {self.method.name}{why}"
                )
            with torch.no_grad():
                for p, value in zip(group, values, strict=True):
                    p.copy_(value)
            optimizer, own = self.optimizers[name], self.optimizers[name].param_groups
            options = [{key: x for key, x in part.items() if key != "params"} for part in own]
            optimizer.load_state_dict(state["optimizers"][name])
            for part, chosen in zip(optimizer.param_groups, options, strict=True):
                part.update(chosen)  # those of now, which may have been changed
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.settings.ema_decay:  # an average that is new begins with the tensors of this step
            self.ema = Ema(self.parameters, self.settings.ema_decay)
            if state["ema"] is not None:
                self.ema.load_state(state["ema"]["updates"], state["ema"]["average"])
