"""Steps that follow the error, one size for the whole state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyflowkern.ode.controllers import UNDERFLOW, first_step, next_factor
from pyflowkern.ode.options import Options
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Stats, Status, Trajectory
from pyflowkern.ode.stages import ErrorNorm
from pyflowkern.ode.steppers import Graph, Stepper

__all__ = ["Stop", "begin", "integrate"]

#: Looks at an accepted step, ``(stepper, t, dt, y, y1)``, and says whether to stop after it.
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
    """Integrate through ``times``, in one direction.

    The last step ends on the last time exactly; output before it is interpolated and costs no steps.  With
    ``torchdiffeq`` the last step runs over the end and is interpolated too, as theirs is.

    Args:
        field: of packed states.
        y0: first state.
        times: monotone, the first one that of ``y0``.
        options: settings.
        record: keep what a backward pass needs.
        first: ``y0`` and its slope, if known.
        stop: ends the solve early.
    """
    out = Trajectory(y0.new_empty((len(times), *y0.shape)))
    stepper = Stepper(field, options.method, y0, options.torchdiffeq)
    if record and not options.checkpoint:
        stepper.graphs = []
    t, end, y = times[0], times[-1], y0
    sign = 1.0 if end >= t else -1.0
    out.ys[0] = y0
    out.outputs.append((-1, None))
    i = _reach(out, 1, times, t, sign, y, -1)
    if i == len(times):
        return out
    norm = ErrorNorm(stepper.stages, options, y0)
    h = begin(stepper, norm, t, sign, y, first)
    accepted, rejected, bad, order = 0, 0, False, options.method.order
    least = UNDERFLOW * abs(end - t)
    over, smallest, largest = options.torchdiffeq, options.min_step, options.max_step
    while i < len(times):
        h = min(max(h, smallest), largest)
        forced = (
            h <= smallest
        )  # before the end cuts it short: the difference of times may round up
        t1 = t + sign * h
        if not over and sign * (t1 - end) >= 0:
            t1, h = end, abs(end - t)
        if t1 == t or h < least or not math.isfinite(t1):
            out.status = Status.non_finite if bad else Status.dt_underflow
            break
        if accepted + rejected >= options.max_steps:
            out.status = Status.max_steps
            break
        dt = sign * h
        y1 = stepper.step(t, dt, y)
        ratio = float(norm(dt, y, y1))
        bad = not math.isfinite(ratio)
        if ratio <= 1 or ((forced or h <= smallest) and not bad):
            if record or options.dense:
                out.t.append(t)
                out.dt.append(dt)
                out.states.append(y)
                if options.dense:
                    out.slopes.append(stepper.slopes.clone())
            if stepper.graphs is not None:
                out.graphs.append(stepper.graphs)
            i = _reach(out, i, times, t1, sign, y1, accepted, stepper, t, dt, y)
            accepted += 1
            if stop is not None and stop(stepper, t, dt, y, y1):
                y = y1
                break
            stepper.advance()
            t, y = t1, y1
        else:
            rejected += 1
        h *= next_factor(ratio, order)
    if i < len(times):
        out.ys[i:] = y
    out.outputs += [(accepted - 1, None)] * (len(times) - i)
    out.end = None if out.status == Status.ok else t
    out.stats = Stats(accepted, rejected, stepper.evaluations)
    return out


def begin(
    stepper: Stepper, norm: ErrorNorm, t: float, sign: float, y: Tensor, first: Graph | None = None
) -> float:
    """Compute the first slope and return the first step."""
    if first is None:
        stepper.start(t, y)
    else:
        stepper.set_first(first)
        stepper.evaluations += 1
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
    """Write the outputs up to ``t1`` and return the number of the next."""
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
