r"""Gradients of the reversible solver: exact up to rounding, in constant memory (McCallum and Foster, 2024).

Given the end of a step of :mod:`pyflowkern.ode.loops.reversible`, its start is

.. math::
    z_n = z_{n+1} + \Psi_{-h}(t_{n+1}, y_{n+1}), \qquad
    y_n = (y_{n+1} - (1 - \lambda) z_n - \Psi_h(t_n, z_n)) / \lambda,

so the backward pass reconstructs the states of the forward pass up to rounding, which grows like :math:`\lambda^{-n}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.ode.adjoints.gradients import Gradients
from pyflowkern.ode.adjoints.problem import Problem, gradients_of_replay, time_gradients
from pyflowkern.ode.adjoints.steps import differentiable_step, record_stages, step_pullback
from pyflowkern.ode.loops.reversible import Pair, Tape, forward_step, integrate
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Status
from pyflowkern.ode.steppers import Stepper, stage_times
from pyflowkern.ode.tableaus import Coefficients, Tableau, coefficients

__all__ = ["Reversible", "back"]


def back(
    field: Field, method: Tableau, coupling: float, t: float, t1: float, y1: Tensor, z1: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the pair at the start of a step from that at its end."""
    dt = t1 - t
    stepper = Stepper(field, method, y1)
    z = z1 + stepper.increment(t1, -dt, y1)
    y = (y1 - (1 - coupling) * z - stepper.increment(t, dt, z)) / coupling
    return y, z


class Reversible(torch.autograd.Function):
    """A whole solve as one node of the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, y0: Tensor, t: Tensor | None, *params: Tensor
    ) -> Tensor:
        """Return the outputs, packed."""
        out, tape, y, z = integrate(problem.field, y0.detach(), problem.times, problem.options)
        problem.finish(out)
        ctx.problem, ctx.tape, ctx.end = problem, tape, (y, z)
        ctx.failed = out.status != Status.ok
        ctx.save_for_backward(y0, t, out.ys, *params)
        return out.ys

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first state, the times and the parameters."""
        y0, t, ys, *params = ctx.saved_tensors
        problem, tape = ctx.problem, ctx.tape
        if torch.is_grad_enabled():

            def replay(start: Tensor) -> Tensor:
                return _replay(problem, tape, start)

            return (None, *gradients_of_replay(replay, problem, y0, t, params, grads))
        gradients = Gradients(params, problem.complete, problem.field, problem.held)
        grads = grads.contiguous()
        with problem.context():
            # steps towards a pole cannot be reversed: the differences of huge numbers are all rounding
            pairs = _pairs(problem, tape, y0.detach()) if ctx.failed else []
            first = _pull(problem, tape, ctx.end, pairs, grads, gradients)
            grad_t = None
            if t is not None and ctx.needs_input_grad[2]:
                grad_t = time_gradients(problem, ys, grads, first).to(t.dtype)
        return (None, first + grads[0], grad_t, *gradients.totals)


@torch.no_grad()
def _pairs(problem: Problem, tape: Tape, y: Tensor) -> list[Pair]:
    """Repeat the accepted steps and return the pair at the start of each."""
    stepper, pair = Stepper(problem.field, problem.options.method, y), (y, y)
    pairs: list[Pair] = []
    for t, t1, dt in zip(tape.t, tape.t1, tape.dt, strict=True):
        pairs.append(pair)
        pair = forward_step(stepper, problem.options.coupling, t, t1, dt, pair)
    return pairs


def _pull(
    problem: Problem,
    tape: Tape,
    end: Pair,
    pairs: Sequence[Pair],
    grads: Tensor,
    gradients: Gradients,
) -> Tensor:
    """Return the gradient of the first state and add up those of parameters.

    Args:
        problem: the solve.
        tape: its accepted steps.
        end: the pair at their end.
        pairs: the pairs at their starts, or empty: they are then reconstructed from the end.
        grads: cotangents of the outputs.
        gradients: where the gradients of parameters are added up.
    """
    method, coupling, field = problem.options.method, problem.options.coupling, problem.field
    y, z = end
    c = coefficients(method, y.dtype, y.device)
    y_bar, z_bar = torch.zeros_like(y), torch.zeros_like(z)
    for i in tape.missing:
        y_bar = y_bar + grads[i]
    for j in reversed(range(len(tape.t))):
        t, t1, dt = tape.t[j], tape.t1[j], tape.dt[j]
        for i in _outputs_at(problem.times, tape, j):
            y_bar = y_bar + grads[i]
        graphs, step = _record(field, method, c, t1, -dt, y)
        z = pairs[j][1] if pairs else z + step
        y_bar = y_bar + step_pullback(method, c, graphs, -dt, -z_bar, gradients)
        graphs, step = _record(field, method, c, t, dt, z)
        y = pairs[j][0] if pairs else (y - (1 - coupling) * z - step) / coupling
        z_bar = z_bar + (1 - coupling) * y_bar
        z_bar = z_bar + step_pullback(method, c, graphs, dt, y_bar, gradients)
        y_bar = coupling * y_bar
    for i in range(1, len(problem.times)):
        if _is_start(problem.times, tape, i):
            y_bar = y_bar + grads[i]
    return y_bar + z_bar


def _is_start(times: Sequence[float], tape: Tape, i: int) -> bool:
    """Whether output ``i`` is the first state."""
    return times[i] == times[0] and i not in tape.missing


def _outputs_at(times: Sequence[float], tape: Tape, j: int) -> list[int]:
    """Return the numbers of the outputs at the end of step ``j``: several where times repeat."""
    first = tape.output[j]
    if first == 0:
        return []
    last = first
    while last + 1 < len(times) and times[last + 1] == times[first]:
        last += 1
    return [i for i in range(first, last + 1) if i not in tape.missing]


def _record(
    field: Field, method: Tableau, c: Coefficients, t: float, dt: float, y: Tensor
) -> tuple[Any, Tensor]:
    """Repeat a step; return the graphs of its stages, and its increment."""
    times = stage_times(c, t, dt, "")
    graphs, stages = record_stages(field, c, method.needed, times, dt, y)
    return graphs, stages.increment(dt)


def _replay(problem: Problem, tape: Tape, y: Tensor) -> Tensor:
    """Take the accepted steps from ``y`` again, recorded by autograd, and return the outputs."""
    method, coupling = problem.options.method, problem.options.coupling
    c = coefficients(method, y.dtype, y.device)
    z, outputs = y, [y] * len(problem.times)
    for j, (t, t1, dt) in enumerate(zip(tape.t, tape.t1, tape.dt, strict=True)):
        times = stage_times(c, t, dt, "")
        after, _ = differentiable_step(problem.field, method, times, dt, z)
        y = coupling * (y - z) + after
        times = stage_times(c, t1, -dt, "")
        before, _ = differentiable_step(problem.field, method, times, -dt, y)
        z = z - (before - y)
        for i in _outputs_at(problem.times, tape, j):
            outputs[i] = y
    for i in tape.missing:
        outputs[i] = y
    return torch.stack(outputs)
