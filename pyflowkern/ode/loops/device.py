"""Adaptive steps, with one size for the whole state, decided on the state's device.

Time, step size, error, decision and status are tensors there.  The host asks only every few steps whether the solve has
ended; until it asks, a solve that has ended takes steps of length zero.  If there will be a backward pass, the accepted
steps are copied to the host at the end, all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflowkern.ode.controllers import first_steps
from pyflowkern.ode.options import Options
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Stats, Status, Trajectory
from pyflowkern.ode.stages import ErrorNorm
from pyflowkern.ode.step_control import StepControl
from pyflowkern.ode.steppers import Graph, Stepper

__all__ = ["integrate"]


class _Stepper(Stepper):
    """A stepper whose times and lengths are 0-d float64 tensors."""

    def step_by(self, t: Tensor, dt: Tensor, y: Tensor) -> Tensor:
        """Return the state after a step, as :meth:`Stepper.step` does."""
        return self._through((self.c.nodes * dt + t).to(y.dtype).unbind(), dt, y)

    def inside(self, y: Tensor, dt: Tensor, theta: Tensor) -> Tensor:
        """Interpolate at fractions ``theta [m]`` of the last step; return ``[m, *shape]``."""
        assert self.c.dense is not None
        degrees = range(1, self.c.dense.shape[1] + 1)
        powers = torch.stack([theta**d for d in degrees]).to(y.dtype)
        weights = (self.c.dense @ powers).t() * dt.to(y.dtype)
        states = y.reshape(1, -1) + weights @ self.slopes.view(self.method.stages, -1)
        return states.view(-1, *y.shape)


@dataclass
class _Round:
    """What is kept of a step, accepted or not, until the host reads it at the end."""

    accept: Tensor
    t: Tensor
    t1: Tensor
    dt: Tensor
    y: Tensor
    slopes: Tensor | None


@dataclass
class _Solve:
    """The state of the loop."""

    stepper: _Stepper
    options: Options
    control: StepControl
    norm: ErrorNorm
    inner: Tensor  # times of the outputs between the first time and the last, [m]
    states: Tensor  # at these times, [m, *shape]
    end: float
    y: Tensor
    done: Tensor
    accepted: Tensor
    steps: Tensor

    def look(self) -> tuple[bool, Status, int, int]:
        """Wait for the device; return whether the solve goes on, its status, and the accepted and all steps."""
        done, status, accepted, steps = torch.stack(
            [self.done.to(torch.int64), self.control.status, self.accepted, self.steps]
        ).tolist()
        return not done and status == Status.ok, Status(status), accepted, steps

    def round(self, keep: bool) -> _Round | None:
        """Take one step and accept or reject it; return None where the solve has used up its steps."""
        control, stepper, y = self.control, self.stepper, self.y
        control.propose(self.end, ~self.done & (control.status == int(Status.ok)))
        if control.rounds >= self.options.max_steps:
            return None
        t, t1, dt, running = control.t, control.t1, control.dt, control.running
        y1 = stepper.step_by(t, dt, y)
        accept = control.decide(self.norm(dt, y, y1).to(t.dtype))
        slopes = stepper.slopes.clone() if keep and self.options.dense else None
        self._write(accept, t, dt, y1)
        self.y = torch.where(accept, y1, y)
        stepper.stages.put(0, torch.where(accept, stepper.slopes[-1], stepper.slopes[0]))
        self.done = self.done | (accept & control.cut)
        self.accepted, self.steps = self.accepted + accept, self.steps + running
        return _Round(accept, t, t1, dt, y, slopes)

    def _write(self, accept: Tensor, t: Tensor, dt: Tensor, y1: Tensor) -> None:
        """Interpolate all inner outputs, and keep those that lie in the step if it was accepted."""
        if self.inner.numel() == 0:
            return
        sign, t1 = self.control.sign, self.control.t1
        now = accept & (sign * (self.inner - t) > 0) & (sign * (t1 - self.inner) >= 0)
        theta = (self.inner - t) / torch.where(dt == 0, 1.0, dt)
        lead = (-1, *[1] * y1.dim())
        inside = self.stepper.inside(self.y, dt, theta)
        value = torch.where((self.inner == t1).view(lead), y1, inside)
        self.states = torch.where(now.view(lead), value, self.states)


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
    """Integrate through ``times``; arguments and steps are those of :func:`pyflowkern.ode.loops.adaptive.integrate`.

    Each output before the last time costs an interpolation at every step.
    """
    out = Trajectory(y0.new_empty((len(times), *y0.shape)))
    out.ys[:] = y0
    between = [i for i, t in enumerate(times) if t not in (times[0], times[-1])]
    ends = [i for i, t in enumerate(times) if t == times[-1] != times[0]]
    if not ends:
        out.outputs = [(-1, None)] * len(times)
        return out
    s = _begin(field, y0, times, [times[i] for i in between], options, first)
    keep, kept = record or options.dense, list[_Round]()
    while s.control.rounds % options.check_every != 0 or s.look()[0]:
        taken = s.round(keep)
        if taken is None:
            break
        if keep:
            kept.append(taken)
    _, out.status, accepted, steps = s.look()
    if between:
        sign = 1.0 if times[-1] >= times[0] else -1.0
        reached = (sign * (s.control.t - s.inner) >= 0).view(-1, *[1] * y0.dim())
        out.ys[between[0] : between[-1] + 1] = torch.where(reached, s.states, s.y)
    out.ys[ends[0] :] = s.y
    out.stats = Stats(accepted, steps - accepted, s.stepper.evaluations)
    out.end = None if out.status == Status.ok else float(s.control.t)
    if keep:
        _recall(out, kept, times)
    return out


def _begin(
    field: Field,
    y0: Tensor,
    times: Sequence[float],
    between: Sequence[float],
    options: Options,
    first: Graph | None,
) -> _Solve:
    """Evaluate the first slope and choose the first step size."""
    stepper = _Stepper(field, options.method, y0)
    t, sign = times[0], 1.0 if times[-1] >= times[0] else -1.0
    stepper.start(t, y0, first=first)
    like = torch.zeros((), dtype=torch.float64, device=y0.device)
    norm = ErrorNorm(stepper.stages, options, y0)

    def change(h: Tensor) -> Tensor:
        stepper.evaluations += 1
        slope = field((t + sign * h).to(y0.dtype), stepper.stages.euler(y0, sign * h))
        return norm.of_change(y0, slope).to(torch.float64)

    if options.first_step is None:
        d0, d1 = norm.of_start(y0)
        h = first_steps((d0.to(torch.float64), d1.to(torch.float64)), change, options.method.order)
    else:
        h = like + options.first_step
    count = like.to(torch.int64)
    return _Solve(
        stepper=stepper,
        options=options,
        control=StepControl(options, like + t, times[-1], h),
        norm=norm,
        inner=torch.tensor(between, dtype=torch.float64, device=y0.device),
        states=y0.expand(len(between), *y0.shape),
        end=times[-1],
        y=y0,
        done=like.to(torch.bool),
        accepted=count,
        steps=count,
    )


def _recall(out: Trajectory, rounds: Sequence[_Round], times: Sequence[float]) -> None:
    """Copy the steps to the host: the accepted ones, and in which step and at which fraction each output lies."""
    sign = 1.0 if times[-1] >= times[0] else -1.0
    numbers = [torch.stack([r.accept.to(r.t.dtype), r.t, r.t1, r.dt]) for r in rounds]
    i = next(i for i, t in enumerate(times) if t != times[0])
    out.outputs = [(-1, None)] * i
    for r, (accept, t, t1, dt) in zip(
        rounds, torch.stack(numbers).tolist() if numbers else [], strict=True
    ):
        if not accept:
            continue
        while i < len(times) and sign * (t1 - times[i]) >= 0:
            theta = None if times[i] == t1 else (times[i] - t) / dt
            out.outputs.append((len(out.t), theta))
            i += 1
        out.keep(t, dt, r.y, r.slopes)
    out.outputs += [(len(out.t) - 1, None)] * (len(times) - i)
