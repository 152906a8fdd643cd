"""What a data set is: training rows, held-out rows and how to read their values."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Batch",
    "Condition",
    "Conditioned",
    "DataError",
    "DataSet",
    "InTurn",
    "Rows",
    "column_at",
    "parts_of",
    "repeated_columns",
    "split_rows",
]


class DataError(ValueError):
    """Data that cannot be used.  The message is one line that names the file and, if known, the row.

    Example:
        >>> from pyflowkern.data import DataError
        >>> from pyflowkern.data import load
        >>> try:
        ...     load("no_such_table.csv")
        ... except DataError as error:
        ...     print(error)
        no_such_table.csv: no such file or folder, nor one of the named sets (photos, digits)
    """

    exit_code = 2


@dataclass(frozen=True)
class Conditioned:
    """Rows and the context of each, used as a tensor of rows is.

    Contexts are numbers ``[N, K]`` in the units of the file, or classes ``[N]``, int64 from 0 on.

    Args:
        rows: ``[N, ...]``.
        context: ``[N, K]`` or ``[N]``.

    Example:
        >>> import torch
        >>> from pyflowkern.data import Conditioned
        >>> rows = Conditioned(torch.zeros(5, 2), torch.arange(5))
        >>> len(rows), rows[torch.tensor([4, 0])].context.tolist(), len(rows.split(3))
        (5, [4, 0], 2)
    """

    rows: Tensor
    context: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the rows."""
        return self.rows.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> Conditioned:
        return Conditioned(self.rows[index], self.context[index])

    def split(self, size: int) -> tuple[Conditioned, ...]:
        """Return parts of ``size`` rows, as :meth:`torch.Tensor.split` does."""
        parts = zip(self.rows.split(size), self.context.split(size), strict=True)
        return tuple(Conditioned(*part) for part in parts)

    def to(self, device: torch.device) -> Conditioned:
        """Return both on a device."""
        return Conditioned(self.rows.to(device), self.context.to(device))


Batch = Tensor | Conditioned


def parts_of(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the rows of a batch, and their context if they have one.

    Args:
        batch: a tensor, or rows with contexts.

    Example:
        >>> import torch
        >>> from pyflowkern.data import Conditioned, parts_of
        >>> rows, context = parts_of(Conditioned(torch.zeros(5, 2), torch.arange(5)))
        >>> tuple(rows.shape), context.tolist(), parts_of(torch.zeros(5, 2))[1]
        ((5, 2), [0, 1, 2, 3, 4], None)
    """
    return (batch.rows, batch.context) if isinstance(batch, Conditioned) else (batch, None)


class Rows(Protocol):
    """Anything with a length that gives a batch for a tensor of row numbers; a tensor is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Batch: ...


@runtime_checkable
class InTurn(Protocol):
    """Rows that are read in an order of their own, which suits where they lie."""

    def __len__(self) -> int: ...

    def shuffled(self, seed: int, pass_: int, begin: int, end: int) -> Batch:
        """Return rows by their places in the order of a pass, which follows from the seed."""


@dataclass(frozen=True)
class Condition:
    """What contexts are: columns with their mean and standard deviation, or the classes of one column.

    ``classes`` are the numbers that a file has for them, in order; mean and standard deviation come from the training
    rows alone.

    Example:
        >>> from pyflowkern.data import Condition
        >>> Condition(["digit"], classes=[0, 1, 2]).mean is None
        True
    """

    columns: list[str]  #: names of the columns
    classes: list[int] = field(default_factory=list)  #: none for numbers
    mean: Tensor | None = None  #: ``[K]``, of numbers
    std: Tensor | None = None  #: ``[K]``


@dataclass(frozen=True)
class DataSet:
    """Training and held-out rows of one kind: integer images or real vectors.

    Images are ``uint8 [N, C, H, W]`` with ``levels`` used values, modelled as ``bits``-bit integers.  Vectors are
    ``float32 [N, D]`` in the units of the file; ``mean`` and ``std`` come from the training rows alone.  With a
    ``condition`` both parts are :class:`Conditioned`.

    Example:
        >>> import torch
        >>> from pyflowkern.data import DataSet
        >>> data = DataSet("numbers", torch.randn(90, 3), torch.randn(10, 3))
        >>> data.shape, data.is_image
        ((3,), False)
    """

    name: str  #: of the file or the named set
    train: Rows | InTurn  #: training rows
    validation: Batch  #: rows that were held out
    bits: int | None = None  #: of an integer pixel; None for vectors
    levels: int = 256  #: how many values pixels have
    flip: bool = False  #: whether training images are mirrored at random
    mean: Tensor | None = None  #: ``[D]``, of the columns of vectors
    std: Tensor | None = None  #: ``[D]``, their standard deviations
    columns: list[str] = field(default_factory=list)  #: names of the columns, or none
    condition: Condition | None = None  #: what the contexts are
    checksum: int | None = None  #: of all rows, where they were read one after the other
    places: list[int] = field(default_factory=list)  #: of columns in the file; none: as they come

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one row, without the batch axis."""
        return tuple(self.validation.shape[1:])

    @property
    def is_image(self) -> bool:
        """Whether rows are integer images."""
        return self.bits is not None

    def fingerprint(self) -> int:
        """Return a checksum of sample rows, by which a resumed run knows that its data is the same."""
        if self.checksum is not None:
            return self.checksum
        assert not isinstance(self.train, InTurn)  # which come with a checksum
        index = torch.linspace(0, len(self.train) - 1, min(len(self.train), 256)).long()
        crc = zlib.crc32(f"{len(self.train)} {self.shape}".encode())
        for batch in (self.train[index], self.validation):
            for part in parts_of(batch):
                if part is not None:
                    crc = zlib.crc32(part.contiguous().numpy().tobytes(), crc)
        return crc


def column_at(place: int, columns: Sequence[str]) -> str:
    """Return how errors call the column at a place, from 0 on; ``columns`` are names of all, or none."""
    return _column(place, columns[place] if columns else "")


def _column(place: int, name: str) -> str:
    name = " ".join(name.split())[:40]  # errors are one line
    return f"column {place + 1} ({name})" if name else f"column {place + 1}"


def repeated_columns(data: DataSet) -> list[str]:
    """Return a line for each column of vectors whose values occur ten times on average, or more: it has no density.

    The values are those of held-out rows, the first 10,000 of them.
    """
    rows = parts_of(data.validation)[0][:10_000]
    if data.is_image:
        return []
    places = data.places or range(rows.shape[1])
    names = data.columns or [""] * len(places)
    lines = []
    for place, name, column in zip(places, names, rows.unbind(1), strict=True):
        different = len(column.unique())
        if 0 < 10 * different <= len(rows):
            lines.append(
                f"{data.name}, {_column(place, name)}: {different} values in {len(rows)} held-out rows; "
                "log-densities grow without bound where values repeat: add noise as wide as their steps, "
                "or leave the column out"
            )
    return lines


def split_rows(rows: int, seed: int, fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return the row numbers of a random split into training and held-out rows."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    held_out = max(1, round(rows * fraction))
    return order[held_out:], order[:held_out]
