"""Data sets by name or path (needs the extra ``pyflowkern[train]``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyflowkern.data.batches import Batches, step_seed
from pyflowkern.data.conditioned import Columns, class_numbers, find_columns, take_context
from pyflowkern.data.dataset import (
    Batch,
    Condition,
    Conditioned,
    DataError,
    DataSet,
    parts_of,
    split_rows,
)
from pyflowkern.data.files import (
    ArrayFile,
    folder_parts,
    image_set,
    read_array,
    read_folder,
    read_table,
    table_parts,
    vector_set,
)
from pyflowkern.data.pairs import PairSet, pair_set
from pyflowkern.data.parquet import ParquetTable, check_pyarrow, parquet_writer
from pyflowkern.data.photos import load_photos
from pyflowkern.data.streamed import Blocks, Moments, Streamed, open_blocks, streamed_set

__all__ = [
    "Batch",
    "Batches",
    "Blocks",
    "Columns",
    "Condition",
    "Conditioned",
    "DataError",
    "DataSet",
    "Moments",
    "PairSet",
    "Parts",
    "Streamed",
    "check_pyarrow",
    "find_columns",
    "image_set",
    "load",
    "load_pairs",
    "open_blocks",
    "parquet_writer",
    "parts_of",
    "read",
    "read_parts",
    "step_seed",
    "streamed_set",
    "take_context",
    "vector_set",
]


def load_digits(seed: int, *, labels: bool = False) -> DataSet:
    """Return scikit-learn's 8x8 handwritten digits, with their labels if asked.

    Their 17 grey levels, 0 to 16, are modelled as 5-bit integers: bits/dim count 32 levels, of which 15 are never used.
    """
    import torch
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
    train, held_out = split_rows(len(images), seed)
    rows: Batch = images
    condition = None
    if labels:
        numbers, classes = class_numbers("digits", torch.from_numpy(digits.target))
        rows, condition = Conditioned(images, numbers), Condition(["digit"], classes)
    return DataSet("digits", rows[train], rows[held_out], bits=5, levels=17, condition=condition)


def load(
    source: str | Path,
    *,
    size: int = 32,
    seed: int = 0,
    context: Columns | None = None,
    labels: bool = False,
    stream: bool = False,
) -> DataSet:
    """Load ``photos``, ``digits``, a ``.csv``, ``.npy`` or ``.parquet`` file or a folder of images.

    Args:
        source: A name or a path.
        size: Side of the square patches or images, for ``photos`` and folders.
        seed: Decides the split into training and held-out rows, except for ``photos``.
        context: The columns of a table that are contexts of the others.
        labels: Take the labels of a set that has some, ``digits``, as classes.
        stream: Leave the training rows in the file, ``.npy`` or ``.parquet``: :func:`streamed_set`.

    Raises:
        DataError: One line that names the file and the row at fault.

    Example:
        >>> from pyflowkern.data import load
        >>> load("digits").shape
        (1, 8, 8)
    """
    if labels and source != "digits":
        raise DataError(f"{source}: has no labels of its own, as digits have; name a column")
    if context is not None and source in ("photos", "digits"):
        raise DataError(f"{source}: holds images, which have no columns for a context")
    if stream:
        return streamed_set(open_blocks(Path(source)), seed, context)
    if source == "photos":
        return load_photos(size)
    if source == "digits":
        return load_digits(seed, labels=labels)
    path = Path(source)
    rows, columns = read(path, size=size)
    if rows.dim() == 4 and context is None:
        return image_set(path, rows, seed)
    return vector_set(path, rows, columns, seed, context)


def load_pairs(first: str | Path, second: str | Path, *, seed: int = 0) -> PairSet:
    r"""Load two files of rows with the same columns.

    Args:
        first: A path.
        second: A path.
        seed: Decides the split of each into training and held-out rows.

    Raises:
        DataError: One line that names the file and the row at fault.

    Example:
        >>> from pathlib import Path
        >>> from pyflowkern.data import load_pairs
        >>> _ = Path("a.csv").write_text("1,2\n" * 20 + "3,4\n"), Path("b.csv").write_text("5,6\n" * 20 + "7,8\n")
        >>> load_pairs("a.csv", "b.csv").shape
        (2,)
    """
    paths = Path(first), Path(second)
    tables = [read(path) for path in paths]
    return pair_set(paths, (tables[0][0], tables[1][0]), tables[0][1], seed)


def read(source: str | Path, *, size: int = 32) -> tuple[Tensor, list[str]]:
    r"""Read every row of a file or folder, unsplit: ``uint8 [N, C, H, W]`` or ``float32 [N, D]``, and column names.

    Args:
        source: a path.
        size: side of the images of a folder.

    Raises:
        DataError: One line that names the file and the row at fault.

    Example:
        >>> from pathlib import Path
        >>> from pyflowkern.data import read
        >>> _ = Path("t.csv").write_text("a,b\n1,2\n3,4\n")
        >>> read("t.csv")
        (tensor([[1., 2.],
                [3., 4.]]), ['a', 'b'])
    """
    path, suffix = _existing(source), Path(source).suffix.lower()
    if path.is_dir():
        return read_folder(path, size), []
    if suffix == ".npy":
        return read_array(path), []
    if suffix == ".csv":
        return read_table(path)
    table = ParquetTable(path)
    return torch.cat([*table.parts(2**16)]), table.columns


class Parts(NamedTuple):
    """The rows of a file in their order, a part at a time.

    Example:
        >>> import torch
        >>> from pyflowkern.data import Parts
        >>> Parts(iter([(torch.zeros(2, 3), [])]), total=2).total
        2
    """

    parts: Iterator[tuple[Tensor, list[str]]]  #: what :func:`read` gives of all rows
    total: int | None  #: how many rows there are, if the file says so


def read_parts(source: str | Path, *, size: int = 32, numbers: int = 2**16) -> Parts:
    r"""Read a file or folder as :func:`read` does, about so many numbers at a time, in whole rows.

    Images come in multiples of 128, but for the last.

    Args:
        source: a path.
        size: side of the images of a folder.
        numbers: about how many come at a time.

    Raises:
        DataError: as :func:`read`, when the row at fault is read.

    Example:
        >>> from pyflowkern.data import read_parts
        >>> from pathlib import Path
        >>> _ = Path("t.csv").write_text("a,b" + 5 * "\n1,2")
        >>> [(rows.shape[0], header) for rows, header in read_parts("t.csv", numbers=6).parts]
        [(3, ['a', 'b']), (2, ['a', 'b'])]
    """
    path, suffix = _existing(source), Path(source).suffix.lower()
    if path.is_dir():
        total, images = folder_parts(path, size)
        return Parts(((part, []) for part in images), total)
    if suffix == ".npy":
        array = ArrayFile(path, numbers)
        return Parts(((array.read(i), []) for i in range(len(array.counts))), sum(array.counts))
    if suffix == ".csv":
        return Parts(table_parts(path, numbers), None)
    table = ParquetTable(path)
    rows = max(1, numbers // len(table.columns))
    return Parts(((part, table.columns) for part in table.parts(rows)), sum(table.counts))


def _existing(source: str | Path) -> Path:
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"{source}: no such file or folder, nor one of the named sets (photos, digits)"
        )
    if not path.is_dir() and path.suffix.lower() not in (".csv", ".npy", ".parquet"):
        raise DataError(f"{source}: wants a .csv, .npy or .parquet file or a folder of images")
    return path
