"""Solves in which a sample that cannot be integrated leaves the others as they are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ode
from pyflowkern.core.outside_graphs import outside_graphs
from pyflowkern.ode.options import name_from_torchdiffeq
from pyflowkern.ode.tableaus import tableau
from pyflowkern.ode.unrolled import unrolls

__all__ = ["Dynamics", "check_export", "guarded", "rows_like", "solve_rows"]

Dynamics = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]

#: Settings that give each sample steps of its own.
_STEPS_PER_SAMPLE: dict[str, Any] = {
    "control": "sample",
    "adjoint": "direct",
    "checkpoint": True,
    "compat": None,
    "norm": None,
    "dense": False,
    "jump_t": None,
    "backward": None,
}


def solve_rows(
    solve: Callable[..., ode.Solution],
    bad: Tensor,
    settings: Mapping[str, Any],
    times: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    """Solve, and where it ends early find the samples that failed and solve for the others.

    A solve with one step size ends for the whole batch where one sample blows up.  Then, and only
    then, each sample gets steps of its own, or with fixed steps those that blow up are stopped one
    by one.  Gradients come from a solve that the failed samples enter as zeros: a zero cotangent
    of a value that is not finite would be NaN.

    Args:
        solve: ``(bad, alive=None, **changed settings)``: with zeros for the bad samples and, given
            ``alive``, with :func:`guarded` slopes.
        bad: ``[N]``, the samples that are known not to be finite.
        settings: those of the solver.
        times: of the states.

    Returns:
        The states ``[T, N, ...]`` and ``bad`` with the samples that failed; those states are NaN.
    """
    if unrolls(times, **settings):  # nothing looks at numbers there
        return _masked(solve(bad), bad), bad
    return _solve_rows(solve, bad, settings)


@outside_graphs(
    "the ODE of a continuous flow is part of a graph where its steps are fixed and few (method='rk4', "
    "step_size=0.1), with adjoint='direct': take such ones, or compile without fullgraph=True"
)
def _solve_rows(
    solve: Callable[..., ode.Solution], bad: Tensor, settings: Mapping[str, Any]
) -> tuple[list[Tensor], Tensor]:
    solution = solve(bad)
    if not _is_known(solution.status) or solution.ok:
        return _masked(solution, bad), bad
    if _has_adaptive_steps(settings):
        result, status = _with_steps_per_sample(solve, solution, bad, settings)
    else:
        result, status = _stopped_one_by_one(solve, bad)
    failed = (status != 0) & ~bad
    _warn(status[failed], bad.numel())
    bad = bad | failed
    return _masked(result, bad), bad


def _with_steps_per_sample(
    solve: Callable[..., ode.Solution],
    solution: ode.Solution,
    bad: Tensor,
    settings: Mapping[str, Any],
) -> tuple[ode.Solution, Tensor]:
    """Give each sample steps of its own; return the solve and the status of each sample."""
    result = solution
    with torch.no_grad():
        if settings.get("control", "batch") != "sample":
            try:
                result = solve(bad, **_STEPS_PER_SAMPLE)
            except (TypeError, ValueError, RuntimeError):
                # a field that takes only a scalar time cannot be solved for each sample
                return solution, _status(solution, bad)
    status = _status(result, bad)
    if torch.is_grad_enabled():
        result = solve(bad | (status != 0), **_STEPS_PER_SAMPLE)
        status = torch.where(status == 0, _status(result, bad), status)
    return result, status


def _stopped_one_by_one(
    solve: Callable[..., ode.Solution], bad: Tensor
) -> tuple[ode.Solution, Tensor]:
    """Take the fixed steps, stopping the samples that overflow; return the solve and the status of each sample."""
    alive = ~bad
    with torch.no_grad():
        result = solve(bad, alive=alive)
    status = torch.zeros_like(bad, dtype=torch.int8)
    status = status.masked_fill(~alive & ~bad, int(ode.Status.non_finite))
    if torch.is_grad_enabled() or not result.ok:
        result = solve(~alive)
        status = torch.where(status == 0, _status(result, bad), status)
    return result, status


def _status(solution: ode.Solution, bad: Tensor) -> Tensor:
    """Return the status of each sample, ``[N]``."""
    status = torch.as_tensor(solution.status, dtype=torch.int8, device=bad.device)
    return status.expand(bad.shape)


def guarded(dynamics: Dynamics, alive: Tensor) -> Dynamics:
    """Return dynamics that stop a sample before it overflows, and set its ``alive [N]`` to False."""

    def stopped(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        slopes = dynamics(t, state)
        for s in slopes:
            # the square root leaves room for what a step adds up
            fine = s.abs() < math.sqrt(torch.finfo(s.dtype).max)
            alive.logical_and_(fine.reshape(fine.shape[0], math.prod(fine.shape[1:])).all(1))
        return tuple(s.masked_fill(rows_like(~alive, s), 0.0) for s in slopes)

    return stopped


def rows_like(rows: Tensor, x: Tensor) -> Tensor:
    """Return a mask ``[N]`` with the axes of ``x``."""
    return rows.view(-1, *[1] * (x.dim() - 1))


def _masked(solution: ode.Solution, bad: Tensor) -> list[Tensor]:
    return [y.masked_fill(rows_like(bad, y[0])[None], math.nan) for y in solution.ys]


def _is_known(status: ode.Status | Tensor) -> bool:
    """Whether a status can be looked at: not while a graph is exported or captured, nor on the meta device."""
    if not isinstance(status, Tensor):
        return True
    captured = status.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (captured or status.is_meta or torch.compiler.is_exporting())


def _has_adaptive_steps(settings: Mapping[str, Any]) -> bool:
    method = settings.get("method", "dopri5")
    if settings.get("compat") is not None:
        method = name_from_torchdiffeq(method)
    fixed = settings.get("step_size") is not None or settings.get("grid") is not None
    return not fixed and tableau(method).error is not None


def check_export(settings: Mapping[str, Any]) -> None:
    """Raise RuntimeError for adaptive steps under torch.export: their number depends on the data."""
    exported = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if exported and _has_adaptive_steps(settings):
        raise RuntimeError(
            "torch.export cannot hold the ODE of a continuous flow with adaptive steps, whose number depends on the "
            "data; it holds fixed steps, as of a flow made with method='rk4', step_size=0.1"
        )


def _warn(status: Tensor, count: int) -> None:
    """Warn of samples that failed, by the status of each."""
    if not status.numel():
        return
    names = [
        f"{int((status == s).sum())} {s.name}" for s in ode.Status if bool((status == s).any())
    ]
    warnings.warn(
        f"{status.numel()} of {count} samples could not be integrated ({', '.join(names)}): "
        "their results are NaN, the others are not affected",
        RuntimeWarning,
        stacklevel=4,
    )
