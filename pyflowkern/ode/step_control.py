"""The rules of adaptive steps, shared by all loops: the next step, whether it is accepted, and when a solve fails."""

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

UNDERFLOW = 1e-20  # of the whole interval: shorter steps change nothing, though a time near 0 could still resolve them


class _Numbers:
    """The functions that :class:`StepControl` needs, for Python numbers."""

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
    """The same for tensors: 0-d on the device of the state, or ``[N]`` for N samples."""

    finite = staticmethod(torch.isfinite)
    larger = staticmethod(torch.maximum)
    smaller = staticmethod(torch.minimum)
    no = staticmethod(torch.logical_not)
    next_factor = staticmethod(next_factors)
    where = staticmethod(torch.where)
    clamp = staticmethod(torch.clamp)


class StepControl:
    r"""Chooses adaptive steps and decides about them.

    From the time ``t`` a step of size ``h`` is proposed, but not beyond ``target``.  It is accepted where the norm of
    its scaled error is at most 1, or its size at most ``min_step``.  Then the size is multiplied by
    :func:`~pyflowkern.ode.controllers.next_factor` of that norm.  The small error of an accepted step that ``target``
    cut short says little about the next step, so the size then stays at least as large as it was before the cut.

    A solve ends early where a step does not change the time or is below ``1e-20`` of the whole interval
    (``dt_underflow``; ``non_finite`` if the last norm was not finite), and after ``max_steps`` steps.

    All quantities are Python numbers, or, if ``t`` is a tensor, all are tensors (except ``rounds``), and nothing waits
    for the device.

    Args:
        options: settings of the solve.
        t: first time.
        end: last time.
        h: first step size, positive.

    Attributes:
        t: time reached.
        h: size of the next step.
        status: of the solve, a :class:`Status` or a tensor of its values.
        rounds: number of calls of :meth:`decide`, always a Python number.
        t1: end of the proposed step.
        dt: its signed length, zero where the solve has ended.
        cut: whether ``target`` cut it short.
        running: whether the solve goes on and the step is taken.
        bad: whether the norm of the last step was not finite.
    """

    def __init__(self, options: Options, t: Any, end: Any, h: Any) -> None:
        kind: Any = _Tensors if isinstance(t, Tensor) else _Numbers
        self.maths = kind
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
        """Propose the next step; where none is possible, ``running`` is false and ``status`` says why.

        Args:
            target: time that the step must not pass; infinite for none.
            active: whether the solve has not ended yet.
        """
        maths, t, sign = self.maths, self.t, self.sign
        self._wanted = h = maths.clamp(self.h, self.smallest, self.largest)
        t1 = t + sign * h
        cut = sign * (t1 - target) >= 0
        # a bool that is False spares numbers what follows from it; of tensors nothing is known
        if cut is not False:
            t1 = maths.where(cut, target, t1)
            h = maths.where(cut, abs(target - t), h)
        self.t1, self._size = t1, h
        possible = cut | ((t1 != t) & (h >= self.least) & maths.finite(t1))
        stuck = active & maths.no(possible)
        if stuck is not False:
            failure = maths.where(self.bad, Status.non_finite, Status.dt_underflow)
            self.status = maths.where(stuck, failure, self.status)
        running = active & possible
        if self.rounds >= self.max_steps:
            self.status = maths.where(running, Status.max_steps, self.status)
            running = running & False
        self.dt = maths.where(running, sign * h, 0.0)
        self.cut, self.running = cut, running

    def decide(self, ratio: Any) -> Any:
        """Return whether the step is accepted, and choose the size of the next one.

        Args:
            ratio: norm of the scaled error, at most 1 within the tolerance; NaN or infinite for a failed step.
        """
        maths, h = self.maths, self._size
        self.rounds += 1
        finite = maths.finite(ratio)
        self.bad = maths.no(finite)
        # a step cut at the target is `target - t` long, which rounding may have made longer than `min_step`
        forced = maths.smaller(h, self._wanted) <= self.smallest
        accept = self.running & finite & ((ratio <= 1) | forced)
        self.h = proposal = h * maths.next_factor(ratio, self.order)
        short = accept & self.cut
        if short is not False:
            self.h = maths.where(short, maths.larger(proposal, self._wanted), proposal)
        self.t = maths.where(accept, self.t1, self.t)
        return accept
