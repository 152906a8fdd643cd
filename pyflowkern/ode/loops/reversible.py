r"""Steps of an algebraically reversible solver (McCallum and Foster, 2024), which a backward pass can walk back.

From the increment :math:`\Psi_h(t, y)` of any explicit method and a coupling :math:`\lambda`,

.. math::
    y_{n+1} = \lambda y_n + (1 - \lambda) z_n + \Psi_h(t_n, z_n), \qquad
    z_{n+1} = z_n - \Psi_{-h}(t_{n+1}, y_{n+1}),

with :math:`z_0 = y_0`; it has the order of the method.

The difference :math:`y - z` is a solution that the method adds to those of the equation.  Where the field contracts at
a rate ``k``, a step multiplies it by about :math:`\lambda e^{kh}`, so it dies out only with steps below
:math:`(1 - \lambda) / k`.  Adaptive steps watch it beside the error: where it would exceed ten tolerances they become
as small as that takes.  With fixed steps it is up to the user: contracting fields want a smaller coupling, or the
direct adjoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflowkern.ode.controllers import UNDERFLOW, Scaling, next_factor
from pyflowkern.ode.loops.adaptive import begin
from pyflowkern.ode.loops.fixed import plan
from pyflowkern.ode.options import Options
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Stats, Status, Trajectory
from pyflowkern.ode.stages import ErrorNorm
from pyflowkern.ode.steppers import Stepper

__all__ = ["Tape", "integrate"]

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
def integrate(
    field: Field, y0: Tensor, times: Sequence[float], options: Options
) -> tuple[Trajectory, Tape, Tensor, Tensor]:
    """Return the outputs, the steps and the pair at the end; every output is the end of a step."""
    o = options
    out = Trajectory(y0.new_empty((len(times), *y0.shape)))
    stepper, coupling = Stepper(field, o.method, y0), o.coupling
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
