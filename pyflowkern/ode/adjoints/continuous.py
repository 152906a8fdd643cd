"""The continuous adjoint: an ODE of state, adjoint and parameter gradients, solved backwards in time.

Memory does not grow with the number of steps.  The gradient is that of the exact flow up to the error of the backward
solve, not that of the discrete solution (Chen et al., 2018).  Under ``create_graph=True`` the backward solve is itself
a :class:`Continuous` node, so derivatives of any order come from further solves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyflowkern.ode.adjoints.direct import integrator, run
from pyflowkern.ode.adjoints.gradients import Parameters, vector_jacobian
from pyflowkern.ode.adjoints.problem import Problem, autocast_like_now, time_gradients
from pyflowkern.ode.norms import Norm, Rms
from pyflowkern.ode.options import Options
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Status

__all__ = ["Continuous"]


class Continuous(torch.autograd.Function):
    """A whole solve as one node of the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, y0: Tensor, t: Tensor | None, *params: Tensor
    ) -> Tensor:
        """Return the outputs, packed."""
        trajectory = run(problem, y0.detach(), False)
        problem.finish(trajectory)
        ctx.problem = problem
        ctx.save_for_backward(t, trajectory.ys, *params)
        return trajectory.ys

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first state, the times and the parameters."""
        t, ys, *params = ctx.saved_tensors
        problem: Problem = ctx.problem
        read = list(range(problem.read))
        totals: list[Tensor | None] = [None] * len(params)
        with problem.context():
            while True:
                try:
                    first, sums = _solve_back(problem, ys, grads, t, params, read)
                    break
                except _UnexpectedParameters as more:  # start again with these, too
                    read += more.numbers
            grad_t = None
            if t is not None and ctx.needs_input_grad[2]:
                given = t if torch.is_grad_enabled() else None
                grad_t = time_gradients(problem, ys, grads, first, given).to(t.dtype)
        for i, part in zip(read, sums.split([_numbers(params[i]) for i in read]), strict=True):
            totals[i] = _shaped(part, params[i])
        return (None, first + grads[0], grad_t, *totals)


class _UnexpectedParameters(RuntimeError):
    """The field has read parameters whose gradients are not part of the backward solve's state yet."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__("func reads tensors that it did not read before: name them in params=")
        self.numbers = numbers


def _solve_back(
    problem: Problem,
    ys: Tensor,
    grads: Tensor,
    t: Tensor | None,
    params: Sequence[Tensor],
    read: list[int],
) -> tuple[Tensor, Tensor]:
    """Solve the adjoint ODE from the last output to the first.

    Args:
        problem: the forward solve.
        ys: its outputs.
        grads: their cotangents.
        t: the output times, if their gradients are wanted.
        params: the tensors that may be read.
        read: indices of those that are known to be read; only their gradients are integrated.

    Returns:
        The gradients of the first state and, concatenated, of the parameters in ``read``.

    Raises:
        _UnexpectedParameters: where the field reads further parameters.
    """
    n, shape = ys[0].numel(), ys[0].shape
    wanted = [params[i] for i in read]
    width = sum(_numbers(p) for p in wanted)
    field = _augmented(problem, shape, params, read)
    options = _augmented_options(problem.options, ys, width, wanted)
    a, totals = torch.zeros_like(ys[0]).view(-1), ys.new_zeros(width)
    times = problem.reached()
    for i in range(len(times) - 1, 0, -1):
        a = a + grads[i].reshape(-1)
        span = [times[i], times[i - 1]]
        if span[0] == span[1]:
            continue
        start = torch.cat([ys[i].reshape(-1), a, totals])
        if torch.is_grad_enabled():
            back = Problem(
                field, span, options, None, autocast_like_now(ys.device), True, len(wanted)
            )
            ends = None if t is None else torch.stack([t[i], t[i - 1]])
            end = Continuous.apply(back, start, ends, *wanted)[-1]  # type: ignore[no-untyped-call]
            assert back.result is not None
            status = back.result.status
        else:
            solved = integrator(options)(field, start, span, options)
            end, status = solved.ys[-1], solved.status
        if status != Status.ok:
            warnings.warn(
                f"the adjoint solve ended early ({Status(int(status)).name}): its gradients are NaN; "
                "adjoint='direct' has those of the steps that were taken",
                RuntimeWarning,
                stacklevel=2,
            )
            return torch.full_like(ys[0], math.nan), torch.full_like(totals, math.nan)
        a, totals = end[n : 2 * n], end[2 * n :]
    return a.view(shape), totals


def _augmented(
    problem: Problem, shape: torch.Size, params: Sequence[Tensor], read: Sequence[int]
) -> Field:
    r"""Return the adjoint ODE's field of (state, adjoint, gradients of what is read): :math:`(f, -a^T f_y, -a^T f_p)`.

    Where the augmented state requires a gradient, the vector-Jacobian products are recorded for another derivative.
    """
    n, wanted = shape.numel(), [params[i] for i in read]
    sizes = [_numbers(p) for p in wanted]
    parameters = Parameters(params, problem.complete, problem.field, problem.held)

    def augmented(t: Tensor, state: Tensor) -> Tensor:
        recorded = torch.is_grad_enabled() and state.requires_grad
        with torch.enable_grad():
            y = state[:n].view(shape)
            y = y if recorded else y.detach().requires_grad_()
            slope = problem.field(t, y)
            parameters.look(slope, y, () if y.grad_fn is None else (y.grad_fn,))
            if len(parameters.read) > len(read) and (more := set(parameters.read) - set(read)):
                raise _UnexpectedParameters(sorted(more))
            grads: Sequence[Tensor | None] = [None] * (1 + len(wanted))
            if slope.requires_grad:
                a = -state[n : 2 * n].view(shape).to(slope.dtype)
                grads = vector_jacobian(slope, (y, *wanted), a, recorded)
        if recorded:
            pairs = zip(grads, [n, *sizes], strict=True)
            parts = [state.new_zeros(m) if g is None else _flat(g).to(state) for g, m in pairs]
            return torch.cat([slope.reshape(-1), *parts])
        out = state.new_zeros(state.shape)
        out[:n] = slope.detach().reshape(-1)
        for part, g in zip(out[n:].split([n, *sizes]), grads, strict=True):
            if g is not None:
                part.copy_(_flat(g))
        return out

    return augmented


class _AdjointNorm:
    """The largest of the norms of state, adjoint, and gradients of each parameter that counts.

    Args:
        state: the norm of a state.
        shape: of a packed state.
        sizes: of the parameters that count: none with the seminorm.
    """

    def __init__(self, state: Norm, shape: torch.Size, sizes: Sequence[int]) -> None:
        self.state, self.shape, self.sizes = state, shape, list(sizes)

    def __call__(self, r: Tensor) -> Tensor:
        """Return the norm."""
        n = self.shape.numel()
        norms = [self.state(r[:n].view(self.shape)), self.state(r[n : 2 * n].view(self.shape))]
        if self.sizes:
            norms.append(Rms(self.sizes)(r[2 * n :]))
        return torch.stack(norms).amax()


def _split(r: Tensor, shape: torch.Size, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Divide an augmented state into state, adjoint and the gradient of each parameter."""
    n, sizes = shape.numel(), [_numbers(p) for p in params]
    y, a, *grads = r.split([n, n, *sizes])
    shaped = [_shaped(g, p) for g, p in zip(grads, params, strict=True)]
    return (y.view(shape), a.view(shape), *shaped)


def _augmented_norm(options: Options, shape: torch.Size, params: Sequence[Tensor]) -> Norm:
    """Return the norm of the backward solve: the largest over its parts of the forward solve's norm."""
    user = options.augmented_norm
    if user is not None:
        return lambda r: user(*_split(r, shape, params))
    sizes = [_numbers(p) for p in params]
    counted = [] if options.seminorm else list(sizes)
    entries = options.norm.sizes or [shape.numel()] if isinstance(options.norm, Rms) else []
    # a norm of another kind, or one that ignores a part of the state
    if sum(entries) != shape.numel():
        return _AdjointNorm(options.norm, shape, counted)
    return Rms([*entries, *entries, *counted])


def _augmented_options(
    options: Options, ys: Tensor, width: int, params: Sequence[Tensor]
) -> Options:
    """Return the settings of the backward solve."""
    first_step = None if options.backward is None else options.backward.first_step
    options = options.backward or options
    callbacks = options.backward_callbacks
    if callbacks is not None:
        unpack = callbacks.unpack
        shape = ys[0].shape

        def augmented(r: Tensor) -> tuple[Tensor, ...]:
            y, a, *grads = _split(r, shape, params)
            return (r.new_zeros(()), unpack(y), unpack(a), *grads)

        callbacks = replace(callbacks, unpack=augmented)

    def extend(tolerance: float | Tensor) -> float | Tensor:
        if isinstance(tolerance, float):
            return tolerance
        full = tolerance.expand(ys[0].shape).reshape(-1)
        return torch.cat([full, full, full.min().expand(width)])

    return replace(
        options,
        norm=_augmented_norm(options, ys[0].shape, params),
        rtol=extend(options.rtol),
        atol=extend(options.atol),
        checkpoint=True,
        dense=False,
        first_step=first_step,
        callbacks=callbacks,
        backward_callbacks=None,
        augmented_norm=None,  # a norm of the user's takes these parts only; an adjoint of the adjoint has more
    )


def _numbers(p: Tensor) -> int:
    """Return how many real numbers a parameter holds."""
    return p.numel() * (2 if p.is_complex() else 1)


def _flat(g: Tensor) -> Tensor:
    """Return the real numbers of a gradient."""
    return (torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).reshape(-1)


def _shaped(g: Tensor, p: Tensor) -> Tensor:
    """Return the gradient of a parameter from its real numbers."""
    if p.is_complex():
        return torch.view_as_complex(g.view(*p.shape, 2).contiguous()).to(p.dtype)
    return g.view_as(p).to(p.dtype)
