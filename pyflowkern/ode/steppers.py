"""One Runge-Kutta step, its vector-Jacobian product, and dense output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyflowkern.ode.packing import Field
from pyflowkern.ode.stages import Stages
from pyflowkern.ode.tableaus import Coefficients, Tableau, coefficients, dense_weights

__all__ = [
    "Graph",
    "Stepper",
    "differentiable_step",
    "record_stages",
    "stage_times",
    "step_pullback",
]

Graph = tuple[Tensor, Tensor]  # the argument of a stage, a leaf, and the slope computed from it


def stage_times(c: Coefficients, t: float, dt: float, perturb: bool) -> tuple[Tensor, ...]:
    """Return the times of the stages as 0-d tensors.

    Args:
        c: of the method.
        t: start of the step.
        dt: its signed length.
        perturb: keep the times just before the end, as torchdiffeq does for fields that jump there.
    """
    if (
        c.nodes.device.type == "cpu" and not perturb
    ):  # one call less; elsewhere it would wait for a copy
        return torch.tensor([node * dt + t for node in c.host_nodes], dtype=c.dtype).unbind()
    if not perturb:
        return (c.nodes * dt + t).to(c.dtype).unbind()
    times = c.nodes.to(c.dtype) * dt + t
    times = torch.where(c.at_end, torch.nextafter(times, times - dt), times)
    return times.unbind()


class Stepper:
    """Takes steps of one method on states of one shape.

    Args:
        field: ``(t, y) -> dy/dt`` of packed states.
        method: its tableau.
        like: a contiguous state.
        perturb: see :func:`stage_times`.
    """

    def __init__(self, field: Field, method: Tableau, like: Tensor, perturb: bool = False) -> None:
        self.field, self.method, self.perturb = field, method, perturb
        self.c = coefficients(method, like.dtype, like.device)
        self.stages = Stages(self.c, method.stages, like)
        self.evaluations = 0
        self.graphs: list[Graph] | None = None  # of the last step, where it shall be kept
        self._last: Graph | None = None

    @property
    def slopes(self) -> Tensor:
        """The slopes of the last step, ``[stages, *shape]``, in memory that the next one overwrites."""
        return self.stages.settled()

    def start(self, t: float, y: Tensor) -> None:
        """Evaluate the first slope at a new state."""
        if self.graphs is not None:
            self.graphs = []
        self._slope(0, torch.full((), t, dtype=y.dtype, device=y.device), y)
        if self.graphs is not None:
            self._last = self.graphs[0]

    def set_first(self, graph: Graph) -> None:
        """Take the first slope, and the state it was computed from, from elsewhere."""
        self.stages.put(0, graph[1].detach())
        self._last = graph

    def advance(self) -> None:
        """Accept the last step: its last slope is the next step's first."""
        self.stages.restart()
        if self.graphs is not None:
            self._last = self.graphs[-1]

    def step(self, t: float, dt: float, y: Tensor) -> Tensor:
        """Return the state after a step; the first slope must be there."""
        method = self.method
        times = stage_times(self.c, t, dt, self.perturb)
        if self.graphs is not None:
            assert self._last is not None
            self.graphs = [self._last]
        arg = y
        for i in range(1, method.stages):
            arg = self.stages.moved(y, i, dt)
            self._slope(i, times[i], arg)
        return arg if method.fsal else self.stages.moved(y, -1, dt)

    def increment(self, t: float, dt: float, y: Tensor, error: bool = False) -> Tensor:
        """Return the change of the state over a step that starts anywhere.

        Args:
            t: start.
            dt: signed length.
            y: state.
            error: also compute the slopes that only the error needs.
        """
        method = self.method
        stages = method.stages if error else method.needed
        times = stage_times(self.c, t, dt, self.perturb)
        self._slope(0, times[0], y)
        for i in range(1, stages):
            self._slope(i, times[i], self.stages.moved(y, i, dt))
        return self.stages.increment(dt)

    def dense(self, y: Tensor, dt: float, theta: float) -> Tensor:
        """Return the state a fraction ``theta`` into the last step, which began at ``y``."""
        return self.stages.inside(y, dense_weights(self.method, theta), dt)

    def _slope(self, i: int, t: Tensor, y: Tensor) -> None:
        self.evaluations += 1
        if self.graphs is None:
            self.stages.put(i, self.field(t, y))
            return
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            slope = self.field(t, leaf)
        self.graphs.append((leaf, slope))
        self.stages.put(i, slope.detach())


def record_stages(
    field: Field, c: Coefficients, count: int, times: Sequence[Tensor], dt: float, y: Tensor
) -> tuple[list[Graph], Stages]:
    """Run a step again; return what the slopes were computed from, each with a graph of its own, and the slopes."""
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
    params: Sequence[Tensor],
    totals: list[Tensor | None],
    interior: Sequence[tuple[float, Tensor]] = (),
) -> Tensor:
    r"""Return the gradient that reaches ``y`` through the slopes of a step, and add up those of parameters.

    With :math:`\bar y` the cotangent of :math:`h \sum b_i k_i`, the stages are taken in reverse order,
    :math:`\bar k_i = h (b_i \bar y + \sum_{j>i} a_{ji} \bar Y_j)`, :math:`\bar Y_i = J_i^T \bar k_i`; the result is
    :math:`\sum \bar Y_i` (Hager, 2000).

    Args:
        method: of the step.
        c: its tensors.
        graphs: of its stages.
        dt: length of the step.
        cotangent: of the increment.
        params: whose gradients are added to ``totals``.
        totals: one sum for each parameter, None while zero.
        interior: fractions of the step and the cotangents of the dense output there.
    """
    needed = method.needed
    found = cotangent.new_empty((needed, cotangent.numel()))
    flat = cotangent.reshape(-1)
    extra = [
        ([w * dt for w in dense_weights(method, theta)], g.reshape(-1)) for theta, g in interior
    ]
    end: Tensor | None = None
    if extra and method.stages > needed:  # the end slope acts through the end state
        k_bar = _weighted(extra, needed)
        end = _through(*graphs[needed], k_bar, params, totals)
        flat = flat + end
    for i in reversed(range(needed)):
        weight = method.b[i] * dt
        if i + 1 < needed:
            k_bar = torch.addmv(flat, found[i + 1 :].t(), c.columns[i], beta=weight, alpha=dt)
        else:
            k_bar = flat * weight
        if extra:
            k_bar = k_bar + _weighted(extra, i)
        found[i] = _through(*graphs[i], k_bar, params, totals)
    total = found.sum(0)
    return (total if end is None else total + end).view(cotangent.shape)


def _weighted(extra: Sequence[tuple[list[float], Tensor]], i: int) -> Tensor:
    return torch.stack([weights[i] * g for weights, g in extra]).sum(0)


def _through(
    argument: Tensor,
    slope: Tensor,
    k_bar: Tensor,
    params: Sequence[Tensor],
    totals: list[Tensor | None],
) -> Tensor:
    if not slope.requires_grad:
        return torch.zeros_like(k_bar)
    grads = torch.autograd.grad(
        slope,
        (argument, *params),
        k_bar.view(slope.shape).to(slope.dtype),
        retain_graph=True,  # what the field reads may hang on a graph of the caller's
        allow_unused=True,
    )
    accumulate(totals, grads[1:])
    return torch.zeros_like(k_bar) if grads[0] is None else grads[0].reshape(-1)


def accumulate(totals: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Add gradients, of which some may be None, to sums in place."""
    have: list[Tensor] = []
    new: list[Tensor] = []
    for i, g in enumerate(grads):
        if g is None:
            continue
        total = totals[i]
        if total is None:
            totals[i] = g.clone()
        else:
            have.append(total)
            new.append(g)
    if have:
        torch._foreach_add_(have, new)


def differentiable_step(
    field: Field, method: Tableau, c: Coefficients, times: Sequence[Tensor], dt: float, y: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the state after a step and its slopes, in operations that autograd records."""
    slopes: list[Tensor] = []
    for i in range(method.stages):
        slopes.append(field(times[i], _combine(y, slopes, method.a[i], dt)))
    return _combine(y, slopes, method.b, dt), slopes


def _combine(y: Tensor, slopes: Sequence[Tensor], weights: Sequence[float], dt: float) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight != 0:
            y = torch.add(y, slope.to(y.dtype), alpha=weight * dt)
    return y
