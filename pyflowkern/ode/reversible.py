r"""An algebraically reversible solver (McCallum and Foster, 2024): exact gradients in constant memory.

From the increment :math:`\Psi_h(t, y)` of any explicit method and a coupling :math:`\lambda`,

.. math::
    y_{n+1} = \lambda y_n + (1 - \lambda) z_n + \Psi_h(t_n, z_n), \qquad
    z_{n+1} = z_n - \Psi_{-h}(t_{n+1}, y_{n+1}),

with :math:`z_0 = y_0`; it has the order of the method.  Given the end of a step, its start is

.. math::
    z_n = z_{n+1} + \Psi_{-h}(t_{n+1}, y_{n+1}), \qquad
    y_n = (y_{n+1} - (1 - \lambda) z_n - \Psi_h(t_n, z_n)) / \lambda,

so the backward pass walks the same states as the forward pass up to rounding, which grows like
:math:`\lambda^{-n}`.

The difference :math:`y - z` is a mode that the equation has not.  Where the field contracts at a rate
``k`` it is multiplied by about :math:`\lambda e^{kh}` a step, and so dies out only with steps below
:math:`(1 - \lambda) / k`.  Adaptive steps look at it beside the error: they take so small ones where
it would leave ten tolerances, as long as it must.  With fixed steps it is up to the user: contracting fields
want a smaller coupling, or the direct adjoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyflowkern.ode.adaptive import begin
from pyflowkern.ode.controllers import UNDERFLOW, Scaling, next_factor
from pyflowkern.ode.fixed import plan
from pyflowkern.ode.packing import Field
from pyflowkern.ode.problem import Problem, gradients_of_replay, time_gradients
from pyflowkern.ode.solution import Stats, Status, Trajectory
from pyflowkern.ode.stages import ErrorNorm
from pyflowkern.ode.steppers import (
    Stepper,
    differentiable_step,
    record_stages,
    stage_times,
    step_pullback,
)
from pyflowkern.ode.tableaus import Coefficients, Tableau, coefficients

__all__ = ["Reversible", "back", "integrate"]

APART = 10.0  # tolerances that the two states of a pair may be apart


@dataclass
class Tape:
    """Starts, ends and signed lengths of the steps, and the number of the output at each end or 0."""

    t: list[float]
    t1: list[float]
    dt: list[float]
    output: list[int]
    missing: list[int]


@torch.no_grad()
def integrate(problem: Problem, y0: Tensor) -> tuple[Trajectory, Tape, Tensor, Tensor]:
    """Return the outputs, the steps and the pair at the end; every output is the end of a step."""
    o, times = problem.options, problem.times
    out = Trajectory(y0.new_empty((len(times), *y0.shape)))
    stepper, coupling = Stepper(problem.field, o.method, y0), o.coupling
    tape = Tape([], [], [], [], [])
    y, z, t, i = y0, y0, times[0], 1
    sign = 1.0 if times[-1] >= t else -1.0
    given = None if o.adaptive else iter(plan(times, o)[0])
    norm = ErrorNorm(stepper.stages, o, y0)
    scaled = Scaling(y0, o.rtol, o.atol) if o.adaptive else None
    h = 0.0 if o.first_step is None else o.first_step
    if o.adaptive and o.first_step is None:
        h = begin(stepper, norm, t, sign, y0)
    wanted = h
    out.ys[:] = y0
    least = UNDERFLOW * abs(times[-1] - t)
    accepted, rejected, bad = 0, 0, False
    while i < len(times):
        if times[i] == t:
            out.ys[i] = y
            if accepted:
                tape.output[-1] = i if tape.output[-1] == 0 else tape.output[-1]
            i += 1
            continue
        if accepted + rejected >= o.max_steps:
            out.status = Status.max_steps
            break
        if given is not None:
            dt = next(given)[1]
            t1 = times[i] if abs(times[i] - (t + dt)) <= 1e-9 * abs(dt) else t + dt
            dt = t1 - t
        else:
            wanted = h = min(max(h, o.min_step), o.max_step)
            t1 = t + sign * h
            cut = sign * (t1 - times[i]) >= 0
            if (t1 == t or h < least) and not cut:
                out.status = Status.non_finite if bad else Status.dt_underflow
                break
            t1 = times[i] if cut else t1
            dt = t1 - t
            h = abs(dt) if cut else h  # |dt| else may not shrink for the rounding of the time
        step = stepper.increment(t, dt, z, error=o.adaptive)
        y1 = torch.lerp(z, y, coupling).add_(step)
        error = None if scaled is None else norm(dt, y, y1)  # before other slopes take its place
        z1 = z - stepper.increment(t1, -dt, y1)
        ratio = 0.0
        if scaled is not None and error is not None:
            apart = [o.norm(scaled(d, y, y1)) for d in (y - z, y1 - z1)]
            ratio = _ratio(*torch.stack([n.double() for n in (error, *apart)]).tolist())
        bad = not (math.isfinite(ratio) and bool(torch.isfinite(torch.add(y1, z1)).all()))
        if bad and given is not None:
            out.status = Status.non_finite
            break
        if not bad and (ratio <= 1 or abs(dt) <= o.min_step):
            tape.t.append(t)
            tape.t1.append(t1)
            tape.dt.append(dt)
            tape.output.append(0)
            accepted += 1
            y, z, t = y1, z1, t1
            if given is None:  # a step cut short by an output says little about the next one
                proposal = h * next_factor(ratio, o.method.order)
                h = max(proposal, wanted) if cut else proposal
        else:
            rejected += 1
            h *= next_factor(math.nan if bad else ratio, o.method.order)
    out.ys[i:] = y
    tape.missing = list(range(i, len(times)))
    out.stats = Stats(accepted, rejected, stepper.evaluations)
    out.end = None if out.status == Status.ok else t
    return out, tape, y, z


def _ratio(error: float, before: float, after: float) -> float:
    """Return how far a step is beyond what is allowed, by its error or by the distance of the pair.

    Any step that is short enough brings the states nearer, wherever they are: it may always be taken.
    """
    return max(error, after / max(APART, before))


def back(
    field: Field, method: Tableau, coupling: float, t: float, t1: float, y1: Tensor, z1: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the pair at the start of a step from that at its end."""
    dt = t1 - t
    stepper = Stepper(field, method, y1)
    z = z1 + stepper.increment(t1, -dt, y1)
    y = (y1 - (1 - coupling) * z - stepper.increment(t, dt, z)) / coupling
    return y, z


class Reversible(torch.autograd.Function):
    """A whole solve as one node."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, y0: Tensor, t: Tensor | None, *params: Tensor
    ) -> Tensor:
        """Return the outputs, packed."""
        out, tape, y, z = integrate(problem, y0.detach())
        problem.finish(out)
        ctx.problem, ctx.tape, ctx.end = problem, tape, (y, z)
        ctx.failed = out.status != Status.ok
        ctx.save_for_backward(y0, t, out.ys, *params)
        return out.ys

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first state, the times and the parameters."""
        y0, t, ys, *params = ctx.saved_tensors
        problem, tape = ctx.problem, ctx.tape
        if torch.is_grad_enabled():

            def replay(start: Tensor) -> Tensor:
                return _replay(problem, tape, start)

            return (None, *gradients_of_replay(replay, problem, y0, t, params, grads))
        totals: list[Tensor | None] = [None] * len(params)
        grads = grads.contiguous()
        with problem.context():
            # steps towards a pole are not walked back: the difference of huge numbers holds nothing
            pairs = _pairs(problem, tape, y0.detach()) if ctx.failed else []
            first = _pull(problem, tape, ctx.end, pairs, grads, params, totals)
            grad_t = None
            if t is not None and ctx.needs_input_grad[2]:
                grad_t = time_gradients(problem, ys, grads, first).to(t.dtype)
        return (None, first + grads[0], grad_t, *totals)


@torch.no_grad()
def _pairs(problem: Problem, tape: Tape, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Take the accepted steps again and return the pair at the start of each."""
    stepper, coupling = Stepper(problem.field, problem.options.method, y), problem.options.coupling
    z, found = y, list[tuple[Tensor, Tensor]]()
    for t, t1, dt in zip(tape.t, tape.t1, tape.dt, strict=True):
        found.append((y, z))
        y = torch.lerp(z, y, coupling).add_(stepper.increment(t, dt, z))
        z = z - stepper.increment(t1, -dt, y)
    return found


def _pull(
    problem: Problem,
    tape: Tape,
    end: tuple[Tensor, Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    grads: Tensor,
    params: Sequence[Tensor],
    totals: list[Tensor | None],
) -> Tensor:
    method, coupling, field = problem.options.method, problem.options.coupling, problem.field
    y, z = end
    c = coefficients(method, y.dtype, y.device)
    y_bar, z_bar = torch.zeros_like(y), torch.zeros_like(z)
    for i in tape.missing:
        y_bar = y_bar + grads[i]
    for j in reversed(range(len(tape.t))):
        t, t1, dt = tape.t[j], tape.t1[j], tape.dt[j]
        for i in _outputs_at(problem.times, tape, j):
            y_bar = y_bar + grads[i]
        graphs, step = _record(field, method, c, t1, -dt, y)
        z = pairs[j][1] if pairs else z + step
        y_bar = y_bar + step_pullback(method, c, graphs, -dt, -z_bar, params, totals)
        graphs, step = _record(field, method, c, t, dt, z)
        y = pairs[j][0] if pairs else (y - (1 - coupling) * z - step) / coupling
        z_bar = z_bar + (1 - coupling) * y_bar
        z_bar = z_bar + step_pullback(method, c, graphs, dt, y_bar, params, totals)
        y_bar = coupling * y_bar
    for i in range(1, len(problem.times)):
        if _is_start(problem.times, tape, i):
            y_bar = y_bar + grads[i]
    return y_bar + z_bar


def _is_start(times: Sequence[float], tape: Tape, i: int) -> bool:
    return times[i] == times[0] and i not in tape.missing


def _outputs_at(times: Sequence[float], tape: Tape, j: int) -> list[int]:
    """Return the outputs at the end of step ``j``: several where times repeat."""
    first = tape.output[j]
    if first == 0:
        return []
    last = first
    while last + 1 < len(times) and times[last + 1] == times[first]:
        last += 1
    return [i for i in range(first, last + 1) if i not in tape.missing]


def _record(
    field: Field, method: Tableau, c: Coefficients, t: float, dt: float, y: Tensor
) -> tuple[Any, Tensor]:
    times = stage_times(c, t, dt, False)
    graphs, stages = record_stages(field, c, method.needed, times, dt, y)
    return graphs, stages.increment(dt)


def _replay(problem: Problem, tape: Tape, y: Tensor) -> Tensor:
    method, coupling = problem.options.method, problem.options.coupling
    c = coefficients(method, y.dtype, y.device)
    z, outputs = y, [y] * len(problem.times)
    for j, (t, t1, dt) in enumerate(zip(tape.t, tape.t1, tape.dt, strict=True)):
        times = stage_times(c, t, dt, False)
        after, _ = differentiable_step(problem.field, method, c, times, dt, z)
        y = coupling * (y - z) + after
        times = stage_times(c, t1, -dt, False)
        before, _ = differentiable_step(problem.field, method, c, times, -dt, y)
        z = z - (before - y)
        for i in _outputs_at(problem.times, tape, j):
            outputs[i] = y
    for i in tape.missing:
        outputs[i] = y
    return torch.stack(outputs)
