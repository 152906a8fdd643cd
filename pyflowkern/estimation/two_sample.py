"""Tests by permutation of whether two samples are of one law."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyflowkern.core.checks import check_count, check_flag, check_number
from pyflowkern.estimation.means import check_values, random_numbers

__all__ = ["TwoSample", "energy_test", "mmd_test", "sliced_test"]

#: Pooled rows of whose distances the median is taken.
_MEDIAN_ROWS = 1000
#: By so much of itself rounding may change a statistic that a permutation leaves as it was.
_ROUNDING = 1e-12


class TwoSample(NamedTuple):
    """A statistic of two samples, and how seldom samples of one law have one as large.

    Example:
        >>> from pyflowkern.estimation import TwoSample
        >>> TwoSample(0.03, 0.4).p_value < 0.05
        False
    """

    statistic: float  #: larger for laws further apart
    p_value: float  #: in (0, 1]: uniform, or larger, if both samples are of one law


@torch.no_grad()
def mmd_test(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float | None = None,
    permutations: int = 500,
    standardize: bool = True,
    generator: torch.Generator | None = None,
    chunk: int = 1024,
) -> TwoSample:
    r"""Test by the maximum mean discrepancy with a Gaussian kernel.

    .. math::

        \mathrm{MMD}_u^2 = \frac{\sum_{i \ne j} k(x_i, x_j)}{n (n-1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{m (m-1)}
        - \frac{2 \sum_{i,j} k(x_i, y_j)}{n m}, \qquad k(a, b) = e^{-\|a - b\|^2 / 2 \sigma^2},

    which is unbiased, so it may be below 0.  The p-value is that of the permutation test: one more than the number of
    random divisions of all rows with a statistic as large, over one more than their number.  Time grows as
    :math:`(n + m)^2`, memory as ``chunk`` x :math:`(n + m)` and ``permutations`` x :math:`(n + m)`.

    Args:
        x: ``[n, D]``.
        y: ``[m, D]``.
        bandwidth: :math:`\sigma`; None for the median distance of pooled rows, of 1000 of them where there are more.
        permutations: how many.
        standardize: divide each column by its standard deviation over both samples first.
        generator: source of randomness.
        chunk: rows of the kernel's matrix at a time.

    Returns:
        The statistic, in float64, and the p-value.

    Raises:
        TypeError: for anything but floating tensors, and arguments of another type.
        ValueError: for other shapes, fewer than two rows, numbers that are not finite, counts below 1, or a bandwidth
            that is not above 0, as the median of rows is where most are equal.

    Source: Gretton et al., A kernel two-sample test (2012).

    Example:
        >>> from pyflowkern.estimation import mmd_test
        >>> import torch
        >>> seeded = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 200, 3, generator=seeded)
        >>> mmd_test(x, y + 0.5, generator=seeded).p_value < 0.01
        True
    """
    pooled, n = pooled_rows(x, y, standardize)
    if bandwidth is None:
        some = random_numbers((len(pooled),), generator).argsort()[:_MEDIAN_ROWS]
        bandwidth = float(torch.pdist(pooled[some.to(pooled.device)]).median())
    if not 0 < check_number("bandwidth", bandwidth) < math.inf:
        raise ValueError(f"bandwidth must be above 0 and finite, got {bandwidth}")
    factor = -0.5 / bandwidth**2
    return _kernel_test(
        pooled, n, lambda d: d.square().mul_(factor).exp_(), permutations, generator, chunk
    )


@torch.no_grad()
def energy_test(
    x: Tensor,
    y: Tensor,
    *,
    permutations: int = 500,
    standardize: bool = True,
    generator: torch.Generator | None = None,
    chunk: int = 1024,
) -> TwoSample:
    r"""Test by the energy distance, which needs no bandwidth.

    .. math:: \mathcal E = 2\,E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|,

    zero only for equal laws with finite means.  The estimate leaves out the distances of rows from themselves, so it is
    unbiased and may be below 0; the p-value is that of the permutation test, as for :func:`mmd_test`.

    Args:
        x: ``[n, D]``.
        y: ``[m, D]``.
        permutations: how many.
        standardize: divide each column by its standard deviation over both samples first.
        generator: source of randomness.
        chunk: rows of the matrix of distances at a time.

    Returns:
        The statistic, in float64 and the unit of the columns, and the p-value.

    Raises:
        TypeError: for anything but floating tensors, and arguments of another type.
        ValueError: for other shapes, fewer than two rows, numbers that are not finite, or counts below 1.

    Source: Szekely and Rizzo (2004, 2013).

    Example:
        >>> from pyflowkern.estimation import energy_test
        >>> import torch
        >>> seeded = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 200, 3, generator=seeded)
        >>> energy_test(x, 2 * y, generator=seeded).p_value < 0.01
        True
    """
    pooled, n = pooled_rows(x, y, standardize)
    return _kernel_test(pooled, n, torch.neg, permutations, generator, chunk)


@torch.no_grad()
def sliced_test(
    x: Tensor,
    y: Tensor,
    *,
    projections: int = 100,
    permutations: int = 500,
    standardize: bool = True,
    generator: torch.Generator | None = None,
    chunk: int = 2**22,
) -> TwoSample:
    r"""Test by the sliced Wasserstein distance of order 1.

    .. math:: SW_1 = E_\theta \int \left| F_{\theta \cdot X}(t) - F_{\theta \cdot Y}(t) \right| dt

    over directions :math:`\theta` that are uniform on the sphere, of which ``projections`` are drawn and used for all
    permutations.  Time grows as :math:`(n + m)` x ``projections`` x ``permutations``: for many rows it is the quickest.

    Args:
        x: ``[n, D]``.
        y: ``[m, D]``.
        projections: how many directions.
        permutations: how many.
        standardize: divide each column by its standard deviation over both samples first.
        generator: source of randomness.
        chunk: numbers at a time; those of one permutation at least.

    Returns:
        The distance, in float64 and the unit of the columns, and the p-value.

    Raises:
        TypeError: for anything but floating tensors, and arguments of another type.
        ValueError: for other shapes, fewer than two rows, numbers that are not finite, or counts below 1.

    Source: Rabin et al. (2012); Bonneel et al. (2015).

    Example:
        >>> from pyflowkern.estimation import sliced_test
        >>> import torch
        >>> seeded = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 200, 3, generator=seeded)
        >>> sliced_test(x, y + 0.5, generator=seeded).p_value < 0.01
        True
    """
    pooled, n = pooled_rows(x, y, standardize)
    check_count("projections", projections)
    check_count("chunk", chunk)
    total = len(pooled)
    uniform = random_numbers((pooled.shape[1], projections), generator).to(pooled.device)
    directions = torch.erfinv(2 * uniform.clamp(1e-12) - 1)  # normal numbers, but for their scale
    lines, order = (pooled @ (directions / directions.norm(dim=0))).T.sort(1)
    steps = lines.diff(dim=1)  # [projections, total - 1]
    found = []
    for part in _divisions(total, n, permutations, generator).split(
        max(1, chunk // (total * projections))
    ):
        first = part.to(lines)  # [permutations, total]
        height = first / n - (1 - first) / (total - n)
        gaps = height[:, order].cumsum(2)[..., :-1].abs()
        found.append((gaps * steps).sum(2).mean(1))
    return _judged(torch.cat(found))


def pooled_rows(x: Tensor, y: Tensor, standardize: bool) -> tuple[Tensor, int]:
    """Return the rows of both samples, float64, and how many are of the first; raise where they do not fit."""
    standardize = check_flag("standardize", standardize)
    for name, rows in (("x", x), ("y", y)):
        check_values(name, rows, 2)
        if len(rows) < 2:
            raise ValueError(f"{name} must have at least 2 rows, got {len(rows)}")
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or inf among its numbers")
    if x.shape[1] != y.shape[1] or not x.shape[1]:
        raise ValueError(
            f"x and y must have the same columns, one at least, got {x.shape[1]} and {y.shape[1]}"
        )
    if x.device != y.device:
        raise ValueError(f"y must be on the device of x, {x.device}, got {y.device}")
    both = torch.cat([x.detach().double(), y.detach().double()])
    if standardize:
        spread = both.std(0)
        both = (both - both.mean(0)) / torch.where(spread > 0, spread, 1.0)
    return both, len(x)


def _divisions(total: int, n: int, permutations: int, generator: torch.Generator | None) -> Tensor:
    """Return which rows are of the first sample, ``[1 + permutations, total]`` bools: as they are, then at random."""
    check_count("permutations", permutations)
    first = torch.zeros(1 + permutations, total, dtype=torch.bool)
    first[0, :n] = True
    for row in first[1:]:
        row[random_numbers((total,), generator).argsort()[:n].cpu()] = True
    return first


def _kernel_test(
    pooled: Tensor,
    n: int,
    kernel: Callable[[Tensor], Tensor],
    permutations: int,
    generator: torch.Generator | None,
    chunk: int,
) -> TwoSample:
    """Test by the mean of a kernel of distances within the samples, less that between them."""
    check_count("chunk", chunk)
    m = len(pooled) - n
    first = _divisions(len(pooled), n, permutations, generator).to(pooled).T
    within, every = pooled.new_zeros(first.shape[1]), 0.0
    sums = pooled.new_zeros(first.shape[1])  # of the kernel between the first sample and all rows
    for begin in range(0, len(pooled), chunk):
        rows = pooled[begin : begin + chunk]
        # the exact way: the fast one loses the digits of rows close to each other
        values = kernel(torch.cdist(rows, pooled, compute_mode="donot_use_mm_for_euclid_dist"))
        values[:, begin : begin + chunk].fill_diagonal_(0)
        reached = values @ first
        within += (first[begin : begin + chunk] * reached).sum(0)
        sums += reached.sum(0)
        every += float(values.sum())
    between = sums - within
    others = every - within - 2 * between
    return _judged(within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * between / (n * m))


def _judged(statistics: Tensor) -> TwoSample:
    """Compare the first statistic, that of the samples as they are, with those of the permutations."""
    own = float(statistics[0])
    as_large = int((statistics[1:] >= own - _ROUNDING * abs(own)).sum())
    return TwoSample(own, (1 + as_large) / len(statistics))
