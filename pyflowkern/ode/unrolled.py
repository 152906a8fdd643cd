"""Fixed steps as plain operations of torch: what a compiler and the transforms of ``torch.func`` can follow.

The backward pass is one call of autograd, where stages with graphs of their own cost such a call each.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import transformed
from pyflowkern.ode.adjoints.steps import differentiable_step, interpolate
from pyflowkern.ode.loops.fixed import all_finite, plan
from pyflowkern.ode.options import Options, name_from_torchdiffeq
from pyflowkern.ode.packing import Field
from pyflowkern.ode.solution import Stats, Status, Trajectory
from pyflowkern.ode.steppers import stage_times
from pyflowkern.ode.tableaus import Tableau, coefficients, tableau

__all__ = ["LIMIT", "integrate", "one_graph", "unrolls"]

#: Evaluations of the field up to which a solve becomes part of a compiled graph, which holds each of them.
LIMIT = 128


def unrolls(
    times: Sequence[float],
    *,
    method: str | Tableau = "dopri5",
    adjoint: str = "direct",
    step_size: float | None = None,
    grid: Callable[[Sequence[float]], Sequence[float]] | None = None,
    control: str = "batch",
    dense: bool = False,
    jump_t: Any = None,
    compat: str | None = None,
    **_: Any,
) -> bool:
    """Whether a solve with these settings of :func:`pyflowkern.ode.solve` is unrolled here and now.

    It is if its steps are known beforehand and its gradients are those of the steps: under a compiler or exporter that
    traces Python, up to :data:`LIMIT` evaluations, and inside transforms of ``torch.func``.
    """
    if not _followed():
        return False
    compiled = torch.compiler.is_compiling()
    chosen = tableau(method if compat is None else name_from_torchdiffeq(method))
    adaptive = chosen.error is not None and step_size is None and grid is None
    if adaptive or adjoint != "direct" or control != "batch" or dense or jump_t is not None:
        return False
    if not compiled:
        return True
    if grid is not None:
        steps = len(grid(times)) - 1
    else:
        size = math.inf if step_size is None else step_size
        steps = sum(max(1, math.ceil(abs(b - a) / size)) for a, b in itertools.pairwise(times))
    return steps * chosen.stages <= LIMIT


def integrate(field: Field, y: Tensor, times: Sequence[float], options: Options) -> Trajectory:
    """Integrate through ``times`` by operations that autograd records; nothing looks at the numbers.

    Args:
        field: of packed states.
        y: first state.
        times: of the outputs, monotone; the first is the time of ``y``.
        options: settings, of fixed steps.
    """
    method = options.method
    steps, outputs = plan(times, options)
    steps = steps[: options.max_steps]
    states = [y] * len(times)
    within: dict[int, list[tuple[int, float | None]]] = defaultdict(list)
    for i, (step, theta) in enumerate(outputs):
        within[step].append((i, theta))
    for j, (t, dt) in enumerate(steps):
        moments = _stage_times(method, t, dt, options.perturbed, y)
        y1, slopes = differentiable_step(field, method, moments, dt, y)
        for i, theta in within.get(j, ()):
            states[i] = interpolate(method, options.linear, y, y1, slopes, dt, theta)
        y = y1
    done = [i for i, (step, _) in enumerate(outputs) if step < len(steps)]
    states[len(done) :] = [y] * (len(times) - len(done))
    finite = torch.isfinite(y).all()
    status = torch.where(finite, int(Status.ok), int(Status.non_finite)).to(torch.int8)
    stats = Stats(len(steps), 0, len(steps) * method.stages)
    return Trajectory(torch.stack(states), status=status, stats=stats)


def one_graph(
    field: Field, y0: Tensor, times: Sequence[float], options: Options
) -> Trajectory | None:
    """Integrate as :func:`integrate` where graphs are kept anyway (``checkpoint=False``).

    Returns:
        None where the steps must be taken one by one: with settings that have another meaning there, for states that
        become NaN or infinite, and for fields that differentiate by a state that requires no gradient.
    """
    o = options
    if o.adjoint != "direct" or o.checkpoint or o.dense or o.callbacks is not None:
        return None
    if not o.linear or o.method.stages != o.method.needed or y0.is_meta or _followed():
        return None
    if torch.compiler.is_exporting() or (y0.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    if len(plan(times, o)[0]) > o.max_steps:
        return None
    try:
        found = integrate(field, y0, times, o)
    except RuntimeError as error:
        if y0.requires_grad or "does not require grad" not in str(error):
            raise
        return None
    return replace(found, status=Status.ok) if all_finite(found.ys.detach()[-1]) else None


def _followed() -> bool:
    """Whether a compiler traces Python, or a transform of ``torch.func`` follows what is computed."""
    return torch.compiler.is_compiling() or transformed()


def _stage_times(
    method: Tableau, t: float, dt: float, perturb: str, y: Tensor
) -> Sequence[Tensor]:
    if perturb or not _followed():
        return stage_times(coefficients(method, y.dtype, y.device), t, dt, perturb)
    return [torch.full((), node * dt + t, dtype=y.dtype, device=y.device) for node in method.c]
