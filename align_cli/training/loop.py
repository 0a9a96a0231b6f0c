"""The only training loop: steps, precision, gradients, optimisers, files, logs. A method owns its maths."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from rich.console import Console
from torch import Tensor, nn

from align_cli.data.base import Dataset
from align_cli.errors import UserError
from align_cli.files import clear_parts, file_errors, write_text
from align_cli.methods.base import Batch, Method, StepContext
from align_cli.settings import TrainSettings
from align_cli.training import run_folder
from align_cli.training.checkpoint import Checkpoint, clean, load_newest, save_checkpoint
from align_cli.training.distributed import Ranks
from align_cli.training.ema import Ema
from align_cli.training.guard import Guard, Guarded, Keeper
from align_cli.training.log import Display, Meter, MetricsFile, duration_text, is_loss, shown_loss
from align_cli.training.order import SliceOrder, batches, step_seed
from align_cli.training.schedule import lr_at
from align_cli.training.signals import StopSignals

Grid = Callable[[int, Path], None]
"""Draws a sample grid: (finished steps, path of the PNG). Must not touch the method's parameters."""

MIN_LOSS_SCALE = 2.0**-14
"""fp16: below this scale the overflow is no longer a matter of scale."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. On a normal end the method holds the trained tensors (their average, with
    train.ema_decay): those after the last step or, with guard.keep best, those of the best measurement.

    step: finished optimiser steps. seconds: training time over all sittings. metrics: the last logged means.
    signal: what stopped it (2 is Ctrl-C), after the last step, too; else 0. guarded: what the guard found.
    """

    step: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    resumed_from: int = 0
    signal: int = 0
    guarded: Guarded | None = None

    @property
    def kept_step(self) -> int:
        """The step whose tensors the method holds."""
        return self.step if self.guarded is None else self.guarded.step


def train(
    method: Method,
    dataset: Dataset,
    settings: TrainSettings,
    out: Path,
    *,
    config: Mapping[str, Any],
    origin: Mapping[str, str] | None = None,
    config_text: Callable[[Mapping[str, str]], str] | None = None,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    overwrite: bool = False,
    num_workers: int = 0,
    grid: Grid | None = None,
    guard: Guard | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train `method` on `dataset`.

    Args:
        config, origin: the resolved configuration as plain dicts; kept in run.json and compared on resume.
        config_text: origins -> the same as TOML, kept in config.toml.
        resume: go on from the newest whole checkpoint in `out`; the trace is that of a run never stopped.
        allow_change: settings that may differ from those it was begun with, see run_folder.check_same.
        overwrite: remove the run that `out` holds.
        num_workers: loader processes. grid: drawn every train.grid_every steps. guard: measures while it
        trains. console: None is silent.
    Raises:
        UserError: see run_folder.check and order.SliceOrder; the loss or a gradient is not finite; the disk
            is full; what the dataset, the method or the guard says. The last good checkpoint is kept in every
            case.
    """
    return Run(
        method, dataset, settings, out, config, origin or {}, config_text, num_workers, grid, guard, console
    ).run(resume=resume, allow_change=allow_change, overwrite=overwrite)


class Run:
    """State of one call of `train`."""

    def __init__(
        self,
        method: Method,
        dataset: Dataset,
        settings: TrainSettings,
        out: Path,
        config: Mapping[str, Any],
        origin: Mapping[str, str],
        config_text: Callable[[Mapping[str, str]], str] | None,
        num_workers: int,
        grid: Grid | None,
        guard: Guard | None,
        console: Console | None,
    ) -> None:
        self.method, self.dataset, self.settings, self.out = method, dataset, settings, out
        self.config, self.origin, self.config_text = config, origin, config_text
        self.changes: list[run_folder.Change] = []
        self.num_workers, self.grid = num_workers, grid
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
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
        if (
            self.device.type == "cuda"
        ):  # the same convolution kernels in every sitting; attention backward may still differ
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self.ranks = Ranks(self.device)
        self.console = console if self.ranks.main else None
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
        self.meter = Meter()
        self.metrics_file = MetricsFile(out / run_folder.METRICS)
        self.seconds = 0.0
        self.saved: Path | None = None
        self.saved_step = -1
        self.last: dict[str, float] = {}
        self.bad_loss = torch.zeros((), dtype=torch.bool, device=self.device)
        self.tracker: Accelerator | None = None
        self.keeper: Keeper | None = None
        if guard is not None:
            self.keeper = Keeper(
                guard, out, self.groups, self.metrics_file, self.ranks,
                averaged=self._averaged, say=self._say, track=self._track,
            )  # fmt: skip

    # ------------------------------------------------------------ the course of a run

    def run(self, *, resume: bool, allow_change: Sequence[str], overwrite: bool) -> TrainResult:
        s = self.settings
        tracker_available(s.tracker)
        self._order(0)  # too few examples or an impossible batch: before anything is written
        self.ranks.on_main(lambda: run_folder.check(self.out, resume=resume, overwrite=overwrite))
        start = self.ranks.agreed(self._load(allow_change) if resume else 0, "step to go on from")
        if self.keeper is not None:
            self.keeper.look_at_base(start, s.steps)
        self.ranks.on_main(lambda: self._prepare(start, overwrite))
        self._start_tracker()
        self._describe(start)
        with StopSignals() as signals, Display(self.console, total=s.steps, start=start) as self.display:
            if self.keeper is not None:
                self.keeper.begin(start, self.seconds)
            step = self._steps(start, signals)
            if self.saved_step != step and step > 0:
                self._save(step)
        signal = max(self.ranks.objects(signals.received))
        guarded = None if signal else self._finish(step)
        if self.tracker is not None:
            for tracker in self.tracker.trackers:  # end_training would leave the group on this rank alone
                tracker.finish()
        return TrainResult(
            step=step,
            seconds=self.seconds,
            metrics=self.last,
            checkpoint=self.saved,
            resumed_from=start,
            signal=signal,
            guarded=guarded,
        )

    def _order(self, start: int) -> SliceOrder:
        s = self.settings
        return SliceOrder(
            len(self.dataset),
            batch_size=s.batch_size,
            seed=s.seed,
            start=start * s.accumulation,
            stop=s.steps * s.accumulation,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )

    def _steps(self, start: int, signals: StopSignals) -> int:
        """Train from step `start`; returns the number of finished steps."""
        s = self.settings
        stream = batches(
            self.dataset, self._order(start), num_workers=self.num_workers, pin=self.device.type == "cuda"
        )
        self._make_up_grid(start)
        for step in range(start, s.steps):
            began = time.perf_counter()
            values, stop = self.step(step, stream, signals)
            self.meter.add(values)
            self.seconds += time.perf_counter() - began
            done = step + 1
            if done % s.log_every == 0:
                self._log(done)
            self.display.step(done, shown_loss(values))
            if done % s.save_every == 0 or done == s.steps or stop:
                self._save(done)
            if self.keeper is not None and not stop:
                began = time.perf_counter()
                self.keeper.after(done, self.seconds)
                self.display.pause(time.perf_counter() - began)
            if s.grid_every and done % s.grid_every == 0 and self.grid is not None:
                self.ranks.on_main(partial(self._draw, self.grid, done))
            if stop:
                return done
        return max(start, s.steps)

    def step(self, step: int, stream: Iterator[Batch], signals: StopSignals) -> tuple[dict[str, float], bool]:
        """One optimiser step. Returns what the method reports, and whether any rank was asked to stop."""
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
        flags = [float(reported or bool(self.bad_loss)), float(signals.received > 0)]
        bad, stop = self.ranks.average_gradients(self.parameters, flags)
        if bad:
            raise self._not_finite("loss", step)
        values |= self._update(step, rate)
        return values, stop > 0

    @contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """What goes wrong inside, a picture that cannot be read, a reward that is not finite, is told with
        what is kept.
        """
        try:
            yield
        except UserError as error:
            raise UserError(f"{error}; stopped at step {step + 1}, {self._last_good()}") from error

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
            f"lr {lr_at(self.settings, step):g}, {self.settings.precision}); {self._last_good()}. Start a "
            "new run with a lower --lr, --set train.max_grad_norm=1, or --set train.precision=fp32"
        )

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"

    # ------------------------------------------------------------ files

    def _prepare(self, start: int, overwrite: bool) -> None:
        """Make the folder ready: an old run is removed only here, when all else is known to be fine."""
        advice = "choose another folder with --out"
        with file_errors(f"cannot write to {self.out}", advice):
            if overwrite:
                run_folder.clear(self.out)
            self.out.mkdir(parents=True, exist_ok=True)
            packages = ("torch", "diffusers", "transformers", "accelerate", "numpy")
            versions = {"python": platform.python_version()} | {
                name: package_version(name) for name in packages
            }
            fingerprint = self.dataset.fingerprint()
            origin = dict(self.origin) | run_folder.origins(self.changes)
            text = run_folder.run_text(self.config, origin, fingerprint, versions, self.changes)
            write_text(self.out / run_folder.RUN, text)
            write_text(self.out / run_folder.CONFIG, self.config_text(origin) if self.config_text else "")
            clear_parts(self.out)
            clean(self.out / run_folder.CHECKPOINTS, self.settings.keep_checkpoints, upto=start)
        self.metrics_file.cut(start)

    def _load(self, allowed: Sequence[str]) -> int:
        """Restore the newest whole checkpoint; returns the number of its finished steps."""
        saved = run_folder.read_run(self.out)
        changed = run_folder.check_same(
            saved["config"],
            self.config,
            str(saved.get("data_fingerprint")),
            self.dataset.fingerprint(),
            self.out,
            allowed,
        )
        found, damaged = load_newest(self.out / run_folder.CHECKPOINTS)
        for line in damaged:
            self._say(f"warning: {line}")
        start = 0 if found is None else found.step
        new = [run_folder.Change(start, *change) for change in changed]
        self.changes = run_folder.changes_in(saved, start) + new
        if found is None:
            self._say(f"{self.out} holds no whole checkpoint yet: starting at step 0")
        else:
            self._restore(found, [change.key for change in new])
        for change in new:
            self._say(f"{change.key} = {change.now!r}: {change.origin}")
        return start

    def _restore(self, found: Checkpoint, changed: Sequence[str]) -> None:
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
        # Sums of all ranks lie in rank 0's meter from here on; the others count on from nothing.
        self.meter = Meter(state["window"] if self.ranks.main else None)
        self.seconds, self.saved, self.saved_step = state["seconds"], found.path, found.step
        self.last = dict(state["last"])

    def _save(self, step: int) -> None:
        windows = self.ranks.objects(self.meter.state())
        state = {
            "trainables": {name: [p.detach().cpu() for p in group] for name, group in self.groups.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "ema": self.ema.state() if self.ema is not None else None,
            "window": Meter.merged(windows).state(),
            "last": self.last,
            "seconds": self.seconds,
        }
        folder = self.out / run_folder.CHECKPOINTS

        def write() -> None:
            self.saved = save_checkpoint(folder, step, state, keep=self.settings.keep_checkpoints)

        self.ranks.on_main(write)
        self.saved_step = step

    def _draw(self, grid: Grid, step: int) -> None:
        folder = self.out / run_folder.GRIDS
        with file_errors(f"cannot write to {folder}"):
            folder.mkdir(exist_ok=True)
        with self._averaged():
            grid(step, folder / f"step-{step:08d}.png")

    def _make_up_grid(self, start: int) -> None:
        """Draw the grid that belongs to the checkpoint a run goes on from, if a kill prevented it."""

        def work(grid: Grid) -> None:
            if not (self.out / run_folder.GRIDS / f"step-{start:08d}.png").exists():
                self._draw(grid, start)

        every = self.settings.grid_every
        if self.grid is not None and every and start and start % every == 0:
            self.ranks.on_main(partial(work, self.grid))

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside, the parameters are those that the run would give if it ended now."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def _track(self, values: Mapping[str, float], step: int) -> None:
        if self.tracker is not None:
            self.tracker.log(dict(values), step=step)

    def _log(self, done: int, *, partial: bool = False) -> None:
        """Write the means since the last line, over all ranks."""
        means = Meter.merged(self.ranks.objects(self.meter.state())).means()
        self.meter = Meter()
        self.last = means
        if self.ranks.main:
            row = {
                "step": done,
                "lr": lr_at(self.settings, done - 1),
                **means,
                "seconds": round(self.seconds, 3),
            }
            self.metrics_file.append(row | {"partial": True} if partial else row)
        self._track(means | {"lr": lr_at(self.settings, done - 1)}, done)

    def _finish(self, step: int) -> Guarded | None:
        """After the last checkpoint: log what the last full line lacks, leave in the method what it is to
        give: the average, or the best.
        """
        if any(self.ranks.objects(bool(self.meter.counts))):
            self._log(step, partial=True)
        if self.ema is not None:
            self.ema.copy_to_parameters()
        return None if self.keeper is None else self.keeper.finish(step, self.seconds)

    # ------------------------------------------------------------ words

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _describe(self, start: int) -> None:
        s, count = self.settings, sum(p.numel() for p in self.parameters)
        batch = f"batch {s.batch_size}" + (f" x {s.accumulation}" if s.accumulation > 1 else "")
        ranks = f", {self.ranks.world_size} processes" if self.ranks.world_size > 1 else ""
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        self._say(
            f"{self.method.name}: {count:,} trained numbers, {len(self.dataset):,} examples, {batch}, "
            f"{s.steps} steps, "
            f"{s.precision} on {self.device}{threads}{ranks}"
        )
        if s.precision == "fp16" and self.device.type == "cpu":
            self._say("note: fp16 on a CPU is emulated and slow; --set train.precision=fp32 is faster here")
        if start:
            self._say(f"resumed at step {start} after {duration_text(self.seconds)}")

    def _start_tracker(self) -> None:
        if self.settings.tracker == "none" or not self.ranks.main:
            return
        folder = self.out / run_folder.TRACKER
        with file_errors(f"cannot write to {folder}"):
            folder.mkdir(exist_ok=True)
        self.tracker = Accelerator(log_with=self.settings.tracker, project_dir=folder)
        values = {k: v for k, v in run_folder.flat(self.config).items() if isinstance(v, int | float | str)}
        self.tracker.init_trackers("t2ialign", config=values)


def tracker_available(name: str) -> None:
    """UserError if `train.tracker` names a package that is not installed."""
    if name != "none" and name not in [str(t.value) for t in get_available_trackers()]:
        raise UserError(
            f"train.tracker {name} needs a package that is not installed; pip install 't2ialign[tracking]', "
            f"or --set train.tracker=none"
        )


def package_version(name: str) -> str:
    """Installed version of a package, "" if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
