"""Arguments of the ops of optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern.core.checks import (
    check_choice,
    check_count,
    check_floating,
    check_number,
    check_same_device,
    check_shape,
)
from pyflowkern.core.codes import SinkhornSchedule, numbered
from pyflowkern.ops.plan_tensors import PlanTensors

__all__ = ["check_clouds", "check_plan", "check_state", "options_of"]

_SCHEDULES = numbered(SinkhornSchedule)


def check_state(name: str, t: Tensor) -> None:
    """Raise TypeError unless a tensor is float32 or float64: half types are too coarse for potentials."""
    check_floating(name, t)
    if t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {t.dtype}")


def check_clouds(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> None:
    """Raise unless clouds and masses fit each other."""
    for name, t in (("x", x), ("y", y)):
        check_state(name, t)
        if t.dim() != 3:
            raise ValueError(f"{name} must have shape [B, points, d], got {tuple(t.shape)}")
        if t.shape[1] == 0 or t.shape[2] == 0:
            raise ValueError(
                f"{name} must have a point and a coordinate at least, got shape {tuple(t.shape)}"
            )
    if x.dtype != y.dtype:
        raise TypeError(f"x and y must have one dtype, got {x.dtype} and {y.dtype}")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(
            "x and y must have the same batch and the same coordinates, "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    for name, t, points in (("a", a, x), ("b", b, y)):
        check_floating(name, t)
        check_shape(name, t, points.shape[:2])
    check_same_device(x=x, y=y, a=a, b=b)


def check_plan(plan: PlanTensors, epsilon: float, scale: float) -> tuple[float, float]:
    """Return epsilon and scale; raise unless they and the tensors make a plan."""
    x, y, a, b, f, g = plan
    check_clouds(x, y, a, b)
    for name, t, points in (("f", f, x), ("g", g, y)):
        check_floating(name, t)
        check_shape(name, t, points.shape[:2])
        if t.dtype != torch.float64:
            raise TypeError(f"{name} must be float64, as sinkhorn returns it, got {t.dtype}")
    check_same_device(x=x, f=f, g=g)
    return _positive("epsilon", epsilon), _positive("scale", scale)


def options_of(
    epsilon: float,
    scale: float,
    max_iterations: int,
    tolerance: float,
    schedule: str,
    epsilon_scaling: float | None,
    penalty_x: float | None,
    penalty_y: float | None,
) -> tuple[float, float, int, float, int, float, float, float]:
    """Return the numbers of the op ``sinkhorn``, checked."""
    max_iterations = check_count("max_iterations", max_iterations)
    if max_iterations >= 2**63:
        raise ValueError(f"max_iterations must be below 2^63, got {max_iterations}")
    tolerance = check_number("tolerance", tolerance)
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance must be zero or positive, got {tolerance}")
    check_choice("schedule", schedule, _SCHEDULES)
    ratio = 0.0
    if epsilon_scaling is not None:
        ratio = check_number("epsilon_scaling", epsilon_scaling)
        if not 0 < ratio < 1:
            raise ValueError(f"epsilon_scaling must be between 0 and 1, got {ratio}")
    penalties = [
        0.0 if value is None else _positive(name, value)
        for name, value in (("penalty_x", penalty_x), ("penalty_y", penalty_y))
    ]
    return (
        _positive("epsilon", epsilon),
        _positive("scale", scale),
        max_iterations,
        tolerance,
        _SCHEDULES[schedule],
        ratio,
        penalties[0],
        penalties[1],
    )


def _positive(name: str, value: float) -> float:
    number = check_number(name, value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return number
