"""What the adjoints share: the description of a solve, gradients of its times, and gradients by a recorded replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    """Return a function that makes the autocast context of this moment again, for the backward pass, which has none."""
    kind = device.type
    if kind == "meta":  # of which asking is an error
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


@dataclass
class Problem:
    """A solve whose gradients are wanted.

    Args:
        field: of packed states.
        times: of the outputs; a float64 tensor ``[T, N]`` where each sample has its own.
        options: settings.
        first: the first state, a leaf, and its slope, if known.
        context: see :func:`autocast_like_now`.
        complete: whether the user named the parameters; see :class:`~pyflowkern.ode.adjoints.gradients.Parameters`.
        read: how many of the parameters, the first ones, are known to be read.
        held: the tensors that the field held when the solve began, if the user named the parameters.
        recorded: the trajectory, if it is known already; the forward pass then returns it instead of solving.
        result: the trajectory of the forward pass, without what only the backward pass needs.
        end: the time that was reached, where the solve ended early, else None.
    """

    field: Field
    times: Any
    options: Options
    first: Graph | None
    context: Callable[[], AbstractContextManager[Any]]
    complete: bool
    read: int
    held: Sequence[Tensor] = ()
    result: Trajectory | None = None
    recorded: Trajectory | None = None
    end: float | None = None

    def reached(self) -> list[float]:
        """Return the output times; those not reached are replaced by where the solve ended, as their states are."""
        times: list[float] = list(self.times)
        if self.end is None:
            return times
        within = min if times[-1] >= times[0] else max
        return [within(t, self.end) for t in times]

    def finish(self, t: Trajectory) -> None:
        """Keep the part of a trajectory that the caller of the solve gets."""
        self.result = Trajectory(t.ys, t.status, stats=t.stats)
        if self.options.dense:
            self.result.t, self.result.dt = t.t, t.dt
            self.result.states, self.result.slopes = t.states, t.slopes
        self.first, self.end = None, t.end


def time_gradients(
    problem: Problem, ys: Tensor, grads: Tensor, first: Tensor, given: Tensor | None = None
) -> Tensor:
    r"""Return the gradients of the output times, by the formulas of the exact flow.

    :math:`\partial y(t_i) / \partial t_i = f(t_i, y_i)`, and a shift :math:`dt_0` of the start has the effect of
    starting from :math:`y_0 - f(t_0, y_0) dt_0`.  Both hold up to the error of the solve.  A time that was not reached
    has gradient zero.

    Args:
        problem: the solve.
        ys: its outputs.
        grads: their cotangents.
        first: the cotangent of the first state through the later outputs.
        given: the user's tensor of times, where the gradients are to be differentiated again.
    """
    by_time = []
    constant = torch.tensor(problem.times, dtype=ys.dtype, device=ys.device)
    moments = constant if given is None else given.to(constant)
    for i, (t, reached) in enumerate(zip(problem.times, problem.reached(), strict=True)):
        if t != reached:
            by_time.append(ys.new_zeros(()))
            continue
        slope = problem.field(moments[i], ys[i])
        by_time.append(((grads[i] if i > 0 else -first) * slope).sum())
    return torch.stack(by_time)


class Gate(torch.autograd.Function):
    """The identity; its gradient passes only while the gate is open.

    While the gradients of a replay are computed, the gate is closed, so that they do not run on into the graph that the
    first state comes from.  Afterwards it is open, so that they can be differentiated with respect to that state.
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
    """Return the gradients of ``y0``, ``t`` and ``params``, with a graph, so that they can be differentiated again.

    Args:
        replay: repeats the solve from a first state, recorded by autograd, and returns the outputs.
        problem: the solve.
        y0: first state.
        t: output times, if their gradients are wanted.
        params: the tensors that the field may read.
        grads: cotangents of the outputs.
    """
    is_open, parameters = (
        [False],
        Parameters(params, problem.complete, problem.field, problem.held),
    )
    with torch.enable_grad(), problem.context():
        start = Gate.apply(y0, is_open) if y0.requires_grad else y0.detach().requires_grad_()  # type: ignore[no-untyped-call]
        ys = replay(start)
        parameters.look(ys, start, () if start.grad_fn is None else (start.grad_fn,))
        first, *others = torch.autograd.grad(
            ys[1:], (start, *parameters.wanted()), grads[1:], create_graph=True, allow_unused=True
        )
        first = torch.zeros_like(y0) if first is None else first
        results: list[Tensor | None] = [first + grads[0], None, *[None] * len(params)]
        if t is not None and t.requires_grad:
            results[1] = time_gradients(problem, ys, grads, first).to(t.dtype)
        for i, g in zip(parameters.read, others, strict=True):
            results[2 + i] = g
    is_open[0] = True
    if t is None or not t.requires_grad:
        return results
    return [
        g if g is None else first_derivative_only(g, (t,), _NO_SECOND_BY_TIME) for g in results
    ]
