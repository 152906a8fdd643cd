"""The photographs that scikit-learn and scikit-image ship, cut into patches; split by photograph, never by patch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyflowkern.data.dataset import DataError, DataSet

__all__ = ["HELD_OUT_PHOTOS", "TRAIN_PHOTOS", "Crops", "grid_patches", "load_photos", "read_image"]

#: (package, file); these lie inside the wheels, nothing is downloaded.
TRAIN_PHOTOS = (
    ("skimage.data", "astronaut.png"),
    ("skimage.data", "motorcycle_left.png"),
    ("skimage.data", "rocket.jpg"),
    ("sklearn.datasets", "images/china.jpg"),
    ("sklearn.datasets", "images/flower.jpg"),
)
HELD_OUT_PHOTOS = (
    ("skimage.data", "coffee.png"),
    ("skimage.data", "chelsea.png"),
)


class Crops:
    """Every ``size`` x ``size`` crop of some photographs, addressed by one row number and cut on demand.

    Example:
        >>> crops = Crops([torch.zeros(3, 40, 50, dtype=torch.uint8)], 32)
        >>> len(crops), crops[torch.tensor([0, 170])].shape
        (171, torch.Size([2, 3, 32, 32]))
    """

    def __init__(self, photos: list[Tensor], size: int) -> None:
        self._windows = [
            p.unfold(1, size, 1).unfold(2, size, 1) for p in photos
        ]  # views, no copies
        counts = [w.shape[1] * w.shape[2] for w in self._windows]
        self._ends = torch.tensor(counts).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([self._crop(int(i)) for i in index])

    def _crop(self, row: int) -> Tensor:
        photo = int(torch.searchsorted(self._ends, row, right=True))
        windows = self._windows[photo]
        row -= int(self._ends[photo - 1]) if photo else 0
        return windows[:, row // windows.shape[2], row % windows.shape[2]]


def grid_patches(photo: Tensor, size: int) -> Tensor:
    """Cut ``[C, H, W]`` into the ``[N, C, size, size]`` patches of a fixed grid without overlap."""
    patches = photo.unfold(1, size, size).unfold(2, size, size)
    return patches.permute(1, 2, 0, 3, 4).reshape(-1, photo.shape[0], size, size).contiguous()


def read_image(path: Path) -> Tensor:
    """Read an image file as ``uint8 [3, H, W]``; DataError names the file when that fails."""
    if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
        raise DataError(f"{path}: is not a regular file")
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # a damaged file raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a readable image ({reason})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _bundled(package: str, name: str) -> Tensor:
    try:
        with resources.as_file(resources.files(package).joinpath(name)) as path:
            return read_image(path)
    except ModuleNotFoundError as error:
        raise DataError(f"photos needs {error.name}: pip install 'pyflowkern[train]'") from None


def load_photos(size: int = 32) -> DataSet:
    """Return the ``photos`` set: random crops of five photographs, a fixed grid over two others.

    Example:
        >>> photos = load_photos()
        >>> photos.shape, photos.validation.shape[0]
        ((3, 32, 32), 342)
    """
    train = [_bundled(*photo) for photo in TRAIN_PHOTOS]
    held_out = [_bundled(*photo) for photo in HELD_OUT_PHOTOS]
    largest = min(min(photo.shape[1:]) for photo in train + held_out)
    if size > largest:
        raise DataError(f"photos: size must be at most {largest} pixels, got {size}")
    patches = torch.cat([grid_patches(photo, size) for photo in held_out])
    return DataSet("photos", Crops(train, size), patches, bits=8, flip=True)
