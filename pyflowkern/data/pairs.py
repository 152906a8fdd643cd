"""Two tables of samples, between which a bridge is learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyflowkern.data.dataset import DataError, DataSet, split_rows
from pyflowkern.data.files import moments_of

__all__ = ["PairSet", "Pairs", "pair_set"]


class Pairs:
    """Rows of two tables, side by side; the shorter one begins again at its end.

    Example:
        >>> pairs = Pairs(torch.zeros(3, 2), torch.ones(2, 2))
        >>> len(pairs), pairs[torch.tensor([0, 2])].shape
        (3, torch.Size([2, 2, 2]))
    """

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self._sides = (first, second)

    def __len__(self) -> int:
        return max(map(len, self._sides))

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([side[index % len(side)] for side in self._sides], 1)


@dataclass(frozen=True)
class PairSet(DataSet):
    """A data set whose rows ``[2, D]`` are a row of each table; they belong together by chance alone.

    Example:
        >>> from pathlib import Path
        >>> import torch
        >>> from pyflowkern.data.pairs import pair_set
        >>> tables = torch.randn(20, 3), torch.randn(30, 3)
        >>> data = pair_set((Path("a.csv"), Path("b.csv")), tables, [], seed=0)
        >>> data.shape, tuple(data.validation.shape), len(data.train)
        ((3,), (2, 2, 3), 27)
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row of one table."""
        return tuple(self.validation.shape[2:])


def pair_set(
    paths: tuple[Path, Path], tables: tuple[Tensor, Tensor], columns: list[str], seed: int
) -> PairSet:
    """Return two tables as one data set, each split at random; mean and standard deviation are of both together."""
    widths = [rows.shape[1:] for rows in tables]
    if widths[0] != widths[1] or any(rows.dim() != 2 for rows in tables):
        shapes = " and ".join(str(list(rows.shape)) for rows in tables)
        raise DataError(f"{paths[1]}: must have as many columns as {paths[0]}, they hold {shapes}")
    train, held_out = [], []
    for k, (path, rows) in enumerate(zip(paths, tables, strict=True)):
        if len(rows) < 2:
            raise DataError(f"{path}: needs 2 rows at least, has {len(rows)}")
        # two orders, so that equal places in the files mean nothing
        kept, left = split_rows(len(rows), 2 * seed + k)
        train.append(rows[kept])
        held_out.append(rows[left])
    mean, std = moments_of(" and ".join(map(str, paths)), torch.cat(train), columns=columns)
    count = min(map(len, held_out))
    return PairSet(
        f"{paths[0]} to {paths[1]}",
        Pairs(*train),
        torch.stack([rows[:count] for rows in held_out], 1),
        mean=mean,
        std=std,
        columns=columns,
    )
