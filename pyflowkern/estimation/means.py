"""A mean and its standard error."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyflowkern.core.checks import check_generator

__all__ = ["Estimate", "mean_with_error"]


class Estimate(NamedTuple):
    """A number that was estimated, and its standard error.

    Example:
        >>> from pyflowkern.estimation import Estimate
        >>> Estimate(1.25, 0.01)
        Estimate(value=1.25, standard_error=0.01)
    """

    value: float  #: the estimate
    #: its standard deviation, as it follows from the spread of what was averaged
    standard_error: float


def mean_with_error(values: Tensor) -> Estimate:
    r"""Return the mean of independent values and its standard error.

    .. math:: \bar v = \frac{1}{N} \sum_i v_i, \qquad \mathrm{se} = \sqrt{\frac{\sum_i (v_i - \bar v)^2}{N (N - 1)}}

    For two models scored on the same rows give the differences of their scores: rows that are hard for both cancel,
    so that the error of the difference is smaller than that of either mean.

    Args:
        values: ``[N]``, of any floating dtype; sums are float64.

    Returns:
        Both, in the unit of the values; the error of a single value is NaN.

    Raises:
        TypeError: for anything but a floating tensor.
        ValueError: for another shape, and for no values.

    Example:
        >>> from pyflowkern.estimation import mean_with_error
        >>> import torch
        >>> mean_with_error(torch.tensor([1.0, 3.0]))
        Estimate(value=2.0, standard_error=1.0)
    """
    check_values("values", values, 1)
    doubles = values.detach().double()
    spread = float(doubles.std()) if len(doubles) > 1 else math.nan
    return Estimate(float(doubles.mean()), spread / math.sqrt(len(doubles)))


def check_values(name: str, values: Tensor, axes: int) -> None:
    """Raise unless ``values`` is a floating tensor with so many axes and a row at least."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating tensor, got {kind}")
    if values.dim() != axes or not len(values):
        wanted = "[N]" if axes == 1 else "[N, D]"
        raise ValueError(
            f"{name} must have shape {wanted} with N at least 1, got {tuple(values.shape)}"
        )


def random_numbers(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Return uniform numbers, float64, on the device of the generator."""
    device = check_generator(generator)
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
