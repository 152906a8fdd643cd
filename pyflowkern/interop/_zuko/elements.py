"""zuko's univariate transforms as maps of elements, and what is done by them where no chain serves."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyflowkern.ops.elements import ElementMap, apply_elements
from pyflowkern.ops.scale_map import ScaleMap
from pyflowkern.ops.spline_map import SplineMap

__all__ = ["Univariate", "name_of", "univariate_of"]


class Univariate(NamedTuple):
    """What zuko does to an element, given its parameters."""

    transform: ElementMap
    #: Before a spline, the element is turned by half a circle of this half length; 0 for no turn.
    turn: float = 0.0

    def __call__(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Transform ``x [N, D]`` with ``params [N, D, P]``; return the result and ``log_det [N]``."""
        if self.turn and not inverse:
            x = torch.remainder(x, 2 * self.turn) - self.turn
        y, log_det = apply_elements(x, params, self.transform, inverse=inverse)
        if self.turn and inverse:
            y = torch.remainder(y, 2 * self.turn) - self.turn
        return y, log_det


def univariate_of(module: Any) -> Univariate | None:
    """Return the univariate transform of a lazy one; None for one that is another."""
    univariate: Any = module.univariate
    shapes: list[tuple[int, ...]] = [tuple(shape) for shape in module.shapes]
    options: dict[str, Any] = {}
    if type(univariate) is functools.partial:
        if univariate.args:
            return None
        univariate, options = univariate.func, dict(univariate.keywords)
    name = name_of(univariate)
    circular = name == "zuko.flows.spline.CircularRQSTransform"
    slope = options.pop("slope", 1e-3)
    bound = math.pi if circular else options.pop("bound", 5.0)
    if options or not all(type(v) in (int, float) for v in (slope, bound)) or not 0 < slope < 1:
        return None
    if name == "zuko.transforms.AdditiveTransform" and shapes == [()]:
        return Univariate(ScaleMap("additive"))
    if name == "zuko.transforms.MonotonicAffineTransform" and shapes == [(), ()]:
        return Univariate(ScaleMap("softclip", clamp=-math.log(slope)))
    if circular or name == "zuko.transforms.MonotonicRQSTransform":
        return _spline(shapes, bound, slope, bound if circular else 0.0)
    return None


def name_of(thing: object) -> str:
    """Return where a class or a function lies."""
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


def _spline(
    shapes: list[tuple[int, ...]], bound: float, slope: float, turn: float
) -> Univariate | None:
    bins = shapes[0][0] if shapes and shapes[0] else 0
    if shapes != [(bins,), (bins,), (bins - 1,)]:
        return None
    try:
        transform = SplineMap(
            bins=bins,
            bound=bound,
            parameterization="softclip",
            min_bin_width=0.0,
            min_bin_height=0.0,
            min_derivative=slope,
        )
    except ValueError:
        return None
    return Univariate(transform, turn)
