"""Which example comes when, and with which random numbers: all a pure function of (seed, position).

Nothing here has a state that a checkpoint would have to save: a resumed run starts the stream at its step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from align_cli.checks import require_shares
from align_cli.data.base import Dataset, Example, collate
from align_cli.errors import UserError
from align_cli.methods.base import Batch

ORDER, ITEM, STEP = 101, 102, 103
"""Third word of every seed, so that the three kinds of random numbers are independent streams."""


def step_seed(seed: int, step: int, slice_index: int) -> int:
    """Seed in [0, 2**63) of `StepContext.rng`."""
    return int(np.random.SeedSequence([seed, step, slice_index, STEP]).generate_state(1, np.uint64)[0] >> 1)


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """(n,) permutation of the examples in this epoch."""
    return np.random.default_rng([seed, epoch, ORDER]).permutation(n)


def item_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator that `Dataset.get` receives for this example in this epoch."""
    return np.random.default_rng([seed, epoch, index, ITEM])


def check_batch(n: int, batch_size: int, world_size: int) -> None:
    """UserError for a global batch of more than the `n` examples, or that the processes cannot share."""
    if n < batch_size:
        raise UserError(
            f"the dataset has {n} examples, fewer than one batch of {batch_size}; "
            f"lower --batch-size to at most {n} or give more data"
        )
    require_shares(batch_size, world_size)


class SliceOrder(Sampler[list[tuple[int, int]]]):
    """This rank's (epoch, index) keys of every slice of the run.

    A slice is one global batch of `batch_size` rows; a rank has its equal, contiguous share. An epoch is one
    permutation of all examples; the rest that does not fill a global batch is left out.
    """

    def __init__(
        self, n: int, *, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world_size: int = 1
    ) -> None:
        check_batch(n, batch_size, world_size)
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.start, self.stop = start, stop
        self.rank, self.share = rank, batch_size // world_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.n // self.batch_size
        current, order = -1, np.empty(0, np.int64)
        for position in range(self.start, self.stop):
            epoch, place = divmod(position, per_epoch)
            if epoch != current:
                current, order = epoch, epoch_order(self.seed, epoch, self.n)
            first = place * self.batch_size + self.rank * self.share
            yield [(epoch, int(i)) for i in order[first : first + self.share]]


class _Keyed(TorchDataset[Example | UserError]):
    """A dataset by (epoch, index).

    A `UserError` is handed on as a value: a worker process would wrap a raised one into a traceback text.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Example | UserError:
        epoch, index = key
        try:
            return self.dataset.get(index, item_rng(self.seed, epoch, index))
        except UserError as error:
            return error


def _collate(items: list[Example | UserError]) -> Batch | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
    return collate([item for item in items if isinstance(item, Example)])


def _start_worker(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; what it means is for the training process to decide."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def batches(
    dataset: Dataset, order: SliceOrder, *, num_workers: int = 0, pin: bool = False
) -> Iterator[Batch]:
    """This rank's batches from `order.start` to `order.stop`.

    Raises:
        UserError: what the dataset raised for an example.
    """
    loader: DataLoader[Example | UserError] = DataLoader(
        _Keyed(dataset, order.seed),
        batch_sampler=order,
        collate_fn=_collate,
        num_workers=num_workers,
        worker_init_fn=_start_worker if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch.map(torch.Tensor.pin_memory) if pin else batch
