"""nflows' functions for linear, quadratic and cubic splines, by one op each; see :mod:`.functions`."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern.interop._nflows.functions import check_tails, library_errors
from pyflowkern.interop._splines import (
    Box,
    Pair,
    Run,
    check_domain,
    check_sizes,
    check_square,
    in_box,
    packed,
    within_bounds,
)

__all__ = [
    "cubic_spline",
    "linear_spline",
    "quadratic_spline",
    "unconstrained_cubic_spline",
    "unconstrained_linear_spline",
    "unconstrained_quadratic_spline",
]


@library_errors
def linear_spline(
    inputs: Tensor,
    unnormalized_pdf: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
) -> Pair:
    """Transform every element by a piecewise linear function with equally wide bins.

    The inverse is that of this function.  nflows' own searches its bin in knots of which it has moved the last one to
    1 + 1e-6 of the box, and computes with these: in the last bin, of height h, it is off by up to 1e-6 / h.

    Args:
        inputs: ``[N, ...]``, inside of the box; asking that waits for the device, as in nflows.
        unnormalized_pdf: ``inputs.shape + (K,)``, whose softmax are the heights of the bins.
        inverse: from outputs to inputs.
        left: of the box, which must be a square here, as with what follows.
        right: likewise.
        bottom: likewise.
        top: likewise.

    Returns:
        ``(outputs, logabsdet)``, both like ``inputs``.

    Raises:
        TypeError: for tensors that are not floating-point, as with all others.
        ValueError: for shapes that do not fit, sizes out of range, and boxes that are no squares.
        nflows.transforms.base.InputOutsideDomain: for inputs outside; without nflows a ValueError.

    Source: Müller, McWilliams, Rousselle, Gross and Novák (2019), *Neural Importance Sampling*.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.nflows import linear_spline
        >>> y, _ = linear_spline(torch.tensor([0.25]), torch.zeros(1, 4))
        >>> round(y.item(), 6)
        0.25
    """
    box = Box(left, right, bottom, top)
    check_square(box)
    check_domain(inputs, box, inverse)
    run = packed("linear", unnormalized_pdf, unnormalized_pdf.shape[-1], inverse)
    return in_box(inputs, box, inverse, run)


@library_errors
def unconstrained_linear_spline(
    inputs: Tensor,
    unnormalized_pdf: Tensor,
    inverse: bool = False,
    tail_bound: float = 1.0,
    tails: str = "linear",
) -> Pair:
    """Transform every element by :func:`linear_spline` between bounds and leave it outside.

    Args:
        inputs: ``[N, ...]``.
        unnormalized_pdf: as in :func:`linear_spline`.
        inverse: from outputs to inputs.
        tail_bound: end of the spline.
        tails: ``"linear"``.

    Returns:
        ``(outputs, logabsdet)``, both like ``inputs``.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.nflows import unconstrained_linear_spline
        >>> unconstrained_linear_spline(torch.tensor([2.0]), torch.randn(1, 4))[0].item()
        2.0
    """
    check_tails(tails)
    run = packed("linear", unnormalized_pdf, unnormalized_pdf.shape[-1], inverse)
    return within_bounds(inputs, tail_bound, None, run)


@library_errors
def quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
) -> Pair:
    """Transform every element by the integral of a density that is linear in each bin.

    Args:
        inputs: as in :func:`linear_spline`.
        unnormalized_widths: ``inputs.shape + (K,)``.
        unnormalized_heights: densities at all knots, ``inputs.shape + (K + 1,)``, or at the inner ones, ``(K - 1,)``;
            those of the ends are then nflows' own, which are not quite 1.
        inverse: from outputs to inputs.
        left: of the box, which must be a square here, as with what follows.
        right: likewise.
        bottom: likewise.
        top: likewise.
        min_bin_width: least share that a bin is wide.
        min_bin_height: least density.

    Returns:
        ``(outputs, logabsdet)``, both like ``inputs``.

    Source: Müller, McWilliams, Rousselle, Gross and Novák (2019), *Neural Importance Sampling*.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.nflows import quadratic_spline
        >>> y, _ = quadratic_spline(torch.tensor([0.25]), torch.zeros(1, 4), torch.zeros(1, 5))
        >>> round(y.item(), 6)
        0.25
    """
    box = Box(left, right, bottom, top)
    check_square(box)
    check_domain(inputs, box, inverse)
    bins = unnormalized_widths.shape[-1]
    check_sizes(bins, min_bin_width, min_bin_height)
    params = torch.cat([unnormalized_widths, unnormalized_heights], -1)
    inner = unnormalized_heights.shape[-1] == bins - 1
    run = packed(
        "quadratic", params, bins, inverse, min_bin_width, min_bin_height,
        tails="linear" if inner else None,
    )  # fmt: skip
    return in_box(inputs, box, inverse, run)


@library_errors
def unconstrained_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    inverse: bool = False,
    tail_bound: float = 1.0,
    tails: str = "linear",
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
) -> Pair:
    """Transform every element by :func:`quadratic_spline` between bounds and leave it outside.

    Args:
        inputs: ``[N, ...]``.
        unnormalized_widths: ``inputs.shape + (K,)``.
        unnormalized_heights: densities at the inner knots, ``inputs.shape + (K - 1,)``.
        inverse: from outputs to inputs.
        tail_bound: end of the spline.
        tails: ``"linear"``.
        min_bin_width: least share that a bin is wide.
        min_bin_height: least density.

    Returns:
        ``(outputs, logabsdet)``, both like ``inputs``.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.nflows import unconstrained_quadratic_spline
        >>> x, widths, heights = torch.tensor([2.0]), torch.randn(1, 4), torch.randn(1, 3)
        >>> unconstrained_quadratic_spline(x, widths, heights)[0].item()
        2.0
    """
    check_tails(tails)
    bins = unnormalized_widths.shape[-1]
    check_sizes(bins, min_bin_width, min_bin_height)
    params = torch.cat([unnormalized_widths, unnormalized_heights], -1)
    run = packed("quadratic", params, bins, inverse, min_bin_width, min_bin_height, tails="linear")
    return within_bounds(inputs, tail_bound, None, run)


@library_errors
def cubic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnorm_derivatives_left: Tensor,
    unnorm_derivatives_right: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    eps: float = 1e-5,
    quadratic_threshold: float = 1e-3,
) -> Pair:
    """Transform every element by a monotone cubic spline.

    Args:
        inputs: as in :func:`linear_spline`.
        unnormalized_widths: ``inputs.shape + (K,)``.
        unnormalized_heights: likewise.
        unnorm_derivatives_left: ``inputs.shape + (1,)``.
        unnorm_derivatives_right: likewise.
        inverse: from outputs to inputs.
        left: of the box, which must be a square here, as with what follows.
        right: likewise.
        bottom: likewise.
        top: likewise.
        min_bin_width: least share that a bin is wide.
        min_bin_height: least share that a bin is high.
        eps: not used: the root inside of the bin is the only one that is looked for.
        quadratic_threshold: not used: nothing is divided by the coefficient of the cube.

    Returns:
        ``(outputs, logabsdet)``, both like ``inputs``.

    Source: Steffen (1990), *A simple method for monotonic interpolation in one dimension*; Durkan, Bekasov, Murray and
    Papamakarios (2019), *Cubic-Spline Flows*.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.nflows import cubic_spline
        >>> x, size, end = torch.rand(5), torch.randn(5, 4), torch.zeros(5, 1)
        >>> y, _ = cubic_spline(x, size, size, end, end)
        >>> back, _ = cubic_spline(y, size, size, end, end, inverse=True)
        >>> bool(torch.allclose(back, x, atol=1e-4))
        True
    """
    box = Box(left, right, bottom, top)
    check_square(box)
    check_domain(inputs, box, inverse)
    sizes = (unnormalized_widths, unnormalized_heights)
    ends = (unnorm_derivatives_left, unnorm_derivatives_right)
    run = _cubic((*sizes, *ends), inverse, min_bin_width, min_bin_height)
    return in_box(inputs, box, inverse, run)


@library_errors
def unconstrained_cubic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnorm_derivatives_left: Tensor,
    unnorm_derivatives_right: Tensor,
    inverse: bool = False,
    tail_bound: float = 1.0,
    tails: str = "linear",
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    eps: float = 1e-5,
    quadratic_threshold: float = 1e-3,
) -> Pair:
    """Transform every element by :func:`cubic_spline` between bounds and leave it outside.

    Args:
        inputs: ``[N, ...]``.
        unnormalized_widths: as in :func:`cubic_spline`, as with what follows.
        unnormalized_heights: likewise.
        unnorm_derivatives_left: likewise.
        unnorm_derivatives_right: likewise.
        inverse: from outputs to inputs.
        tail_bound: end of the spline.
        tails: ``"linear"``.
        min_bin_width: as in :func:`cubic_spline`, as with what follows.
        min_bin_height: likewise.
        eps: likewise.
        quadratic_threshold: likewise.

    Returns:
        ``(outputs, logabsdet)``, both like ``inputs``.

    Example:
        >>> import torch
        >>> from pyflowkern.interop.nflows import unconstrained_cubic_spline
        >>> size, end = torch.randn(1, 4), torch.randn(1, 1)
        >>> unconstrained_cubic_spline(torch.tensor([2.0]), size, size, end, end)[0].item()
        2.0
    """
    check_tails(tails)
    sizes = (unnormalized_widths, unnormalized_heights)
    ends = (unnorm_derivatives_left, unnorm_derivatives_right)
    run = _cubic((*sizes, *ends), inverse, min_bin_width, min_bin_height)
    return within_bounds(inputs, tail_bound, None, run)


def _cubic(
    parts: tuple[Tensor, ...], inverse: bool, min_bin_width: float, min_bin_height: float
) -> Run:
    bins = parts[0].shape[-1]
    check_sizes(bins, min_bin_width, min_bin_height)
    return packed("cubic", torch.cat(parts, -1), bins, inverse, min_bin_width, min_bin_height)
