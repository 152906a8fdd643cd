"""Rational-quadratic splines of FrEIA, whose interval is learned, as steps of a chain."""

from __future__ import annotations

from typing import Any

import torch

from pyflowkern.interop._freia_layers import CouplingLayer
from pyflowkern.interop._freia_moves import Coupling, Move
from pyflowkern.interop._freia_parts import FreiaLayer
from pyflowkern.interop._watches import Holds
from pyflowkern.nn.links import Link
from pyflowkern.ops import ElementsStep, SplineMap

__all__ = ["ElementwiseSpline", "SplineCoupling"]

_BUFFERS = ("bins", "min_bin_sizes", "default_domain", "identity_tails", "default_width")
_FACTS = ("domain_clamping", "parameter_counts")


def _map_of(base: Any) -> SplineMap | None:
    """Return the map of a spline; None for intervals that are not the same square, and clamped ones."""
    if not all(isinstance(base._buffers.get(name), torch.Tensor) for name in _BUFFERS):
        return None
    bins, identity = int(base.bins), bool(base.identity_tails)
    left, right, bottom, top = base.default_domain.tolist()
    square = left == bottom == -right == -top and base.default_width.item() == 2 * right
    names = ["widths", "heights", *(["total_width"] if identity else ["bottom", "left"]), "deltas"]
    if [*base.parameter_counts] != names or base.domain_clamping is not None or not square:
        return None
    width, height = base.min_bin_sizes.tolist()
    try:
        return SplineMap(
            bins=bins,
            bound=right,
            tails="linear" if identity else "affine",
            min_bin_width=0.0 if identity else width,
            min_bin_height=0.0 if identity else height,
            min_derivative=0.0,
            parameterization="domain",
        )
    except ValueError:  # a number of bins, for one, that no kernel has
        return None


def _watch(link: Link, base: Any) -> None:
    link.watch(base, *_FACTS)
    link.holds += [Holds(base, name) for name in _BUFFERS]


def _coupling(module: Any) -> Coupling | None:
    spline_map = _map_of(module.spline_base)
    if spline_map is None:
        return None
    context = sum(int(shape[0]) for shape in module.dims_c) if module.conditional else 0
    moves = [Move(["subnet1"], False, spline_map), Move(["subnet2"], True, spline_map)]
    count = module.split_len1 + module.split_len2
    return Coupling(moves, module.split_len1, count, context)


class SplineCoupling(CouplingLayer):
    """``RationalQuadraticSpline``: a coupling."""

    def __init__(self, module: Any) -> None:
        super().__init__(_coupling, module)

    def link(self) -> Link | None:
        if (link := super().link()) is not None:
            _watch(link, self.module.spline_base)
        return link


class ElementwiseSpline(FreiaLayer):
    """``ElementwiseRationalQuadraticSpline`` without a condition."""

    def link(self) -> Link | None:
        module = self.module
        spline_map = None if module.conditional else _map_of(module)
        if spline_map is None:
            return None
        link = Link([ElementsStep(spline_map, range(self.features))])
        link.watch(module, "conditional", "channels")
        _watch(link, module)
        link.read(module, "spline_parameters")
        return link
