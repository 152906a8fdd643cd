"""What the adjoints share: the problem, the parameters of its field, and gradients of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.first_derivative import first_derivative_only
from pyflowkern.ode.adjoints.gradients import Parameters
from pyflowkern.ode.options import Options
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Trajectory
from pyflowkern.ode.steppers import Graph

__all__ = ["Gate", "Problem", "autocast_like_now", "gradients_of_replay", "time_gradients"]

_NO_SECOND_BY_TIME = (
    "gradients of this solve have no derivative by t: detach t, or use adjoint='continuous'"
)


def autocast_like_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return a maker of the autocast context that is on now: a backward pass starts without one."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


@dataclass
class Problem:
    """A solve whose gradients are wanted.

    Args:
        field: of packed states.
        times: of the outputs; a float64 tensor ``[T, N]`` where each sample has its own.
        options: settings.
        first: the first state, a leaf, and its slope.
        context: see :func:`autocast_like_now`.
        complete: whether the user named the parameters; see :class:`~pyflowkern.ode.adjoints.gradients.Parameters`.
        read: how many of the parameters, the first ones, are known to be read.
        recorded: what the forward pass would find, if it is known.
        result: what the forward pass found, without what only the backward pass needs.
        end: the time it came to where it ended early, else None.
    """

    field: Field
    times: Any
    options: Options
    first: Graph | None
    context: Callable[[], AbstractContextManager[Any]]
    complete: bool
    read: int
    result: Trajectory | None = None
    recorded: Trajectory | None = None
    end: float | None = None

    def reached(self) -> list[float]:
        """Return the output times; those that the solve did not come to are where it ended, as their states are."""
        times: list[float] = list(self.times)
        if self.end is None:
            return times
        within = min if times[-1] >= times[0] else max
        return [within(t, self.end) for t in times]

    def finish(self, t: Trajectory) -> None:
        """Keep the part of a trajectory that the caller is told."""
        self.result = Trajectory(t.ys, t.status, stats=t.stats)
        if self.options.dense:
            self.result.t, self.result.dt = t.t, t.dt
            self.result.states, self.result.slopes = t.states, t.slopes
        self.first, self.end = None, t.end


def time_gradients(
    problem: Problem, ys: Tensor, grads: Tensor, first: Tensor, given: Tensor | None = None
) -> Tensor:
    r"""Return the gradients of the output times, those of the flow itself.

    :math:`\partial y(t_i) / \partial t_i = f(t_i, y_i)`, and moving the start is to start from
    :math:`y_0 - f(t_0, y_0) dt_0`; they hold up to the error of the solve.  A time that it did not come to has none.

    Args:
        problem: that was solved.
        ys: states there.
        grads: their cotangents.
        first: what reaches the first state through the later ones.
        given: the times as the user's tensor, where they are to be differentiated again.
    """
    found = []
    constant = torch.tensor(problem.times, dtype=ys.dtype, device=ys.device)
    moments = constant if given is None else given.to(constant)
    for i, (t, reached) in enumerate(zip(problem.times, problem.reached(), strict=True)):
        if t != reached:
            found.append(ys.new_zeros(()))
            continue
        slope = problem.field(moments[i], ys[i])
        found.append(((grads[i] if i > 0 else -first) * slope).sum())
    return torch.stack(found)


class Gate(torch.autograd.Function):
    """Pass a tensor on, and its gradient only while open.

    A gradient with respect to parameters shall not run on into what the first state was computed from, yet be
    differentiable with respect to that state.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_open: list[bool]) -> Tensor:
        """Return an alias."""
        ctx.is_open = is_open
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        """Return the gradient if open."""
        return (grad if ctx.is_open[0] else None), None


def gradients_of_replay(
    replay: Callable[[Tensor], Tensor],
    problem: Problem,
    y0: Tensor,
    t: Tensor | None,
    params: Sequence[Tensor],
    grads: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of ``y0``, ``t`` and ``params`` as expressions that autograd can differentiate again."""
    is_open, parameters = [False], Parameters(params, problem.complete)
    with torch.enable_grad(), problem.context():
        start = Gate.apply(y0, is_open) if y0.requires_grad else y0.detach().requires_grad_()  # type: ignore[no-untyped-call]
        ys = replay(start)
        parameters.look(ys, start, () if start.grad_fn is None else (start.grad_fn,))
        first, *others = torch.autograd.grad(
            ys[1:], (start, *parameters.wanted()), grads[1:], create_graph=True, allow_unused=True
        )
        first = torch.zeros_like(y0) if first is None else first
        found: list[Tensor | None] = [first + grads[0], None, *[None] * len(params)]
        if t is not None and t.requires_grad:
            found[1] = time_gradients(problem, ys, grads, first).to(t.dtype)
        for i, g in zip(parameters.read, others, strict=True):
            found[2 + i] = g
    is_open[0] = True
    if t is None or not t.requires_grad:
        return found
    return [g if g is None else first_derivative_only(g, (t,), _NO_SECOND_BY_TIME) for g in found]
