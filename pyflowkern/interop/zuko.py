"""What is known of zuko 1.6: lazy transforms and flows, whose calls return objects that run one op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from pyflowkern.interop._check import comparable, disagreement, same_values
from pyflowkern.interop._doors import the_library_itself
from pyflowkern.interop._kinds import Kind, Library, Outcome
from pyflowkern.interop._layers import LayerMark
from pyflowkern.interop._zuko.continuous import ContinuousDoor
from pyflowkern.interop._zuko.doors import (
    ComposedDoor,
    FlowDoor,
    TransformDoor,
    is_known,
    layer_of,
    parts_of,
)
from pyflowkern.interop._zuko.layers import (
    Called,
    Conditional,
    Coupling,
    ElementWise,
    Inverse,
    MaskedAutoregressive,
    Unconditional,
    sizes_of,
)

__all__ = ["LIBRARY"]


def _runs(modules: list[Any] | None) -> str:
    """Return what runs a sequence of transforms now, for the report; empty where zuko does."""
    doors = [m.__dict__.get("forward") for m in modules or []]
    found = [door for door in doors if isinstance(door, TransformDoor)]
    if not found:
        return ""
    return "one op" if any(door.layer.link() is not None for door in found) else "own op"


def _transform(make: Callable[[torch.nn.Module], Conditional]) -> Kind:
    def look(module: torch.nn.Module) -> Outcome:
        if make(module).univariate() is None:
            univariate = getattr(module.univariate, "func", module.univariate)
            name = getattr(univariate, "__name__", type(univariate).__name__)
            return Outcome(note=f"no op knows its univariate transform, {name}")
        why = disagreement(module, make)
        door = TransformDoor(make(module))
        if not why:
            return Outcome([door], runs="one op")
        if by_op_differs(module, make):
            return Outcome(note=why)
        return Outcome([door], runs="own op", note=f"no chain: {why}")

    return Kind(look, ("forward",))


def by_op_differs(module: torch.nn.Module, make: Callable[[torch.nn.Module], Conditional]) -> bool:
    """Whether the op of a transform's elements is not what they are, found by running both on a few numbers."""
    twin = _twin(module)
    if twin is None:
        return True
    layer = make(twin)
    draw = torch.Generator().manual_seed(0)
    x = 1.5 * torch.randn(7, layer.features, generator=draw, dtype=torch.float64)
    size = sizes_of(twin._modules.get("hyper"))[0]
    if isinstance(layer, Coupling):
        size -= int(twin._buffers["mask"].sum())  # type: ignore[union-attr]
    elif isinstance(layer, MaskedAutoregressive):
        size -= layer.features
    context = torch.randn(7, size, generator=draw, dtype=torch.float64) if size > 0 else None
    with torch.no_grad():
        got = layer.by_op(x, context, False)
        try:
            with the_library_itself():
                want = layer(x, context)
        except Exception:
            return True
    return got is None or not same_values(got, want)


def _twin(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return a copy to be compared; None for what cannot be copied."""
    try:
        return comparable(copy.deepcopy(module))
    except Exception:
        return None


def _unconditional(module: torch.nn.Module) -> Outcome:
    if Unconditional(module).link() is None:
        name = getattr(module.f, "__name__", type(module.f).__name__)
        return Outcome(note=f"no op knows its transform, {name}")
    if why := disagreement(module, Unconditional):
        return Outcome(note=why)
    return Outcome([LayerMark(Unconditional(module))])


def _inverse_of(module: torch.nn.Module) -> Called:
    return Inverse(module, layer_of(module.get_submodule("transform")))


def _inverse(module: torch.nn.Module) -> Outcome:
    if not is_known(module._modules.get("transform")) or _inverse_of(module).link() is None:
        return Outcome()
    return Outcome([LayerMark(_inverse_of(module))])


def _continuous(module: torch.nn.Module) -> Outcome:
    twin = _twin(module)
    if twin is None:
        return Outcome(note="it cannot be copied to be compared")
    door = ContinuousDoor(twin)
    features = sizes_of(twin._modules.get("ode"))[1]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, features, generator=draw, dtype=torch.float64)
    size = sizes_of(twin._modules.get("ode"))[0] - features - 2 * len(twin._buffers["freqs"])  # type: ignore[arg-type]
    c = torch.randn(3, size, generator=draw, dtype=torch.float64) if size > 0 else None
    with torch.no_grad():
        seed = torch.random.get_rng_state()
        got = door.run(c).call_and_ladj(x)
        torch.random.set_rng_state(seed)
        with the_library_itself():
            want = door.run(c).call_and_ladj(x)
    if door._form is None:
        return Outcome(note="its network is no MLP with an activation whose slope is known")
    if not same_values(got, want):
        return Outcome(note="its values are not those of the form that its name says")
    return Outcome(
        [ContinuousDoor(module)], runs="own op", note="zuko's own solver, the same steps"
    )


def _composed(module: torch.nn.Module) -> Outcome:
    runs = _runs(parts_of(module))
    return Outcome([ComposedDoor(module)], runs) if runs else Outcome()  # its parts say why


def _flow(module: torch.nn.Module) -> Outcome:
    door = FlowDoor(module)
    runs = _runs(door.transforms())
    return Outcome([door], runs) if runs else Outcome()  # its parts say why


_FLOWS = (
    "lazy.Flow",
    "flows.autoregressive.MAF",
    "flows.coupling.NICE",
    "flows.coupling.RealNVP",
    "flows.spline.NSF",
    "flows.spline.NCSF",
    "flows.polynomial.SOSPF",
    "flows.polynomial.BPF",
    "flows.neural.NAF",
    "flows.neural.UNAF",
    "flows.gaussianization.GF",
    "flows.continuous.CNF",
)

LIBRARY = Library(
    "zuko",
    ("zuko",),
    {
        "flows.autoregressive.MaskedAutoregressiveTransform": _transform(MaskedAutoregressive),
        "flows.coupling.GeneralCouplingTransform": _transform(Coupling),
        "flows.gaussianization.ElementWiseTransform": _transform(ElementWise),
        "lazy.UnconditionalTransform": Kind(_unconditional, ("forward",)),
        "lazy.LazyInverse": Kind(_inverse, ("forward",), quiet=True, holds=True),
        "lazy.LazyComposedTransform": Kind(_composed, ("forward",), quiet=True, holds=True),
        "flows.continuous.FFJTransform": Kind(_continuous, ("forward",)),
        **{where: Kind(_flow, ("forward",), quiet=True, holds=True) for where in _FLOWS},
    },
    roots=("lazy.LazyTransform", "lazy.LazyDistribution"),
    plain=("lazy.UnconditionalDistribution",),
)
