"""Steps that follow the error, with a time, a size and an acceptance of its own for each sample.

Everything is masked, nothing is indexed by a mask: the shapes stay, and the host is asked only every few rounds whether
all samples are done.  A sample that is done or has failed takes steps of length zero, its state no longer changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyflowkern.ode.controllers import UNDERFLOW, Scaling, first_steps, next_factors
from pyflowkern.ode.options import Options
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Stats, Status, Trajectory
from pyflowkern.ode.tableaus import Coefficients, Tableau, coefficients

__all__ = ["SampleTrajectory", "arguments", "integrate"]


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


def arguments(
    c: Coefficients, slopes: Tensor, i: int, dt: Tensor, y: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return ``y + dt sum_j a_ij k_j`` for each sample; ``slopes`` is ``[stages, N, F]``."""
    row = c.rows[i] if weights is None else weights
    total = torch.mv(slopes[: row.numel()].view(row.numel(), -1).t(), row).view(y.shape)
    return torch.addcmul(y, dt[:, None].to(y.dtype), total)


def slopes_of(
    field: Field,
    method: Tableau,
    c: Coefficients,
    t: Tensor,
    dt: Tensor,
    y: Tensor,
    slopes: Tensor,
) -> Tensor:
    """Fill all slopes but the first and return the state after the step."""
    y1 = y
    for i in range(1, method.stages):
        y1 = arguments(c, slopes, i, dt, y)
        slopes[i].copy_(field((t + method.c[i] * dt).to(y.dtype), y1))
    return y1 if method.fsal else arguments(c, slopes, method.stages, dt, y)


@torch.no_grad()
def integrate(
    field: Field, y0: Tensor, times: Tensor, options: Options, *, record: bool = False
) -> SampleTrajectory:
    """Integrate every row of ``y0 [N, F]`` through its column of ``times [T, N]``, float64.

    Each output is the end of a step of its sample.
    """
    method, (count, rows) = options.method, times.shape
    c = coefficients(method, y0.dtype, y0.device)
    out = SampleTrajectory(y0.new_empty((count, *y0.shape)), slots=[], reached=[])
    sign = torch.where(times[-1] >= times[0], 1.0, -1.0).to(times.dtype)
    t, y = times[0].clone(), y0
    slot = torch.ones(rows, dtype=torch.int64, device=y0.device).clamp(max=count - 1)
    slopes = y0.new_empty((method.stages, *y0.shape))
    slopes[0].copy_(field(t.to(y0.dtype), y0))
    slope, evaluations = slopes[0], 2

    def probe(h: Tensor) -> Tensor:
        step = (sign * h)[:, None].to(y0.dtype)
        return field((t + sign * h).to(y0.dtype), torch.addcmul(y0, step, slope))

    if options.first_step is None:
        h = first_steps(
            options.norm, probe, y0, slope, method.order, options.rtol, options.atol
        ).to(times.dtype)
    else:
        h, evaluations = torch.full_like(t, options.first_step), 1
    status = torch.zeros(rows, dtype=torch.int8, device=y0.device)
    finite = torch.isfinite(y0).all(-1) & torch.isfinite(slope).all(-1)
    status = torch.where(finite, status, status + int(Status.non_finite))
    out.ys[:] = y0
    scaled = Scaling(y0, options.rtol, options.atol)
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
        y1 = slopes_of(field, method, c, t, dt, y, slopes)
        evaluations += method.stages - 1
        steps += 1
        error = arguments(c, slopes, 0, dt, torch.zeros_like(y), c.error)
        ratio = options.norm(scaled(error, y, y1)).to(times.dtype)
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
        slopes[0].copy_(torch.where(keep, slopes[-1], slopes[0]))
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
