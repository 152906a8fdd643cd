"""Adaptive steps, with a time, a step size and an acceptance for each sample.

All samples take a step together.  Results are selected by ``torch.where`` and never by indexing with a mask, so shapes
stay the same, and the host asks only every few steps whether all samples are done.  A sample that is done or has failed
takes steps of length zero; its state no longer changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyflowkern.ode.controllers import first_steps
from pyflowkern.ode.options import Options
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Stats, Status, Trajectory
from pyflowkern.ode.stages import ErrorNorm, Stages
from pyflowkern.ode.step_control import StepControl
from pyflowkern.ode.tableaus import Tableau, coefficients

__all__ = ["SampleTrajectory", "integrate"]


@dataclass
class SampleTrajectory(Trajectory):
    """A trajectory whose ``t`` and ``dt`` are tensors ``[N]``.

    Args:
        slots: for each step, the number of the next output of each sample.
        reached: for each step, which samples reached that output.
        missing: which outputs, ``[T, N]``, were not reached and hold the last state.
    """

    slots: list[Tensor] = None  # type: ignore[assignment]
    reached: list[Tensor] = None  # type: ignore[assignment]
    missing: Tensor = None  # type: ignore[assignment]


def step(
    field: Field, method: Tableau, stages: Stages, t: Tensor, dt: Tensor, y: Tensor
) -> Tensor:
    """Evaluate all slopes but the first and return the state after the step."""
    y1 = y
    for i in range(1, method.stages):
        y1 = stages.moved(y, i, dt)
        stages.put(i, field((t + method.c[i] * dt).to(y.dtype), y1))
    return y1 if method.fsal else stages.moved(y, -1, dt)


@torch.no_grad()
def integrate(
    field: Field, y0: Tensor, times: Tensor, options: Options, *, record: bool = False
) -> SampleTrajectory:
    """Integrate each row of ``y0 [N, F]`` through its column of ``times [T, N]``, float64.

    Every output is the end of a step of its sample.
    """
    method, (count, rows) = options.method, times.shape
    stages = Stages(coefficients(method, y0.dtype, y0.device), method.stages, y0)
    norm = ErrorNorm(stages, options, y0)
    out = SampleTrajectory(y0.new_empty((count, *y0.shape)), slots=[], reached=[])
    control, evaluations = _begin(field, y0, times, options, stages, norm)
    out.ys[:] = y = y0
    slot = torch.ones(rows, dtype=torch.int64, device=y0.device).clamp(max=count - 1)
    done, columns = torch.zeros_like(slot, dtype=torch.bool), torch.arange(rows, device=y0.device)
    while True:
        active = (control.status == 0) & ~done
        if control.rounds % options.check_every == 0 and not bool(active.any()):
            break
        control.propose(times[slot, columns], active)
        if control.rounds >= options.max_steps:
            break
        t, dt = control.t, control.dt
        y1 = step(field, method, stages, t, dt, y)
        evaluations += method.stages - 1
        accept = control.decide(norm(dt, y, y1).to(times.dtype))
        reached, keep = accept & control.cut, accept[:, None]
        if record:
            out.keep(t, torch.where(accept, dt, 0.0), y)
            out.slots.append(slot)
            out.reached.append(reached)
        y = torch.where(keep, y1, y)
        slopes = stages.settled()
        stages.put(0, torch.where(keep, slopes[-1], slopes[0]))
        out.ys.scatter_(0, slot[None, :, None].expand(1, *y.shape), y[None])
        done = done | (reached & (slot == count - 1))
        slot = torch.where(reached, (slot + 1).clamp(max=count - 1), slot)
    slots = torch.arange(count, device=y0.device)[:, None]
    out.missing = (slots >= slot) & ~done & (slots > 0)
    out.ys = torch.where(out.missing[..., None], y, out.ys)
    out.status, out.stats = control.status.to(torch.int8), Stats(control.rounds, 0, evaluations)
    return out


def _begin(
    field: Field, y0: Tensor, times: Tensor, options: Options, stages: Stages, norm: ErrorNorm
) -> tuple[StepControl, int]:
    """Evaluate the first slopes, choose each sample's first step, and return the number of evaluations, too."""
    t = times[0].clone()
    sign = torch.where(times[-1] >= t, 1.0, -1.0).to(times.dtype)
    stages.put(0, field(t.to(y0.dtype), y0))

    def change(h: Tensor) -> Tensor:
        time, step = (t + sign * h).to(y0.dtype), (sign * h).to(times.dtype)
        return norm.of_change(y0, field(time, stages.euler(y0, step)))

    finite = torch.isfinite(y0).all(-1) & torch.isfinite(stages.settled()[0]).all(-1)
    if options.first_step is None:
        h = first_steps(norm.of_start(y0), change, options.method.order).to(times.dtype)
    else:
        h = torch.full_like(t, options.first_step)
    control = StepControl(options, t, times[-1], h)
    control.status = torch.where(finite, control.status, int(Status.non_finite))
    return control, 1 if options.first_step is not None else 2
