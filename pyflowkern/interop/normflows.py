"""What is known of normflows 1.7.

There ``forward`` goes from latent to data, and ``inverse`` from data to latent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pyflowkern.interop._check import disagreement
from pyflowkern.interop._images import Form, FormDoor, form_disagreement
from pyflowkern.interop._kinds import Kind, Library, Outcome
from pyflowkern.interop._layers import LayerMark, single_doors
from pyflowkern.interop._normflows.flows import CLASS_FLOW, FLOW
from pyflowkern.interop._normflows.functions import (
    rational_quadratic_spline,
    unconstrained_rational_quadratic_spline,
)
from pyflowkern.interop._normflows.images import BlockForm, CouplingForm
from pyflowkern.interop._normflows.layers import LAYERS, Turned
from pyflowkern.interop._normflows.parts import PREFIX
from pyflowkern.interop._normflows.splines import CdfDoor, SplineDoor, spline_disagreement
from pyflowkern.interop._normflows.vectors import (
    AffineCoupling,
    AffineMatrix,
    ConstantAffine,
    Layer,
    Permute,
)

__all__ = [
    "LIBRARY",
    "rational_quadratic_spline",
    "unconstrained_rational_quadratic_spline",
]

#: The methods, and whether they go from latent to data.
_DIRECTIONS = {"inverse": False, "forward": True}


def _vectors(
    make: Callable[[torch.nn.Module], Layer], alone: bool, module: torch.nn.Module
) -> Outcome:
    """Look at a transform of vectors; those that are fast ``alone`` get methods of their own."""
    layer = make(module)
    if not layer.features:  # what is turned round says itself why
        return Outcome(note="" if isinstance(layer, Turned) else _OF_IMAGES)
    if why := disagreement(module, make):
        return Outcome(note=why)
    doors = single_doors(layer, "inverse", "forward") if alone else [LayerMark(layer)]
    return Outcome(doors, runs="one op")


def _coupling(module: torch.nn.Module) -> Outcome:
    """Look at an affine coupling, of vectors or images: in a chain where its network is known, else by its own op."""
    layer = AffineCoupling(module)
    form = CouplingForm.read(module)
    if form is None:
        return Outcome(note="only couplings of channels are known, of halves")
    outputs = 2 if form.scale_map.kind == "additive" else 4
    put_in = {form.net: torch.nn.Linear(2, outputs)}
    if why := form_disagreement(module, _DIRECTIONS, CouplingForm.read, (4,), put_in):
        return Outcome(note=why)
    known = layer.features and not disagreement(module, AffineCoupling)
    if not known:
        layer.features = 0
    runs = "one op" if known else "own op"
    return Outcome(single_doors(layer, "inverse", "forward"), runs=runs)


def _images(read: Callable[[torch.nn.Module], Form | None], module: torch.nn.Module) -> Outcome:
    """Look at a transform of images."""
    if why := form_disagreement(module, _DIRECTIONS, read):
        return Outcome(note=why)
    doors = [FormDoor(module, name, inverse, read) for name, inverse in _DIRECTIONS.items()]
    return Outcome(doors, runs="own op")


def _splines(name: str, module: torch.nn.Module) -> Outcome:
    """Look at what a spline flow consists of: its elements are one op where its network must be called.

    Splines with parameters of their own are called only where no chain takes them.
    """
    if why := spline_disagreement(module, name):
        return Outcome(note=why)
    door = CdfDoor if name == "_spline" else SplineDoor
    return Outcome([door(module, name)], runs="own op")


#: Transforms of which several together are faster, but not one alone.
_WITH_OTHERS = (ConstantAffine, AffineMatrix, Permute)
_OF_IMAGES = "it is of images, of which only couplings and GlowBlocks are known"
#: Transforms that consist of splines, and the method that one op does.
_SPLINES = {
    "autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive": "_elementwise",
    "coupling.PiecewiseRationalQuadraticCDF": "_spline",
    "coupling.PiecewiseRationalQuadraticCoupling": "_piecewise_cdf",
}

LIBRARY = Library(
    PREFIX,
    (PREFIX,),
    {
        "core.NormalizingFlow": FLOW,
        "core.ConditionalNormalizingFlow": FLOW,
        "core.ClassCondFlow": CLASS_FLOW,
        **{
            name: Kind(partial(_vectors, layer, layer not in _WITH_OTHERS))
            for name, layer in LAYERS.items()
        },
        "flows.affine.coupling.AffineCouplingBlock": Kind(_coupling),
        "flows.affine.glow.GlowBlock": Kind(partial(_images, BlockForm.read)),
        "flows.base.Reverse": Kind(partial(_vectors, Turned, True)),
        **{
            f"flows.neural_spline.{where}": Kind(partial(_splines, name), (name,))
            for where, name in _SPLINES.items()
        },
    },
    roots=("flows.base.Flow", "distributions.base.BaseDistribution"),
    plain=(
        "distributions.base.DiagGaussian",  # one op with its flow
        "flows.base.Composite",
        # what they hold has its own op
        "flows.neural_spline.wrapper.CircularAutoregressiveRationalQuadraticSpline",
        "flows.neural_spline.wrapper.CircularCoupledRationalQuadraticSpline",
        "flows.reshape.Merge",
        "flows.reshape.Split",
        "flows.reshape.Squeeze",
    ),
)
