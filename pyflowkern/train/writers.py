"""Rows into a file part by part: an array, a table or Parquet."""

from __future__ import annotations

import csv
import io
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from pyflowkern.core.files import open_atomic
from pyflowkern.data import check_pyarrow, parquet_writer
from pyflowkern.train.config import ConfigError

__all__ = ["SUFFIXES", "rows_into"]

Write = Callable[[Tensor], object]
#: The kinds of files, and the bytes that a number takes in them at least.
SUFFIXES = {".npy": 4, ".csv": 4, ".parquet": 2}


@contextmanager
def rows_into(path: Path, n: int, shape: tuple[int, ...], columns: list[str]) -> Iterator[Write]:
    """Give the block a function that writes rows; the file stands at ``path`` once all ``n`` are written.

    Args:
        path: ends in .npy, .csv or .parquet.
        n: how many rows.
        shape: of a row: ``(D,)`` of float32 numbers, or that of an image of uint8 pixels, which needs .npy.
        columns: names of the numbers; none for numbers without names.

    Raises:
        ConfigError: where the disk has not enough space; DataError without pyarrow for .parquet.
        OSError: naming ``path`` if it cannot be written.
    """
    suffix = path.suffix.lower()
    pixels = len(shape) > 1
    if suffix == ".parquet":
        check_pyarrow(path)
    _check_space(path, n, n * math.prod(shape) * (1 if pixels else SUFFIXES[suffix]))
    if suffix == ".parquet":
        names = columns or [f"x{i + 1}" for i in range(shape[0])]
        with open_atomic(path) as file, parquet_writer(path, file, names) as write:
            yield write
        return
    with open_atomic(path) as file:
        if suffix == ".npy":
            yield _array(file, (n, *shape), "|u1" if pixels else "<f4")
        else:
            yield _table(file, columns)


def _check_space(path: Path, n: int, wanted: int) -> None:
    """Refuse more rows than the disk has space for, before the first is written."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise ConfigError(
            f"{path}: {n} samples would take {wanted / 1e9:.3g} GB or more, its disk has {free / 1e9:.3g} GB left"
        )


def _array(file: BinaryIO, shape: tuple[int, ...], descr: str) -> Write:
    """Write the header of a ``.npy`` file, which says how many rows follow."""
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return lambda rows: file.write(rows.contiguous().numpy().astype(descr, copy=False).data)


def _table(file: BinaryIO, columns: list[str]) -> Write:
    def write(rows: list[list[float]] | list[list[str]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        file.write(text.getvalue().encode())

    if columns:
        write([columns])
    # the shortest text of a float32, which as a Python float would have the digits of a double
    return lambda rows: write(rows.numpy().astype("U").tolist())
