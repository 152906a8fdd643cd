r"""Steps of an algebraically reversible solver (McCallum and Foster, 2024), which a backward pass can undo.

From the increment :math:`\Psi_h(t, y)` of any explicit method and a coupling :math:`\lambda`,

.. math::
    y_{n+1} = \lambda y_n + (1 - \lambda) z_n + \Psi_h(t_n, z_n), \qquad
    z_{n+1} = z_n - \Psi_{-h}(t_{n+1}, y_{n+1}),

with :math:`z_0 = y_0`; it has the order of the method.

The difference :math:`y - z` is a parasitic solution, which the equation itself does not have.  Where the field
contracts at a rate ``k``, a step multiplies the difference by about :math:`\lambda e^{kh}`, so it decays only with
steps below :math:`(1 - \lambda) / k`.  Adaptive steps control it together with the error: they shrink where it would
exceed ten tolerances.  With fixed steps nothing controls it; for contracting fields choose a smaller coupling or the
direct adjoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyflowkern.ode.controllers import Scaling
from pyflowkern.ode.loops.adaptive import begin
from pyflowkern.ode.loops.fixed import plan
from pyflowkern.ode.options import Options
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Stats, Status, Trajectory
from pyflowkern.ode.stages import ErrorNorm
from pyflowkern.ode.step_control import StepControl
from pyflowkern.ode.steppers import Stepper

__all__ = ["Pair", "Tape", "forward_step", "integrate"]

APART = 10.0  # allowed distance between the two states of a pair, in tolerances

Pair = tuple[Tensor, Tensor]


@dataclass
class Tape:
    """The accepted steps: their starts, ends and signed lengths, and the number of the output at each end, or 0."""

    t: list[float] = field(default_factory=list)
    t1: list[float] = field(default_factory=list)
    dt: list[float] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)

    def add(self, t: float, t1: float, dt: float) -> None:
        """Add an accepted step."""
        self.t.append(t)
        self.t1.append(t1)
        self.dt.append(dt)
        self.output.append(0)


@torch.no_grad()
def integrate(
    field: Field, y0: Tensor, times: Sequence[float], options: Options
) -> tuple[Trajectory, Tape, Tensor, Tensor]:
    """Integrate through ``times``; every output is the end of a step.

    Returns:
        The outputs, the accepted steps, and both states at the end.
    """
    out, tape = Trajectory(y0.new_empty((len(times), *y0.shape))), Tape()
    stepper = Stepper(field, options.method, y0)
    pair, t, i = (y0, y0), times[0], 1
    kind = _AdaptiveSteps if options.adaptive and times[-1] != t else _FixedSteps
    steps = kind(stepper, y0, times, options)
    out.ys[:] = y0
    while i < len(times):
        if times[i] == t:
            out.ys[i] = pair[0]
            if tape.t:
                tape.output[-1] = tape.output[-1] or i
            i += 1
            continue
        taken = steps.take(t, times[i], pair)
        if taken is None:
            break
        t1, dt, pair = taken
        tape.add(t, t1, dt)
        t = t1
    y, z = pair
    if i < len(times):
        out.ys[i:] = y
    tape.missing = list(range(i, len(times)))
    out.status, accepted = steps.status, len(tape.t)
    out.stats = Stats(accepted, steps.rounds - accepted, stepper.evaluations)
    out.end = None if out.status == Status.ok else t
    return out, tape, y, z


def forward_step(
    stepper: Stepper, coupling: float, t: float, t1: float, dt: float, pair: Pair
) -> Pair:
    """Return the pair after a step."""
    y, z = pair
    y1 = torch.lerp(z, y, coupling).add_(stepper.increment(t, dt, z))
    return y1, z - stepper.increment(t1, -dt, y1)


class _FixedSteps:
    """Steps of given lengths; the solve ends at the first state that is not finite."""

    def __init__(
        self, stepper: Stepper, y0: Tensor, times: Sequence[float], options: Options
    ) -> None:
        self.stepper, self.options = stepper, options
        self.lengths = iter([] if times[-1] == times[0] else plan(times, options)[0])
        self.rounds, self.status = 0, Status.ok

    def take(self, t: float, target: float, pair: Pair) -> tuple[float, float, Pair] | None:
        """Return the end, the length and the pair after the next step; None where the solve ends early."""
        if self.rounds >= self.options.max_steps:
            self.status = Status.max_steps
            return None
        dt = next(self.lengths)[1]
        t1 = target if abs(target - (t + dt)) <= 1e-9 * abs(dt) else t + dt
        pair = forward_step(self.stepper, self.options.coupling, t, t1, t1 - t, pair)
        if not _finite(pair):
            self.status = Status.non_finite
            return None
        self.rounds += 1
        return t1, t1 - t, pair


class _AdaptiveSteps:
    """Steps chosen by the error and by the distance between the two states."""

    def __init__(
        self, stepper: Stepper, y0: Tensor, times: Sequence[float], options: Options
    ) -> None:
        self.stepper, self.options = stepper, options
        self.norm = ErrorNorm(stepper.stages, options, y0)
        self.scaled = Scaling(y0, options.rtol, options.atol)
        h, sign = options.first_step, 1.0 if times[-1] >= times[0] else -1.0
        if h is None:
            h = begin(stepper, self.norm, times[0], sign, y0)
        self.control = StepControl(options, times[0], times[-1], h)

    @property
    def status(self) -> Status:
        """How the solve ended; ok while it goes on."""
        status: Status = self.control.status
        return status

    @property
    def rounds(self) -> int:
        """Steps taken, accepted or rejected."""
        return self.control.rounds

    def take(self, t: float, target: float, pair: Pair) -> tuple[float, float, Pair] | None:
        """Return the end, the length and the pair after the next accepted step; None where the solve ends early."""
        control, stepper, (y, z) = self.control, self.stepper, pair
        while True:
            control.propose(target)
            if not control.running:
                return None
            t1, dt = control.t1, control.dt
            y1 = torch.lerp(z, y, self.options.coupling)
            y1.add_(stepper.increment(t, dt, z, error=True))
            error = self.norm(dt, y, y1)  # now, because the step back overwrites the slopes
            z1 = z - stepper.increment(t1, -dt, y1)
            apart = [self.options.norm(self.scaled(d, y, y1)) for d in (y - z, y1 - z1)]
            error, before, after = torch.stack([n.double() for n in (error, *apart)]).tolist()
            if after > APART:
                before = max(before, self._rounded(y, y1))
            ratio = _ratio(error, before, after)
            if control.decide(ratio if _finite((y1, z1)) else math.nan):
                return t1, dt, (y1, z1)

    def _rounded(self, y: Tensor, y1: Tensor) -> float:
        """Return the scaled distance below which rounding keeps the two states from coming closer.

        A step takes off the share ``1 - coupling`` of it, which is lost where it is less than half of the last digit.
        """
        digit = torch.finfo(y.dtype).eps / max(1 - self.options.coupling, 0.01)
        return float(self.options.norm(self.scaled(digit * y1, y, y1)))


def _finite(pair: Pair) -> bool:
    return bool(torch.isfinite(torch.add(*pair)).all())


def _ratio(error: float, before: float, after: float) -> float:
    """Return the larger of the scaled error and the scaled distance between the states after the step.

    States that are already further apart than allowed must only come closer, which any step that is short enough does,
    unless rounding prevents it.
    """
    return max(error, after / max(APART, before))
