"""Couplings and autoregressive transforms of nflows, as steps of a chain, or by ops of their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.interop._images import served_samples
from pyflowkern.interop._layers import ForeignLayer, many
from pyflowkern.interop._networks import (
    Family,
    activation_of,
    idle,
    masked_network,
    multilayer,
    residual_network,
)
from pyflowkern.interop._nflows.maps import (
    Elements,
    autoregressive_elements,
    coupling_elements,
    unconditional_elements,
)
from pyflowkern.interop._nflows.names import PREFIXES, is_named
from pyflowkern.interop._watches import Holds
from pyflowkern.nn.links import Link, activation_name
from pyflowkern.ops.chain_network import ChainNetwork
from pyflowkern.ops.chain_steps import ElementsStep
from pyflowkern.ops.elements import apply_elements
from pyflowkern.ops.spline_map import SplineMap

__all__ = ["Autoregressive", "Coupling", "Unconditional"]

Pair = tuple[Tensor, Tensor]
_FAMILIES = [
    Family(f"{prefix}.nn.nets.resnet", f"{prefix}.transforms.made", "activated", "add")
    for prefix in PREFIXES
]


class Coupling(ForeignLayer):
    """A coupling, on vectors and images."""

    module: Any

    def __init__(self, module: Any) -> None:
        super().__init__(module, int(module.features))

    def link(self) -> Link | None:
        module, inner = self.module, self.module._modules
        moves, passes = (
            module._buffers[name] for name in ("transform_features", "identity_features")
        )
        link, net = Link(), inner.get("transform_net")
        link.watch(module, "features")
        if net is None or (elements := coupling_elements(module, net, link)) is None:
            return None
        network = coupling_network(net, link)
        reads = passes.tolist()
        step = _step(elements, moves.tolist(), reads, network)
        if network is None or step is None:
            return None
        link.holds += [
            Holds(module, "transform_features"),
            Holds(module, "identity_features"),
        ]
        if elements.heights != 1:  # the last layer's tensors are those noted last
            home = link.sources[-1][0]
            link.made.append((len(link.sources) - 2, partial(_scaled, home, elements)))
        link.steps.append(step)
        link.bounded |= elements.bounded
        if (other := inner.get("unconditional_transform")) is None:
            link.absent.append((module, "unconditional_transform"))
        elif not _add_unconditional(other, reads, link):
            return None
        link.modules = [*dict.fromkeys(link.modules)]
        return link

    def pays(self, x: Tensor) -> bool:
        """Whether an op of the elements is faster than the library."""
        return _is_spline(self.module) or many(x)

    def by_op(self, x: Any, context: Any, inverse: bool) -> Pair | None:
        """Run the network as it is, and one op for what it is for."""
        module, link = self.module, Link()
        if not served_samples(x) or x.shape[1] != self.features:
            return None
        net = module.transform_net
        if (elements := coupling_elements(module, net, link)) is None:
            return None
        passes, other, total = module.identity_features, module.unconditional_transform, None
        part = x[:, passes, ...]
        if other is not None and inverse:
            part, total = other.inverse(part, context)
            x = x.index_copy(1, passes, part)
        params = net(part, context)
        if not isinstance(params, Tensor) or params.dtype != x.dtype:
            return None
        if (factors := elements.factors(x, len(module.transform_features))) is not None:
            params = params * factors.view(-1, *[1] * (x.dim() - 2))
        split = torch.zeros(self.features, dtype=torch.bool, device=x.device)
        split[module.transform_features] = True
        if isinstance(elements.element, SplineMap):
            form: dict[str, Any] = {"split": split, "inverse": inverse}
            y, log_det = ops.spline_coupling(x, params, elements.element, **form)
        else:
            form = {"split": split, "inverse": inverse, "scale_map": elements.element}
            y, log_det = ops.affine_coupling(x, params, **form)
        if elements.bounded and not _is_finite(log_det):
            return None
        if other is not None and not inverse:
            part, total = other(part, context)
            y = y.index_copy(1, passes, part)
        return y, log_det if total is None else log_det + total


class Autoregressive(ForeignLayer):
    """A masked autoregressive transform."""

    module: Any

    def __init__(self, module: Any) -> None:
        net = module._modules.get("autoregressive_net")
        first = None if net is None else net._modules.get("initial_layer")
        weight = None if first is None else first._parameters.get("weight")
        super().__init__(module, 0 if weight is None or weight.dim() != 2 else weight.shape[1])

    def link(self) -> Link | None:
        module, link = self.module, Link()
        net = module._modules["autoregressive_net"]
        link.watch(module)
        if (elements := autoregressive_elements(module, net, link)) is None:
            return None
        families = (masked_network(family, net, link, elements.parts) for family in _FAMILIES)
        if (known := next(filter(None, families), None)) is None:
            return None
        if (step := _step(elements, known.order, known.order, known.network)) is None:
            return None
        link.steps.append(step)
        link.bounded |= elements.bounded
        link.modules = [*dict.fromkeys(link.modules)]
        return link

    def pays(self, x: Tensor) -> bool:
        """Whether an op of the elements is faster than the library."""
        return _is_spline(self.module) or many(x)

    def by_op(self, x: Any, context: Any, inverse: bool) -> Pair | None:
        """Run the network as it is, as often as the library does, and one op for what it is for."""
        module = self.module
        if not served_samples(x) or x.dim() != 2 or x.shape[1] != self.features:
            return None
        net = module.autoregressive_net
        if (elements := autoregressive_elements(module, net, Link())) is None:
            return None
        y, log_det = (torch.zeros_like(x) if inverse else x), None
        for _ in range(self.features if inverse else 1):
            params = net(y, context)
            if not isinstance(params, Tensor) or params.dtype != x.dtype:
                return None
            params = params.view(len(x), self.features, -1)
            if elements.raw_first:
                params = params.flip(-1)
            y, log_det = apply_elements(x, params, elements.element, inverse=inverse)
        if log_det is None or (elements.bounded and not _is_finite(log_det)):
            return None
        return y, log_det


class Unconditional(ForeignLayer):
    """A spline whose parameters are the same for all samples."""

    module: Any

    def __init__(self, module: Any) -> None:
        first = next(iter(module._parameters.values()))
        super().__init__(module, first.shape[0] if first.dim() == 2 else 0)

    def link(self) -> Link | None:
        link = Link()
        return link if _add_unconditional(self.module, [*range(self.features)], link) else None


def _is_spline(module: object) -> bool:
    return "Piecewise" in type(module).__name__


def _add_unconditional(module: Any, moves: Sequence[int], link: Link) -> bool:
    """Add the step of a spline with the same parameters for all samples; return whether it is one."""
    named = [f"transforms.nonlinearities.Piecewise{kind}CDF" for kind in _KINDS]
    if not is_named(module, *named):
        return False
    link.watch(module)
    elements = unconditional_elements(module, link)
    if elements is None or (step := _step(elements, moves, [], None)) is None:
        return False
    tensors = [*module._parameters]
    if any(module._parameters[name].shape[0] != len(moves) for name in tensors):
        return False
    link.steps.append(step)
    link.make(module, tensors[:1], partial(_joined, module, tensors))
    link.bounded |= elements.bounded
    return True


def _scaled(layer: Any, elements: Elements, inverse: bool) -> Sequence[Tensor]:
    """Return weight and bias of a last layer that has the factors in it."""
    weight, bias = layer.weight, layer.bias
    spline: Any = elements.element
    factors = elements.factors(weight, len(bias) // spline.params)
    if factors is None or len(factors) != len(bias):
        return weight, bias
    return weight * factors[:, None], bias * factors


_KINDS = ("Linear", "Quadratic", "Cubic", "RationalQuadratic")


def _joined(module: Any, names: Sequence[str], inverse: bool) -> Sequence[Tensor]:
    return [torch.cat([module._parameters[name] for name in names], -1).flatten()]


def _step(
    elements: Elements, moves: Sequence[int], reads: Sequence[int], network: ChainNetwork | None
) -> ElementsStep | None:
    try:
        return ElementsStep(elements.element, moves, reads, network, elements.layout)
    except ValueError:  # sizes that do not fit: calls say so
        return None


def coupling_network(net: torch.nn.Module, link: Link) -> ChainNetwork | None:
    """Return the network of a coupling, after noting it; None for one of another form.

    Args:
        net: the network.
        link: where it is noted.
    """
    for family in _FAMILIES:
        if (network := residual_network(family, net, link)) is not None:
            return network
    where = f"{type(net).__module__}.{type(net).__qualname__}"
    if where == "sbi.neural_nets.net_builders.flow.ContextSplineMap":
        return _context_network(net, link)
    if where in ("nessai.flows.nets.MLP", "glasflow.nets.mlp.MLP"):
        return _mlp(net, link)
    return None


def _context_network(net: torch.nn.Module, link: Link) -> ChainNetwork | None:
    """Return sbi's ContextSplineMap, which reads the context alone."""
    inner = net._modules.get("spline_predictor")
    if type(inner) is not torch.nn.Sequential:
        return None
    link.watch(net)
    link.watch(inner)
    parts = [*inner._modules.values()]
    first = parts[0]
    if len(parts) % 2 == 0 or type(first) is not torch.nn.Linear:
        return None
    activation = activation_name(parts[1::2], link)
    return multilayer(parts[0::2], activation, link, joined=first.in_features)


def _mlp(net: torch.nn.Module, link: Link) -> ChainNetwork | None:
    """Return the MLP of nessai or of glasflow, which takes no context."""
    inner, attributes = net._modules, net.__dict__
    hidden, drops = inner.get("_hidden_layers"), inner.get("_dropout_layers")
    name = "_activation" if "_activation" in {*attributes, *inner} else "_activation_fn"
    shapes = (
        ("_in_shape", "_out_shape")
        if "_in_shape" in attributes
        else ("_input_shape", "_output_shape")
    )
    if hidden is None or drops is None or attributes.get("_activate_output") is not False:
        return None
    if any(len(attributes.get(shape, ())) != 1 for shape in shapes):
        return None
    link.watch(net, "_activate_output", *shapes)
    for part in (hidden, drops):
        link.watch(part)
    if not all(idle(drop, link) for drop in drops._modules.values()):
        return None
    layers = [inner.get("_input_layer"), *hidden._modules.values(), inner.get("_output_layer")]
    return multilayer(layers, activation_of([net], link, name), link)


def _is_finite(log_det: Tensor) -> bool:
    """Whether the library would have taken the values, too: outside of [0, 1] it raises an error."""
    return bool(torch.isfinite(log_det).all())
