"""Networks that users of FrEIA make for its couplings, as networks of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from pyflowkern.nn.links import ACTIVATIONS, Link, activation_name
from pyflowkern.ops import ChainLayer, ChainNetwork

__all__ = ["sequential"]


def sequential(
    net: torch.nn.Module | None,
    link: Link,
    context: int,
    rows: Sequence[int] | None = None,
    zeros: int = 0,
) -> ChainNetwork | None:
    """Return an ``nn.Sequential`` of linear layers with one kind of activation between them, after noting it.

    Args:
        net: the network.
        link: where it is noted.
        context: how many of its inputs, the last ones, are the context.
        rows: the order in which its outputs are taken.
        zeros: how many outputs that are always 0 come before its own.
    """
    linears: list[torch.nn.Linear] = []
    activations: list[torch.nn.Module | None] = []
    if net is None or not _collect(net, link, linears, activations):
        return None
    if not linears or len(activations) != len(linears) - 1:
        return None
    if (activation := activation_name(activations, link)) is None:
        return None
    found = []
    for i, layer in enumerate(linears):
        last = i == len(linears) - 1
        one = (
            _padded(layer, link, zeros)
            if last and zeros and i
            else _layer(layer, link, 0 if i else context, rows if last else None)
        )
        if one is None:
            return None
        found.append(one)
    link.network(found)
    try:
        return ChainNetwork(found, activation, context="joined" if context else "none")
    except ValueError:  # layers that do not fit each other: calling them says so
        return None


def _collect(
    net: torch.nn.Module,
    link: Link,
    linears: list[torch.nn.Linear],
    activations: list[torch.nn.Module | None],
) -> bool:
    """Collect the parts of a Sequential, those of nested ones, too; return whether all of them are known."""
    if type(net) is not torch.nn.Sequential:
        return False
    link.watch(net)
    for part in net._modules.values():
        if type(part) is torch.nn.Sequential:
            if not _collect(part, link, linears, activations):
                return False
        elif type(part) is torch.nn.Linear:
            if len(activations) != len(linears):  # two linear layers in a row
                return False
            linears.append(part)
        elif type(part) is torch.nn.Dropout:
            link.watch(part, "p", "training")
            if part.p > 0 and part.training:
                return False
        elif type(part) in ACTIVATIONS:
            if len(activations) != len(linears) - 1:
                return False
            activations.append(part)
        else:
            return False
    return True


def _layer(
    layer: torch.nn.Linear, link: Link, context: int, rows: Sequence[int] | None
) -> ChainLayer | None:
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or weight.dim() != 2 or weight.shape[1] < context:
        return None
    if rows is not None and len(rows) != weight.shape[0]:
        return None
    if bias is None and getattr(layer, "bias", None) is not None:
        return None  # a buffer, or no tensor of the module's
    link.watch(layer)
    link.read(layer, "weight")
    if bias is None:
        link.absent.append((layer, "bias"))
    else:
        link.read(layer, "bias")
    outputs, inputs = weight.shape
    return ChainLayer(outputs, inputs - context, bias is not None, rows=rows)


def _padded(layer: torch.nn.Linear, link: Link, zeros: int) -> ChainLayer | None:
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or bias is None or weight.dim() != 2:
        return None
    link.watch(layer)
    link.make(layer, ("weight", "bias"), partial(_with_zeros, layer, zeros))
    return ChainLayer(weight.shape[0] + zeros, weight.shape[1])


def _with_zeros(layer: torch.nn.Linear, zeros: int, inverse: bool) -> Sequence[Any]:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if weight is None or bias is None:
        return weight, bias  # which the op refuses, so that the layers are asked
    pad = torch.nn.functional.pad
    return pad(weight, (0, 0, zeros, 0)), pad(bias, (zeros, 0))
