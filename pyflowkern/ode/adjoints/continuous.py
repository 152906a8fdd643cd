"""The continuous adjoint: an ODE of state, adjoint and parameter gradients, solved backwards in time.

Memory does not grow with the number of steps; the gradient is that of the flow up to the error of the backward solve,
not that of the discrete solution (Chen et al., 2018).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyflowkern.ode.adjoints.direct import integrator, run
from pyflowkern.ode.adjoints.problem import Problem, time_gradients
from pyflowkern.ode.norms import Norm, Rms
from pyflowkern.ode.options import Options
from pyflowkern.ode.solution import Status

__all__ = ["Continuous"]


class Continuous(torch.autograd.Function):
    """A whole solve as one node."""

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
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first state, the times and the parameters."""
        t, ys, *params = ctx.saved_tensors
        problem: Problem = ctx.problem
        with problem.context():
            first, totals = _solve_back(problem, ys, grads, params)
            grad_t = None
            if t is not None and ctx.needs_input_grad[2]:
                grad_t = time_gradients(problem, ys, grads, first).to(t.dtype)
        sizes = [_numbers(p) for p in params]
        parts = [_shaped(g, p) for g, p in zip(totals.split(sizes), params, strict=True)]
        return (None, first + grads[0], grad_t, *parts)


def _solve_back(
    problem: Problem, ys: Tensor, grads: Tensor, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    n, shape = ys[0].numel(), ys[0].shape
    sizes = [_numbers(p) for p in params]
    width = sum(sizes)

    def augmented(t: Tensor, state: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = state[:n].view(shape).detach().requires_grad_()
            slope = problem.field(t, leaf)
        out = state.new_zeros(state.shape)
        out[:n] = slope.detach().reshape(-1)
        if slope.requires_grad:
            a = -state[n : 2 * n].view(shape).to(slope.dtype)
            found = torch.autograd.grad(
                slope, (leaf, *params), a, retain_graph=True, allow_unused=True
            )
            parts = out[n:].split([n, *sizes])
            for part, g in zip(parts, found, strict=True):
                if g is not None:
                    part.copy_(_flat(g))
        return out

    options = _augmented_options(problem.options, ys, width, params)
    a, totals = torch.zeros_like(ys[0]).view(-1), ys.new_zeros(width)
    times = problem.reached()
    for i in range(len(times) - 1, 0, -1):
        a = a + grads[i].reshape(-1)
        span = times[i], times[i - 1]
        if span[0] == span[1]:
            continue
        start = torch.cat([ys[i].reshape(-1), a, totals])
        back = integrator(options)(augmented, start, span, options)
        if back.status != Status.ok:
            warnings.warn(
                f"the adjoint solve ended early ({Status(int(back.status)).name}): its gradients are NaN; "
                "adjoint='direct' has those of the steps that were taken",
                RuntimeWarning,
                stacklevel=2,
            )
            return torch.full_like(ys[0], math.nan), torch.full_like(totals, math.nan)
        a, totals = back.ys[-1][n : 2 * n], back.ys[-1][2 * n :]
    return a.view(shape), totals


class _AdjointNorm:
    """The largest of the norms of state, adjoint and, unless left out, the gradients of each parameter.

    Args:
        state: the norm of a state.
        shape: of a packed state.
        sizes: of the parameters that count.
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


def _augmented_norm(options: Options, shape: torch.Size, sizes: Sequence[int]) -> Norm:
    """Return the norm of the backward solve: that of the forward solve, of each part the largest."""
    counted = [] if options.seminorm else list(sizes)
    if not isinstance(options.norm, Rms):
        return _AdjointNorm(options.norm, shape, counted)
    entries = options.norm.sizes or [shape.numel()]
    return Rms([*entries, *entries, *counted])


def _augmented_options(
    options: Options, ys: Tensor, width: int, params: Sequence[Tensor]
) -> Options:
    """Return the settings of the backward solve."""

    def extend(tolerance: float | Tensor) -> float | Tensor:
        if isinstance(tolerance, float):
            return tolerance
        full = tolerance.expand(ys[0].shape).reshape(-1)
        return torch.cat([full, full, full.min().expand(width)])

    return replace(
        options,
        norm=_augmented_norm(options, ys[0].shape, [_numbers(p) for p in params]),
        rtol=extend(options.rtol),
        atol=extend(options.atol),
        checkpoint=True,
        dense=False,
        first_step=None,
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
