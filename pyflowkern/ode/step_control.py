"""The rules of adaptive steps, once: which step comes next, whether it is accepted, and when a solve cannot go on."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from pyflowkern.ode.controllers import next_factor, next_factors
from pyflowkern.ode.options import Options
from pyflowkern.ode.solution import Status

__all__ = ["StepControl"]

UNDERFLOW = 1e-20  # of the whole interval: a step that no rounding of the time would show


class _Numbers:
    """Arithmetic of one solve, in numbers of the host."""

    finite = staticmethod(math.isfinite)
    larger = staticmethod(max)
    smaller = staticmethod(min)
    no = staticmethod(operator.not_)
    next_factor = staticmethod(next_factor)

    @staticmethod
    def where(condition: bool, a: Any, b: Any) -> Any:
        return a if condition else b

    @staticmethod
    def clamp(value: float, least: float, most: float) -> float:
        return min(max(value, least), most)


class _Tensors:
    """The same where each number is a tensor: 0-d on the device of the state, or ``[N]`` for N samples."""

    finite = staticmethod(torch.isfinite)
    larger = staticmethod(torch.maximum)
    smaller = staticmethod(torch.minimum)
    no = staticmethod(torch.logical_not)
    next_factor = staticmethod(next_factors)
    where = staticmethod(torch.where)
    clamp = staticmethod(torch.clamp)


class StepControl:
    r"""Steps that follow the error.

    From the time ``t`` a step of size ``h`` is proposed, at most to ``target``.  It is accepted where the norm of its
    error is at most 1, or its size at most ``min_step``.  After it the size is multiplied by
    :func:`~pyflowkern.ode.controllers.next_factor` of that norm; an accepted step that ``target`` cut short says little
    about the next one, so the size does not fall below the one that was proposed.

    Three things end a solve early: a step that does not move the time, or is below ``1e-20`` of the whole interval
    (``dt_underflow``; ``non_finite`` if the norm before it was not finite), and more than ``max_steps`` steps.

    Everything is a number of the host, or a tensor if ``t`` is one; then every attribute is, and nothing waits for
    the device.

    Args:
        options: settings of the solve.
        t: first time.
        end: last time.
        h: first step size, positive.

    Attributes:
        t: time reached.
        h: size of the next step.
        status: of the solve, a :class:`Status` or a tensor of its values.
        rounds: steps decided about, on the host.
        t1: end of the proposed step.
        dt: its signed length, zero where the solve has ended.
        cut: whether ``target`` cut it short.
        running: whether it is taken.
        bad: whether the norm of the last step was not finite.
    """

    def __init__(self, options: Options, t: Any, end: Any, h: Any) -> None:
        kind: Any = _Tensors if isinstance(t, Tensor) else _Numbers
        self.on = kind
        self.t: Any = t
        self.h, self.rounds = h, 0
        self.smallest, self.largest = options.min_step, options.max_step
        self.order, self.max_steps = options.method.order, options.max_steps
        self.sign: Any = kind.where(end >= t, 1.0, -1.0)
        self.least = UNDERFLOW * abs(end - t)
        no: Any = torch.zeros_like(t, dtype=torch.bool) if isinstance(t, Tensor) else False
        self.bad, self.running, self.cut = no, no, no
        self.status: Any = no.long() if isinstance(t, Tensor) else Status.ok
        self.t1 = self.dt = self.t
        self._wanted = self._size = h

    def propose(self, target: Any, active: Any = True) -> None:
        """Choose the next step; where there can be none, ``running`` is false and ``status`` says why.

        Args:
            target: time that the step must not pass; infinite if it may pass any.
            active: whether the solve has not ended yet.
        """
        on, t, sign = self.on, self.t, self.sign
        self._wanted = h = on.clamp(self.h, self.smallest, self.largest)
        t1 = t + sign * h
        cut = sign * (t1 - target) >= 0
        self.t1 = t1 = on.where(cut, target, t1)
        self._size = h = on.where(cut, abs(target - t), h)
        stuck = active & on.no(cut) & ((t1 == t) | (h < self.least) | on.no(on.finite(t1)))
        failure = on.where(self.bad, Status.non_finite, Status.dt_underflow)
        self.status = on.where(stuck, failure, self.status)
        running = active & on.no(stuck)
        if self.rounds >= self.max_steps:
            self.status = on.where(running, Status.max_steps, self.status)
            running = running & False
        self.dt = on.where(running, sign * h, 0.0)
        self.cut, self.running = cut, running

    def decide(self, ratio: Any) -> Any:
        """Return whether the step is accepted, and choose the size of the next one.

        Args:
            ratio: norm of the error, 1 for the largest that is allowed; NaN or infinite for a failed step.
        """
        on, h = self.on, self._size
        self.rounds += 1
        self.bad = on.no(on.finite(ratio))
        # the size asked for as well: what the target leaves of it may be rounded up
        forced = on.smaller(h, self._wanted) <= self.smallest
        accept = self.running & on.no(self.bad) & ((ratio <= 1) | forced)
        proposal = h * on.next_factor(ratio, self.order)
        longer = on.larger(proposal, self._wanted)
        self.h = on.where(accept & self.cut, longer, proposal)
        self.t = on.where(accept, self.t1, self.t)
        return accept
