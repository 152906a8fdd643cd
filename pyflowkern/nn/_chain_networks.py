"""Conditioners as networks of a chain: which of them a chain knows, and which tensors they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyflowkern.core.structure import Structure
from pyflowkern.nn.conditioners import MLP, PeriodicInput, ResidualMLP
from pyflowkern.nn.links import Link, activation_name
from pyflowkern.nn.masked import MaskedLinear, MaskedMLP
from pyflowkern.ops.chain_network import ChainLayer, ChainNetwork

__all__ = ["Ends", "coupling_network", "masked_network"]


class Ends(NamedTuple):
    """Which inputs and outputs of a network count, of how many: those left read zeros, or are not used."""

    inputs: Tensor
    outputs: Tensor
    sizes: tuple[int, int]


def coupling_network(
    conditioner: torch.nn.Module, link: Link, ends: Ends | None = None
) -> ChainNetwork | None:
    """Return the network of a coupling, after noting it in the link; None for others than MLPs of this package.

    With ``ends`` it is a network of those inputs and outputs alone.
    """
    kind = type(conditioner)
    if kind is MLP:
        return _mlp(conditioner, link, ends)  # type: ignore[arg-type]
    if kind is PeriodicInput and ends is None:
        return _periodic(conditioner, link)  # type: ignore[arg-type]
    return _residual_mlp(conditioner, link, ends) if kind is ResidualMLP else None  # type: ignore[arg-type]


def _periodic(net: PeriodicInput, link: Link) -> ChainNetwork | None:
    """Return the network inside, which reads the cosines of all angles and then their sines."""
    link.watch(net, "factor")
    inside = coupling_network(net._modules["net"], link)  # type: ignore[arg-type]
    if inside is None or inside.frequencies is not None or inside.inputs % 2:
        return None
    angles = inside.inputs // 2
    columns = [c for i in range(angles) for c in (i, angles + i)]
    first = replace(inside.layers[0], columns=columns)
    try:
        layers = first, *inside.layers[1:]
        return replace(inside, layers=layers, frequencies=(float(net.factor),) * angles)
    except (TypeError, ValueError):  # no number, or that of a circle that is no circle
        return None


def _mlp(net: MLP, link: Link, ends: Ends | None) -> ChainNetwork | None:
    inner = net._modules
    link.watch(net, "context_features")
    body = inner["body"]
    if type(body) is not torch.nn.Sequential or len(body._modules) % 2 == 0:
        return None  # the last layer follows an activation
    link.watch(body)
    between = list(body._modules.values())
    layers = [inner["first"], *between[1::2], inner["last"]]
    return _network(net, layers, between[0::2], link, ends=ends)


def _residual_mlp(net: ResidualMLP, link: Link, ends: Ends | None) -> ChainNetwork | None:
    inner = net._modules
    link.watch(net, "context_features", "activate_last")
    blocks, end = inner["blocks"], inner["last"]
    if type(blocks) is not torch.nn.ModuleList or type(end) is not torch.nn.Sequential:
        return None
    link.watch(blocks)
    link.watch(end)
    layers, activations = [inner["first"]], []
    if (gates := _gates(net, len(blocks._modules), link)) is None:
        return None
    for block in blocks._modules.values():
        if type(block) is not torch.nn.Sequential or len(block._modules) != 4:
            return None
        link.watch(block)
        before, first, between, second = block._modules.values()
        layers += [first, second]
        activations += [before, between]
    if len(end._modules) != 2:
        return None
    activation, last = end._modules.values()
    if net.activate_last:
        activations.append(activation)
    elif type(activation) is not torch.nn.Identity:
        return None
    else:
        link.watch(activation)
    form = True, net.activate_last, gates, ends
    return _network(net, [*layers, last], activations, link, *form)


def _network(
    net: MLP | ResidualMLP,
    layers: Sequence[torch.nn.Module | None],
    activations: Sequence[torch.nn.Module | None],
    link: Link,
    residual: bool = False,
    activate_last: bool = True,
    gates: Sequence[torch.nn.Module] = (),
    ends: Ends | None = None,
) -> ChainNetwork | None:
    activation = activation_name(activations, link)
    if activation is None or not all(type(layer) is torch.nn.Linear for layer in layers):
        return None
    found = [
        _part(layer, link, ends, i == 0)
        if ends is not None and i in (0, len(layers) - 1)
        else _layer(layer, link, _gate_of(gates, i, len(layers)))
        for i, layer in enumerate(layers)
        if layer is not None
    ]
    if None in found or not _context(net, link):
        return None
    link.network(found)
    try:
        return ChainNetwork(
            [layer for layer in found if layer is not None],
            activation,
            residual,
            activate_last,
            "add" if net.context_features > 0 else "none",
        )
    except ValueError:  # layers that do not fit each other: calling them says so
        return None


def _gates(net: ResidualMLP | MaskedMLP, blocks: int, link: Link) -> list[torch.nn.Module] | None:
    """Return the layers of a network's gates, after noting them; an empty list for none, None for others than ours."""
    gates = net._modules.get("gates")
    if gates is None:
        link.absent.append((net, "gates"))
        return []
    inner = list(gates._modules.values())
    if type(gates) is not torch.nn.ModuleList or len(inner) != blocks or not net.context_features:
        return None
    link.watch(gates)
    for gate in inner:
        if type(gate) is not torch.nn.Linear or not {"weight", "bias"} <= {*gate._parameters}:
            return None
        weight, bias = gate._parameters["weight"], gate._parameters["bias"]
        if (
            weight is None
            or bias is None
            or tuple(weight.shape) != (len(bias), net.context_features)
        ):
            return None
        link.watch(gate)
    return [gate for gate in inner if gate is not None]


def _gate_of(gates: Sequence[torch.nn.Module], i: int, layers: int) -> torch.nn.Module | None:
    """Return the gate of layer ``i``: of the second one of each block."""
    return gates[i // 2 - 1] if gates and i % 2 == 0 and 0 < i < layers - 1 else None


def _layer(
    layer: torch.nn.Module, link: Link, gate: torch.nn.Module | None = None, **options: Any
) -> ChainLayer | None:
    """Return a linear layer, after noting its tensors, and those of its gate."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or weight.dim() != 2:
        return None
    if (
        bias is None and getattr(layer, "bias", None) is not None
    ):  # a buffer, or no tensor of the module's
        return None
    link.watch(layer)
    link.read(layer, "weight")
    if bias is None:
        link.absent.append((layer, "bias"))
    else:
        link.read(layer, "bias")
    outputs, inputs = weight.shape
    if gate is not None:
        if gate._parameters["weight"].shape[0] != outputs:  # type: ignore[union-attr]
            return None
        link.read(gate, "weight", "bias")
        options["context"] = "gate"
    return ChainLayer(outputs, inputs, bias is not None, **options)


def _part(layer: torch.nn.Module, link: Link, ends: Ends, first: bool) -> ChainLayer | None:
    """Return the first or the last layer with those inputs or outputs alone that count, after noting its tensors."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or bias is None or weight.dim() != 2:
        return None
    axis = 1 if first else 0
    if weight.shape[axis] != ends.sizes[0 if first else 1] or bias.shape != weight.shape[:1]:
        return None
    host = ends.inputs if first else ends.outputs
    kept, shape = Structure(host), weight.shape

    def make(inverse: bool) -> Sequence[Any]:
        w, b = layer._parameters["weight"], layer._parameters["bias"]
        if w is None or b is None or w.shape != shape or b.shape != shape[:1]:
            return w, b  # which the op refuses, so that the layers are asked
        index = kept.on(w.device)
        part = w.index_select(axis, index)
        return part, b if first else b.index_select(0, index)

    link.watch(layer)
    link.make(layer, ("weight", "bias"), make)
    outputs, inputs = weight.shape
    return ChainLayer(outputs, len(host)) if first else ChainLayer(len(host), inputs)


def _context(net: MLP | ResidualMLP | MaskedMLP, link: Link) -> bool:
    """Note the context's layer; return whether it is what the network was made with."""
    layer, size = net._modules.get("context"), net.context_features
    link.context_features = size
    if layer is None or not size:
        return layer is None and not size
    if type(layer) is not torch.nn.Linear or getattr(layer, "bias", None) is not None:
        return False
    weight = layer._parameters.get("weight")
    if weight is None or weight.dim() != 2 or weight.shape[1] != size:
        return False
    link.watch(layer)
    link.read(layer, "weight")
    link.absent.append((layer, "bias"))
    return True


def masked_network(net: torch.nn.Module, link: Link) -> ChainNetwork | None:
    """Return the network of an autoregressive layer, after noting it; None for others than MaskedMLPs."""
    if type(net) is not MaskedMLP:
        return None
    link.watch(net, "features", "outputs", "context_features", "activation", "order", "plan")
    layers = net._modules["layers"]
    if type(layers) is not torch.nn.ModuleList:
        return None
    link.watch(layers)
    plan, inner = net.plan, list(layers._modules.values())
    if len(inner) != len(plan.layers) or not all(type(m) is MaskedLinear for m in inner):
        return None
    order = torch.tensor(net.order, device="cpu")
    found, last = [], len(inner) - 1
    if (gates := _gates(net, len(plan.gated), link)) is None:
        return None
    for i, (layer, planned) in enumerate(zip(inner, plan.layers, strict=True)):
        mask = planned.mask
        if i == 0:
            mask = mask[:, order]
        if i == last:
            mask = mask.view(net.features, net.outputs, -1)[order].flatten(0, 1)
        prefixes = _prefixes(mask)
        assert layer is not None
        form = {"prefixes": prefixes, "columns": net.order if i == 0 else None}
        form["rows"] = _rows_of(net) if i == last else None
        gate = _gate_of(gates, i, len(inner))
        known = None if prefixes is None else _layer(layer, link, gate, **form)
        if known is None or (known.outputs, known.inputs) != tuple(mask.shape):
            return None
        found.append(known)
    residual = any(layer.residual is not None for layer in plan.layers)
    if not _context(net, link):
        return None
    context = "add" if net.context_features > 0 else "none"
    return ChainNetwork(tuple(found), net.activation, residual, True, context)


def _rows_of(net: MaskedMLP) -> list[int]:
    """Return the rows of a masked network's last layer in the order in which features are moved."""
    return [m * net.outputs + k for m in net.order for k in range(net.outputs)]


def _prefixes(mask: Tensor) -> list[int] | None:
    """Return how many columns each row reads; None unless they are the first ones, and more in later rows."""
    counts = mask.sum(1)
    first = torch.arange(mask.shape[1], device="cpu") < counts[:, None]
    ascending = bool((counts[1:] >= counts[:-1]).all())
    return counts.tolist() if ascending and torch.equal(mask, first) else None
