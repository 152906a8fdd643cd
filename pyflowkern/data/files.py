"""Data from the user's own files: a table (``.csv``), an array (``.npy``) or a folder of images."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyflowkern.data.conditioned import Columns, take_context
from pyflowkern.data.dataset import Condition, DataError, DataSet, split_rows
from pyflowkern.data.photos import read_image

__all__ = ["image_set", "moments_of", "read_array", "read_folder", "read_table", "vector_set"]

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
    rows: list[list[float]] = []
    header: list[str] = []
    check_regular(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for line, cells in enumerate(csv.reader(file), start=1):
                if not cells:
                    continue
                numbers = _numbers(cells)
                if not rows and not header and all(_numbers([cell]) is None for cell in cells):
                    header = [cell.strip() for cell in cells]
                    continue
                if numbers is None:
                    bad = next(c for c in cells if _numbers([c]) is None)
                    raise DataError(f"{path}, row {line}: {bad.strip()[:40]!r} is not a number")
                if len(numbers) != len(header or (rows[0] if rows else numbers)):
                    wanted = len(header or rows[0])
                    raise DataError(
                        f"{path}, row {line}: {len(numbers)} columns instead of {wanted}"
                    )
                for cell, number in zip(cells, numbers, strict=True):
                    if not abs(number) <= LARGEST:  # false for NaN, too
                        raise DataError(f"{path}, row {line}: {_unusable(cell, number)}")
                rows.append(numbers)
    except (OSError, UnicodeDecodeError, csv.Error, MemoryError) as error:
        raise DataError(f"{path}: not a readable table ({error})") from None
    if not rows:
        raise DataError(f"{path}: holds no rows of numbers")
    return torch.tensor(rows, dtype=torch.float32), header


def vector_set(
    path: Path, rows: Tensor, columns: list[str], seed: int, context: Columns | None = None
) -> DataSet:
    """Return vectors as a data set, split at random, with the statistics that standardise them."""
    if len(rows) < 2:
        raise DataError(f"{path}: needs 2 rows at least, has {len(rows)}")
    train, held_out = split_rows(len(rows), seed)
    if context is None:
        mean, std = moments_of(str(path), rows[train])
        return DataSet(str(path), rows[train], rows[held_out], mean=mean, std=std, columns=columns)
    both, places, classes = take_context(str(path), rows, columns, context)
    rest = [i for i in range(rows.shape[1]) if i not in places]
    mean, std = moments_of(str(path), both.rows[train], rest)
    condition = Condition([columns[i] if columns else str(i + 1) for i in places], classes)
    if not classes:
        moments = moments_of(str(path), both.context[train], places, "so nothing depends on it")
        condition = replace(condition, mean=moments[0], std=moments[1])
    names = [columns[i] for i in rest] if columns else []
    data = DataSet(str(path), both[train], both[held_out], columns=names, condition=condition)
    return replace(data, mean=mean, std=std)


def moments_of(
    name: str,
    rows: Tensor,
    places: Sequence[int] | None = None,
    constant: str = "so it has no density",
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column; raise DataError for one that is constant.

    Args:
        name: of the file, for errors.
        rows: ``[N, columns]``.
        places: where the columns stand in the file, from 0 on; as they come if None.
        constant: what follows from a constant column.
    """
    mean, std = rows.double().mean(0), rows.double().std(0, correction=0)
    smallest = torch.finfo(torch.float32).tiny
    for i, (centre, spread) in enumerate(zip(mean.tolist(), std.tolist(), strict=True)):
        column = 1 + (i if places is None else places[i])
        if spread == 0 or spread <= 1e-7 * abs(centre):
            raise DataError(f"{name}, column {column}: constant, {constant}; leave it out")
        if spread < smallest:
            raise DataError(
                f"{name}, column {column}: its spread of {spread:.2g} is too small for float32; scale it up"
            )
    return mean.float(), std.float()


def image_set(path: Path, images: Tensor, seed: int) -> DataSet:
    """Return ``uint8 [N, C, H, W]`` as a data set, split at random by image."""
    if len(images) < 2:
        raise DataError(f"{path}: needs 2 images at least, has {len(images)}")
    train, held_out = split_rows(len(images), seed)
    return DataSet(str(path), images[train], images[held_out], bits=8)


def read_array(path: Path) -> Tensor:
    """Read a ``.npy`` file of images (uint8, four axes) or vectors (real, two axes)."""
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
        return torch.from_numpy(_copied(path, array, np.uint8))
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: wants real [N, D] vectors or uint8 [N, C, H, W] images, "
            f"got {array.dtype} {list(array.shape)}"
        )
    rows = _copied(path, array, np.float32)
    bad = np.argwhere(~np.isfinite(rows))
    if bad.size:
        row, column = bad[0]
        value = array[row, column]
        raise DataError(f"{path}, row {row + 1}: {_unusable(str(value), float(value))}")
    return torch.from_numpy(rows)


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
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{path}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return torch.stack([_square(read_image(f), f, size) for f in files])
