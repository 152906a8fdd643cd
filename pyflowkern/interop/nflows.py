"""What is known of nflows, 0.14 and later, and its copies in other packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyflowkern.interop._check import disagreement, own_disagreement
from pyflowkern.interop._kinds import Kind, Library, Outcome
from pyflowkern.interop._layers import ForeignLayer, LayerMark, known_layer, single_doors
from pyflowkern.interop._nflows.elements import Autoregressive, Coupling, Unconditional
from pyflowkern.interop._nflows.flows import CompositeDoor, FlowDoor, Identity, Normal
from pyflowkern.interop._nflows.functions import (
    rational_quadratic_spline,
    unconstrained_rational_quadratic_spline,
)
from pyflowkern.interop._nflows.linear import (
    ActNorm,
    Affine,
    BatchNorm,
    Inverse,
    Linear,
    LULinear,
    OneByOneConvolution,
    Permutation,
)
from pyflowkern.interop._nflows.names import PREFIXES
from pyflowkern.interop._nflows.polynomial_functions import (
    cubic_spline,
    linear_spline,
    quadratic_spline,
    unconstrained_cubic_spline,
    unconstrained_linear_spline,
    unconstrained_quadratic_spline,
)

__all__ = [
    "BASE",
    "LIBRARY",
    "LINEAR",
    "cubic_spline",
    "elements",
    "linear_spline",
    "marked",
    "quadratic_spline",
    "rational_quadratic_spline",
    "unconstrained_cubic_spline",
    "unconstrained_linear_spline",
    "unconstrained_quadratic_spline",
    "unconstrained_rational_quadratic_spline",
]

Make = Callable[[Any], ForeignLayer]


def marked(make: Make, note: str = "") -> Kind:
    """Return the kind of transforms that only with others are faster."""

    def look(module: torch.nn.Module) -> Outcome:
        if why := disagreement(module, make):
            return Outcome(note=why)
        return Outcome([LayerMark(make(module))], runs="one op", note=note)

    return Kind(look)


def _linear(module: torch.nn.Module) -> Outcome:
    if why := disagreement(module, LULinear):
        return Outcome(note=why)
    note = f"{_CACHED}; {_OF_FLOATS}" if module.using_cache else ""
    return Outcome(single_doors(LULinear(module)), runs="one op", note=note)


_OF_FLOATS = (
    "the inverse that nflows 0.14 keeps is made in float32 on the CPU, and raises elsewhere"
)
_CACHED = "weights are read at each call, where the library keeps a cache in evaluation mode"


def _convolution(module: torch.nn.Module) -> Outcome:
    if why := own_disagreement(module, OneByOneConvolution):
        return Outcome(note=why)
    note = _CACHED if module.using_cache else ""
    return Outcome(single_doors(OneByOneConvolution(module)), runs="own op", note=note)


def elements(make: Make) -> Kind:
    """Return the kind of transforms with networks, which run by ops of their own where no chain knows the network."""

    def look(module: torch.nn.Module) -> Outcome:
        layer: Any = make(module)
        why = disagreement(module, make)
        if not why:
            return Outcome(single_doors(layer), runs="one op")
        if other := own_disagreement(module, make):
            return Outcome(note=other)
        layer.chained = False
        return Outcome(single_doors(layer), runs="own op", note=f"its network is called: {why}")

    return Kind(look)


def _act_norm(module: torch.nn.Module) -> Outcome:
    if why := disagreement(module, ActNorm):
        return Outcome(note=why)
    return Outcome(single_doors(ActNorm(module)), runs="one op")


def _composite(module: torch.nn.Module) -> Outcome:
    doors = [CompositeDoor(module, "forward"), CompositeDoor(module, "inverse")]
    return Outcome(doors, runs="one op")


def _inverse(module: Any) -> Outcome:
    if (layer := known_layer(module._transform)) is None or not layer.features:
        return Outcome()
    return Outcome([LayerMark(Inverse(module))], runs="one op")


def _unsized(make: Make) -> Kind:
    """Return the kind of transforms that take any number of features."""

    def look(module: torch.nn.Module) -> Outcome:
        if why := disagreement(module, _Sized(make)):
            return Outcome(note=why)
        return Outcome([LayerMark(make(module))], runs="one op")

    return Kind(look)


class _Sized:
    """Makes layers of some number of features."""

    def __init__(self, make: Make) -> None:
        self._make = make

    def __call__(self, module: torch.nn.Module) -> ForeignLayer:
        return self._make(module).fitted(3)


def _base(module: torch.nn.Module) -> Outcome:
    if Normal(module)._chain_link() is None:
        return Outcome(note="samples are no vectors")
    return Outcome([LayerMark(Normal(module))], runs="one op")


def _flow(module: torch.nn.Module) -> Outcome:
    return Outcome([FlowDoor(module, "_log_prob")], runs="one op")


LINEAR = Kind(_linear)
BASE = Kind(_base, ("log_prob", "_log_prob"))
_SPLINES = ("Linear", "Quadratic", "Cubic", "RationalQuadratic")
_PIECEWISE = tuple(f"Piecewise{kind}" for kind in _SPLINES)
_FLOW = Kind(_flow, ("_log_prob", "log_prob"), holds=True)
_COMPOSITE = Kind(_composite, holds=True)
LIBRARY = Library(
    "nflows",
    PREFIXES,
    {
        "flows.base.Flow": _FLOW,
        "flows.autoregressive.MaskedAutoregressiveFlow": _FLOW,
        "flows.realnvp.SimpleRealNVP": _FLOW,
        "transforms.base.CompositeTransform": _COMPOSITE,
        "transforms.nonlinearities.CompositeCDFTransform": _COMPOSITE,
        "transforms.base.InverseTransform": Kind(_inverse, quiet=True, holds=True),
        **{
            f"transforms.coupling.{name}CouplingTransform": elements(Coupling)
            for name in ("Affine", "Additive", *_PIECEWISE)
        },
        **{
            f"transforms.autoregressive.Masked{name}AutoregressiveTransform": elements(
                Autoregressive
            )
            for name in ("Affine", *_PIECEWISE)
        },
        **{
            f"transforms.nonlinearities.Piecewise{kind}CDF": elements(Unconditional)
            for kind in _SPLINES
        },
        **{
            f"transforms.permutations.{name}": marked(Permutation)
            for name in ("Permutation", "RandomPermutation", "ReversePermutation")
        },
        "transforms.lu.LULinear": LINEAR,
        "transforms.conv.OneByOneConvolution": Kind(_convolution),
        "transforms.linear.NaiveLinear": marked(Linear),
        "transforms.qr.QRLinear": marked(Linear),
        "transforms.svd.SVDLinear": marked(Linear),
        "transforms.normalization.ActNorm": Kind(_act_norm),
        "transforms.normalization.BatchNorm": marked(BatchNorm),
        "transforms.standard.PointwiseAffineTransform": _unsized(Affine),
        "transforms.standard.AffineTransform": _unsized(Affine),
        "transforms.standard.IdentityTransform": _unsized(Identity),
        "distributions.normal.StandardNormal": BASE,
        "distributions.normal.DiagonalNormal": BASE,
    },
    roots=("transforms.base.Transform", "distributions.base.Distribution"),
    plain=(
        "transforms.base.MultiscaleCompositeTransform",
        "transforms.reshape.ReshapeTransform",
        "transforms.reshape.SqueezeTransform",
    ),
)
