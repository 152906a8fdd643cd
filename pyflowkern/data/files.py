"""Data from the user's own files: a table (``.csv``), an array (``.npy``) or a folder of images."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyflowkern.data.conditioned import Columns, take_context
from pyflowkern.data.dataset import Condition, DataError, DataSet, column_at, split_rows
from pyflowkern.data.photos import read_image

__all__ = [
    "ArrayFile",
    "check_finite",
    "check_moments",
    "folder_parts",
    "image_set",
    "moments_of",
    "read_array",
    "read_folder",
    "read_table",
    "table_parts",
    "vector_set",
]

IMAGE_SUFFIXES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
}

LARGEST = torch.finfo(torch.float32).max
#: What other tables have between columns.
_SEPARATORS = {";": "semicolons", "\t": "tabs", " ": "spaces"}


def check_regular(path: Path) -> None:
    """Raise DataError for a named pipe, a socket or a device, on which a read could wait for ever."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is not a regular file")


def _unusable(text: str, value: float) -> str | None:
    """Say why a number cannot be a value, ``text`` being how the file has it."""
    if abs(value) <= LARGEST:
        return None
    if math.isfinite(value) or any(
        digit in text for digit in "0123456789"
    ):  # 1e999 is read as inf
        return f"holds {text.strip()[:40]}, which is too large for float32 ({LARGEST:.2g} at most)"
    return "holds NaN or inf"


def _numbers(cells: list[str]) -> list[float] | None:
    try:
        return [float(cell) for cell in cells]
    except ValueError:
        return None


def read_table(path: Path) -> tuple[Tensor, list[str]]:
    """Read a comma-separated table of numbers; a first row without any number is its header."""
    parts, headers = zip(*table_parts(path, 2**16), strict=True)
    return torch.cat(parts), headers[0]


def table_parts(path: Path, numbers: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Read a table a part at a time, with about so many numbers; each part comes with the header."""
    header, rows = list[str](), list[list[float]]()
    width, some = 0, False
    for line, cells in _table_lines(path):
        if not width and all(_numbers([cell]) is None for cell in cells):
            header, width = [cell.strip() for cell in cells], len(cells)
            continue
        width = width or len(cells)
        rows.append(_table_row(path, line, cells, width, header))
        if len(rows) * width >= numbers:
            yield torch.tensor(rows, dtype=torch.float32), header
            rows, some = [], True
    if rows:
        yield torch.tensor(rows, dtype=torch.float32), header
    elif not some:
        raise DataError(f"{path}: holds no rows of numbers")


def _table_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines of a table that are not empty, and their numbers."""
    check_regular(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for line, cells in enumerate(csv.reader(file), start=1):
                if cells:
                    yield line, cells
    except (OSError, UnicodeDecodeError, csv.Error, MemoryError) as error:
        raise DataError(f"{path}: not a readable table ({error})") from None


def _table_row(
    path: Path, line: int, cells: list[str], width: int, header: list[str]
) -> list[float]:
    numbers = _numbers(cells)
    if len(cells) != width:
        raise DataError(f"{path}, row {line}: {len(cells)} columns instead of {width}")
    if numbers is None:
        _check_separator(path, line, cells)
        place = next(i for i, cell in enumerate(cells) if _numbers([cell]) is None)
        held = cells[place].strip()[:40]
        what = f"{held!r} is not a number" if held else "is empty, wants a number"
        raise DataError(f"{path}, row {line}, {column_at(place, header)}: {what}")
    for place, (cell, number) in enumerate(zip(cells, numbers, strict=True)):
        if not abs(number) <= LARGEST:  # false for NaN, too
            where = f"{path}, row {line}, {column_at(place, header)}"
            raise DataError(f"{where}: {_unusable(cell, number)}")
    return numbers


def _check_separator(path: Path, line: int, cells: list[str]) -> None:
    """Raise DataError for numbers that are separated, but not by commas."""
    for mark, name in _SEPARATORS.items():
        if len(cells) == 1 and mark in cells[0] and _numbers(cells[0].split(mark)) is not None:
            raise DataError(
                f"{path}, row {line}: numbers are separated by {name}; a .csv file has commas"
            )


def vector_set(
    path: Path, rows: Tensor, columns: list[str], seed: int, context: Columns | None = None
) -> DataSet:
    """Return vectors as a data set, split at random, with the statistics that standardise them.

    Args:
        path: of the file, for its name and errors.
        rows: ``float32 [N, D]``.
        columns: names of the columns, or none.
        seed: decides the split.
        context: the columns that are contexts of the others.

    Raises:
        DataError: one line, for less than two rows, and for a column that is constant or overflows.

    Example:
        >>> from pathlib import Path
        >>> import torch
        >>> from pyflowkern.data import vector_set
        >>> data = vector_set(Path("t.csv"), torch.randn(50, 2), ["a", "b"], seed=0)
        >>> len(data.train), len(data.validation), data.columns
        (45, 5, ['a', 'b'])
    """
    if len(rows) < 2:
        raise DataError(f"{path}: needs 2 rows at least, has {len(rows)}")
    train, held_out = split_rows(len(rows), seed)
    if context is None:
        mean, std = moments_of(str(path), rows[train], columns=columns)
        return DataSet(str(path), rows[train], rows[held_out], mean=mean, std=std, columns=columns)
    both, places, classes = take_context(str(path), rows, columns, context)
    rest = [i for i in range(rows.shape[1]) if i not in places]
    mean, std = moments_of(str(path), both.rows[train], rest, columns=columns)
    condition = Condition([columns[i] if columns else str(i + 1) for i in places], classes)
    if not classes:
        rows, why = both.context[train], "so nothing depends on it"
        moments = moments_of(str(path), rows, places, why, columns)
        condition = replace(condition, mean=moments[0], std=moments[1])
    names = [columns[i] for i in rest] if columns else []
    data = DataSet(str(path), both[train], both[held_out], columns=names, condition=condition)
    return replace(data, mean=mean, std=std, places=rest)


def moments_of(
    name: str,
    rows: Tensor,
    places: Sequence[int] | None = None,
    constant: str = "so it has no density",
    columns: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column; raise DataError for one that is constant.

    Args:
        name: of the file, for errors.
        rows: ``[N, columns]``.
        places: where the columns stand in the file, from 0 on; as they come if None.
        constant: what follows from a constant column.
        columns: names of all columns of the file, or none.
    """
    doubles = rows.double()
    mean, std = doubles.mean(0), doubles.std(0, correction=0)
    return check_moments(name, mean, std, places, constant, columns)


def check_moments(
    name: str,
    mean: Tensor,
    std: Tensor,
    places: Sequence[int] | None = None,
    constant: str = "so it has no density",
    columns: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """Return float64 moments of columns as float32; raise DataError for a column that is constant.  Args as above."""
    smallest = torch.finfo(torch.float32).tiny
    for i, (centre, spread) in enumerate(zip(mean.tolist(), std.tolist(), strict=True)):
        column = column_at(i if places is None else places[i], columns)
        if spread == 0 or spread <= 1e-7 * abs(centre):
            raise DataError(f"{name}, {column}: constant, {constant}; leave it out")
        if spread < smallest:
            raise DataError(
                f"{name}, {column}: its spread of {spread:.2g} is too small for float32; scale it up"
            )
    return mean.float(), std.float()


def image_set(path: Path, images: Tensor, seed: int) -> DataSet:
    """Return ``uint8 [N, C, H, W]`` as a data set, split at random by image.

    Args:
        path: of the file, for its name and errors.
        images: the images.
        seed: decides the split.

    Raises:
        DataError: one line, for less than two images.

    Example:
        >>> from pathlib import Path
        >>> import torch
        >>> from pyflowkern.data import image_set
        >>> data = image_set(Path("images.npy"), torch.zeros(50, 3, 8, 8, dtype=torch.uint8), seed=0)
        >>> data.shape, data.bits, len(data.validation)
        ((3, 8, 8), 8, 5)
    """
    if len(images) < 2:
        raise DataError(f"{path}: needs 2 images at least, has {len(images)}")
    train, held_out = split_rows(len(images), seed)
    return DataSet(str(path), images[train], images[held_out], bits=8)


def read_array(path: Path) -> Tensor:
    """Read a ``.npy`` file of images (uint8, four axes) or vectors (real, two axes)."""
    return _array_rows(path, _open_array(path))


class ArrayFile:
    """A ``.npy`` file as :func:`read_array` takes it, of which blocks of rows are read.

    The file is mapped anew for each block: one that has become shorter is an error then, and what was read need not
    stay in memory.

    Args:
        path: the file.
        numbers: about how many a block has.

    Raises:
        DataError: one line, for a file that is damaged, empty or of another kind.
    """

    def __init__(self, path: Path, numbers: int) -> None:
        array = _open_array(path)
        self.name, self.columns, self.shape = str(path), list[str](), tuple(array.shape[1:])
        self._path, self._all = path, len(array)
        # 128 images are scored at a time, and their noise must not depend on the blocks
        self._rows = max(1, numbers // math.prod(self.shape) // 128) * 128
        begins = range(0, self._all, self._rows)
        self.counts = [min(self._rows, self._all - begin) for begin in begins]

    def read(self, block: int) -> Tensor:
        """Return the rows of a block: ``float32 [n, D]``, or ``uint8 [n, C, H, W]``."""
        array = _open_array(self._path)
        if array.shape != (self._all, *self.shape):
            raise DataError(f"{self.name}: has changed while it was read")
        begin = block * self._rows
        return _array_rows(self._path, array[begin : begin + self._rows], begin)


def _open_array(path: Path) -> np.ndarray[Any, Any]:
    """Map a ``.npy`` file: images ``[N, C, H, W]`` or vectors ``[N, D]``."""
    check_regular(path)
    try:  # mapped: a header that promises more than the file holds is refused before memory is taken for it
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except Exception as error:  # a damaged file raises almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: not a readable .npy file ({reason})") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: is an archive of arrays (.npz), wants one array (.npy)")
    if array.size == 0:
        raise DataError(f"{path}: is empty (shape {array.shape})")
    if array.dtype == np.uint8 and array.ndim == 4:
        if array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        if array.shape[1] not in (1, 3):
            raise DataError(f"{path}: images have 1 or 3 channels, got shape {list(array.shape)}")
    elif array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: wants real [N, D] vectors or uint8 [N, C, H, W] images, "
            f"got {array.dtype} {list(array.shape)}"
        )
    return array


def _array_rows(path: Path, array: np.ndarray[Any, Any], row: int = 0) -> Tensor:
    """Return rows of a mapped array, the first of which is number ``row`` of the file, from 0 on."""
    if array.ndim == 4:
        return torch.from_numpy(_copied(path, array, np.uint8))
    rows = _copied(path, array, np.float32)
    check_finite(str(path), rows, lambda i, j: array[i, j], row)
    return torch.from_numpy(rows)


def check_finite(
    name: str,
    rows: np.ndarray[Any, Any],
    value: Callable[[int, int], Any],
    row: int = 0,
    columns: Sequence[str] = (),
) -> None:
    """Raise DataError for the first number that float32 cannot hold.

    Args:
        name: of the file.
        rows: float32 ``[n, D]``, where such a number is inf or NaN.
        value: gives the number as the file has it.
        row: number of the first row in the file, from 0 on.
        columns: their names, or none.
    """
    if np.isfinite(rows).all():
        return
    i, j = (int(k) for k in np.argwhere(~np.isfinite(rows))[0])
    held = value(i, j)
    where = f"{name}, row {row + i + 1}, {column_at(j, columns)}"
    raise DataError(f"{where}: {_unusable(str(held), float(held))}")


def _copied(path: Path, array: np.ndarray[Any, Any], dtype: type) -> np.ndarray[Any, Any]:
    """Read a mapped array into memory; what float32 cannot hold becomes inf."""
    try:
        with np.errstate(over="ignore"):
            return np.array(array, dtype=dtype, order="C")
    except MemoryError:
        raise DataError(f"{path}: {list(array.shape)} values are more than memory holds") from None


def _square(image: Tensor, path: Path, size: int) -> Tensor:
    """Cut the centre square and scale it down to ``size``."""
    side = min(image.shape[1:])
    if side < size:
        raise DataError(
            f"{path}: {image.shape[2]}x{image.shape[1]} pixels, smaller than {size}x{size}"
        )
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    centre = image[:, top : top + side, left : left + side].permute(1, 2, 0).numpy()
    scaled = Image.fromarray(centre).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)


def read_folder(path: Path, size: int) -> Tensor:
    """Read the images of a folder and its subfolders, centre-cropped and scaled down to ``size``."""
    return torch.cat([*folder_parts(path, size)[1]])


def folder_parts(path: Path, size: int, images: int = 128) -> tuple[int, Iterator[Tensor]]:
    """Return how many images a folder has, and what reads ``images`` of them at a time as :func:`read_folder` does."""
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{path}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    parts = (files[begin : begin + images] for begin in range(0, len(files), images))
    return len(files), (torch.stack([_square(read_image(f), f, size) for f in p]) for p in parts)
