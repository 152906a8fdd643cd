"""A step repeated for its gradient: stages with a graph each and their VJP, or one graph of the whole step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyflowkern.ode.adjoints.gradients import Gradients
from pyflowkern.ode.packing import Field
from pyflowkern.ode.stages import Stages
from pyflowkern.ode.steppers import Graph
from pyflowkern.ode.tableaus import Coefficients, Tableau, dense_weights

__all__ = ["differentiable_step", "interpolate", "record_stages", "step_pullback"]


def record_stages(
    field: Field, c: Coefficients, count: int, times: Sequence[Tensor], dt: float, y: Tensor
) -> tuple[list[Graph], Stages]:
    """Repeat a step; return (argument, slope) of each stage, each slope with a graph of its own, and all slopes."""
    stages = Stages(c, count, y)
    graphs: list[Graph] = []
    for i in range(count):
        arg = y if i == 0 else stages.moved(y, i, dt)
        with torch.enable_grad():
            leaf = arg.detach().requires_grad_()
            slope = field(times[i], leaf)
        graphs.append((leaf, slope))
        stages.put(i, slope.detach())
    return graphs, stages


def step_pullback(
    method: Tableau,
    c: Coefficients,
    graphs: Sequence[Graph],
    dt: float,
    cotangent: Tensor,
    gradients: Gradients,
    interior: Sequence[tuple[float, Tensor]] = (),
) -> Tensor:
    r"""Return the gradient that reaches ``y`` through the slopes of a step, and add up those of parameters.

    With :math:`\bar y` the cotangent of :math:`h \sum b_i k_i`, the stages are taken in reverse order,
    :math:`\bar k_i = h (b_i \bar y + \sum_{j>i} a_{ji} \bar Y_j)`, :math:`\bar Y_i = J_i^T \bar k_i`; the result is
    :math:`\sum \bar Y_i` (Hager, 2000).

    Args:
        method: of the step.
        c: its coefficients.
        graphs: of its stages.
        dt: signed length of the step.
        cotangent: of the increment.
        gradients: where the gradients of parameters are added up.
        interior: fractions of the step at which it is interpolated, and the cotangents of the results.
    """
    needed = method.needed
    cotangents = cotangent.new_empty((needed, cotangent.numel()))
    flat = cotangent.reshape(-1)
    extra = [
        ([w * dt for w in dense_weights(method, theta)], g.reshape(-1)) for theta, g in interior
    ]
    end: Tensor | None = None
    if extra and method.stages > needed:  # the end slope acts through the end state
        k_bar = _weighted(extra, needed)
        end = _through(*graphs[needed], k_bar, gradients)
        flat = flat + end
    for i in reversed(range(needed)):
        weight = method.b[i] * dt
        if i + 1 < needed:
            k_bar = torch.addmv(flat, cotangents[i + 1 :].t(), c.columns[i], beta=weight, alpha=dt)
        else:
            k_bar = flat * weight
        if extra:
            k_bar = k_bar + _weighted(extra, i)
        cotangents[i] = _through(*graphs[i], k_bar, gradients)
    total = cotangents.sum(0)
    return (total if end is None else total + end).view(cotangent.shape)


def _weighted(extra: Sequence[tuple[list[float], Tensor]], i: int) -> Tensor:
    """Return what reaches slope ``i`` through interpolated outputs."""
    return torch.stack([weights[i] * g for weights, g in extra]).sum(0)


def _through(argument: Tensor, slope: Tensor, k_bar: Tensor, gradients: Gradients) -> Tensor:
    """Return the cotangent of a stage's argument, flat, from that of its slope."""
    pulled = gradients.pull(slope, argument, k_bar)
    return torch.zeros_like(k_bar) if pulled is None else pulled.reshape(-1)


def differentiable_step(
    field: Field, method: Tableau, times: Sequence[Tensor], dt: float, y: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the state after a step and its slopes, computed by operations that autograd records."""
    slopes: list[Tensor] = []
    for i in range(method.stages):
        slopes.append(field(times[i], _combine(y, slopes, method.a[i], dt)))
    return _combine(y, slopes, method.b, dt), slopes


def interpolate(
    method: Tableau,
    linear: bool,
    y: Tensor,
    y1: Tensor,
    slopes: Sequence[Tensor],
    dt: float,
    theta: float | None,
) -> Tensor:
    """Return the state a fraction ``theta`` into a step, None for its end, by operations that autograd records."""
    if theta is None:
        return y1
    if linear:
        return torch.lerp(y, y1, theta)
    return _combine(y, slopes, dense_weights(method, theta), dt)


def _combine(y: Tensor, slopes: Sequence[Tensor], weights: Sequence[float], dt: float) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight != 0:
            y = torch.add(y, slope.to(y.dtype), alpha=weight * dt)
    return y
