"""Data from the user's own files: a table (``.csv``), an array (``.npy``) or a folder of images."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyflowkern.data.dataset import DataError, DataSet, split_rows
from pyflowkern.data.photos import read_image

__all__ = ["image_set", "read_array", "read_folder", "read_table", "vector_set"]

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


def _numbers(cells: list[str]) -> list[float] | None:
    try:
        return [float(cell) for cell in cells]
    except ValueError:
        return None


def read_table(path: Path) -> tuple[Tensor, list[str]]:
    """Read a comma-separated table of numbers; a first row without any number is its header."""
    rows: list[list[float]] = []
    header: list[str] = []
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
                if not all(abs(number) <= LARGEST for number in numbers):  # false for NaN, too
                    raise DataError(f"{path}, row {line}: holds NaN or inf")
                rows.append(numbers)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable table ({error})") from None
    if not rows:
        raise DataError(f"{path}: holds no rows of numbers")
    return torch.tensor(rows, dtype=torch.float32), header


def vector_set(path: Path, rows: Tensor, columns: list[str], seed: int) -> DataSet:
    """Return vectors as a data set, split at random, with the statistics that standardise them."""
    if len(rows) < 2:
        raise DataError(f"{path}: needs 2 rows at least, has {len(rows)}")
    train, held_out = split_rows(len(rows), seed)
    mean, std = rows[train].double().mean(0), rows[train].double().std(0, correction=0)
    constant = (std <= 1e-7 * mean.abs()).nonzero().flatten().tolist()
    if constant:
        raise DataError(
            f"{path}, column {constant[0] + 1}: constant, so it has no density; leave it out"
        )
    return DataSet(
        str(path),
        rows[train],
        rows[held_out],
        mean=mean.float(),
        std=std.float(),
        columns=columns,
    )


def image_set(path: Path, images: Tensor, seed: int) -> DataSet:
    """Return ``uint8 [N, C, H, W]`` as a data set, split at random by image."""
    if len(images) < 2:
        raise DataError(f"{path}: needs 2 images at least, has {len(images)}")
    train, held_out = split_rows(len(images), seed)
    return DataSet(str(path), images[train], images[held_out], bits=8)


def read_array(path: Path) -> Tensor:
    """Read a ``.npy`` file of images (uint8, four axes) or vectors (real, two axes)."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: not a readable .npy file ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: is an archive of arrays (.npz), wants one array (.npy)")
    if array.size == 0:
        raise DataError(f"{path}: is empty (shape {array.shape})")
    if array.dtype == np.uint8 and array.ndim == 4:
        if array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        if array.shape[1] not in (1, 3):
            raise DataError(f"{path}: images have 1 or 3 channels, got shape {list(array.shape)}")
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: wants real [N, D] vectors or uint8 [N, C, H, W] images, "
            f"got {array.dtype} {list(array.shape)}"
        )
    with np.errstate(over="ignore"):  # becomes inf, which is refused below
        rows = array.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if bad.size:
        raise DataError(f"{path}, row {bad[0] + 1}: holds NaN or inf")
    return torch.from_numpy(rows)


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
