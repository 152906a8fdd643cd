"""Files larger than memory as data sets: read block by block, and shuffled within a buffer."""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pyflowkern.data.batches import step_seed
from pyflowkern.data.conditioned import (
    MOST_CLASSES,
    Columns,
    class_numbers,
    find_columns,
    take_context,
)
from pyflowkern.data.dataset import Batch, Condition, Conditioned, DataError, DataSet, column_at
from pyflowkern.data.files import ArrayFile, check_moments
from pyflowkern.data.parquet import ParquetTable

__all__ = ["Blocks", "Moments", "Streamed", "open_blocks", "streamed_set"]

#: Numbers of a block of an array; those of Parquet are its row groups.
BLOCK = 2**16
#: Numbers among which rows are shuffled: 64 MiB of float32.
BUFFER = 2**24
#: Most rows that are held out; they are kept in memory and scored at each evaluation.
HELD_OUT = 2**16


class Blocks(Protocol):
    """A file of rows that is read in blocks.

    Example:
        >>> from pathlib import Path
        >>> from pyflowkern.data import Blocks, open_blocks
        >>> import numpy as np
        >>> np.save("rows.npy", np.zeros((100_000, 2), np.float32))
        >>> blocks: Blocks = open_blocks(Path("rows.npy"))
        >>> blocks.shape, blocks.counts, tuple(blocks.read(3).shape)
        ((2,), [32768, 32768, 32768, 1696], (1696, 2))
    """

    name: str
    columns: list[str]  #: names of the columns, or none
    shape: tuple[int, ...]  #: of a row
    counts: list[int]  #: rows of each block

    def read(self, block: int) -> Tensor:
        """Return the rows of a block; raise DataError for one that cannot be used."""


def open_blocks(path: Path) -> Blocks:
    """Return a file that can be read in blocks of any order.

    Args:
        path: a ``.npy`` or a Parquet file.

    Raises:
        DataError: one line, for a file of another kind, and one that is damaged or empty.

    Example:
        >>> from pathlib import Path
        >>> from pyflowkern.data import open_blocks
        >>> import numpy as np
        >>> np.save("rows.npy", np.zeros((5, 2), np.float32))
        >>> open_blocks(Path("rows.npy")).counts
        [5]
    """
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".parquet"):
        raise DataError(f"{path}: only .npy and .parquet files can be read in blocks")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    return ArrayFile(path, BLOCK) if suffix == ".npy" else ParquetTable(path)


class Moments:
    """Mean and spread of rows that come in parts, in float64.

    Source: Chan, Golub and LeVeque 1983, *Algorithms for computing the sample variance*.

    Example:
        >>> import torch
        >>> from pyflowkern.data import Moments
        >>> moments = Moments()
        >>> for part in torch.arange(10.0).split(4):
        ...     moments.update(part)
        >>> moments.count, float(moments.mean), float(moments.std) ** 2
        (10, 4.5, 8.25)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)  # of differences from the mean

    def update(self, rows: Tensor) -> None:
        """Add rows ``[n, *shape]``."""
        count = len(rows)
        if not count:
            return
        rows = rows.double()
        mean = rows.mean(0)
        squares = (rows - mean).square_().sum(0)
        total = self.count + count
        apart = mean - self.mean
        self._squares = self._squares + squares + apart.square() * (self.count * count / total)
        # of an infinite number the mean is infinite, whichever part it is in
        means = self.mean + apart * (count / total)
        self.mean = torch.where(apart.isfinite(), means, self.mean + mean)
        self.count = total

    @property
    def std(self) -> Tensor:
        """The standard deviation, that of a whole population."""
        return (self._squares / self.count).sqrt()


class Streamed:
    """The training rows of a file, which are read in a shuffled order.

    A pass reads the blocks in a random order, as many at a time as fill a buffer, and gives the rows of the buffer in a
    random order.  All of it follows from the seed and the number of the pass, so that a run can go on in the middle of
    one; the buffer is all that is in memory.

    Args:
        file: the file.
        held_out: how many rows of each block are no training rows.
        seed: says which.
        batch_of: makes a batch of rows as they are in the file.
        buffer: about how many numbers are in memory; one block at least.

    Example:
        >>> from pathlib import Path
        >>> from pyflowkern.data import Streamed, open_blocks
        >>> import numpy as np
        >>> np.save("rows.npy", np.arange(10, dtype=np.float32)[:, None])
        >>> rows = Streamed(open_blocks(Path("rows.npy")), held_out=[2], seed=0, batch_of=lambda rows: rows)
        >>> len(rows), len(rows.shuffled(0, 0, 0, 4))
        (8, 4)
    """

    def __init__(
        self,
        file: Blocks,
        held_out: list[int],
        seed: int,
        batch_of: Callable[[Tensor], Batch],
        buffer: int = BUFFER,
    ) -> None:
        self._file, self._held_out, self._seed, self._batch_of = file, held_out, seed, batch_of
        self._counts = [n - held for n, held in zip(file.counts, held_out, strict=True)]
        self._rows = sum(self._counts)
        self._most = buffer // math.prod(file.shape)
        self._windows: tuple[int, _Windows] | None = None
        self._buffer: tuple[tuple[int, int, int], Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self._rows

    def shuffled(self, seed: int, pass_: int, begin: int, end: int) -> Batch:
        """Return rows by their places in the order of a pass."""
        end = min(end, len(self))
        windows = self._windows_of(step_seed(seed, -2 - pass_))
        parts = []
        while begin < end:
            window = bisect_right(windows.begins, begin) - 1
            rows, order = self._filled(seed, pass_, window, windows.blocks[window])
            first = begin - windows.begins[window]
            parts.append(rows[order[first : first + end - begin]])
            begin += len(parts[-1])
        return self._batch_of(torch.cat(parts))

    def _filled(
        self, seed: int, pass_: int, window: int, blocks: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the rows of some blocks and their order; those of the last call are at hand."""
        key = (seed, pass_, window)
        if self._buffer is None or self._buffer[0] != key:
            self._buffer = None  # there is memory for one
            count, at = sum(self._counts[b] for b in blocks), 0
            rows: Tensor | None = None
            for b in blocks:
                read = self._file.read(b)
                train = read[~held_out_rows(self._seed, b, len(read), self._held_out[b])]
                rows = train.new_empty(count, *train.shape[1:]) if rows is None else rows
                rows[at : at + len(train)] = train
                at += len(train)
            assert rows is not None
            generator = _generator(step_seed(step_seed(seed, -2 - pass_), window))
            self._buffer = key, rows, torch.randperm(count, generator=generator)
        return self._buffer[1:]

    def _windows_of(self, seed: int) -> _Windows:
        if self._windows is None or self._windows[0] != seed:
            self._windows = seed, _windows(self._counts, self._most, seed)
        return self._windows[1]


@dataclass(frozen=True)
class _Windows:
    """The blocks that are in the buffer together, and the place of the first row of each such group."""

    blocks: list[list[int]]
    begins: list[int]


def _windows(counts: list[int], most: int, seed: int) -> _Windows:
    """Put blocks into a random order, and as many together as have ``most`` rows; a larger one is alone."""
    order = torch.randperm(len(counts), generator=_generator(seed)).tolist()
    groups, sizes = list[list[int]](), list[int]()
    for block in order:
        if not groups or sizes[-1] + counts[block] > most:
            groups.append([])
            sizes.append(0)
        groups[-1].append(block)
        sizes[-1] += counts[block]
    return _Windows(groups, [0, *accumulate(sizes)][:-1])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def held_out_rows(seed: int, block: int, rows: int, held: int) -> Tensor:
    """Return which rows of a block are held out, at random: a mask."""
    order = torch.randperm(rows, generator=_generator(step_seed(step_seed(seed, -1), block)))
    return torch.zeros(rows, dtype=torch.bool).index_fill_(0, order[:held], True)


def _shares(counts: list[int], fraction: float, most: int) -> list[int]:
    """Return how many rows of each block are held out: of all a fraction, but at most ``most``."""
    total = sum(counts)
    wanted = max(1, min(round(total * fraction), most))
    ends = [wanted * end // total for end in accumulate(counts)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def streamed_set(
    file: Blocks,
    seed: int,
    context: Columns | None = None,
    buffer: int = BUFFER,
    told: Callable[[int], object] = lambda rows: None,
) -> DataSet:
    """Return a file as a data set whose training rows stay in the file.

    One pass over the file looks at every row, and finds mean and standard deviation of the columns.  A tenth of the
    rows, 65,536 and a buffer full at most, is held out and kept in memory.

    Args:
        file: the file.
        seed: decides which rows are held out.
        context: The columns of a table that are contexts of the others.
        buffer: about how many numbers are in memory.
        told: is told of each block that was looked at how many rows it had.

    Raises:
        DataError: one line that names the file and, if known, the row.

    Example:
        >>> from pathlib import Path
        >>> from pyflowkern.data import open_blocks, streamed_set
        >>> import numpy as np
        >>> np.save("rows.npy", np.arange(100, dtype=np.float32).reshape(50, 2))
        >>> data = streamed_set(open_blocks(Path("rows.npy")), seed=0)
        >>> len(data.train), tuple(data.validation.shape), tuple(data.mean.shape)
        (45, (5, 2), (2,))
    """
    total = sum(file.counts)
    if total < 2:
        raise DataError(f"{file.name}: needs 2 rows at least, has {total}")
    shares = _shares(file.counts, 0.1, max(1, min(HELD_OUT, buffer // math.prod(file.shape))))
    images, checksum, moments = len(file.shape) > 1, 0, Moments()
    if images and context is not None:
        raise DataError(f"{file.name}: holds images, which have no columns for a context")
    places = find_columns(file.name, file.columns, file.shape[0], context.names) if context else []
    label, held_out, values = context is not None and context.classes, [], torch.empty(0)
    for block, held in enumerate(shares):
        rows = file.read(block)
        checksum = zlib.crc32(rows.numpy().data, checksum)
        mask = held_out_rows(seed, block, len(rows), held)
        held_out.append(rows[mask])
        if not images:
            moments.update(rows[~mask])
        told(len(rows))
        if label and len(values) <= MOST_CLASSES:  # of more, all is said
            values = torch.cat([values, rows[:, places[0]].unique()]).unique()
    data = DataSet(file.name, torch.empty(0), torch.cat(held_out), checksum=checksum)
    if images:
        return replace(data, train=Streamed(file, shares, seed, _as_it_is, buffer), bits=8)
    classes = list[int]()
    if label:
        _, classes = class_numbers(f"{file.name}, {column_at(places[0], file.columns)}", values)

    def batch_of(rows: Tensor) -> Batch:
        return _conditioned(file, rows, context, classes)

    rest = [i for i in range(file.shape[0]) if i not in places]
    found = moments.mean[rest], moments.std[rest]
    mean, std = check_moments(file.name, *found, rest, columns=file.columns)
    return replace(
        data,
        train=Streamed(file, shares, seed, batch_of, buffer),
        validation=batch_of(torch.cat(held_out)),
        mean=mean,
        std=std,
        columns=[file.columns[i] for i in rest] if file.columns else [],
        condition=None if context is None else _condition(file, moments, places, classes),
        places=rest,
    )


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def _conditioned(
    file: Blocks, rows: Tensor, context: Columns | None, classes: list[int]
) -> Tensor | Conditioned:
    """Return rows of a file with their contexts."""
    if context is None:
        return rows
    return take_context(file.name, rows, file.columns, context, classes or None)[0]


def _condition(file: Blocks, moments: Moments, places: list[int], classes: list[int]) -> Condition:
    """Say what the contexts of a file are."""
    names = [file.columns[i] if file.columns else str(i + 1) for i in places]
    if classes:
        return Condition(names, classes)
    parts = moments.mean[places], moments.std[places]
    why = "so nothing depends on it"
    mean, std = check_moments(file.name, *parts, places, why, file.columns)
    return Condition(names, mean=mean, std=std)
