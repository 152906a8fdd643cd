"""Which rows a training step sees: a function of (seed, step) alone, so that a resumed run sees the same."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pyflowkern.data.dataset import Batch, DataSet, InTurn, Rows

__all__ = ["Batches", "step_seed"]


def step_seed(seed: int, step: int) -> int:
    """Mix a seed and a step into one 63-bit seed (splitmix64), so that neighbours do not correlate.

    Example:
        >>> step_seed(0, 1) != step_seed(1, 0)
        True
    """
    z = (seed * 0xD1342543DE82EF95 + (step + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1


class Batches:
    """Batches of a data set by step: every pass is a new permutation, images are mirrored at random if asked.

    Example:
        >>> data = DataSet("numbers", torch.arange(8.0)[:, None], torch.zeros(1, 1))
        >>> batches = Batches(data, 4, seed=0)
        >>> sorted(torch.cat([batches.batch(0), batches.batch(1)]).flatten().int().tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(self, data: DataSet, batch_size: int, seed: int) -> None:
        self._flip, self._batch_size, self._seed = data.flip, batch_size, seed
        self._rows = data.train if isinstance(data.train, InTurn) else _Permuted(data.train)
        self._per_pass = max(1, len(data.train) // batch_size)

    def batch(self, step: int) -> Batch:
        """Return the batch of one step."""
        pass_, position = divmod(step, self._per_pass)
        begin = position * self._batch_size
        rows = self._rows.shuffled(self._seed, pass_, begin, begin + self._batch_size)
        if not self._flip or not isinstance(rows, Tensor):
            return rows
        generator = torch.Generator().manual_seed(step_seed(self._seed, step))
        mirrored = torch.rand(len(rows), generator=generator) < 0.5
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
