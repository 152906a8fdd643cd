"""Checks of clouds and masses, and the batch of problems that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyflowkern.core.checks import check_floating, check_number, check_same_device, check_shape

__all__ = [
    "Clouds",
    "check_pair",
    "clouds_of_equal_masses",
    "parse_clouds",
    "parse_penalties",
    "positive",
]

#: The largest relative difference between totals that one calls equal: masses may be rounded to float32.
EQUAL_TOTALS = 1e-5


class Clouds(NamedTuple):
    """A batch of problems: points ``[B, n, d]`` and ``[B, m, d]``, masses ``[B, n]`` and ``[B, m]`` in float64.

    ``size`` is the largest squared distance of a point from the mean of its cloud, where it is known.
    """

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    batched: bool
    size: float = 0.0


def positive(name: str, value: float) -> float:
    """Return a number as a float; raise unless it is positive and finite."""
    number = check_number(name, value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return number


def parse_penalties(unbalanced: object) -> tuple[float | None, float | None]:
    """Return the penalties of both marginals, None for one that is held."""
    if unbalanced is None:
        return None, None
    if isinstance(unbalanced, Sequence) and not isinstance(unbalanced, str):
        if len(unbalanced) != 2:
            raise ValueError(f"unbalanced must be a number or a pair, got {unbalanced!r}")
        first, second = (v if v is None else positive("unbalanced", v) for v in unbalanced)
        return first, second
    number = positive("unbalanced", unbalanced)  # type: ignore[arg-type]
    return number, number


def parse_clouds(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, *, balanced: bool
) -> Clouds:
    """Return checked clouds as a batch of problems; looking at their numbers waits once for the device."""
    for name, points in (("x", x), ("y", y)):
        check_floating(name, points)
        if points.dim() not in (2, 3):
            raise ValueError(
                f"{name} must have shape [points, d] or [B, points, d], got {tuple(points.shape)}"
            )
        if points.shape[-2] == 0 or points.shape[-1] == 0:
            raise ValueError(
                f"{name} must have a point and a coordinate at least, got shape {tuple(points.shape)}"
            )
    if x.dim() != y.dim() or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        raise ValueError(
            "x and y must have the same batch and the same coordinates, "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    batched = x.dim() == 3
    if not batched:
        x, y = x[None], y[None]
    clouds = Clouds(x, y, _masses("a", a, x), _masses("b", b, y), batched)
    check_same_device(x=x, y=y, a=clouds.a, b=clouds.b)
    return clouds._replace(size=_check_numbers(clouds, balanced))


def clouds_of_equal_masses(x: Tensor, y: Tensor) -> Clouds:
    """Return two clouds ``[n, d]`` and ``[m, d]`` of one dtype and device as a problem, unchecked."""
    return Clouds(
        x[None], y[None], _masses("a", None, x[None]), _masses("b", None, y[None]), False
    )


def _masses(name: str, masses: Tensor | None, points: Tensor) -> Tensor:
    shape = points.shape[:2]
    if masses is None:
        return points.new_full(shape, 1 / shape[1], dtype=torch.float64)
    check_floating(name, masses)
    if masses.dim() == 1:
        masses = masses[None].expand(shape[0], -1)
    check_shape(name, masses, shape)
    return masses.double()


def _check_numbers(clouds: Clouds, balanced: bool) -> float:
    """Raise for bad numbers, else return the size of the clouds: one look at the device."""
    with torch.no_grad():
        sizes = [
            (t - t.mean(1, keepdim=True)).square().sum(-1).double().flatten()
            for t in (clouds.x, clouds.y)
        ]
        largest = torch.cat([*sizes, sizes[0].new_zeros(1)]).amax()  # of no problem: 0
        totals = [clouds.a.sum(-1), clouds.b.sum(-1)]
        apart = (totals[0] - totals[1]).abs() > EQUAL_TOTALS * torch.maximum(*totals)
        points = [t.isfinite().all() for t in (clouds.x, clouds.y)]
        masses = [(t.isfinite() & (t >= 0)).all() for t in (clouds.a, clouds.b)]
        some = [(t > 0).all() for t in totals]
        flags = torch.stack([*points, *masses, *some, ~apart.any()])
        *fine, size = torch.cat([flags.double(), largest[None]]).tolist()
    wanted = [
        "x must be finite, got NaN or inf",
        "y must be finite, got NaN or inf",
        "a must be finite and not negative",
        "b must be finite and not negative",
        "a must have a positive total, got zero",
        "b must have a positive total, got zero",
    ]
    for good, message in zip(fine, wanted, strict=False):
        if not good:
            raise ValueError(message)
    if balanced and not fine[-1]:
        worst = int((totals[0] - totals[1]).abs().argmax())
        raise ValueError(
            "a and b must have the same total unless unbalanced is given, "
            f"got {float(totals[0][worst])} and {float(totals[1][worst])}"
        )
    return float(size)


def check_pair(x0: Tensor, x1: Tensor) -> None:
    """Raise unless ``x0`` and ``x1`` are floating tensors ``[N, *shape]`` of one shape of samples, dtype and device."""
    for name, t in (("x0", x0), ("x1", x1)):
        check_floating(name, t)
        if t.dim() < 2:
            raise ValueError(f"{name} must have shape [N, *shape], got {tuple(t.shape)}")
    if x0.shape[1:] != x1.shape[1:]:
        raise ValueError(
            f"x0 and x1 must have samples of one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}"
        )
    if x0.dtype != x1.dtype:
        raise TypeError(f"x0 and x1 must have one dtype, got {x0.dtype} and {x1.dtype}")
    check_same_device(x0=x0, x1=x1)
