"""The slopes of a step in one buffer, and weighted sums over them: one pass over memory each where a kernel runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.ode.controllers import Scaling
from pyflowkern.ode.norms import Rms
from pyflowkern.ode.options import Options
from pyflowkern.ode.tableaus import Coefficients
from pyflowkern.ops.runge_kutta import MAX_SEGMENTS, MAX_SLOPES, STATES, below_autograd

__all__ = ["ErrorNorm", "Stages", "Step"]

#: A signed length: a number, or float64 on the device of the state, 0-d or ``[N]`` with one for each row.
Step = float | Tensor

#: Relative and absolute tolerance, and the sizes of the segments.
Allowed = tuple[float, float, list[int]]

_OPS = torch.ops.pyflowkern
_ONE = torch.tensor([1.0], dtype=torch.float64, device="cpu")
_CHANGE = torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu")


class Stages:
    """The slopes ``[stages, *shape]`` of a step.

    With a kernel, the newest slope stays in the tensor that the field returned, and the next sum copies it into its row
    on the way.  No field may be called in between, because it may reuse that tensor's memory.

    Args:
        c: coefficients of the method.
        count: number of stages.
        like: a contiguous state.
    """

    def __init__(self, c: Coefficients, count: int, like: Tensor) -> None:
        self.c = c
        self.buffer = like.new_empty((count, *like.shape))
        self.fused = count <= MAX_SLOPES and kernel_serves("rk_stage", like, dtypes=STATES)
        self._fresh: Tensor | None = None  # the newest slope, which belongs into row `_row`
        self._row = 0
        self._zero: Tensor | None = None
        self._columns: list[
            Tensor
        ] = []  # [i]: the first i slopes as columns, for sums without a kernel

    def put(self, i: int, slope: Tensor) -> None:
        """Store a slope; its memory must not change before the next sum or :meth:`settled`."""
        if self._fresh is not None:
            self.settled()
        if self.fused:
            self._fresh, self._row = slope, i
        else:
            self.buffer[i].copy_(slope)

    def settled(self) -> Tensor:
        """Return all slopes, the newest one copied into its row."""
        if self._fresh is not None:
            self.buffer[self._row].copy_(self._fresh)
            self._fresh = None
        return self.buffer

    def restart(self) -> None:
        """Make the last slope the first."""
        last = len(self.buffer) - 1
        if self._fresh is not None and self._row == last:
            self._row = 0
        else:
            self.put(0, self.buffer[last])

    def moved(self, y: Tensor, i: int, dt: Step) -> Tensor:
        """Return the state that stage ``i`` is evaluated at; with -1 the state after the step."""
        if self.fused:
            return self._sum(y, self.c.host_rows[i], dt)
        return self._plain(y, self.c.rows[i], dt)

    def euler(self, y: Tensor, dt: Step) -> Tensor:
        """Return ``y + dt k_0``."""
        if self.fused:
            return self._sum(y, _ONE, dt)
        return self._plain(y, self.buffer.new_ones(1), dt)

    def inside(self, y: Tensor, weights: Sequence[float], dt: Step) -> Tensor:
        """Return ``y + dt sum_i w_i k_i`` for any weights."""
        row = torch.tensor(weights, dtype=torch.float64, device="cpu")
        if self.fused:
            return self._sum(y, row, dt)
        return self._plain(y, row.to(self.buffer), dt)

    def increment(self, dt: Step) -> Tensor:
        """Return the change of the state over the step."""
        return self.moved(self._zeros(), -1, dt)

    def error(self, dt: Step) -> Tensor:
        """Return the estimated error of the step."""
        if self.fused:
            assert self.c.host_error is not None
            return self._sum(self._zeros(), self.c.host_error, dt)
        assert self.c.error is not None
        return self._plain(self._zeros(), self.c.error, dt)

    def _zeros(self) -> Tensor:
        if self._zero is None:
            self._zero = self.buffer.new_zeros(self.buffer.shape[1:])
        return self._zero

    def norm(self, weights: Tensor, y: Tensor, y1: Tensor, dt: Step, allowed: Allowed) -> Tensor:
        """Return the error norm, :func:`pyflowkern.ops.rk_error`, by the kernel."""
        fresh, self._fresh = self._fresh, None
        args = (y, y1, weights, *_split(dt), *allowed)
        norm: Tensor
        if fresh is not None:
            norm = _OPS.rk_last.default(self.buffer, fresh, self._row, *args)
        else:
            norm = _OPS.rk_error.default(y, y1, self.buffer, *args[2:])
        return norm

    def _sum(self, y: Tensor, weights: Tensor, dt: Step) -> Tensor:
        fresh, self._fresh = self._fresh, None
        if fresh is None:
            return below_autograd(y, self.buffer, weights, *_split(dt))
        moved: Tensor = _OPS.rk_stage.default(
            self.buffer, fresh, self._row, y, weights, *_split(dt)
        )
        return moved

    def _plain(self, y: Tensor, weights: Tensor, dt: Step) -> Tensor:
        buffer = self.settled()
        if not self._columns:
            flat = buffer.view(len(buffer), -1)
            self._columns = [flat[:i].t() for i in range(len(flat) + 1)]
        slopes = self._columns[len(weights)]
        if not isinstance(dt, Tensor):
            return torch.addmv(y.view(-1), slopes, weights, alpha=dt).view(y.shape)
        dt = dt.to(y.dtype)
        if dt.dim() == 0:
            return torch.addmv(y.view(-1), slopes, weights * dt).view(y.shape)
        return torch.addcmul(y, dt[:, None], torch.mv(slopes, weights).view(y.shape))


class ErrorNorm:
    """The norm of the scaled error of a step; a step is accepted up to 1.

    Args:
        stages: the slopes.
        options: tolerances and the norm.
        like: a state.
    """

    def __init__(self, stages: Stages, options: Options, like: Tensor) -> None:
        self.stages, self.options = stages, options
        norm, rtol, atol = options.norm, options.rtol, options.atol
        self.unit: Step = 1.0
        self.fused: Allowed | None = None
        if (
            stages.fused
            and isinstance(norm, Rms)
            and len(norm.sizes) <= MAX_SEGMENTS
            and isinstance(rtol, float)
            and isinstance(atol, float)
        ):
            self.fused = rtol, atol, norm.sizes
            if norm.rows:
                self.unit = like.new_ones(len(like), dtype=torch.float64)
        else:
            self.scaled = Scaling(like, rtol, atol)

    def __call__(self, dt: Step, y: Tensor, y1: Tensor) -> Tensor:
        """Return the norm for the step from ``y`` to ``y1``, NaN where ``y1`` is not finite."""
        if self.fused is not None:
            assert self.stages.c.host_error is not None
            return self.stages.norm(self.stages.c.host_error, y, y1, dt, self.fused)
        return self.options.norm(self.scaled(self.stages.error(dt), y, y1))

    def of_start(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled norms of a state and of the first slope, which was evaluated there."""
        if self.fused is None:
            o = self.options
            self.scale = y.abs().mul_(o.rtol).add_(o.atol)
            return o.norm(y / self.scale), o.norm(self.stages.settled()[0] / self.scale)
        slope = self.stages.norm(_ONE, y, y, self.unit, self.fused)
        return _OPS.rk_error.default(y, y, y[None], _ONE, *_split(self.unit), *self.fused), slope

    def of_change(self, y: Tensor, slope: Tensor) -> Tensor:
        """Return the scaled norm of the difference between another slope and the first; overwrites the second."""
        if self.fused is None:
            return self.options.norm((slope - self.stages.settled()[0]) / self.scale)
        self.stages.put(1, slope)
        return self.stages.norm(_CHANGE, y, y, self.unit, self.fused)


def _split(dt: Step) -> tuple[float, Tensor | None]:
    """Return a step as two arguments of the ops: a number, and a tensor that replaces it."""
    return (0.0, dt) if isinstance(dt, Tensor) else (dt, None)
