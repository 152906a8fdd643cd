"""What a solve of a transport problem returns."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from pyflowkern.transport.plan import Plan

__all__ = ["Solution", "Status"]


class Status(IntEnum):
    """How Sinkhorn's iteration ended.

    * ``converged``: the error of the marginals is within the tolerance.
    * ``not_converged``: it took as many iterations as it was allowed; :attr:`Solution.error` says how far it came.
    * ``non_finite``: the cost or the error is NaN, or the cost infinite.

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> x = torch.randn(100, 2)
        >>> transport.sinkhorn(x, x.flip(1), epsilon=1e-4, max_iterations=20).status.name
        'not_converged'
    """

    converged = 0
    not_converged = 1
    non_finite = 2


class Solution:
    r"""A solved problem, or a batch of them; made by :func:`sinkhorn`.

    Attributes:
        cost: the value of the objective, ``[]`` or ``[B]``, of the dtype of the points.  Differentiable in points and
            masses by the envelope theorem: :math:`\partial_{x_i} = \sum_j P_{ij}\, \partial_{x_i} C_{ij}`.
        f: the potential of ``x``, ``[n]`` or ``[B, n]``, float64, without gradient; ``g``: of ``y``.
        error: the sum of the differences between a marginal of the plan and what it should be, ``[]`` or ``[B]``; see
            :meth:`Plan.marginal_error` for that of float32.
        iterations: how many were taken, those of larger epsilons among them, int64, ``[]`` or ``[B]``.
        plan: the :class:`Plan`.
        tolerance: the error up to which a problem counts as converged.

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> solution = transport.sinkhorn(x, x + 1.0, epsilon=0.05)
        >>> solution.status.name, tuple(solution.barycentric_map().shape)
        ('converged', (50, 3))
    """

    def __init__(
        self, cost: Tensor, plan: Plan, error: Tensor, iterations: Tensor, tolerance: float
    ) -> None:
        self.plan, self.tolerance = plan, tolerance
        parts = (cost, plan.f, plan.g, error, iterations)
        self.cost, self.f, self.g, self.error, self.iterations = (
            parts if plan.batched else (t[0] for t in parts)
        )

    @property
    def status(self) -> Status | tuple[Status, ...]:
        """How it ended, one for each problem of a batch; reading it waits for the device."""
        bad = self.error.isnan() | ~self.cost.isfinite()
        codes = torch.where(bad, Status.non_finite, (self.error > self.tolerance).long())
        if self.plan.batched:
            return tuple(Status(code) for code in codes.tolist())
        return Status(int(codes))

    def barycentric_map(self) -> Tensor:
        r"""Return the mean place where each point of ``x`` goes, :math:`\sum_j P_{ij} y_j / \sum_j P_{ij}`, ``[n, d]``.

        With a small epsilon it approximates the map of optimal transport (Pooladian and Niles-Weed, 2021).
        """
        return self.plan.conditional_mean()

    def pairs(
        self,
        n: int | None = None,
        *,
        replace: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw indices of pairs from the plan: see :meth:`Plan.pairs`."""
        return self.plan.pairs(n, replace=replace, generator=generator)

    def __repr__(self) -> str:
        """Say what it is of, without waiting for the device."""
        return f"Solution(shape={self.plan.shape}, epsilon={self.plan.epsilon})"
