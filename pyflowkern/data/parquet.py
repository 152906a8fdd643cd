"""Tables in Parquet files, read and written in parts (needs the extra ``pyflowkern[parquet]``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pyflowkern.data.dataset import DataError, column_at
from pyflowkern.data.files import check_finite, check_regular

__all__ = ["ParquetTable", "check_pyarrow", "parquet_writer"]

#: Rows that are decoded at a time.
ROWS = 2**16


def check_pyarrow(path: Path) -> Any:
    """Return pyarrow with its Parquet part, imported only here.

    Args:
        path: what the error names.

    Raises:
        DataError: one line, where pyarrow is not installed.

    Example:
        >>> from pathlib import Path
        >>> from pyflowkern.data import check_pyarrow
        >>> check_pyarrow(Path("rows.parquet")).__name__
        'pyarrow'
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: Parquet files need pyarrow: pip install 'pyflowkern[parquet]'"
        ) from None
    return pyarrow


class ParquetTable:
    """A table of numbers in a Parquet file; its blocks are the row groups of the file.

    Args:
        path: the file.

    Raises:
        DataError: one line, for a file that is damaged, empty, or has a column without numbers, and without pyarrow.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self.name, self._path = str(path), path
        self._arrow = check_pyarrow(path)
        # columns are read through small buffers, not whole: memory is to be that of a part
        options = {"pre_buffer": False, "buffer_size": 2**20}
        self._file = self._tried(lambda: self._arrow.parquet.ParquetFile(path, **options))
        schema, metadata = self._tried(lambda: (self._file.schema_arrow, self._file.metadata))
        types = self._arrow.types
        for field in schema:
            if not (types.is_integer(field.type) or types.is_floating(field.type)):
                raise DataError(
                    f"{path}: column {field.name!r} holds values of type {field.type}, wants numbers"
                )
        self.columns: list[str] = list(schema.names)
        self.shape: tuple[int, ...] = (len(self.columns),)
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._groups = [i for i, rows in enumerate(sizes) if rows]
        self.counts = [sizes[i] for i in self._groups]
        if not (self.counts and self.columns):
            raise DataError(f"{path}: holds no rows of numbers")

    def read(self, block: int) -> Tensor:
        """Return the rows of a block, ``float32 [n, columns]``."""
        rows, at = torch.empty(self.counts[block], *self.shape), 0
        for part in self.parts(ROWS, [block]):
            rows[at : at + len(part)] = part
            at += len(part)
        return rows

    def parts(self, rows: int, blocks: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Yield the rows of some blocks, or all, in their order, at most ``rows`` at a time."""
        blocks = range(len(self.counts)) if blocks is None else blocks
        groups = [self._groups[block] for block in blocks]
        row = sum(self.counts[: blocks[0]])
        batches = iter(
            self._file.iter_batches(batch_size=rows, row_groups=groups, use_threads=False)
        )
        while (batch := self._tried(lambda: next(batches, None))) is not None:
            yield self._numbers(batch, row)
            row += batch.num_rows

    def _numbers(self, batch: Any, row: int) -> Tensor:
        """Return a batch of columns as rows, the first of which is number ``row`` of the file, from 0 on."""
        values = np.empty((batch.num_rows, *self.shape), np.float32)
        with np.errstate(over="ignore"):
            for i, column in enumerate(batch.columns):
                if column.null_count:
                    at = 1 + row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
                    where = f"{self.name}, row {at}, {column_at(i, self.columns)}"
                    raise DataError(f"{where}: is empty, wants a number")
                values[:, i] = column.to_numpy(zero_copy_only=False)
        check_finite(
            self.name, values, lambda i, j: batch.columns[j][i].as_py(), row, self.columns
        )
        return torch.from_numpy(values)

    def _tried(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except MemoryError:
            raise
        except Exception as error:  # a damaged file raises almost anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{self.name}: not a readable Parquet file ({reason})") from None


@contextmanager
def parquet_writer(
    path: Path, file: BinaryIO, columns: list[str]
) -> Iterator[Callable[[Tensor], object]]:
    """Give the block a function that writes rows of numbers into an open file, a row group each time.

    Args:
        path: what errors name.
        file: is written to.
        columns: their names.

    Raises:
        DataError: one line, where pyarrow is not installed.

    Example:
        >>> from pathlib import Path
        >>> from pyflowkern.data import parquet_writer
        >>> from pyflowkern.data.parquet import ParquetTable
        >>> import torch
        >>> path = Path("rows.parquet")
        >>> with path.open("wb") as file, parquet_writer(path, file, ["a", "b"]) as write:
        ...     write(torch.zeros(3, 2))
        >>> ParquetTable(path).columns, ParquetTable(path).counts
        (['a', 'b'], [3])
    """
    arrow = check_pyarrow(path)
    schema = arrow.schema([arrow.field(name, arrow.float32()) for name in columns])
    with arrow.parquet.ParquetWriter(file, schema) as writer:

        def write(rows: Tensor) -> None:
            arrays = [arrow.array(column.numpy()) for column in rows.t().contiguous()]
            writer.write_table(arrow.table(arrays, schema=schema))

        yield write
