"""Neural spline flows of normflows, as steps of a chain, and their splines as one op."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.interop._check import comparable, same_values
from pyflowkern.interop._doors import MethodDoor
from pyflowkern.interop._images import served_samples
from pyflowkern.interop._networks import masked_network, residual_network
from pyflowkern.interop._normflows.parts import FAMILY, is_named
from pyflowkern.interop._normflows.vectors import Layer
from pyflowkern.interop._watches import Holds
from pyflowkern.nn.links import Link
from pyflowkern.ops import SplineMap
from pyflowkern.ops.chain_steps import ElementsStep

__all__ = [
    "AutoregressiveSpline",
    "CdfDoor",
    "CoupledSpline",
    "SplineDoor",
    "spline_disagreement",
    "spline_map_of",
]

Pair = tuple[Tensor, Tensor]
_SIZES = ("num_bins", "tails", "min_bin_width", "min_bin_height", "min_derivative")
_OWN_PARAMETERS = ("unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives")
_OF_CDF = ("tails", "tail_bound", "min_bin_width", "min_bin_height", "min_derivative")


def spline_map_of(spline: Any, bins: int, width: int | None) -> SplineMap | None:
    """Return the map of a spline whose raw sizes are divided by the root of a network's width; None for others.

    Tails that are circular are no wrapped ones in the library: outside of the interval it is the identity.
    """
    bound = vars(spline).get("tail_bound")
    if spline.tails != "linear" or isinstance(bound, bool) or not isinstance(bound, (int, float)):
        return None
    try:
        return SplineMap(
            bins=bins,
            bound=float(bound),
            min_bin_width=spline.min_bin_width,
            min_bin_height=spline.min_bin_height,
            min_derivative=spline.min_derivative,
            scale=1.0 if width is None else 1.0 / math.sqrt(width),
        )
    except (TypeError, ValueError):  # numbers that the library may find an error in, too
        return None


class CoupledSpline(Layer):
    """``CoupledRationalQuadraticSpline``: splines of one half by a network, of the other by parameters alone."""

    def __init__(self, module: Any) -> None:
        inner = module._modules.get("prqct")
        super().__init__(module, 0 if inner is None else int(inner.features))

    def link(self) -> Link | None:
        inner = self.module._modules.get("prqct")
        if not is_named(inner, "flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling"):
            return None
        net, other = (inner._modules.get(n) for n in ("transform_net", "unconditional_transform"))
        link = Link()
        link.watch(self.module)
        link.watch(inner, "features", *_SIZES, "tail_bound")
        splits = ("identity_features", "transform_features")
        reads, moves = (inner._buffers[name].tolist() for name in splits)
        link.holds += [Holds(inner, name) for name in splits]
        network = residual_network(FAMILY, net, link)
        width = getattr(net, "hidden_features", None)
        spline_map = spline_map_of(inner, inner.num_bins, width)
        if network is None or spline_map is None:
            return None
        link.watch(net, "hidden_features")
        try:
            link.steps.append(ElementsStep(spline_map, moves, reads, network))
        except ValueError:  # sizes that do not fit each other
            return None
        if other is None:
            link.absent.append((inner, "unconditional_transform"))
            return link
        return link if self._read_other(other, reads, link) else None

    def _read_other(self, cdf: Any, moves: list[int], link: Link) -> bool:
        """Note the splines of the half that passes."""
        if not is_named(cdf, "flows.neural_spline.coupling.PiecewiseRationalQuadraticCDF"):
            return False
        spline_map = spline_map_of(cdf, cdf.unnormalized_widths.shape[-1], None)
        if spline_map is None or cdf.unnormalized_widths.shape[:-1] != (len(moves),):
            return False
        link.watch(cdf, *_OF_CDF)

        def flat(inverse: bool) -> list[Tensor]:
            return [torch.cat([cdf._parameters[n] for n in _OWN_PARAMETERS], -1).view(-1)]

        link.make(cdf, _OWN_PARAMETERS[:1], flat)
        link.steps.append(ElementsStep(spline_map, moves))
        return True


class AutoregressiveSpline(Layer):
    """``AutoregressiveRationalQuadraticSpline``."""

    def __init__(self, module: Any) -> None:
        inner = module._modules.get("mprqat")
        net = None if inner is None else inner._modules.get("autoregressive_net")
        super().__init__(module, 0 if net is None else int(net.initial_layer.in_features))

    def link(self) -> Link | None:
        inner = self.module._modules.get("mprqat")
        if not is_named(inner, _AUTOREGRESSIVE):
            return None
        net = inner._modules.get("autoregressive_net")
        link = Link()
        link.watch(self.module)
        link.watch(inner, *_SIZES, "tail_bound")
        if getattr(net, "hidden_features", None) is not None:
            return None  # as in none of the versions that are known
        link.absent.append((net, "hidden_features"))
        spline_map = spline_map_of(inner, inner.num_bins, None)
        if spline_map is None:
            return None
        made = masked_network(FAMILY, net, link, range(spline_map.params))
        if made is None:
            return None
        try:
            link.steps.append(ElementsStep(spline_map, made.order, made.order, made.network))
        except ValueError:
            return None
        return link


_AUTOREGRESSIVE = (
    "flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive"
)


class SplineDoor(MethodDoor):
    """The elements of a spline flow, given all parameters: where networks must be called, as with active dropout.

    Args:
        module: a coupling or an autoregressive transform.
        name: ``_piecewise_cdf`` or ``_elementwise``.
    """

    module: Any

    def run(self, inputs: Any, params: Any, inverse: Any = False) -> Any:
        """Run one op."""
        pair = self.by_op(inputs, params, bool(inverse))
        return self.own(inputs, params, inverse) if pair is None else pair

    def by_op(self, inputs: Any, params: Any, inverse: bool) -> Pair | None:
        """Return what the method does by one op; None where the library must."""
        if (
            not served_samples(inputs)
            or type(params) is not Tensor
            or params.dtype != inputs.dtype
        ):
            return None
        module, coupled = self.module, self.name == "_piecewise_cdf"
        net = module._modules.get("transform_net" if coupled else "autoregressive_net")
        width = getattr(net, "hidden_features", None)
        if width is None and coupled:
            width = getattr(net, "hidden_channels", None)
        pair = _elements(module, inputs, params, inverse, module.num_bins, width)
        return pair if pair is None or coupled else (pair[0], pair[1].flatten(1).sum(1))

    def numbers(self, draw: torch.Generator) -> tuple[Tensor, ...]:
        """Return numbers to call the method with."""
        module = self.module
        if self.name == "_piecewise_cdf":
            features, per = len(module.transform_features), module._transform_dim_multiplier()
        else:
            per = module._output_dim_multiplier()
            features = module.autoregressive_net.final_layer.out_features // per
        sizes = ((7, features), (7, features, per))
        return tuple(3 * torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)


class CdfDoor(MethodDoor):
    """``_spline`` of the splines that have parameters of their own, the same for all samples."""

    module: Any

    def run(self, inputs: Any, inverse: Any = False) -> Any:
        """Run one op."""
        pair = self.by_op(inputs, bool(inverse))
        return self.own(inputs, inverse) if pair is None else pair

    def by_op(self, inputs: Any, inverse: bool) -> Pair | None:
        """Return what the method does by one op; None where the library must."""
        module = self.module
        parts = [p for n in _OWN_PARAMETERS if (p := module._parameters.get(n)) is not None]
        if len(parts) < len(_OWN_PARAMETERS) or not served_samples(inputs):
            return None
        if inputs.shape[1:] != parts[0].shape[:-1] or any(p.dtype != inputs.dtype for p in parts):
            return None
        params = torch.cat(parts, -1).expand(len(inputs), *inputs.shape[1:], -1)
        pair = _elements(module, inputs, params, inverse, parts[0].shape[-1], None)
        return None if pair is None else (pair[0], pair[1].flatten(1).sum(1))

    def numbers(self, draw: torch.Generator) -> tuple[Tensor, ...]:
        """Return numbers to call the method with."""
        shape = self.module.unnormalized_widths.shape[:-1]
        return (3 * torch.randn(7, *shape, generator=draw, dtype=torch.float64),)


def spline_disagreement(module: torch.nn.Module, name: str) -> str:
    """Return why one op must not stand for a method of splines, found by running both; empty if it may."""
    try:
        twin = comparable(copy.deepcopy(module))
    except Exception as error:
        return f"it cannot be copied to be compared: {type(error).__name__}"
    door: Any = (CdfDoor if name == "_spline" else SplineDoor)(twin, name)
    for inverse in (False, True):
        given = door.numbers(torch.Generator().manual_seed(0))
        with torch.no_grad():
            got = door.by_op(*given, inverse)
            if got is None:
                return "its form is not known"
            # the library divides the parameters in place
            want = door.own(*(t.clone() for t in given), inverse)
        if not same_values(got, want):
            return "its values are not those of the form that its name says"
    return ""


def _elements(
    spline: Any, x: Tensor, params: Tensor, inverse: bool, bins: int, width: int | None
) -> tuple[Tensor, Tensor] | None:
    """Return values and log-derivatives of elements ``x``; None for splines of another form."""
    spline_map = spline_map_of(spline, bins, width)
    if spline_map is None:
        return _of_features(spline, x, params, inverse, bins, width)
    shape = (*x.shape, spline_map.params)
    if params.numel() != math.prod(shape):
        return None
    return ops.spline(x, params.reshape(shape), spline_map, inverse=inverse, elementwise=True)


def _of_features(
    spline: Any, x: Tensor, params: Tensor, inverse: bool, bins: int, width: int | None
) -> tuple[Tensor, Tensor] | None:
    """Return values and log-derivatives of splines that are circular, or whose features differ in tails or bounds.

    All are one op, with a raw derivative at every knot: those at the ends of a linear one say 1, and the two of a
    circular one are the same.  An input outside of its interval stays what it is; where each feature has tails of its
    own, the library makes it 0.
    """
    tails, bound = spline.tails, spline.tail_bound
    apart = isinstance(tails, (list, tuple))
    each = tuple(tails) if apart else (tails,) * (x.shape[1] if x.dim() == 2 else 0)
    if len(each) != x.shape[1] or x.dim() != 2 or not {*each} <= {"linear", "circular"}:
        return None
    if isinstance(bound, bool) or not isinstance(bound, (int, float, Tensor)):
        return None
    spline_map = _of_knots(spline, bins, width)
    knots = bins + 1 if apart else bins - 1 if tails == "linear" else bins
    if spline_map is None or params.numel() != x.numel() * (2 * bins + knots):
        return None
    bounds = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    if bounds.dim() > 1 or bounds.numel() not in (1, x.shape[1]) or not (bounds > 0).all():
        return None  # the library says what is wrong
    raw = params.reshape(*x.shape, -1)
    first, inner = raw[..., 2 * bins : 2 * bins + 1], raw[..., 2 * bins :]
    inner = inner[..., 1:-1] if apart else inner if tails == "linear" else inner[..., 1:]
    least = spline.min_derivative
    one = torch.full_like(first, math.log(math.expm1(1 - least)))
    circular = torch.tensor([[tail == "circular"] for tail in each], device=x.device)
    end = torch.where(circular, first, one)
    raw = torch.cat([raw[..., : 2 * bins], end, inner, end], -1)
    inside = (x >= -bounds) & (x <= bounds)
    within = torch.where(inside, x, 0.0) / bounds
    y, log_slope = ops.spline(within, raw, spline_map, inverse=inverse, elementwise=True)
    outside = torch.zeros_like(x) if apart else x
    return torch.where(inside, bounds * y, outside), torch.where(inside, log_slope, 0.0)


def _of_knots(spline: Any, bins: int, width: int | None) -> SplineMap | None:
    """Return the map of splines over [-1, 1] with a raw derivative at every knot."""
    try:
        return SplineMap(
            bins=bins,
            bound=1.0,
            tails="affine",
            min_bin_width=spline.min_bin_width,
            min_bin_height=spline.min_bin_height,
            min_derivative=spline.min_derivative,
            scale=1.0 if width is None else 1.0 / math.sqrt(width),
        )
    except (TypeError, ValueError):  # numbers that the library may find an error in, too
        return None
