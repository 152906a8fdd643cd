"""Pictures of a run: a grid of samples and the learning curve."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pyflowkern.core.files import write_atomic

__all__ = ["image_grid", "save_curve", "save_grid"]


def image_grid(images: Tensor, levels: int = 256, columns: int = 8, gap: int = 2) -> Tensor:
    """Lay ``uint8 [N, C, H, W]`` out as one ``uint8 [3, H', W']`` picture, ``levels`` spread over black to white.

    Example:
        >>> image_grid(torch.zeros(16, 1, 8, 8, dtype=torch.uint8), columns=4).shape
        torch.Size([3, 42, 42])
    """
    scaled = (images.float() * (255 / (levels - 1))).clamp(0, 255).round().to(torch.uint8)
    rows = -(-len(scaled) // columns)
    blank = scaled.new_zeros((rows * columns - len(scaled), *scaled.shape[1:]))
    cells = F.pad(torch.cat([scaled, blank]).expand(-1, 3, -1, -1), (0, gap, 0, gap), value=255)
    height, width = cells.shape[2:]
    grid = cells.view(rows, columns, 3, height, width).permute(2, 0, 3, 1, 4)
    picture = grid.reshape(3, rows * height, columns * width)
    return F.pad(picture, (gap, 0, gap, 0), value=255)


def save_grid(
    path: Path, images: Tensor, levels: int = 256, columns: int = 8, zoom: int = 2
) -> None:
    """Write a grid of images as PNG, each pixel ``zoom`` times enlarged."""
    picture = np.ascontiguousarray(image_grid(images, levels, columns).permute(1, 2, 0).numpy())
    size = (picture.shape[1] * zoom, picture.shape[0] * zoom)
    enlarged = Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    enlarged.save(buffer, "PNG")
    write_atomic(path, buffer.getbuffer())


def save_curve(path: Path, history: list[dict[str, float]], unit: str) -> None:
    """Plot training and held-out score by step as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in history]
    axes.plot(
        steps,
        [row["held_out"] for row in history],
        "o-",
        ms=3,
        label="held out (averaged weights)",
    )
    axes.plot(steps, [row["train"] for row in history], alpha=0.7, label="training batches")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_atomic(path, buffer.getbuffer())
