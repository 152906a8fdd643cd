"""One Runge-Kutta step at a time, and interpolation within it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyflowkern.ode.packing import Field
from pyflowkern.ode.stages import Stages
from pyflowkern.ode.tableaus import Coefficients, Tableau, coefficients, dense_weights

__all__ = ["Graph", "Stepper", "stage_times"]

Graph = tuple[Tensor, Tensor]  # the argument of a stage, a leaf, and the slope computed from it


def stage_times(c: Coefficients, t: float, dt: float, perturb: str) -> tuple[Tensor, ...]:
    """Return the times of the stages as 0-d tensors.

    Args:
        c: coefficients of the method.
        t: start of the step.
        dt: its signed length.
        perturb: "end" moves times at the end of the step to just before it, as torchdiffeq does for fields that are
            discontinuous there; "both" also moves times at the start to just after it; "" moves none.
    """
    # one call of torch fewer; on other devices this would wait for a copy
    if c.nodes.device.type == "cpu" and not perturb:
        moments = [node * dt + t for node in c.host_nodes]
        return torch.tensor(moments, dtype=c.dtype, device="cpu").unbind()
    if not perturb:
        return (c.nodes * dt + t).to(c.dtype).unbind()
    times = c.nodes.to(c.dtype) * dt + t
    times = torch.where(c.at_end, torch.nextafter(times, times - dt), times)
    if perturb == "both":
        times = torch.where(c.nodes == 0, torch.nextafter(times, times + dt), times)
    return times.unbind()


class Stepper:
    """Takes steps of one method on states of one shape.

    Args:
        field: ``(t, y) -> dy/dt`` of packed states.
        method: its tableau.
        like: a contiguous state.
        perturb: see :func:`stage_times`.
    """

    def __init__(self, field: Field, method: Tableau, like: Tensor, perturb: str = "") -> None:
        self.field, self.method, self.perturb = field, method, perturb
        self.c = coefficients(method, like.dtype, like.device)
        self.stages = Stages(self.c, method.stages, like)
        self.evaluations = 0
        self.graphs: list[Graph] | None = (
            None  # of the last step; a list if they are to be recorded
        )
        self._last: Graph | None = None

    @property
    def slopes(self) -> Tensor:
        """The slopes of the last step, ``[stages, *shape]``; the next step overwrites them."""
        return self.stages.settled()

    def start(self, t: float, y: Tensor, dt: float = 0.0, first: Graph | None = None) -> None:
        """Evaluate the slope at a new state, where a step of length ``dt`` starts.

        ``first`` is this slope, with the state that it was computed from, where it is known already.
        """
        if first is not None:
            self.evaluations += 1
            self.stages.put(0, first[1].detach())
            self._last = first
            return
        if self.graphs is not None:
            self.graphs = []
        time = torch.full((), t, dtype=y.dtype, device=y.device)
        if self.perturb == "both":
            time = torch.nextafter(time, time + dt)
        self._slope(0, time, y)
        if self.graphs is not None:
            self._last = self.graphs[0]

    def advance(self) -> None:
        """Accept the last step: its last slope is the next step's first."""
        self.stages.restart()
        if self.graphs is not None:
            self._last = self.graphs[-1]

    def step(self, t: float, dt: float, y: Tensor) -> Tensor:
        """Return the state after a step, whose first slope :meth:`start` or :meth:`advance` has provided."""
        times = stage_times(self.c, t, dt, self.perturb)
        if self.graphs is not None:
            assert self._last is not None
            self.graphs = [self._last]
        return self._through(times, dt, y)

    def whole(self, t: float, dt: float, y: Tensor, first: Graph | None = None) -> Tensor:
        """Return the state after a step whose first slope is evaluated, too, or given as to :meth:`start`."""
        times = stage_times(self.c, t, dt, self.perturb)
        if first is not None:
            self.start(t, y, dt, first)
        if self.graphs is not None:
            self.graphs = [] if first is None else [first]
        if first is None:
            self._slope(0, times[0], y)
        return self._through(times, dt, y)

    def _through(self, times: Sequence[Tensor], dt: float | Tensor, y: Tensor) -> Tensor:
        """Evaluate all stages but the first at their times; return the state after the step."""
        arg = y
        for i in range(1, self.method.stages):
            arg = self.stages.moved(y, i, dt)
            self._slope(i, times[i], arg)
        return arg if self.method.fsal else self.stages.moved(y, -1, dt)

    def increment(self, t: float, dt: float, y: Tensor, error: bool = False) -> Tensor:
        """Return the change of the state over a step, whose first slope is evaluated, too.

        Args:
            t: start.
            dt: signed length.
            y: state.
            error: also evaluate the stages that only the error estimate needs.
        """
        method = self.method
        stages = method.stages if error else method.needed
        times = stage_times(self.c, t, dt, self.perturb)
        self._slope(0, times[0], y)
        for i in range(1, stages):
            self._slope(i, times[i], self.stages.moved(y, i, dt))
        return self.stages.increment(dt)

    def dense(self, y: Tensor, dt: float, theta: float) -> Tensor:
        """Return the state a fraction ``theta`` into the last step, which began at ``y``."""
        return self.stages.inside(y, dense_weights(self.method, theta), dt)

    def _slope(self, i: int, t: Tensor, y: Tensor) -> None:
        self.evaluations += 1
        if self.graphs is None:
            self.stages.put(i, self.field(t, y))
            return
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            slope = self.field(t, leaf)
        self.graphs.append((leaf, slope))
        self.stages.put(i, slope.detach())
