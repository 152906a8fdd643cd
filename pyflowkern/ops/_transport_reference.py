"""Entropic optimal transport in plain PyTorch, with dense matrices: the reference, and gradients that both share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyflowkern.core.codes import SinkhornSchedule
from pyflowkern.ops.plan_tensors import PlanTensors

__all__ = ["gradient_of_mass", "gradient_of_points", "plan_draw", "plan_product", "sinkhorn"]

#: Of an epsilon above the last one: most iterations, and the error at which the next one begins.
LEVEL_ITERATIONS, LEVEL_TOLERANCE = 8, 0.1
#: Errors have grown where they are larger by more than this part of the smallest.
ROUNDING = 1e-6
#: How many of its own lengths a step is prolonged by at most.
LONGEST_STEP = 30.0


def costs(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """Return ``scale |x_i - y_j|^2``, by differences: no digits are lost."""
    return scale * (x.double()[..., :, None, :] - y.double()[..., None, :, :]).square().sum(-1)


def decided(value: Tensor) -> float:
    """Return a number on which it depends what is computed next.

    Raises:
        ValueError: under ``vmap``, where each problem would go its own way.
    """
    try:
        return float(value)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise ValueError(
            "tolerance must be 0, epsilon_scaling None and schedule another than 'accelerated' under vmap, where "
            "iterations cannot depend on numbers; or give the problems as the axis B"
        ) from error


def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    scale: float,
    iterations: int,
    tolerance: float,
    schedule: int,
    scaling: float,
    penalty_x: float,
    penalty_y: float,
) -> tuple[Tensor, ...]:
    """Solve each problem of the batch, one after the other."""
    solved = [
        _Problem(x[p], y[p], a[p], b[p], scale, (penalty_x, penalty_y)).solve(
            epsilon, iterations, tolerance, SinkhornSchedule(schedule), scaling
        )
        for p in range(x.shape[0])
    ]
    if not solved:  # the cost is part of the graph all the same
        cost = sum(t.double().flatten(1).sum(1) for t in (x, y, a, b))
        return torch.as_tensor(cost), a.clone(), b.clone(), a.new_zeros(0), a.new_zeros(0).long()
    return tuple(torch.stack(parts) for parts in zip(*solved, strict=True))


class _Step(NamedTuple):
    """The last ``g`` before it was prolonged, its step, the smallest error so far, and whether it was prolonged."""

    g: Tensor
    step: Tensor
    error: Tensor
    prolonged: bool


class _Problem:
    """A problem, its potentials and the count of its iterations."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        penalties: tuple[float, float],
    ) -> None:
        self.x, self.y = x, y
        self.cost = costs(x, y, scale)
        self.mass = (a, b)
        self.log_mass = (a.log(), b.log())
        self.penalties = penalties
        self.potential = [torch.zeros_like(a), torch.zeros_like(b)]
        self.done = 0
        self.error = torch.full_like(a[0], math.inf)
        self.last: _Step | None = None

    def soft_minimum(self, side: int, epsilon: float) -> Tensor:
        other = 1 - side
        scores = self.log_mass[other] + self.potential[other] / epsilon
        cost = self.cost if side == 0 else self.cost.mT
        return -epsilon * torch.logsumexp(scores - cost / epsilon, -1)

    def half(self, side: int, epsilon: float, blend: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the next potential and the error of the marginal with the present one."""
        old, penalty = self.potential[side], self.penalties[side]
        soft = self.soft_minimum(side, epsilon)
        new = soft * (penalty / (penalty + epsilon)) if penalty > 0 else soft
        wanted = torch.exp(-old / penalty) if penalty > 0 else 1.0
        ratio = (
            torch.exp((old - soft) / epsilon) - wanted
        ).abs()  # infinite, perhaps, without mass
        mass = self.mass[side]
        error = torch.where(mass == 0, torch.zeros_like(mass), mass * ratio).sum()
        return old + blend * (new - old), error

    def prolonged(self, g: Tensor) -> Tensor:
        """Return the next ``g`` moved along the line to the one before it, to where the steps of both would vanish.

        That is Anderson's acceleration with a memory of one step, unless the error is not the smallest so far.  If it
        grew by such a move, that is taken back.
        """
        last, error = self.last, self.error
        # the error may stay the same for many iterations: rounding must not count as growth
        smallest = last is None or decided(error <= last.error * (1 + ROUNDING)) > 0
        if last is not None and last.prolonged and not smallest:
            self.last = None
            return last.g
        step, length = g - self.potential[1], torch.zeros_like(error)
        if last is not None and smallest:
            with torch.no_grad():
                change = step - last.step
                mass = self.mass[1]
                slope = (mass * step * change).sum() / (mass * change * change).sum()
                length = (-slope).clamp(0.0, LONGEST_STEP).nan_to_num(0.0)
        least = error if last is None else torch.minimum(error, last.error)
        self.last = _Step(g, step, least, decided(length) > 0)
        return g if last is None else g + length * (g - last.g)

    def take(self, g: Tensor, epsilon: float, accelerated: bool) -> None:
        """Accept the next ``g`` and find the ``f`` that belongs to it."""
        self.potential[1] = self.prolonged(g) if accelerated else g
        self.potential[0], _ = self.half(0, epsilon)
        self.done += 1

    def alternating(self, epsilon: float, most: int, tolerance: float, accelerated: bool) -> None:
        self.last = None
        for _ in range(most):
            g, self.error = self.half(1, epsilon)
            if tolerance > 0 and not decided(self.error) > tolerance:
                return
            self.take(g, epsilon, accelerated)

    def alternating_level(self, epsilon: float, most: int, accelerated: bool) -> None:
        self.last = None
        for _ in range(most):
            g, self.error = self.half(1, epsilon)
            self.take(g, epsilon, accelerated)
            if not decided(self.error) > LEVEL_TOLERANCE:
                return

    def both(self, epsilon: float, blend: float) -> list[Tensor]:
        (f, of_x), (g, of_y) = self.half(0, epsilon, blend), self.half(1, epsilon, blend)
        self.error = torch.maximum(of_x, of_y)
        return [f, g]

    def symmetric(self, epsilon: float, most: int, tolerance: float) -> None:
        for _ in range(most):
            new = self.both(epsilon, 0.5)
            if tolerance > 0 and not decided(self.error) > tolerance:
                return
            self.potential = new
            self.done += 1

    def larger_epsilons(
        self, epsilon: float, scaling: float, most: int, symmetric: bool
    ) -> list[float]:
        if not scaling > 0:
            return []
        points = torch.cat([self.x, self.y]).double()
        extent = decided((points.amax(0) - points.amin(0)).square().sum())
        levels: list[float] = []
        while extent > epsilon and len(levels) < most:
            levels.append(extent)
            extent *= scaling
        if symmetric:  # so begins the schedule of Feydy et al.
            levels = (levels[:1] + levels)[:most]
        return levels

    def solve(
        self,
        epsilon: float,
        iterations: int,
        tolerance: float,
        schedule: SinkhornSchedule,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        symmetric = schedule == SinkhornSchedule.SYMMETRIC
        accelerated = schedule == SinkhornSchedule.ACCELERATED
        levels = self.larger_epsilons(epsilon, scaling, iterations, symmetric)
        if symmetric:
            self.potential = self.both(levels[0] if levels else epsilon, 1.0)
        for level in levels:
            rest = iterations - self.done
            if symmetric:
                self.symmetric(level, min(1, rest), 0.0)
            else:
                self.alternating_level(level, min(LEVEL_ITERATIONS, rest), accelerated)
        reached = not levels or self.done < iterations
        if symmetric:
            self.symmetric(epsilon, iterations - self.done, tolerance)
        else:
            self.alternating(epsilon, iterations - self.done, tolerance, accelerated)
        if symmetric:
            self.potential = self.both(epsilon, 1.0)
        elif not reached:  # f at least is one of the last epsilon
            self.potential[0], _ = self.half(0, epsilon)
        if symmetric or self.done == iterations:
            self.error = self.half(1, epsilon)[1]
        # where NaN ended the iteration, the potentials are not those of any plan
        bad = torch.where(self.error.isnan(), self.error, torch.zeros_like(self.error))
        self.potential = [f + bad for f in self.potential]
        count = torch.tensor(self.done, device=self.x.device)
        return self.value(epsilon), self.potential[0], self.potential[1], self.error, count

    def value(self, epsilon: float) -> Tensor:
        """Return the dual objective."""
        total = [mass.sum() for mass in self.mass]
        value = epsilon * total[0] * total[1]
        for side, penalty in enumerate(self.penalties):
            f, mass = self.potential[side], self.mass[side]
            value = (
                value + (mass * (-penalty * torch.expm1(-f / penalty) if penalty > 0 else f)).sum()
            )
        f, penalty = self.potential[0], self.penalties[0]
        plan = (self.mass[0] * torch.exp(-f / penalty)).sum() if penalty > 0 else total[0]
        return value - epsilon * plan


def _log_plan(p: PlanTensors, epsilon: float, scale: float) -> Tensor:
    return (p.f[:, :, None] + p.g[:, None, :] - costs(p.x, p.y, scale)) / epsilon


def plan_product(*inputs: Any) -> Tensor:
    """Multiply the dense plan by a matrix: the inputs are those of the op."""
    *tensors, matrix, epsilon, scale = inputs
    p = PlanTensors(*tensors)
    plan = p.a[:, :, None] * p.b[:, None, :] * torch.exp(_log_plan(p, epsilon, scale))
    out: Tensor = (plan @ matrix.double()).to(p.x.dtype)
    return out


def plan_draw(*inputs: Any) -> Tensor:
    """Draw a column of each row by its distribution function: the inputs are those of the op."""
    *tensors, uniforms, epsilon, scale = inputs
    p = PlanTensors(*tensors)
    log_plan = _log_plan(p, epsilon, scale) + p.b.log()[:, None, :]
    sums = torch.softmax(log_plan, -1).cumsum(-1)
    wanted = uniforms[..., None] * sums[..., -1:]
    return torch.searchsorted(sums, wanted, right=True)[..., 0].clamp(max=p.y.shape[1] - 1)


# --- gradients of the cost by the envelope theorem ------------------------------------------------


def gradient_of_points(
    product: Callable[..., Tensor], plan: PlanTensors, epsilon: float, scale: float
) -> Tensor:
    r"""Return :math:`\sum_j P_{ij}\, 2 s (x_i - y_j)`; one product with the plan gives both sums over ``j``."""
    centre = plan.y.mean(1, keepdim=True)
    ones = torch.ones_like(plan.y[..., :1])
    sums = product(*plan, torch.cat([plan.y - centre, ones], -1), epsilon, scale)
    return 2 * scale * (sums[..., -1:] * (plan.x - centre) - sums[..., :-1])


def gradient_of_mass(potential: Tensor, other: Tensor, epsilon: float, penalty: float) -> Tensor:
    """Return the derivative of the cost by the masses whose potential is given."""
    total = other.sum(-1, keepdim=True)
    if penalty > 0:
        decay = torch.expm1(-potential / penalty)
        return -(penalty + epsilon) * decay + epsilon * (total - 1)
    return potential + epsilon * (total - 1)
