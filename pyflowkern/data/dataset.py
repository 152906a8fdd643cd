"""What a data set is: training rows, held-out rows and how to read their values."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DataError", "DataSet", "Rows", "split_rows"]


class DataError(ValueError):
    """Data that cannot be used.  The message is one line that names the file and, if known, the row."""

    exit_code = 2


class Rows(Protocol):
    """Anything with a length that gives a batch for a tensor of row numbers; a tensor is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DataSet:
    """Training and held-out rows of one kind: integer images or real vectors.

    Images are ``uint8 [N, C, H, W]`` with ``levels`` used values, modelled as ``bits``-bit integers.  Vectors are
    ``float32 [N, D]`` in the units of the file; ``mean`` and ``std`` come from the training rows alone.
    """

    name: str
    train: Rows
    validation: Tensor
    bits: int | None = None
    levels: int = 256
    flip: bool = False
    mean: Tensor | None = None
    std: Tensor | None = None
    columns: list[str] = field(default_factory=list)

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
        index = torch.linspace(0, len(self.train) - 1, min(len(self.train), 256)).long()
        parts = (self.train[index], self.validation)
        crc = zlib.crc32(f"{len(self.train)} {self.shape}".encode())
        for part in parts:
            crc = zlib.crc32(part.contiguous().numpy().tobytes(), crc)
        return crc


def split_rows(rows: int, seed: int, fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return the row numbers of a random split into training and held-out rows."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    held_out = max(1, round(rows * fraction))
    return order[held_out:], order[:held_out]
