"""Pairs of samples of two batches by optimal transport."""

from __future__ import annotations

import math
import warnings
from typing import NoReturn

import torch
from torch import Tensor

from pyflowkern.core.checks import (
    check_choice,
    check_count,
    check_flag,
    check_floating,
    check_generator,
    check_number,
)
from pyflowkern.core.draws import uniform_like
from pyflowkern.transport._arguments import (
    check_pair,
    clouds_of_equal_masses,
    positive,
)
from pyflowkern.transport.assignment import (
    exact_plan,
    partial_plan,
    reduced_costs,
    squared_distances,
)
from pyflowkern.transport.plan import draw
from pyflowkern.transport.solution import Solution
from pyflowkern.transport.solver import solve_clouds

__all__ = ["OTPlanSampler", "wasserstein"]

METHODS = ("exact", "sinkhorn", "unbalanced", "partial")
EXACT = ("exact", "partial")
#: Without numbers, so that a loop over batches says it once.
NOT_SOLVED = (
    "a plan of OTPlanSampler did not converge: its marginals are off by more than tolerance; "
    "take a larger reg, more max_iterations, or warn=False"
)


class OTPlanSampler:
    r"""Draws pairs from a plan of optimal transport between two batches, on their device.

    The cost is the squared distance of flattened samples, and all samples of a batch have the same mass.

    Args:
        method: "exact" (by SciPy, on the host; some thousand samples), "sinkhorn" (entropic), "unbalanced"
            (entropic, with marginals that are penalized), or "partial" (exact, of a part of the mass: the pairs that
            cost least, while outliers have no partner).
        reg: the weight of the entropy, in units of the cost.
        reg_m: the weight of the penalty on the marginals; of "unbalanced" alone.
        normalize_cost: whether ``reg`` and ``reg_m`` are in units of the largest cost, so that they do not depend on
            the scale of the data; or "spread": in units of the mean cost of centred batches, which does not depend on
            their distance either, and is cheap.
        num_threads: as in torchcfm, for code that gives it; changes nothing: SciPy has one thread, and all else has
            those of torch.
        warn: whether a plan whose iterations ran out before its marginals were within ``tolerance`` gives a warning.
        mass: the part that "partial" carries, in (0, 1], rounded to whole pairs; all of it if not given.
        max_iterations: most iterations of a plan that is not exact.
        tolerance: the error of its marginals at which it is solved.  A hundredth of the mass is less than what draws
            with replacement differ by.

    Raises:
        ValueError: for another method, weights that are not positive, and a mass beyond its range or of another
            method than "partial".

    Source: Tong et al. (2024), minibatch optimal transport; Pooladian et al. (2023); Chapel, Alaya and Gasso (2020)
    for "partial".

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> x0 = torch.tensor([[0.0], [1.0], [2.0]])
        >>> sampler = transport.OTPlanSampler("exact")
        >>> pairs = sampler.sample_plan(x0, x0.flip(0) + 5, replace=False)
        >>> (pairs[1] - pairs[0]).flatten().tolist()
        [5.0, 5.0, 5.0]
    """

    def __init__(
        self,
        method: str = "exact",
        reg: float = 0.05,
        reg_m: float = 1.0,
        normalize_cost: bool | str = False,
        num_threads: int | str = 1,
        warn: bool = True,
        *,
        mass: float = 1.0,
        max_iterations: int = 1000,
        tolerance: float = 1e-2,
    ) -> None:
        self.method, self.mass = check_choice("method", method, METHODS), positive("mass", mass)
        if self.mass > 1 or (method != "partial" and self.mass != 1):
            raise ValueError(
                f'mass must be at most 1, and below it with "partial" alone, got {mass} with {method!r}'
            )
        self.reg, self.reg_m = positive("reg", reg), positive("reg_m", reg_m)
        if isinstance(normalize_cost, str):
            if normalize_cost != "spread":
                raise ValueError(
                    f"normalize_cost must be True, False or 'spread', got {normalize_cost!r}"
                )
        else:
            check_flag("normalize_cost", normalize_cost)
        self.normalize_cost, self.num_threads = normalize_cost, num_threads
        self.warn = check_flag("warn", warn)
        self.max_iterations, self.tolerance = max_iterations, tolerance

    def solve(self, x0: Tensor, x1: Tensor) -> Solution:
        """Return the entropic plan as a :class:`Solution`, of ``x0`` ``[n, *shape]`` and ``x1`` ``[m, *shape]``.

        Raises:
            ValueError: for an exact or partial plan, which has no potentials here.
        """
        if self.method in EXACT:
            raise ValueError('method must be "sinkhorn" or "unbalanced" for a solution')
        x0, x1 = _flat(x0, x1)
        unit = 1.0
        if self.normalize_cost:
            unit = (_spread if self.normalize_cost == "spread" else _largest_cost)(x0, x1)
            if not math.isfinite(unit):
                _refuse(x0, x1)
        penalty = self.reg_m * unit if self.method == "unbalanced" else None
        solution = solve_clouds(
            clouds_of_equal_masses(x0, x1),
            epsilon=self.reg * unit,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            schedule="accelerated",
            epsilon_scaling=0.25,
            penalty_x=penalty,
            penalty_y=penalty,
        )
        error = float(solution.error)  # one look, which waits for the device, tells all
        if not math.isfinite(error):
            _refuse(x0, x1)
        if self.warn and error > self.tolerance:
            warnings.warn(NOT_SOLVED, RuntimeWarning, stacklevel=2)
        return solution

    def get_map(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Return the whole plan ``[n, m]``, of the dtype of ``x0``; for small batches."""
        if self.method not in EXACT:
            return self.solve(x0, x1).plan.dense()
        i, j = self._cells(x0, x1)
        out = x0.new_zeros(len(x0), len(x1))
        each = 1 / math.lcm(len(x0), len(x1))
        return out.index_put_((i, j), out.new_tensor(each), accumulate=True)

    def _cells(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cells of equal mass of an exact plan, of all or of a part of the mass."""
        clouds = _flat(x0, x1, finite=True)
        if self.mass == 1:
            return exact_plan(reduced_costs(*clouds))
        return partial_plan(squared_distances(*clouds), self.mass)

    def sample_map(
        self,
        pi: Tensor,
        batch_size: int,
        replace: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw ``batch_size`` cells of a plan ``pi`` ``[n, m]`` in proportion to their mass.

        Args:
            pi: the plan.
            batch_size: how many cells.
            replace: whether a cell may come again.
            generator: the source of random numbers.

        Returns:
            ``i`` and ``j``, int64, ``[batch_size]``.

        Raises:
            ValueError: for a plan of another shape or without mass, or where fewer cells have mass than are wanted.
        """
        check_floating("pi", pi)
        batch_size = check_count("batch_size", batch_size)
        check_flag("replace", replace)
        check_generator(generator)
        if pi.dim() != 2 or not pi.numel():
            raise ValueError(f"pi must have shape [n, m], got {tuple(pi.shape)}")
        mass = pi.detach().double().flatten()
        if replace:
            cells = draw(mass, uniform_like(mass, (batch_size,), generator))
        else:
            if not int((mass > 0).sum()) >= batch_size:
                raise ValueError(
                    f"batch_size must be at most the number of cells of pi with mass, got {batch_size}"
                )
            # waiting times with rates of the masses: the first that end are draws without replacement
            waits = mass.new_empty(mass.shape).exponential_(generator=generator) / mass
            cells = waits.topk(batch_size, largest=False).indices
        return cells // pi.shape[1], cells % pi.shape[1]

    def pairs(
        self,
        x0: Tensor,
        x1: Tensor,
        replace: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the indices of as many pairs as ``x0`` has samples.

        With ``replace`` they are independent draws from the plan.  Without, every sample of ``x0`` is there once, in
        its order, and its partner is drawn given it; the pairs of an exact plan of equal counts are a permutation.

        Raises:
            ValueError: without ``replace`` for a plan of a part of the mass, where some samples have no partner.
        """
        return self.pairs_of(x0, x1, self.uniforms(x0, replace, generator=generator))

    def uniforms(
        self, x0: Tensor, replace: bool = True, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the random numbers that :meth:`pairs` takes, ``[2, n]`` float64, or ``[1, n]`` without ``replace``."""
        check_flag("replace", replace)
        check_generator(generator)
        if self.mass < 1 and not replace:
            raise ValueError(
                "replace must be True for a plan of a part of the mass: samples may have no partner"
            )
        shape = (1 + replace, len(x0))
        return uniform_like(x0, shape, generator, torch.float64)

    def pairs_of(self, x0: Tensor, x1: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pairs that random numbers of :meth:`uniforms` choose: no others are drawn."""
        if self.method in EXACT:
            i, j = self._cells(x0, x1)
            if len(uniforms) == 2:
                k = _index(uniforms[0], len(i))
            else:  # the cells are ordered by row, each of which has as many
                each = len(i) // len(x0)
                k = torch.arange(0, len(i), each, device=i.device) + _index(uniforms[0], each)
            return i[k], j[k]
        plan, rows = self.solve(x0, x1).plan, None
        if len(uniforms) == 2:
            # each sample's mass leaves it, but where that is only a penalty
            balanced = self.method == "sinkhorn"
            rows = _index(uniforms[0], len(x0)) if balanced else draw(plan.row_sums(), uniforms[0])
        return plan.partners(rows, uniforms=uniforms[-1])

    def sample_plan(
        self,
        x0: Tensor,
        x1: Tensor,
        replace: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return as many pairs of samples as ``x0`` has, ``[n, *shape]`` twice: see :meth:`pairs`.

        Args:
            x0: ``[n, *shape]``.
            x1: ``[m, *shape]``.
            replace: whether a sample of ``x0`` may come again.
            generator: the source of random numbers, on the device of the samples.
        """
        i, j = self.pairs(x0, x1, replace, generator=generator)
        return x0[i], x1[j]

    def sample_plan_with_labels(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Tensor | None = None,
        y1: Tensor | None = None,
        replace: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return pairs of samples and what belongs to them, ``y0`` ``[n, ...]`` and ``y1`` ``[m, ...]``."""
        i, j = self.pairs(x0, x1, replace, generator=generator)
        return x0[i], x1[j], None if y0 is None else y0[i], None if y1 is None else y1[j]

    def sample_trajectory(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return paths through snapshots ``[n, times, *shape]``: each point's next is drawn from the plan to there."""
        check_floating("x", x)
        if x.dim() < 3:
            raise ValueError(f"x must have shape [n, times, *shape], got {tuple(x.shape)}")
        index = torch.arange(len(x), device=x.device)
        path = [x[:, 0]]
        for k in range(1, x.shape[1]):
            _, j = self.pairs(x[:, k - 1], x[:, k], False, generator=generator)
            index = j[index]
            path.append(x[index, k])
        return torch.stack(path, 1)


def wasserstein(
    x0: Tensor,
    x1: Tensor,
    method: str | None = None,
    reg: float = 0.05,
    power: int = 2,
) -> float:
    r"""Return the Wasserstein distance :math:`(\sum_{ij} P_{ij} |x_i - y_j|^p)^{1/p}` of two batches.

    Args:
        x0: ``[n, *shape]``.
        x1: ``[m, *shape]``.
        method: "exact", also if None, or "sinkhorn": the plan is then the entropic one, the sum without its entropy.
        reg: the weight of the entropy.
        power: ``p``, 1 or 2; of "sinkhorn" 2 alone.

    Raises:
        ValueError: for another method or power, and for an exact distance of batches whose counts differ and have no
            common multiple up to 4096.

    Warns:
        RuntimeWarning: where Sinkhorn's iteration did not converge: ``reg`` is too small for the distance.

    Example:
        >>> import torch
        >>> from pyflowkern import transport
        >>> x = torch.randn(50, 2)
        >>> round(transport.wasserstein(x, x + torch.tensor([3.0, 4.0])), 4)
        5.0
    """
    method = "exact" if method is None else method
    if method not in ("exact", "sinkhorn"):
        raise ValueError(f"method must be 'exact' or 'sinkhorn', got {method!r}")
    check_number("reg", reg)
    if check_number("power", power) not in (1, 2) or (power == 1 and method == "sinkhorn"):
        raise ValueError(f"power must be 2, or 1 if exact, got {power!r}")
    if method == "sinkhorn":
        check_pair(x0, x1)
        # the sum is off by the error of the marginals times the largest cost
        sampler = OTPlanSampler("sinkhorn", reg, tolerance=1e-6, max_iterations=10_000)
        cost = sampler.solve(x0.double(), x1.double()).plan.transport_cost()
        return float(cost.clamp(min=0).sqrt())
    x0, x1 = _flat(x0, x1, finite=True)
    costs = reduced_costs(x0, x1) if power == 2 else squared_distances(x0, x1).sqrt()
    i, j = exact_plan(costs)
    moved = (x0[i].double() - x1[j].double()).norm(dim=1).pow(power)
    mean = float(moved.mean())
    return mean if power == 1 else math.sqrt(mean)


def _largest_cost(x0: Tensor, x1: Tensor) -> float:
    """Return the largest squared distance between two clouds, some rows at a time; waits for the device."""
    rows = max(1, 4_000_000 // len(x1))
    parts = [squared_distances(part, x1).max() for part in x0.split(rows)]
    return float(torch.stack(parts).max()) or 1.0


def _spread(x0: Tensor, x1: Tensor) -> float:
    """Return the mean squared distance of two clouds, each centred by its mean; waits for the device."""
    parts = [x.double().var(0, correction=0).sum() for x in (x0, x1)]
    return float(parts[0] + parts[1]) or 1.0


def _index(uniforms: Tensor, count: int) -> Tensor:
    """Return indices below ``count``, all equally likely, of uniform random numbers."""
    return (uniforms * count).long().clamp_(max=count - 1)


def _flat(x0: Tensor, x1: Tensor, *, finite: bool = False) -> tuple[Tensor, Tensor]:
    """Return checked samples as clouds, of float32 or float64; looking whether they are ``finite`` takes a while."""
    check_pair(x0, x1)
    for name, x in (("x0", x0), ("x1", x1)):
        if not x.numel():
            raise ValueError(f"{name} must have a sample at least, got shape {tuple(x.shape)}")
    if finite and not bool(x0.detach().isfinite().all() & x1.detach().isfinite().all()):
        _refuse(x0, x1)
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    return x0.detach().flatten(1).to(wide), x1.detach().flatten(1).to(wide)


def _refuse(x0: Tensor, x1: Tensor) -> NoReturn:
    """Raise the error of samples whose plan is not finite."""
    for name, x in (("x0", x0), ("x1", x1)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or inf")
    raise ValueError("the plan must carry mass that is finite, got NaN: x0 and x1 are too large")
