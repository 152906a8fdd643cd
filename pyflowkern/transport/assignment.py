"""Exact transport of small clouds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyflowkern.core.checks import check_floating
from pyflowkern.transport._arguments import parse_clouds
from pyflowkern.transport.solver import sinkhorn

__all__ = [
    "assign",
    "assignment",
    "exact_plan",
    "partial_plan",
    "reduced_costs",
    "squared_distances",
]

#: Unequal clouds are repeated until they are equal: up to so many points.
MOST_REPEATED = 4096
#: From so many points on, potentials are cheaper than what they save.
REDUCED_FROM = 128


def assignment(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the pairs of smallest total squared distance; each point is in one pair at most.

    SciPy solves it on the host in float64.  Equal counts are first solved by Sinkhorn's iteration, whose potentials
    lead it to the pairs: 512 points take about a seventh of the time, and 10,000 half a minute or more and 2 GB.

    Args:
        x: ``[n, d]`` or ``[B, n, d]``.
        y: ``[m, d]`` or ``[B, m, d]``.

    Returns:
        ``i`` (rising) and ``j``, int64, ``[min(n, m)]`` or ``[B, min(n, m)]``, on the device of ``x``.

    Raises:
        ImportError: without SciPy.
        TypeError, ValueError: as :func:`sinkhorn`.

    Source: Kuhn (1955); Crouse (2016) for the algorithm.

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> i, j = transport.assignment(x, x.flip(0) + 5)
        >>> i.tolist(), j.tolist()
        ([0, 1, 2], [2, 1, 0])
    """
    clouds = parse_clouds(x, y, None, None, balanced=True)
    # where some of y stay alone, potentials would change which
    costs = reduced_costs if clouds.x.shape[1] == clouds.y.shape[1] else squared_distances
    found = [assign(costs(one, other)) for one, other in zip(clouds.x, clouds.y, strict=True)]
    least = min(clouds.x.shape[1], clouds.y.shape[1])
    if not found:
        empty = x.new_zeros(0, least, dtype=torch.int64)
        return empty, empty.clone()
    i, j = (torch.stack(parts) for parts in zip(*found, strict=True))
    return (i, j) if clouds.batched else (i[0], j[0])


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared distances of two clouds ``[n, d]`` and ``[m, d]`` in float64."""
    return torch.cdist(
        x.detach().double(), y.detach().double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()


def reduced_costs(x: Tensor, y: Tensor) -> Tensor:
    r"""Return :math:`|x_i - y_j|^2 - f_i - g_j`, float64: as good a cost for a plan of uniform masses.

    All plans have the same sum of f and g.  With the potentials of an entropic plan most points are nearest to their
    partner, which saves the solver most of its search.  Any potentials give the same plan, so the iteration need not
    converge.
    """
    costs = squared_distances(x, y)
    if min(costs.shape) < REDUCED_FROM:
        return costs
    spread = sum(float((p - p.mean(0)).double().square().sum(1).mean()) for p in (x, y))
    if not 0 < spread < math.inf:
        return costs
    wide = torch.float32 if x.dtype == y.dtype == torch.float32 else torch.float64
    x, y = (p.detach().to(wide) for p in (x, y))
    near = sinkhorn(x, y, epsilon=5e-4 * spread, max_iterations=60, tolerance=0.1)
    for potential, axis in ((near.f, 1), (near.g, 0)):
        costs -= potential.nan_to_num(0.0, 0.0, 0.0).unsqueeze(axis)
    return costs


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs of smallest total cost, of a matrix ``[n, m]``."""
    check_floating("cost", cost)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            'exact transport needs SciPy (pip install scipy); method="sinkhorn" does without'
        ) from error
    i, j = linear_sum_assignment(cost.detach().double().cpu().numpy())
    return tuple(torch.as_tensor(t, dtype=torch.int64, device=cost.device) for t in (i, j))  # type: ignore[return-value]


def exact_plan(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return cells of equal mass that make an optimal plan of uniform masses, of a matrix ``[n, m]``.

    Equal counts have a permutation; others are repeated until they are equal.
    """
    cost, rows, columns = _repeated(cost)
    i, j = assign(cost)
    return i // rows, j // columns


def partial_plan(cost: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Return cells of equal mass that make the cheapest plan of a part of the mass, in (0, 1], rounded to whole cells.

    What is left out of ``k`` repeated points is assigned to as many that cost nothing (Chapel, Alaya and Gasso 2020).
    Vertices of this problem are assignments, so that nothing is lost by asking for whole cells.
    """
    cost, rows, columns = _repeated(cost)
    k = len(cost)
    left = k - max(1, round(mass * k))
    padded = cost.new_zeros(k + left, k + left)
    padded[:k, :k] = cost
    padded[k:, k:] = math.inf
    i, j = assign(padded)
    real = (i < k) & (j < k)
    return i[real] // rows, j[real] // columns


def _repeated(cost: Tensor) -> tuple[Tensor, int, int]:
    """Return the costs of clouds that are repeated until they have equal counts, and how often each is."""
    n, m = cost.shape
    k = math.lcm(n, m)
    if n != m and k > MOST_REPEATED:
        raise ValueError(
            f"x0 and x1 must have equal counts, or counts with a common multiple up to {MOST_REPEATED}, "
            f"for an exact plan, got {n} and {m}"
        )
    rows, columns = k // n, k // m
    return cost.repeat_interleave(rows, 0).repeat_interleave(columns, 1), rows, columns
