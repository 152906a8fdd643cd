"""What is known of FrEIA: version 0.2, its sources after that, and the copy of AllInOneBlock in anomalib.

There ``module((x,), c=[], rev=False, jac=True)`` goes from data to latent, and back with ``rev``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pyflowkern.interop._check import disagreement
from pyflowkern.interop._freia.blocks import (
    AllInOneForm,
    BlockDoor,
    CouplingForm,
    SplineForm,
    block_disagreement,
)
from pyflowkern.interop._freia.layers import (
    ActNorm,
    AllInOne,
    CouplingLayer,
    FixedLinear,
    Householder,
    NewActNorm,
    Permutation,
)
from pyflowkern.interop._freia.moves import (
    Coupling,
    conditional_affine,
    gin,
    glow,
    nice,
    one_sided,
    rnvp,
)
from pyflowkern.interop._freia.nets import GraphDoor, SequenceDoor, line_of
from pyflowkern.interop._freia.parts import PREFIXES, FreiaLayer
from pyflowkern.interop._freia.splines import (
    ElementwiseSpline,
    SplineCoupling,
    linear_coupling,
    spline_coupling,
)
from pyflowkern.interop._images import Form
from pyflowkern.interop._kinds import Kind, Library, Outcome
from pyflowkern.interop._layers import LayerMark

__all__ = ["LIBRARY"]

_METHODS = ("forward",)
_OF_IMAGES = "it is of images, of which only couplings are known"


def _marked(make: Callable[[Any], FreiaLayer], module: torch.nn.Module) -> Outcome:
    """Look at a transform that is faster only with others."""
    if not make(module).features:
        return Outcome(note=_OF_IMAGES)
    if why := disagreement(module, make):
        return Outcome(note=why)
    return Outcome([LayerMark(make(module))], runs="one op")


def _actnorm(module: torch.nn.Module) -> Outcome:
    """Look at an ActNorm; later versions cannot find their first values in float64, in which they are compared."""
    if "log_scale" not in module._parameters:
        return _marked(ActNorm, module)
    layer = NewActNorm(module)
    if not layer.features:
        return Outcome(note=_OF_IMAGES)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        torch.nn.init.constant_(twin.log_scale, 0.3)  # type: ignore[arg-type]
        torch.nn.init.constant_(twin.loc, 0.2)  # type: ignore[arg-type]
        twin.is_initialized.fill_(True)  # type: ignore[operator]
    if why := disagreement(twin, NewActNorm):
        return Outcome(note=why)
    return Outcome([LayerMark(layer)], runs="one op")


def _coupling(
    make: Callable[[Any], FreiaLayer],
    read: Callable[[torch.nn.Module], Form | None],
    module: torch.nn.Module,
    quick: bool = False,
) -> Outcome:
    """Look at a coupling: in a chain where its networks are known, else with its networks called."""
    if module.__dict__.get("w_perm") is not None:  # of the last call, which made it of reflections
        module.w_perm = module.w_perm_inv = None  # type: ignore[assignment]
    layer = make(module)
    why = disagreement(module, make) if layer.features else "of images"
    own = block_disagreement(module, read)
    if why:
        layer.features = 0
    if why and own:
        return Outcome(note=own)
    doors = [BlockDoor(layer, None if own else read, quick), LayerMark(layer)]
    return Outcome(doors, runs="own op" if why else "one op")


def _elementwise(module: torch.nn.Module) -> Outcome:
    """Look at a spline of each feature, which runs in chains alone."""
    layer = ElementwiseSpline(module)
    if not layer.features:
        return Outcome(note="of splines of images, only couplings are known")
    if why := disagreement(module, ElementwiseSpline):
        return Outcome(note=why)
    return Outcome([BlockDoor(layer, None), LayerMark(layer)], runs="one op")


def _blocks(of: Callable[[Any], Coupling | None], quick: bool = False) -> Kind:
    make, read = partial(CouplingLayer, of), partial(CouplingForm.read, of)
    return Kind(partial(_coupling, make, read, quick=quick), _METHODS)


def _splines(make: Callable[[Any], FreiaLayer], of: Callable[[Any], Coupling | None]) -> Kind:
    read = partial(SplineForm.read_spline, of)
    return Kind(partial(_coupling, make, read, quick=True), _METHODS)


def _any_known(modules: list[Any]) -> bool:
    """Whether one of the transforms is a coupling that a chain takes."""
    return any(
        isinstance(door := m.__dict__.get("forward"), BlockDoor) and door.layer.features
        for m in modules
        if m is not None
    )


def _sequence(module: Any) -> Outcome:
    if not _any_known([*module.module_list._modules.values()]):
        return Outcome()
    return Outcome([SequenceDoor(module)], runs="one op")


def _graph(module: Any) -> Outcome:
    graph = line_of(module)
    if graph is None:
        return Outcome(note="it branches: its nodes run one by one")
    if not _any_known([node.module for node in graph.nodes]):
        return Outcome()
    return Outcome([GraphDoor(module)], runs="one op")


_GRAPH = Kind(_graph, _METHODS, quiet=True, holds=True)
_SEQUENCE = Kind(_sequence, _METHODS, quiet=True, holds=True)
_ALL_IN_ONE = Kind(partial(_coupling, AllInOne, AllInOneForm.read_block), _METHODS)
_COUPLINGS = "modules.coupling_layers."
_SPLINES = "modules.splines.rational_quadratic."

LIBRARY = Library(
    "FrEIA",
    PREFIXES,
    {
        "framework.sequence_inn.SequenceINN": _SEQUENCE,
        "framework.reversible_sequential_net.ReversibleSequential": _SEQUENCE,
        "framework.graph_inn.GraphINN": _GRAPH,
        "framework.graph_inn.graph_inn.GraphINN": _GRAPH,
        "framework.reversible_graph_net.ReversibleGraphNet": _GRAPH,
        _COUPLINGS + "GLOWCouplingBlock": _blocks(glow),
        _COUPLINGS + "RNVPCouplingBlock": _blocks(rnvp),
        _COUPLINGS + "NICECouplingBlock": _blocks(nice),
        _COUPLINGS + "AffineCouplingOneSided": _blocks(one_sided),
        _COUPLINGS + "ConditionalAffineTransform": _blocks(conditional_affine),
        _COUPLINGS + "GINCouplingBlock": _blocks(gin),
        _SPLINES + "RationalQuadraticSpline": _splines(SplineCoupling, spline_coupling),
        _SPLINES + "ElementwiseRationalQuadraticSpline": Kind(_elementwise, _METHODS),
        "modules.splines.linear.LinearSpline": _splines(
            partial(CouplingLayer, linear_coupling), linear_coupling
        ),
        "modules.all_in_one_block.AllInOneBlock": _ALL_IN_ONE,
        "all_in_one_block.AllInOneBlock": _ALL_IN_ONE,
        "modules.fixed_transforms.PermuteRandom": Kind(partial(_marked, Permutation), _METHODS),
        "modules.fixed_transforms.FixedLinearTransform": Kind(
            partial(_marked, FixedLinear), _METHODS
        ),
        "modules.invertible_resnet.ActNorm": Kind(_actnorm, _METHODS),
        "modules.orthogonal.HouseholderPerm": Kind(partial(_marked, Householder), _METHODS),
    },
    roots=("modules.base.InvertibleModule",),
    plain=(
        "modules.graph_topology.Concat",
        "modules.graph_topology.Split",
        "modules.reshapes.Flatten",
        "modules.reshapes.Reshape",
    ),
)
