"""The spline functions of nflows (Durkan, Bekasov, Murray and Papamakarios, 2020), by one op each.

Arguments, defaults, outputs and log-determinants are those of nflows 0.14, with ``enable_identity_init`` of its present
source.  Other than there,

* float32 does not crash: no discriminant below zero, no bin beyond the last one, no division by a vanishing curvature;
* an input that is NaN gives NaN for itself alone, and an empty input an empty output;
* the inverse asks whether its inputs lie between ``bottom`` and ``top``, not between ``left`` and ``right``;
* the numbers of bins are 2 to 64, and 0-d inputs are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from pyflowkern.interop._splines import (
    Box,
    OutsideDomain,
    Pair,
    check_domain,
    check_sizes,
    rational_quadratic,
    within_bounds,
)
from pyflowkern.ops import rational_quadratic_spline as rational_quadratic_op

__all__ = [
    "check_tails",
    "library_errors",
    "rational_quadratic_spline",
    "unconstrained_rational_quadratic_spline",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def library_errors(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Raise nflows' own exception for inputs outside of the domain, where nflows is installed."""

    @wraps(function)
    def raising(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except OutsideDomain as error:
            try:
                own = import_module("nflows.transforms.base").InputOutsideDomain
            except ImportError:
                raise error from None
            raise own(str(error)) from None

    return raising


def check_tails(tails: str) -> None:
    """Raise for tails that nflows does not have."""
    if tails != "linear":
        raise ValueError(f"tails must be 'linear', got {tails!r}")


def _identity_beta(enable_identity_init: bool, min_derivative: float) -> float:
    return math.log(2) / (1 - min_derivative) if enable_identity_init else 1.0


@library_errors
def rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    enable_identity_init: bool = False,
) -> Pair:
    r"""Transform every element by a rational-quadratic spline from ``[left, right]`` onto ``[bottom, top]``.

    :func:`pyflowkern.ops.rational_quadratic_spline` has the formula.

    Args:
        inputs: ``[N, ...]``, inside of the box; asking that waits for the device, as in nflows.
        unnormalized_widths: ``inputs.shape + (K,)``, of which the softmax is taken.
        unnormalized_heights: likewise.
        unnormalized_derivatives: ``inputs.shape + (K + 1,)``, of which the softplus is taken.
        inverse: from outputs to inputs, with the log-determinant of that direction.
        left: of the box, as with what follows.
        right: likewise.
        bottom: likewise.
        top: likewise.
        min_bin_width: least share of ``right - left`` that a bin is wide.
        min_bin_height: least share of ``top - bottom`` that a bin is high.
        min_derivative: least derivative at a knot.
        enable_identity_init: let raw numbers that are all zero give the identity.

    Returns:
        ``(outputs, logabsdet)``, both like ``inputs``; log-derivatives in nats.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not fit and sizes out of range.
        nflows.transforms.base.InputOutsideDomain: for inputs outside; without nflows a ValueError.

    Source: Durkan, Bekasov, Murray and Papamakarios (2019), *Neural Spline Flows*.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.nflows import rational_quadratic_spline
        >>> x, size, slope = torch.rand(4, 3), torch.zeros(4, 3, 8), torch.zeros(4, 3, 9)
        >>> y, log_det = rational_quadratic_spline(x, size, size, slope, enable_identity_init=True)
        >>> bool(torch.allclose(y, x, atol=1e-5)), tuple(log_det.shape)
        (True, (4, 3))
    """
    box = Box(left, right, bottom, top)
    check_domain(inputs, box, inverse)
    parts = (unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
    least = (min_bin_width, min_bin_height, min_derivative)
    beta = _identity_beta(enable_identity_init, min_derivative)
    return rational_quadratic(inputs, parts, inverse, box, least, beta)


@library_errors
def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    enable_identity_init: bool = False,
) -> Pair:
    r"""Transform every element by a rational-quadratic spline on ``[-tail_bound, tail_bound]``, the identity outside.

    Nothing waits for the device.  As in nflows, ``enable_identity_init`` leaves the derivative of the ends not quite 1.

    Args:
        inputs: ``[N, ...]``.
        unnormalized_widths: as in :func:`rational_quadratic_spline`, as with what follows.
        unnormalized_heights: likewise.
        unnormalized_derivatives: ``inputs.shape + (K - 1,)``: of the inner knots.
        inverse: from outputs to inputs.
        tails: ``"linear"``.
        tail_bound: end of the spline.
        min_bin_width: as in :func:`rational_quadratic_spline`.
        min_bin_height: likewise.
        min_derivative: likewise.
        enable_identity_init: likewise.

    Returns:
        ``(outputs, logabsdet)``, both like ``inputs``.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not fit, sizes out of range, and other tails.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.nflows import unconstrained_rational_quadratic_spline
        >>> x, size, slope = torch.tensor([[0.3, 7.0]]), torch.ones(1, 2, 8), torch.ones(1, 2, 7)
        >>> y, _ = unconstrained_rational_quadratic_spline(x, size, size, slope, tail_bound=3.0)
        >>> y[0, 1].item()
        7.0
    """
    check_tails(tails)
    widths, heights, inner = unnormalized_widths, unnormalized_heights, unnormalized_derivatives
    check_sizes(widths.shape[-1], min_bin_width, min_bin_height)
    if not enable_identity_init:
        y, log_det = rational_quadratic_op(
            inputs, widths, heights, inner, bound=tail_bound, min_bin_width=min_bin_width,
            min_bin_height=min_bin_height, min_derivative=min_derivative, inverse=inverse,
            elementwise=True,
        )  # fmt: skip
        return y, log_det.to(y.dtype)
    ends = math.log(math.expm1(1 - min_derivative))
    parts = (widths, heights, torch.nn.functional.pad(inner, (1, 1), value=ends))
    least = (min_bin_width, min_bin_height, min_derivative)
    beta = _identity_beta(True, min_derivative)

    def run(x: Tensor, _: str, bound: float) -> Pair:
        box = Box(-bound, bound, -bound, bound)
        return rational_quadratic(x, parts, inverse, box, least, beta)

    return within_bounds(inputs, tail_bound, None, run)
