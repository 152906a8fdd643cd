"""Elementwise transforms by their map: what an autoregressive layer does to a feature, given its parameters."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from pyflowkern.ops.affine import affine_coupling, affine_coupling_reference
from pyflowkern.ops.scale_map import ScaleMap, scale_map
from pyflowkern.ops.spline import spline, spline_reference
from pyflowkern.ops.spline_map import SplineMap

__all__ = ["ElementMap", "apply_elements", "element_map", "element_parameters"]

ElementMap: TypeAlias = ScaleMap | SplineMap


def element_map(transform: str | ElementMap) -> ElementMap:
    """Return the map of a name: ``"affine"`` is the scale map softclip, whose ``|log s|`` stays below 6.9."""
    if isinstance(transform, SplineMap):
        return transform
    if transform == "affine":
        return scale_map("softclip")
    return scale_map(transform)


def element_parameters(transform: ElementMap) -> int:
    """Return how many numbers an element takes."""
    if isinstance(transform, SplineMap):
        return transform.params
    return 1 if transform.kind == "additive" else 2


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
        elements = spline_reference if reference else spline
        return elements(x, params, transform, inverse=inverse)
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
