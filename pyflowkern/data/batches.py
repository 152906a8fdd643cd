"""Which rows a training step sees: a function of (seed, step) alone, so that a resumed run sees the same."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pyflowkern.data.dataset import Batch, DataSet, InTurn, Rows

__all__ = ["Batches", "share", "step_seed"]


def share(count: int, rank: int, ranks: int) -> slice:
    """Return which of ``count`` rows the process ``rank`` of ``ranks`` takes; sizes differ by one row at most.

    Example:
        >>> [list(range(10))[share(10, rank, 3)] for rank in range(3)]
        [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    """
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Mix a seed, a step and a rank into one 63-bit seed (splitmix64), so that neighbours do not correlate.

    Rank 0 has the seeds of a run in one process.

    Args:
        seed: of the run.
        step: of the training.
        rank: of the process.

    Example:
        >>> from pyflowkern.data import step_seed
        >>> step_seed(0, 1) != step_seed(1, 0)
        True
    """
    if rank:
        seed = step_seed(step_seed(seed, step), rank)
    z = (seed * 0xD1342543DE82EF95 + (step + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1


class Batches:
    """Batches of a data set by step: every pass is a new permutation, images are mirrored at random if asked.

    Of several processes each has its share of every batch, and together they have the batch of one process.

    Args:
        data: the data set, of which training rows are taken.
        batch_size: rows of a batch of all processes together.
        seed: decides the order, with the number of the pass.
        rank: which of the processes this is.
        ranks: how many there are.

    Example:
        >>> import torch
        >>> from pyflowkern.data import Batches, DataSet
        >>> data = DataSet("numbers", torch.arange(8.0)[:, None], torch.zeros(1, 1))
        >>> batches = Batches(data, 4, seed=0)
        >>> sorted(torch.cat([batches.batch(0), batches.batch(1)]).flatten().int().tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(
        self, data: DataSet, batch_size: int, seed: int, *, rank: int = 0, ranks: int = 1
    ) -> None:
        self._flip, self._batch_size, self._seed = data.flip, batch_size, seed
        self._rows = data.train if isinstance(data.train, InTurn) else _Permuted(data.train)
        #: Rows of a batch of all processes together, and which of them are this one's.
        self.rows = min(batch_size, len(data.train))
        self._share = share(self.rows, rank, ranks)
        self._per_pass = max(1, len(data.train) // batch_size)

    def batch(self, step: int) -> Batch:
        """Return this process's share of the batch of one step."""
        pass_, position = divmod(step, self._per_pass)
        begin = position * self._batch_size
        ends = begin + self._share.start, begin + self._share.stop
        rows = self._rows.shuffled(self._seed, pass_, *ends)
        if not self._flip or not isinstance(rows, Tensor):
            return rows
        generator = torch.Generator().manual_seed(step_seed(self._seed, step))
        mirrored = torch.rand(self.rows, generator=generator)[self._share] < 0.5
        return torch.where(mirrored.view(-1, 1, 1, 1), rows.flip(3), rows)


class _Permuted:
    """Rows that are addressed by number, each pass in another order."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._order = lru_cache(maxsize=1)(self._permutation)

    def __len__(self) -> int:
        return len(self._rows)

    def _permutation(self, seed: int, pass_: int) -> Tensor:
        generator = torch.Generator().manual_seed(step_seed(seed, -2 - pass_))
        return torch.randperm(len(self._rows), generator=generator)

    def shuffled(self, seed: int, pass_: int, begin: int, end: int) -> Batch:
        return self._rows[self._order(seed, pass_)[begin:end]]
