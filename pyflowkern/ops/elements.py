"""Elementwise transforms by their map: what an autoregressive layer does to a feature, given its parameters."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from pyflowkern.core.codes import ElementFamily
from pyflowkern.ops.affine import affine_coupling, affine_coupling_reference
from pyflowkern.ops.scale_map import PRESETS, ScaleMap, scale_map, scale_map_of
from pyflowkern.ops.spline import spline, spline_reference
from pyflowkern.ops.spline_map import SplineMap, spline_map_of

__all__ = [
    "ElementCode",
    "ElementMap",
    "apply_elements",
    "element_code",
    "element_map",
    "element_of_code",
    "element_parameters",
    "wrapped",
]

ElementMap: TypeAlias = ScaleMap | SplineMap

_AFFINE, _SPLINE = ElementFamily.AFFINE.value, ElementFamily.SPLINE.value


class ElementCode(NamedTuple):
    """A map as the kernels take it; what a family does not have is 0 (see ``core.codes``)."""

    family: int
    kind: int
    tails: int
    parameterization: int
    bins: int
    numbers: list[float]
    flags: int


def element_map(transform: str | ElementMap) -> ElementMap:
    """Return the map of a name: ``"affine"`` is the scale map softclip, whose ``|log s|`` stays below 6.9."""
    if isinstance(transform, SplineMap):
        return transform
    if isinstance(transform, str) and transform == "affine":
        return PRESETS["softclip"]
    if not isinstance(transform, ScaleMap) and transform not in [*PRESETS]:
        raise ValueError(
            "transform must be a SplineMap, a ScaleMap, or one of affine, "
            f"{', '.join(PRESETS)}, got {transform!r}"
        )
    return scale_map(transform)


def element_parameters(transform: ElementMap) -> int:
    """Return how many numbers an element takes."""
    if isinstance(transform, SplineMap):
        return transform.params
    return 1 if transform.kind == "additive" else 2


def element_code(transform: ElementMap) -> ElementCode:
    """Return the map as the kernels take it."""
    if isinstance(transform, SplineMap):
        return ElementCode(_SPLINE, *transform.form, transform.numbers, 0)
    return ElementCode(_AFFINE, transform.code, 0, 0, 0, transform.numbers, transform.flags)


def element_of_code(code: ElementCode) -> ElementMap:
    """Return the map that has this code."""
    if code.family == _SPLINE:
        form = code.kind, code.tails, code.parameterization, code.bins
        return spline_map_of(form, code.numbers)
    return scale_map_of(code.kind, code.numbers, code.flags)


def apply_elements(
    x: Tensor,
    params: Tensor,
    transform: ElementMap,
    *,
    inverse: bool = False,
    reference: bool = False,
    every: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Transform ``x [N, D]`` with ``params [N, D, P]``; return ``(y, log_det[N])``.

    ``every`` is ``[D]``, all True, from a caller that keeps it: making it takes as long as a small transform.
    """
    if isinstance(transform, SplineMap):
        of_spline = spline_reference if reference else spline
        return of_spline(x, params, transform, inverse=inverse)
    function = affine_coupling_reference if reference else affine_coupling
    if every is None:
        every = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    return function(
        x,
        params,
        split=every,
        scale_map=transform,
        params_layout="feature_major",
        inverse=inverse,
    )


def wrapped(x: Tensor, bound: float) -> Tensor:
    """Return angles modulo ``2 bound``, in ``[-bound, bound)``."""
    turned = torch.remainder(x + bound, 2 * bound) - bound
    # the remainder of a tiny negative number rounds to the whole circle
    return torch.where(turned >= bound, -bound, turned)
