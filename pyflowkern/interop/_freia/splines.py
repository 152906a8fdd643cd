"""Splines of FrEIA: rational-quadratic ones as steps of a chain, and what couplings by linear ones are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyflowkern.interop._freia.domains import (
    BUFFERS,
    FACTS,
    Domain,
    Segments,
    domain_of,
    segments_of,
)
from pyflowkern.interop._freia.layers import CouplingLayer
from pyflowkern.interop._freia.moves import Coupling, Move
from pyflowkern.interop._freia.networks import sequential
from pyflowkern.interop._freia.parts import FreiaLayer
from pyflowkern.interop._watches import Holds
from pyflowkern.nn.links import Link
from pyflowkern.ops import ElementsStep, SplineMap
from pyflowkern.ops.chain_steps import ActNormStep

__all__ = [
    "ElementwiseSpline",
    "SplineCoupling",
    "linear_coupling",
    "spline_coupling",
    "watch_domain",
]


def watch_domain(link: Link, base: Any) -> None:
    """Note what a spline follows from."""
    link.watch(base, *FACTS)
    link.holds += [Holds(base, name) for name in BUFFERS]


def spline_coupling(module: Any) -> Coupling | None:
    """Return what a RationalQuadraticSpline is."""
    return _halves(module, domain_of(module.spline_base))


def linear_coupling(module: Any) -> Coupling | None:
    """Return what a LinearSpline is."""
    return _halves(module, segments_of(module.spline_base))


def _halves(module: Any, domain: Domain | Segments | None) -> Coupling | None:
    if domain is None:
        return None
    context = sum(int(shape[0]) for shape in module.dims_c) if module.conditional else 0
    moves = [
        Move(["subnet1"], False, domain.map, domain=domain),
        Move(["subnet2"], True, domain.map, domain=domain),
    ]
    count = module.split_len1 + module.split_len2
    return Coupling(moves, module.split_len1, count, context)


class SplineCoupling(CouplingLayer):
    """``RationalQuadraticSpline``: a coupling."""

    def __init__(self, module: Any) -> None:
        super().__init__(spline_coupling, module)

    def link(self) -> Link | None:
        if (link := super().link()) is not None:
            watch_domain(link, self.module.spline_base)
        return link


class ElementwiseSpline(FreiaLayer):
    """``ElementwiseRationalQuadraticSpline``; with a condition it is of float32, as the library has it."""

    def link(self) -> Link | None:
        module, domain = self.module, domain_of(self.module)
        if domain is None:
            return None
        link = Link()
        link.watch(module, "conditional", "channels")
        watch_domain(link, module)
        if module.conditional:
            return link if domain.plain and self._given(link, domain.map) else None
        spline = ElementsStep(domain.map, range(self.features))
        if domain.plain:
            link.steps.append(spline)
            link.read(module, "spline_parameters")
        else:
            link.steps += [ActNormStep(), spline, ActNormStep()]
            link.make(module, ["spline_parameters"] * 5, partial(self._tensors, domain))
        return link

    def _tensors(self, domain: Domain, inverse: bool) -> Sequence[Tensor]:
        """Return logarithms of a scale and shifts, raw numbers, and logarithms and shifts again."""
        given = self.module.spline_parameters
        raw, wide, high = domain.unclamped(given.view(self.features, -1))
        none = torch.zeros_like(wide)
        return -wide.log(), none, raw.reshape(-1), high.log(), none

    def _given(self, link: Link, spline_map: SplineMap) -> bool:
        """Add the step whose numbers a network makes of the condition; return whether the network is known."""
        link.context_features = sum(self.sizes)
        link.in_float64 = False
        net = sequential(self.module._modules.get("subnet"), link, link.context_features)
        if net is None:
            return False
        every = range(self.features)
        try:
            step = ElementsStep(spline_map, every, range(0), net, "feature_major")
        except ValueError:  # a network of other sizes: calling it says so
            return False
        link.steps.append(step)
        return True
