"""What a solve returns: states, how it ended, and what it cost."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from pyflowkern.ode.packing import Packing
from pyflowkern.ode.tableaus import Tableau, dense_weights
from pyflowkern.ode.times import number
from pyflowkern.ops import rk_combine

__all__ = ["DenseOutput", "Solution", "Stats", "Status", "Trajectory"]


class Status(IntEnum):
    """How a solve ended; anything but ``ok`` leaves the last finite state in the rest of the output.

    * ``ok``: it reached its last time.
    * ``max_steps``: it took as many steps as ``max_steps`` allows.
    * ``dt_underflow``: the tolerance asks for a step too small to change the time.
    * ``non_finite``: the state or the field became NaN or infinite, however small the step, as at a pole.
    * ``no_event``: :func:`pyflowkern.ode.odeint_event` reached ``max_time`` without an event.

    Example:
        >>> import torch
        >>> from pyflowkern import ode
        >>> s = ode.solve(lambda t, y: y**2, torch.ones(1), [0.0, 2.0], max_steps=5)  # a pole at t = 1
        >>> s.status is ode.Status.max_steps
        True
    """

    ok = 0
    max_steps = 1
    dt_underflow = 2
    non_finite = 3
    no_event = 4


@dataclass(frozen=True)
class Stats:
    """Counts of a solve.

    With ``control="sample"`` all samples take a step together; such steps of the batch are counted, all as accepted.
    Calls of the field in a backward pass are not counted, nor is one that only looks for parameters.

    Args:
        accepted: steps kept.
        rejected: steps repeated with a smaller size.
        evaluations: calls of the field, including those that choose the first step size.

    Example:
        >>> import torch
        >>> from pyflowkern import ode
        >>> ode.solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0], method="rk4", step_size=0.25).stats
        Stats(accepted=4, rejected=0, evaluations=16)
    """

    accepted: int
    rejected: int
    evaluations: int


#: ``(number of a step, a time within it, the state there) -> the same state with its gradients``.
Inside = Callable[[int, float | Tensor, Tensor], Tensor]


@dataclass
class Trajectory:
    """What a loop returns: the outputs, and the accepted steps, which a backward pass needs.

    Args:
        ys: packed states at the output times, ``[T, ...]``.
        status: of the solve, or an int8 tensor ``[N]`` with one for each sample.
        t: start times of the accepted steps.
        dt: their signed lengths.
        states: the states at their starts; empty where there will be no backward pass.
        outputs: for each output, the number of the step that it lies in and the fraction of the step, None for the end
            of the step; step -1 stands for the first state.
        graphs: autograd graphs of the stages, with ``checkpoint=False``.
        slopes: of the stages, where a dense output was asked for.
        stats: counts.
        inside: pairs of a step's number and the function that gives states in this step or later ones their gradients.
        end: time of the last accepted state where the solve ended early, else None.
    """

    ys: Tensor
    status: Status | Tensor = Status.ok
    t: list[Any] = field(default_factory=list)
    dt: list[Any] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    outputs: list[tuple[int, float | None]] = field(default_factory=list)
    graphs: list[Any] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)
    stats: Stats = Stats(0, 0, 0)
    end: float | None = None
    inside: list[tuple[int, Inside]] = field(default_factory=list)

    def keep(self, t: Any, dt: Any, y: Tensor, slopes: Tensor | None = None) -> None:
        """Add an accepted step: its start, its length, the state at its start, the slopes of its stages."""
        self.t.append(t)
        self.dt.append(dt)
        self.states.append(y)
        if slopes is not None:
            self.slopes.append(slopes)

    def extend(self, later: Trajectory) -> None:
        """Append the steps of a solve that continued from here, and its status."""
        self.status, self.end = later.status, later.end
        self.inside += [(len(self.t) + first, give) for first, give in later.inside]
        for name in ("t", "dt", "states", "slopes"):
            getattr(self, name).extend(getattr(later, name))
        a, b = self.stats, later.stats
        self.stats = Stats(
            a.accepted + b.accepted, a.rejected + b.rejected, a.evaluations + b.evaluations
        )


@dataclass(frozen=True)
class DenseOutput:
    """The state at any time within a solve, by the method's interpolation.

    While gradients are recorded it has those of the discrete solution with respect to the first state and to what the
    field depends on, if the solve recorded them.  With respect to the time, where it is a tensor that requires a
    gradient, the derivative is the field there.

    Args:
        method: tableau with its polynomials.
        starts: of the accepted steps, in their order.
        dt: signed lengths.
        states: at the starts.
        slopes: of the stages of each step.
        packing: from packed states to the user's.
        begin: time and state before the first step, which there need not be.
        inside: see :class:`Trajectory`; empty for what only ``solve`` itself uses.

    Example:
        >>> import torch
        >>> from pyflowkern import ode
        >>> solution = ode.solve(lambda t, y: -y, torch.ones(3), [0.0, 2.0], dense=True)
        >>> y = solution.dense(0.5)
        >>> bool(torch.allclose(y, torch.full((3,), -0.5).exp(), rtol=1e-3))
        True
    """

    method: Tableau
    starts: Sequence[float]
    dt: Sequence[float]
    states: Sequence[Tensor]
    slopes: Sequence[Tensor]
    packing: Packing
    begin: tuple[float, Tensor]
    inside: Sequence[tuple[int, Inside]] = ()

    def __call__(self, t: float | Tensor) -> Any:
        """Return the state at ``t``, a number or a 0-d tensor; ValueError outside of what was integrated."""
        moment, t = t, number(t)
        first = last = self.begin[0]
        if self.starts:
            last = self.starts[-1] + self.dt[-1]
        if not min(first, last) <= t <= max(first, last):
            raise ValueError(f"t must be between {first} and {last}, got {t}")
        if not self.starts:
            return self.packing.unpack(self.begin[1])
        sign = 1.0 if last >= first else -1.0
        i = bisect.bisect_right(self.starts, sign * t, key=lambda s: sign * s) - 1
        weights = dense_weights(self.method, (t - self.starts[i]) / self.dt[i])
        with torch.no_grad():
            packed = rk_combine(self.states[i], self.slopes[i], weights, self.dt[i])
        if torch.is_grad_enabled():
            for begin, give in reversed(self.inside):
                if begin <= i:
                    packed = give(i - begin, moment, packed)
                    break
        return self.packing.unpack(packed)


@dataclass(frozen=True)
class Solution:
    """Result of :func:`pyflowkern.ode.solve`.

    Args:
        ys: states at the times ``t``, ``[T, *shape]``, one tensor per entry of a tuple state.
        ts: the times, float64.
        status: a :class:`Status`; an int8 tensor ``[N]`` of its values where each sample has its own steps, and a
            0-d tensor where a fixed-step solve is being captured as a CUDA graph.
        stats: counts.
        dense: the state at any time, if asked for.

    Example:
        >>> import torch
        >>> from pyflowkern import ode
        >>> solution = ode.solve(lambda t, y: (-y[0], y[1]), (torch.ones(2), torch.ones(3)), [0.0, 1.0])
        >>> [tuple(y.shape) for y in solution.ys], solution.ok
        ([(2, 2), (2, 3)], True)
    """

    ys: Any
    ts: Tensor
    status: Status | Tensor
    stats: Stats
    dense: DenseOutput | None = None

    @property
    def ok(self) -> bool:
        """Whether everything was integrated to its end."""
        if isinstance(self.status, Tensor):
            return bool((self.status == Status.ok).all())
        return self.status == Status.ok
