"""The spline functions of normflows (Stimper et al., 2023), by one op each.

Arguments, defaults, outputs and log-determinants are those of normflows 1.7.3.  Other than there, float32 does not
crash in the inverse, and inputs outside of the box of :func:`rational_quadratic_spline` give NaN, where normflows reads
bins that do not exist; the numbers of bins are 2 to 64, and 0-d inputs are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyflowkern.interop._splines import Box, Pair, check_sizes, rational_quadratic, within_bounds
from pyflowkern.ops import rational_quadratic_spline as rational_quadratic_op

__all__ = ["rational_quadratic_spline", "unconstrained_rational_quadratic_spline"]


def rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: float | Tensor = 0.0,
    right: float | Tensor = 1.0,
    bottom: float | Tensor = 0.0,
    top: float | Tensor = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> Pair:
    """Transform every element by a rational-quadratic spline from ``[left, right]`` onto ``[bottom, top]``.

    Args:
        inputs: ``[N, ...]``; NaN comes out for those outside of the box.
        unnormalized_widths: ``inputs.shape + (K,)``, of which the softmax is taken.
        unnormalized_heights: likewise.
        unnormalized_derivatives: ``inputs.shape + (K + 1,)``, of which the softplus is taken.
        inverse: from outputs to inputs.
        left: of the box: a number, or one for each element, as with what follows.
        right: likewise.
        bottom: likewise.
        top: likewise.
        min_bin_width: least share of ``right - left`` that a bin is wide.
        min_bin_height: least share of ``top - bottom`` that a bin is high.
        min_derivative: least derivative at a knot.

    Returns:
        ``(outputs, logabsdet)``, both like ``inputs``; log-derivatives in nats.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not fit and sizes out of range.

    Source: Durkan, Bekasov, Murray and Papamakarios (2019), *Neural Spline Flows*.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.normflows import rational_quadratic_spline
        >>> x, size, slope = torch.rand(4, 3), torch.randn(4, 3, 8), torch.randn(4, 3, 9)
        >>> y, log_det = rational_quadratic_spline(x, size, size, slope)
        >>> tuple(log_det.shape)
        (4, 3)
    """
    box = Box(left, right, bottom, top)
    low, high = (bottom, top) if inverse else (left, right)
    outside = (inputs < low) | (inputs > high)
    parts = (unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
    least = (min_bin_width, min_bin_height, min_derivative)
    y, log_det = rational_quadratic(inputs, parts, inverse, box, least)
    return torch.where(outside, math.nan, y), torch.where(outside, math.nan, log_det)


def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: str | Sequence[str] = "linear",
    tail_bound: float | Tensor = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> Pair:
    """Transform every element by a rational-quadratic spline between bounds.

    Outside, inputs come out as they are, with circular tails, too; where ``tails`` is a list, 0 comes out, as in
    normflows, so that such a spline has no inverse there.  Nothing waits for the device.

    Args:
        inputs: ``[N, ...]``; features lie on the last axis.
        unnormalized_widths: as in :func:`rational_quadratic_spline`.
        unnormalized_heights: likewise.
        unnormalized_derivatives: ``inputs.shape + (K - 1,)`` for linear tails, K for circular ones, and K + 1 for a
            list, of which the first and last are not read for linear features and the last not for circular ones.
        inverse: from outputs to inputs.
        tails: ``"linear"``, ``"circular"``, or a list of them with an entry for each feature.
        tail_bound: end of the spline: a number, or a tensor that broadcasts to ``inputs``.
        min_bin_width: as in :func:`rational_quadratic_spline`.
        min_bin_height: likewise.
        min_derivative: likewise.

    Returns:
        ``(outputs, logabsdet)``, both like ``inputs``.

    Raises:
        TypeError: as :func:`rational_quadratic_spline`.
        ValueError: likewise, and for other tails.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.normflows import unconstrained_rational_quadratic_spline
        >>> x, size, slope = torch.randn(4, 2), torch.randn(4, 2, 8), torch.randn(4, 2, 9)
        >>> y, _ = unconstrained_rational_quadratic_spline(
        ...     x, size, size, slope, tails=["linear", "circular"], tail_bound=torch.tensor([3.0, 4.0])
        ... )
        >>> tuple(y.shape)
        (4, 2)
    """
    widths, heights, given = unnormalized_widths, unnormalized_heights, unnormalized_derivatives
    check_sizes(widths.shape[-1], min_bin_width, min_bin_height)
    least = (min_bin_width, min_bin_height, min_derivative)
    if tails == "linear" and not isinstance(tail_bound, Tensor):
        y, log_det = rational_quadratic_op(
            inputs, widths, heights, given, bound=tail_bound, min_bin_width=min_bin_width,
            min_bin_height=min_bin_height, min_derivative=min_derivative, inverse=inverse,
            elementwise=True,
        )  # fmt: skip
        return y, log_det.to(y.dtype)
    parts = (widths, heights, _all_knots(given, tails, min_derivative))

    def run(x: Tensor, _: str, bound: float) -> Pair:
        return rational_quadratic(x, parts, inverse, Box(-bound, bound, -bound, bound), least)

    return within_bounds(inputs, tail_bound, None if isinstance(tails, str) else 0.0, run)


def _all_knots(given: Tensor, tails: str | Sequence[str], min_derivative: float) -> Tensor:
    """Return raw derivatives of all knots, those of the ends as the tails have them."""
    end = math.log(math.expm1(1 - min_derivative))
    if tails == "linear":
        return torch.nn.functional.pad(given, (1, 1), value=end)
    if tails == "circular":
        return torch.cat([given, given[..., :1]], -1)
    if isinstance(tails, str) or not {*tails} <= {"linear", "circular"}:
        raise ValueError(f"tails must be 'linear', 'circular' or a list of them, got {tails!r}")
    if given.dim() < 2 or given.shape[-2] != len(tails):
        raise ValueError(
            f"tails must have an entry for each feature, got {len(tails)} for {tuple(given.shape)}"
        )
    linear = torch.tensor([tail == "linear" for tail in tails], device=given.device)[:, None]
    ends = torch.where(linear, end, given[..., :1])  # both ends of a circle share the first one
    return torch.cat([ends, given[..., 1:-1], ends], -1)
