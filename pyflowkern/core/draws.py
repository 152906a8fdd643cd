"""Random numbers for the dtype and the device of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["normal_like", "uniform_like"]


def uniform_like(
    like: Tensor,
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return uniform numbers of [0, 1)."""
    return torch.rand(shape, **_options(like, generator, dtype))


def normal_like(
    like: Tensor,
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, **_options(like, generator, dtype))


def _options(
    like: Tensor, generator: torch.Generator | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Name a generator only where there is one: else torch.compile would allow no symbolic sizes."""
    options: dict[str, Any] = {"dtype": dtype or like.dtype, "device": like.device}
    return options if generator is None else options | {"generator": generator}
