"""Elementwise transforms by their map: what an autoregressive layer does to a feature, given its parameters."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from pyflowkern.ops.affine import _DIVIDE, _SHIFT_FIRST, affine_coupling, affine_coupling_reference
from pyflowkern.ops.affine import _map_of as _scale_map_of
from pyflowkern.ops.scale_map import ScaleMap, scale_map
from pyflowkern.ops.spline import spline, spline_reference
from pyflowkern.ops.spline_map import SplineMap, from_code

__all__ = [
    "ElementMap",
    "apply_elements",
    "element_code",
    "element_map",
    "element_of_code",
    "element_parameters",
]

ElementMap: TypeAlias = ScaleMap | SplineMap

_SPLINE = 64  # kSplineCode of the kernels


def element_map(transform: str | ElementMap) -> ElementMap:
    """Return the map of a name: ``"affine"`` is the scale map softclip, whose ``|log s|`` stays below 6.9."""
    if isinstance(transform, SplineMap):
        return transform
    return scale_map("softclip" if transform == "affine" else transform)


def element_parameters(transform: ElementMap) -> int:
    """Return how many numbers an element takes."""
    if isinstance(transform, SplineMap):
        return transform.params
    return 1 if transform.kind == "additive" else 2


def element_code(transform: ElementMap) -> tuple[int, list[float], int]:
    """Return the map as the kernels take it: code, constants and flags."""
    if isinstance(transform, SplineMap):
        return _SPLINE + transform.code, transform.numbers, transform.bins
    flags = _SHIFT_FIRST * transform.shift_first + _DIVIDE * transform.divide
    return transform.code, transform.numbers, flags


def element_of_code(code: int, numbers: list[float], flags: int) -> ElementMap:
    """Return the map that has this code."""
    if code >= _SPLINE:
        return from_code(code - _SPLINE, flags, numbers)
    return _scale_map_of(code, numbers, flags)


def apply_elements(
    x: Tensor,
    params: Tensor,
    transform: ElementMap,
    *,
    inverse: bool = False,
    reference: bool = False,
) -> tuple[Tensor, Tensor]:
    """Transform ``x [N, D]`` with ``params [N, D, P]``; return ``(y, log_det[N])``."""
    if isinstance(transform, SplineMap):
        of_spline = spline_reference if reference else spline
        return of_spline(x, params, transform, inverse=inverse)
    function = affine_coupling_reference if reference else affine_coupling
    every = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    return function(
        x,
        params,
        split=every,
        scale_map=transform,
        params_layout="feature_major",
        inverse=inverse,
    )
