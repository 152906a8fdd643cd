"""Steps that follow the error, with a time, a size and an acceptance of its own for each sample.

Everything is masked, nothing is indexed by a mask: the shapes stay, and the host is asked only every few rounds whether
all samples are done.  A sample that is done or has failed takes steps of length zero, its state no longer changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyflowkern.ode.controllers import UNDERFLOW, first_steps, next_factors
from pyflowkern.ode.options import Options
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Stats, Status, Trajectory
from pyflowkern.ode.stages import ErrorNorm, Stages
from pyflowkern.ode.tableaus import Tableau, coefficients

__all__ = ["SampleTrajectory", "integrate"]


@dataclass
class SampleTrajectory(Trajectory):
    """A trajectory whose ``t`` and ``dt`` are tensors ``[N]``.

    Args:
        slots: per step, the output that each sample is on its way to.
        reached: per step, which samples reached it.
        missing: which outputs, ``[T, N]``, were not reached and hold the last state.
    """

    slots: list[Tensor] = None  # type: ignore[assignment]
    reached: list[Tensor] = None  # type: ignore[assignment]
    missing: Tensor = None  # type: ignore[assignment]


def step(
    field: Field, method: Tableau, stages: Stages, t: Tensor, dt: Tensor, y: Tensor
) -> Tensor:
    """Take all slopes but the first and return the state after the step."""
    y1 = y
    for i in range(1, method.stages):
        y1 = stages.moved(y, i, dt)
        stages.put(i, field((t + method.c[i] * dt).to(y.dtype), y1))
    return y1 if method.fsal else stages.moved(y, -1, dt)


@torch.no_grad()
def integrate(
    field: Field, y0: Tensor, times: Tensor, options: Options, *, record: bool = False
) -> SampleTrajectory:
    """Integrate every row of ``y0 [N, F]`` through its column of ``times [T, N]``, float64.

    Each output is the end of a step of its sample.
    """
    method, (count, rows) = options.method, times.shape
    stages = Stages(coefficients(method, y0.dtype, y0.device), method.stages, y0)
    out = SampleTrajectory(y0.new_empty((count, *y0.shape)), slots=[], reached=[])
    sign = torch.where(times[-1] >= times[0], 1.0, -1.0).to(times.dtype)
    t, y = times[0].clone(), y0
    slot = torch.ones(rows, dtype=torch.int64, device=y0.device).clamp(max=count - 1)
    stages.put(0, field(t.to(y0.dtype), y0))
    norm, slope, evaluations = ErrorNorm(stages, options, y0), stages.settled()[0], 2

    def change(h: Tensor) -> Tensor:
        time, step = (t + sign * h).to(y0.dtype), (sign * h).to(times.dtype)
        return norm.of_change(y0, field(time, stages.euler(y0, step)))

    if options.first_step is None:
        h = first_steps(norm.of_start(y0), change, method.order).to(times.dtype)
    else:
        h, evaluations = torch.full_like(t, options.first_step), 1
    status = torch.zeros(rows, dtype=torch.int8, device=y0.device)
    finite = torch.isfinite(y0).all(-1) & torch.isfinite(slope).all(-1)
    status = torch.where(finite, status, status + int(Status.non_finite))
    out.ys[:] = y0
    least = UNDERFLOW * (times[-1] - times[0]).abs()
    bad, done, steps = torch.zeros_like(finite), torch.zeros_like(finite), 0
    columns = torch.arange(rows, device=y0.device)
    while True:
        running = (status == 0) & ~done
        if steps % options.check_every == 0 and not bool(running.any()):
            break
        h = h.clamp(options.min_step, options.max_step)
        target = times[slot, columns]
        clipped = sign * (t + sign * h - target) >= 0
        t1 = torch.where(clipped, target, t + sign * h)
        dead = running & ~clipped & ((t1 == t) | (h < least))
        failure = torch.where(bad, int(Status.non_finite), int(Status.dt_underflow)).to(torch.int8)
        status = torch.where(dead, failure, status)
        if steps >= options.max_steps:
            late = running & ~dead
            status = torch.where(late, torch.full_like(status, int(Status.max_steps)), status)
            break
        running = running & ~dead
        dt = torch.where(running, t1 - t, torch.zeros_like(t))
        y1 = step(field, method, stages, t, dt, y)
        evaluations += method.stages - 1
        steps += 1
        ratio = norm(dt, y, y1).to(times.dtype)
        bad = ~torch.isfinite(ratio)
        # h as well as dt: the difference of times may round up
        forced = torch.minimum(h, dt.abs()) <= options.min_step
        accept = running & ((ratio <= 1) | (~bad & forced))
        keep = accept[:, None]
        if record:
            out.t.append(t)
            out.dt.append(torch.where(accept, dt, torch.zeros_like(dt)))
            out.states.append(y)
            out.slots.append(slot)
        y = torch.where(keep, y1, y)
        slopes = stages.settled()
        stages.put(0, torch.where(keep, slopes[-1], slopes[0]))
        t = torch.where(accept, t1, t)
        reached = accept & clipped
        if record:
            out.reached.append(reached)
        out.ys.scatter_(0, slot[None, :, None].expand(1, *y.shape), y[None])
        done = done | (reached & (slot == count - 1))
        slot = torch.where(reached, (slot + 1).clamp(max=count - 1), slot)
        # not |dt|, which the rounding of the time may keep from shrinking
        size = torch.where(clipped, dt.abs(), h)
        proposal = size * next_factors(ratio, method.order)
        # a step cut short by an output says little about the next one
        h = torch.where(running, torch.where(reached, torch.maximum(proposal, h), proposal), h)
    slots = torch.arange(count, device=y0.device)[:, None]
    out.missing = (slots >= slot) & ~done & (slots > 0)
    out.ys = torch.where(out.missing[..., None], y, out.ys)
    out.status, out.stats = status, Stats(steps, 0, evaluations)
    return out
