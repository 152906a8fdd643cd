"""Gradients of the discrete solution: each accepted step is repeated with a graph, from the last to the first.

The forward pass keeps only the state at the start of each accepted step (or, with ``checkpoint=False``, the graphs of
its stages).  Step sizes count as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyflowkern.ode.adjoints.gradients import Gradients
from pyflowkern.ode.adjoints.problem import Problem, gradients_of_replay, time_gradients
from pyflowkern.ode.adjoints.steps import (
    differentiable_step,
    interpolate,
    record_stages,
    step_pullback,
)
from pyflowkern.ode.loops import adaptive, device, fixed, per_sample
from pyflowkern.ode.loops.per_sample import SampleTrajectory
from pyflowkern.ode.options import Options
from pyflowkern.ode.solution import Trajectory
from pyflowkern.ode.steppers import stage_times
from pyflowkern.ode.tableaus import coefficients

__all__ = ["Direct", "integrator", "run"]


def integrator(options: Options) -> Callable[..., Trajectory]:
    """Return the loop for these settings, of those with one step size for the whole state."""
    if options.on_device:
        return device.integrate
    return adaptive.integrate if options.adaptive else fixed.integrate


def run(problem: Problem, y0: Tensor, record: bool) -> Trajectory:
    """Solve forward; with ``record`` keep what a backward pass needs."""
    if problem.recorded is not None:
        return problem.recorded
    o = problem.options
    if o.per_sample:
        return per_sample.integrate(problem.field, y0, problem.times, o, record=record)
    return integrator(o)(problem.field, y0, problem.times, o, record=record, first=problem.first)


class Direct(torch.autograd.Function):
    """A whole solve as one node of the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, y0: Tensor, t: Tensor | None, *params: Tensor
    ) -> Tensor:
        """Return the outputs, packed."""
        trajectory = run(problem, y0.detach(), True)
        problem.finish(trajectory)
        ys, trajectory.ys = trajectory.ys, torch.empty(0)
        ctx.problem, ctx.trajectory = problem, trajectory
        ctx.save_for_backward(y0, t, ys, *params)
        return ys

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first state, the times and the parameters."""
        y0, t, ys, *params = ctx.saved_tensors
        problem, trajectory = ctx.problem, ctx.trajectory
        if torch.is_grad_enabled():

            def replay(start: Tensor) -> Tensor:
                if problem.options.per_sample:
                    return _replay_samples(problem, trajectory, start)
                return _replay(problem, trajectory, start)

            return (None, *gradients_of_replay(replay, problem, y0, t, params, grads))
        gradients = Gradients(params, problem.complete, problem.field, problem.held)
        grads = grads.contiguous()
        with problem.context():
            if problem.options.per_sample:
                first = _pull_samples(problem, trajectory, grads, gradients)
            else:
                first = _pull(problem, trajectory, grads, gradients)
            grad_t = None
            if t is not None and ctx.needs_input_grad[2]:
                grad_t = time_gradients(problem, ys, grads, first).to(t.dtype)
        return (None, first + grads[0], grad_t, *gradients.totals)


def _by_step(trajectory: Trajectory) -> list[list[tuple[int, float | None]]]:
    """Return the outputs that lie in each step, as (number, fraction); entry 0 lists those that are the first state."""
    steps: list[list[tuple[int, float | None]]] = [[] for _ in range(len(trajectory.t) + 1)]
    for i, (step, theta) in enumerate(trajectory.outputs[1:], 1):
        steps[step + 1].append((i, theta))
    return steps


# --- one step size for the whole state -----------------------------------------------------------


def _pull(problem: Problem, trajectory: Trajectory, grads: Tensor, gradients: Gradients) -> Tensor:
    """Return the gradient that reaches the first state through the steps, and add up those of parameters."""
    method, perturb = problem.options.method, problem.options.perturbed
    at = _by_step(trajectory)
    cotangent = torch.zeros_like(grads[0])
    for j in reversed(range(len(trajectory.t))):
        t, dt, y = trajectory.t[j], trajectory.dt[j], trajectory.states[j]
        c = coefficients(method, y.dtype, y.device)
        inside: list[tuple[float, Tensor]] = []
        chord = torch.zeros_like(cotangent)
        for i, theta in at[j + 1]:
            if theta is None:
                cotangent = cotangent + grads[i]
            elif not problem.options.linear:
                inside.append((theta, grads[i]))
            else:  # linear interpolation between the ends of a fixed step
                cotangent = torch.add(cotangent, grads[i], alpha=theta)
                chord = torch.add(chord, grads[i], alpha=1 - theta)
        if trajectory.graphs:
            graphs = trajectory.graphs[j]
        else:
            stages = method.stages if inside else method.needed
            times = stage_times(c, t, dt, perturb)
            graphs, _ = record_stages(problem.field, c, stages, times, dt, y)
        through = step_pullback(method, c, graphs, dt, cotangent, gradients, inside)
        cotangent = cotangent + through + chord
        for _, g in inside:
            cotangent = cotangent + g
    for i, _ in at[0]:
        cotangent = cotangent + grads[i]
    return cotangent


def _replay(problem: Problem, trajectory: Trajectory, y: Tensor) -> Tensor:
    """Take the accepted steps from ``y`` again, recorded by autograd, and return the outputs."""
    method, perturb = problem.options.method, problem.options.perturbed
    at = _by_step(trajectory)
    c = coefficients(method, y.dtype, y.device)
    outputs: list[Tensor] = [y] * len(trajectory.outputs)
    for j, (t, dt) in enumerate(zip(trajectory.t, trajectory.dt, strict=True)):
        times = stage_times(c, t, dt, perturb)
        y1, slopes = differentiable_step(problem.field, method, times, dt, y)
        for i, theta in at[j + 1]:
            outputs[i] = interpolate(method, problem.options.linear, y, y1, slopes, dt, theta)
        y = y1
    return torch.stack(outputs)


# --- a step size for each sample -----------------------------------------------------------------


def _column(dt: Tensor, y: Tensor) -> Tensor:
    """Return step sizes as a column that multiplies a state."""
    return dt[:, None].to(y.dtype)


def _stand_in(trajectory: SampleTrajectory) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that replaces failed samples, once they no longer move, by one that did not fail.

    The field's derivative at a failed sample may not be finite.  Its cotangent there is zero, but zero times infinity
    would put NaN into the gradients of the parameters.
    """
    failed = torch.as_tensor(trajectory.status) != 0
    if not trajectory.t:
        return lambda x, dt: x
    moved = torch.stack([dt != 0 for dt in trajectory.dt]).any(0)
    donor = (2 * (~failed).to(torch.int8) + moved).argmax()[None] if len(moved) else None

    def stand_in(x: Tensor, dt: Tensor) -> Tensor:
        if donor is None:
            return x
        stopped = failed & (dt == 0)
        return torch.where(stopped.view(-1, *[1] * (x.dim() - 1)), x.detach()[donor], x)

    return stand_in


def _pull_samples(
    problem: Problem,
    trajectory: SampleTrajectory,
    grads: Tensor,
    gradients: Gradients,
) -> Tensor:
    """As :func:`_pull`; the field is multiplied by each sample's step size, and the steps then have length one."""
    method, field = problem.options.method, problem.field
    cotangent = torch.where(trajectory.missing[..., None], grads, 0.0).sum(0)
    rows = torch.arange(grads.shape[1], device=grads.device)
    zero = torch.zeros_like(cotangent)
    stand_in = _stand_in(trajectory)
    for j in reversed(range(len(trajectory.t))):
        dt = trajectory.dt[j]
        t, y = stand_in(trajectory.t[j], dt), stand_in(trajectory.states[j], dt)
        c = coefficients(method, y.dtype, y.device)
        here = grads[trajectory.slots[j], rows]
        cotangent = cotangent + torch.where(trajectory.reached[j][:, None], here, zero)
        h = _column(dt, y)
        times = [(t + node * dt).to(y.dtype) for node in method.c[: method.needed]]

        def scaled(s: Tensor, x: Tensor, h: Tensor = h) -> Tensor:
            return field(s, x) * h

        graphs, _ = record_stages(scaled, c, method.needed, times, 1.0, y)
        cotangent = cotangent + step_pullback(method, c, graphs, 1.0, cotangent, gradients)
    return cotangent


def _replay_samples(problem: Problem, trajectory: SampleTrajectory, y: Tensor) -> Tensor:
    """As :func:`_replay`."""
    method = problem.options.method
    count = problem.times.shape[0]
    outputs: list[Tensor] = [y] * count
    stand_in = _stand_in(trajectory)
    for t, dt, slot, reached in zip(
        trajectory.t, trajectory.dt, trajectory.slots, trajectory.reached, strict=True
    ):
        h, t = _column(dt, y), stand_in(t, dt)
        times = [(t + node * dt).to(y.dtype) for node in method.c]

        def scaled(s: Tensor, x: Tensor, h: Tensor = h) -> Tensor:
            return problem.field(s, x) * h

        y1, _ = differentiable_step(scaled, method, times, 1.0, stand_in(y, dt))
        stopped = (h == 0) & (torch.as_tensor(trajectory.status) != 0)[:, None]
        y = torch.where(stopped, y, y1)
        for i in range(1, count):
            mine = (reached & (slot == i))[:, None]
            outputs[i] = torch.where(mine, y, outputs[i])
    for i in range(1, count):
        outputs[i] = torch.where(trajectory.missing[i][:, None], y, outputs[i])
    return torch.stack(outputs)
