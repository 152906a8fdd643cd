"""Fixed steps: nothing waits for the device, so a solve can be captured as a CUDA graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyflowkern.ode.options import Options
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Stats, Status, Trajectory
from pyflowkern.ode.steppers import Graph, Stepper

__all__ = ["Plan", "all_finite", "integrate", "plan"]

_MANY = 1e15  # limit on the number of steps, which must not overflow

#: Starts and signed lengths of the steps; for each output, its step and the fraction of it, None for its end.
Plan = tuple[list[tuple[float, float]], list[tuple[int, float | None]]]


def plan(times: Sequence[float], options: Options) -> Plan:
    """Return the steps to be taken.

    Each interval between outputs is divided into equal steps of at most ``step_size``, so that every output is the end
    of a step.  With a ``grid``, or a ``step_size`` and ``compat="torchdiffeq"``, the steps do not depend on the
    outputs, which are interpolated.  The list is cut after ``max_steps + 1`` steps: enough to see that there are too
    many.
    """
    if options.grid is not None:
        return _on_grid(times, _checked_grid(times, options.grid(times)))
    if options.torchdiffeq and options.step_size is not None:
        return _on_grid(times, _torchdiffeq_grid(times, options.step_size, options.max_steps + 1))
    steps: list[tuple[float, float]] = []
    outputs: list[tuple[int, float | None]] = [(-1, None)]
    count = 0
    for t, t1 in itertools.pairwise(times):
        size = math.inf if options.step_size is None else options.step_size
        if t1 == t:
            outputs.append((count - 1, None))
            continue
        n = max(1, math.ceil(min(abs(t1 - t) / size, _MANY) * (1 - 1e-12)))
        room = max(0, options.max_steps + 1 - count)
        grid = [t + (t1 - t) * j / n for j in range(min(n, room + 1))]
        grid += [t1] if n <= room else []
        steps += [(a, b - a) for a, b in itertools.pairwise(grid)]
        count += n
        outputs.append((count - 1, None))
    return steps, outputs


def _torchdiffeq_grid(times: Sequence[float], size: float, most: int) -> list[float]:
    t0, end = times[0], times[-1]
    sign = 1.0 if end >= t0 else -1.0
    n = math.ceil(min(abs(end - t0) / size, _MANY) + 1)
    grid = [t0 + sign * size * j for j in range(min(n - 1, most + 1))]
    return [*grid, *([end] if n - 1 <= most else [])]


def _checked_grid(times: Sequence[float], grid: Sequence[float]) -> Sequence[float]:
    """Return the user's grid; raise ValueError unless it goes monotonically from the first time to the last one."""
    sign = 1.0 if times[-1] >= times[0] else -1.0
    if len(grid) < 1 or grid[0] != times[0] or grid[-1] != times[-1]:
        raise ValueError(
            f"grid must go from the first time, {times[0]}, to the last one, {times[-1]}, got {list(grid)}"
        )
    if not all(sign * (b - a) > 0 for a, b in itertools.pairwise(grid)):
        raise ValueError(f"grid must be strictly monotone, got {list(grid)}")
    return grid


def _on_grid(times: Sequence[float], grid: Sequence[float]) -> Plan:
    """Return the steps of a grid, and where the outputs lie in them."""
    t0, end = times[0], times[-1]
    sign = 1.0 if end >= t0 else -1.0
    if end == t0:
        return [], [(-1, None)] * len(times)
    steps = [(a, b - a) for a, b in itertools.pairwise(grid)]
    outputs: list[tuple[int, float | None]] = [(-1, None)]
    for t in times[1:]:
        if t == t0:
            outputs.append((-1, None))
            continue
        j = next((j for j, b in enumerate(grid[1:]) if sign * (b - t) >= 0), len(steps))
        there = j == len(steps) or grid[j + 1] == t
        outputs.append((j, None if there else (t - grid[j]) / steps[j][1]))
    return steps, outputs


@torch.no_grad()
def integrate(
    field: Field,
    y0: Tensor,
    times: Sequence[float],
    options: Options,
    *,
    record: bool = False,
    first: Graph | None = None,
) -> Trajectory:
    """Integrate through ``times``; arguments as those of :func:`pyflowkern.ode.loops.adaptive.integrate`."""
    planned = plan(times, options)
    if len(planned[0]) > options.max_steps:
        out = _run(field, y0, times, planned, options, record, first, checked=True)
        all_taken = out.stats.accepted == options.max_steps
        out.status = Status.max_steps if all_taken else Status.non_finite
        return out
    out = _run(field, y0, times, planned, options, record, first, checked=False)
    out.end = None
    captured = y0.is_cuda and torch.cuda.is_current_stream_capturing()
    # a graph holds no decisions of the host, and meta tensors no numbers
    if captured or y0.is_meta or torch.compiler.is_exporting():
        finite = torch.isfinite(out.ys[-1]).all()
        out.status = torch.where(finite, int(Status.ok), int(Status.non_finite)).to(torch.int8)
        return out
    # NaN and inf never disappear again, so one check of the end is enough; only if it fails, the steps are repeated
    # with a check of each, to find the last finite state
    if not all_finite(out.ys[-1]):
        evaluations = out.stats.evaluations
        silent = replace(options, callbacks=None)  # they have been called for all steps already
        out = _run(field, y0, times, planned, silent, record, first, checked=True)
        out.status = Status.non_finite
        total = evaluations + out.stats.evaluations
        out.stats = replace(out.stats, evaluations=total)
    return out


def all_finite(y: Tensor) -> bool:
    """Whether all numbers are finite; mostly their sum says so."""
    return math.isfinite(y.sum().item()) or bool(torch.isfinite(y).all())


def _run(
    field: Field,
    y0: Tensor,
    times: Sequence[float],
    planned: Plan,
    options: Options,
    record: bool,
    first: Graph | None,
    checked: bool,
) -> Trajectory:
    steps, outputs = planned
    callbacks = options.callbacks
    steps = steps[: options.max_steps]
    method = options.method
    out = Trajectory(y0.new_empty((len(times), *y0.shape)), end=times[0])
    stepper = Stepper(field, method, y0, options.perturbed)
    if record and not options.checkpoint:
        stepper.graphs = []
    y, done, i, fresh = y0, 0, 0, False
    while i < len(times) and outputs[i][0] < 0:
        out.ys[i] = y0
        i += 1
    for t, dt in steps:
        if callbacks is not None:
            callbacks.started(t, y, dt)
        given = first if done == 0 else None
        y1 = stepper.step(t, dt, y) if fresh else stepper.whole(t, dt, y, given)
        if checked and not bool(torch.isfinite(y1).all()):
            break
        if record or options.dense:
            out.keep(t, dt, y, stepper.slopes.clone() if options.dense else None)
        if stepper.graphs is not None:
            out.graphs.append(stepper.graphs)
        while i < len(times) and outputs[i][0] == done:
            theta = outputs[i][1]
            if theta is None:
                out.ys[i] = y1
            else:
                linear = options.linear
                out.ys[i] = torch.lerp(y, y1, theta) if linear else stepper.dense(y, dt, theta)
            i += 1
        if method.fsal and not options.perturbed:
            stepper.advance()
            fresh = True
        y, out.end = y1, t + dt
        done += 1
    if i < len(times):
        out.ys[i:] = y
    out.outputs = outputs[:i] + [(done - 1, None)] * (len(times) - i)
    out.stats = Stats(done, 0, stepper.evaluations)
    return out
