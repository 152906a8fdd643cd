"""Adaptive steps, with one size for the whole state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyflowkern.ode.controllers import first_step
from pyflowkern.ode.options import Options
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Stats, Status, Trajectory
from pyflowkern.ode.stages import ErrorNorm
from pyflowkern.ode.step_control import StepControl
from pyflowkern.ode.steppers import Graph, Stepper

__all__ = ["Stop", "begin", "integrate"]

#: Called after an accepted step with ``(stepper, t, dt, y, y1)``; true ends the solve.
Stop = Callable[[Stepper, float, float, Tensor, Tensor], bool]


@torch.no_grad()
def integrate(
    field: Field,
    y0: Tensor,
    times: Sequence[float],
    options: Options,
    *,
    record: bool = False,
    first: Graph | None = None,
    stop: Stop | None = None,
) -> Trajectory:
    """Integrate through ``times``.

    The last step ends exactly at the last time; outputs before it are interpolated and do not influence the steps.
    With ``compat="torchdiffeq"`` the last step passes the end, and the last output is interpolated, too.

    Args:
        field: of packed states.
        y0: first state.
        times: of the outputs, monotone; the first is the time of ``y0``.
        options: settings.
        record: keep what a backward pass needs.
        first: ``y0`` and its slope, if known.
        stop: ends the solve early.
    """
    out = Trajectory(y0.new_empty((len(times), *y0.shape)))
    stepper = Stepper(field, options.method, y0, options.perturbed)
    if record and not options.checkpoint:
        stepper.graphs = []
    y, sign, accepted = y0, 1.0 if times[-1] >= times[0] else -1.0, 0
    out.ys[0] = y0
    out.outputs.append((-1, None))
    i = _reach(out, 1, times, times[0], sign, y, -1)
    if i == len(times):
        return out
    norm = ErrorNorm(stepper.stages, options, y0)
    h = begin(stepper, norm, times[0], sign, y, first)
    control = StepControl(options, times[0], times[-1], h)
    target = sign * math.inf if options.torchdiffeq else times[-1]
    callbacks = options.callbacks
    while i < len(times):
        control.propose(target)
        if not control.running:
            break
        t, t1, dt = control.t, control.t1, control.dt
        if callbacks is not None:
            callbacks.started(t, y, dt)
        y1 = stepper.step(t, dt, y)
        accept = control.decide(float(norm(dt, y, y1)))
        if callbacks is not None:
            callbacks.decided(accept, t, y, dt)
        if not accept:
            continue
        if record or options.dense:
            out.keep(t, dt, y, stepper.slopes.clone() if options.dense else None)
        if stepper.graphs is not None:
            out.graphs.append(stepper.graphs)
        i = _reach(out, i, times, t1, sign, y1, accepted, stepper, t, dt, y)
        accepted += 1
        ended = stop is not None and stop(stepper, t, dt, y, y1)
        y = y1
        if ended:
            break
        stepper.advance()
    if i < len(times):  # even the copy of an empty slice costs as much as three small stages
        out.ys[i:] = y
    out.outputs += [(accepted - 1, None)] * (len(times) - i)
    out.status, out.end = control.status, None if control.status == Status.ok else control.t
    out.stats = Stats(accepted, control.rounds - accepted, stepper.evaluations)
    return out


def begin(
    stepper: Stepper, norm: ErrorNorm, t: float, sign: float, y: Tensor, first: Graph | None = None
) -> float:
    """Evaluate the first slope and return the first step size."""
    stepper.start(t, y, first=first)
    if norm.options.first_step is not None:
        return norm.options.first_step

    def change(h: float) -> Tensor:
        stepper.evaluations += 1
        time = torch.full((), t + sign * h, dtype=y.dtype, device=y.device)
        return norm.of_change(y, stepper.field(time, stepper.stages.euler(y, sign * h)))

    return first_step(norm.of_start(y), change, stepper.method.order)


def _reach(
    out: Trajectory,
    i: int,
    times: Sequence[float],
    t1: float,
    sign: float,
    y1: Tensor,
    step: int,
    stepper: Stepper | None = None,
    t: float = 0.0,
    dt: float = 1.0,
    y: Tensor | None = None,
) -> int:
    """Write the outputs from number ``i`` on up to time ``t1``, and return the number of the next one.

    Args:
        out: to write to.
        i: number of the first output not written yet.
        times: of all outputs.
        t1: end of the step.
        sign: direction of time.
        y1: state at the end.
        step: number of the step, -1 for the first state.
        stepper: that took it; None for the first state.
        t: start of the step.
        dt: its signed length.
        y: state at its start.
    """
    while i < len(times) and sign * (t1 - times[i]) >= 0:
        if times[i] == t1 or stepper is None or y is None:
            out.ys[i] = y1
            out.outputs.append((step, None))
        else:
            theta = (times[i] - t) / dt
            out.ys[i] = stepper.dense(y, dt, theta)
            out.outputs.append((step, theta))
        i += 1
    return i
