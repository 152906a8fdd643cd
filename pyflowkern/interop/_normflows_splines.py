"""Neural spline flows of normflows, as steps of a chain, and their splines as one op."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.interop._doors import MethodDoor
from pyflowkern.interop._images import served_samples
from pyflowkern.interop._networks import masked_network, residual_network
from pyflowkern.interop._normflows_parts import FAMILY, is_named
from pyflowkern.interop._normflows_vectors import Layer
from pyflowkern.interop._watches import Holds
from pyflowkern.nn.links import Link
from pyflowkern.ops import SplineMap
from pyflowkern.ops.chain_steps import ElementsStep

__all__ = ["AutoregressiveSpline", "CoupledSpline", "SplineDoor", "spline_map_of"]

_SIZES = ("num_bins", "tails", "min_bin_width", "min_bin_height", "min_derivative")
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
        names = ("unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives")

        def flat(inverse: bool) -> list[Tensor]:
            return [torch.cat([cdf._parameters[n] for n in names], -1).view(-1)]

        link.make(cdf, names[:1], flat)
        link.steps.append(ElementsStep(spline_map, moves))
        return True


class AutoregressiveSpline(Layer):
    """``AutoregressiveRationalQuadraticSpline``."""

    def __init__(self, module: Any) -> None:
        inner = module._modules.get("mprqat")
        net = None if inner is None else inner._modules.get("autoregressive_net")
        super().__init__(module, 0 if net is None else net.initial_layer.weight.shape[1])

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
        net: the name of the network, whose width counts.
    """

    module: Any

    def __init__(self, module: torch.nn.Module, name: str, net: str) -> None:
        super().__init__(module, name)
        self._net = net

    def run(self, inputs: Any, params: Any, inverse: Any = False) -> Any:
        """Run one op."""
        module = self.module
        net = module._modules.get(self._net)
        width = getattr(net, "hidden_features", getattr(net, "hidden_channels", None))
        spline_map = spline_map_of(module, module.num_bins, width)
        of_elements = self.name == "_piecewise_cdf"
        if spline_map is None and not inputs.is_cuda and inputs.dim() == 2:
            found = _of_features(module, inputs, params, bool(inverse), width)
            if found is not None:
                return found[0], found[1] if of_elements else found[1].sum(1)
        if spline_map is None or not served_samples(inputs) or type(params) is not Tensor:
            return self.own(inputs, params, inverse)
        shape = (*inputs.shape, spline_map.params)
        if params.numel() != math.prod(shape) or params.dtype != inputs.dtype:
            return self.own(inputs, params, inverse)
        options = {"inverse": bool(inverse), "elementwise": of_elements}
        return ops.spline(inputs, params.reshape(shape), spline_map, **options)


def _of_features(
    spline: Any, x: Tensor, params: Tensor, inverse: bool, width: int | None
) -> tuple[Tensor, Tensor] | None:
    """Return values and log-derivatives of splines whose features have tails of their own.

    None where an input lies outside of its interval: there the library's splines of this kind give 0, and ours do not.
    """
    tails, bound, bins = spline.tails, spline.tail_bound, spline.num_bins
    size = 3 * bins + 1
    fits = isinstance(tails, (list, tuple)) and len(tails) == x.shape[1]
    if not fits or not served_samples(x) or params.numel() != x.numel() * size:
        return None
    bounds = torch.as_tensor(bound, dtype=x.dtype, device=x.device).expand(x.shape[1])
    if not (x.abs() < bounds).all() or params.dtype != x.dtype:
        return None
    raw, y, log_derivatives = params.reshape(*x.shape, size), [], []
    for i, (tail, limit) in enumerate(zip(tails, bounds.tolist(), strict=True)):
        if tail not in ("linear", "circular"):
            return None
        # all knots have a raw derivative: those of the ends do not count, or the last one is the first
        first = raw[:, i, : 2 * bins]
        rest = raw[:, i, 2 * bins + 1 : -1] if tail == "linear" else raw[:, i, 2 * bins : -1]
        spline_map = SplineMap(
            bins=bins,
            bound=limit,
            tails=tail,
            min_bin_width=spline.min_bin_width,
            min_bin_height=spline.min_bin_height,
            min_derivative=spline.min_derivative,
            scale=1.0 if width is None else 1.0 / math.sqrt(width),
        )
        of_one = torch.cat([first, rest], 1).unsqueeze(1)
        value, log_derivative = ops.spline(
            x[:, i : i + 1], of_one, spline_map, inverse=inverse, elementwise=True
        )
        y.append(value)
        log_derivatives.append(log_derivative)
    return torch.cat(y, 1), torch.cat(log_derivatives, 1)
