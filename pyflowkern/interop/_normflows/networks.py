"""Networks of normflows as networks of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.structure import Structure
from pyflowkern.interop._normflows.parts import is_named
from pyflowkern.nn.links import ACTIVATIONS, Link, activation_name
from pyflowkern.ops.chain_network import ChainLayer, ChainNetwork

__all__ = ["Ends", "mlp"]


class Ends:
    """Which inputs and outputs of a network count: the others read zeros, or are not used.

    Args:
        inputs: places of the inputs.
        outputs: places of the outputs, each as often as it is wanted.
    """

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        self.inputs = Structure(torch.tensor(inputs, device="cpu"))
        self.outputs = Structure(torch.tensor(outputs, device="cpu"))


def mlp(net: Any, link: Link, ends: Ends | None = None) -> ChainNetwork | None:
    """Return a ``nets.MLP`` or a plain Sequential, after noting it; None for others.

    Also None where its output goes through a function.  With ``ends`` the network has those inputs and outputs alone.
    """
    inner = net
    if is_named(net, "nets.mlp.MLP"):
        link.watch(net)
        inner = net._modules.get("net")
    if type(inner) is not torch.nn.Sequential:
        return None
    link.watch(inner)
    linears: list[torch.nn.Linear] = []
    activations: list[Any] = []
    for part in inner._modules.values():
        if type(part) is torch.nn.Dropout:
            link.watch(part, "p", *(["training"] if part.p > 0 else []))
            if part.p > 0 and part.training:
                return None
        elif type(part) is torch.nn.Linear and len(linears) == len(activations):
            linears.append(part)
        elif len(linears) == len(activations) + 1 and part is not None:
            activations.append(part)
        else:
            return None
    if len(linears) != len(activations) + 1:
        return None
    activation = _activation(activations, link)
    found = [
        _linear(layer, link, ends, i == 0, i == len(linears) - 1)
        for i, layer in enumerate(linears)
    ]
    if activation is None or None in found:
        return None
    layers = [layer for layer in found if layer is not None]
    link.network(layers)
    try:
        return ChainNetwork(layers, activation)
    except ValueError:  # layers that do not fit each other
        return None


def _activation(activations: list[Any], link: Link) -> str | None:
    """Return the name of the activation, after noting it: the library's ReLU is a LeakyReLU of slope 0."""
    of_slope_zero = [type(a) is torch.nn.LeakyReLU and a.negative_slope == 0 for a in activations]
    if any(of_slope_zero):
        if not all(of_slope_zero):
            return None
        for a in activations:
            link.watch(a, "negative_slope")
        return "relu"
    if not all(type(a) in ACTIVATIONS for a in activations):
        return None
    return activation_name(activations, link)


def _linear(
    layer: torch.nn.Linear, link: Link, ends: Ends | None, first: bool, last: bool
) -> ChainLayer | None:
    """Return a layer, after noting its tensors."""
    weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or bias is None or weight.dim() != 2:
        return None
    link.watch(layer)
    outputs, inputs = weight.shape
    if ends is None or not (first or last):
        link.read(layer, "weight", "bias")
        return ChainLayer(outputs, inputs)
    columns, rows = ends.inputs if first else None, ends.outputs if last else None

    def make(inverse: bool) -> Sequence[Any]:
        w: Any = layer._parameters["weight"]
        b: Any = layer._parameters["bias"]
        if w is None or b is None or w.shape != (outputs, inputs) or b.shape != (outputs,):
            return w, b  # which the op refuses, so that the layers are asked
        if columns is not None:
            w = w.index_select(1, columns.on(w.device))
        if rows is not None:
            index = rows.on(w.device)
            w, b = w.index_select(0, index), b.index_select(0, index)
        return w, b

    link.make(layer, ("weight", "bias"), make)
    count: Tensor | None = None if columns is None else columns.host
    wanted: Tensor | None = None if rows is None else rows.host
    return ChainLayer(
        outputs if wanted is None else len(wanted), inputs if count is None else len(count)
    )
