"""Networks of zuko as networks of a chain: MLPs, and masked ones in the order of what their units see."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyflowkern.interop._kinds import class_test
from pyflowkern.interop._watches import Holds
from pyflowkern.nn.links import Link, activation_name
from pyflowkern.ops.chain_network import ChainLayer, ChainNetwork

__all__ = ["Orders", "dense_network", "is_of", "linears_of", "masked_network"]


#: Whether an object is of exactly the class of zuko that lies there, such as ``"nn.MLP"``.
is_of = class_test("zuko")


class Orders(NamedTuple):
    """In which order the layers of a masked network are taken, so that each unit reads the first ones alone."""

    features: list[int]
    columns: list[list[int]]
    rows: list[list[int]]
    prefixes: list[list[int]]


def dense_network(net: object, features: int, context: int, link: Link) -> ChainNetwork | None:
    """Return an MLP as a network of a chain, after noting it; None for one of another form.

    Args:
        net: the network, which reads the features and then the context.
        features: how many features it reads.
        context: how many numbers of a context it reads.
        link: where it is noted.
    """
    if not is_of(net, "nn.MLP") or (parts := linears_of(net, "nn.Linear", link)) is None:
        return None
    linears, activation = parts
    layers = []
    for i, linear in enumerate(linears):
        layer = _layer(linear, context if i == 0 else 0, link)
        if layer is None:
            return None
        layers.append(layer)
    link.network(layers)
    return _network(layers, activation, features, context, link)


def masked_network(
    net: object, features: int, context: int, outputs: int, link: Link
) -> tuple[ChainNetwork, Orders] | None:
    """Return a MaskedMLP as a network of a chain, after noting it; None for one of another form.

    Args:
        net: the network, which reads the features and then the context.
        features: how many features it reads.
        context: how many numbers of a context it reads.
        outputs: how many numbers it returns for each feature.
        link: where it is noted.
    """
    if not is_of(net, "nn.MaskedMLP"):
        return None
    residual = any(is_of(m, "nn.Residual") for m in net._modules.values())  # type: ignore[attr-defined]
    parts = _blocks_of(net, link) if residual else linears_of(net, "nn.MaskedLinear", link)
    if parts is None:
        return None
    linears, activation = parts
    masks = [linear._buffers.get("mask") for linear in linears]
    known = [m for m in masks if m is not None and m.dim() == 2]
    if len(known) < len(masks):
        return None
    orders = _orders([m.bool().cpu() for m in known], features, outputs)
    if orders is None:
        return None
    layers = []
    for i, linear in enumerate(linears):
        layer = _layer(linear, context if i == 0 else 0, link, orders, i)
        if layer is None or linear._parameters["weight"].shape != known[i].shape:  # type: ignore[union-attr]
            return None
        link.holds.append(Holds(linear, "mask"))
        layers.append(layer)
    # blocks add units, which must be the same ones
    if residual and any(rows != orders.rows[0] for rows in orders.rows[:-1]):
        return None
    network = _network(layers, activation, features, context, link, residual)
    return None if network is None else (network, orders)


def linears_of(net: Any, linear: str, link: Link) -> tuple[list[torch.nn.Module], str] | None:
    """Return the linear layers of a sequence, and the activation between them, after noting both."""
    inner = [*net._modules.values()]
    found = [m for m in inner[::2] if m is not None and is_of(m, linear)]
    activation = activation_name(inner[1::2], link)
    if len(inner) % 2 == 0 or len(found) != len(inner[::2]) or activation is None:
        return None
    link.watch(net)
    return found, activation


def _blocks_of(net: Any, link: Link) -> tuple[list[torch.nn.Module], str] | None:
    """Return the layers and the activation of a masked network with residual blocks, after noting all of them.

    None where blocks have several widths, with a layer between them.
    """
    first, *blocks, last = net._modules.values()
    inner = [[*block._modules.values()] for block in blocks if is_of(block, "nn.Residual")]
    if len(inner) < len(blocks) or any(len(parts) != 3 for parts in inner):
        return None
    linears = [first, *(m for parts in inner for m in parts[::2]), last]
    activation = activation_name([parts[1] for parts in inner], link)
    if activation is None or not all(is_of(m, "nn.MaskedLinear") for m in linears):
        return None
    for module in (net, *blocks):
        link.watch(module)
    return linears, activation


def _layer(
    linear: torch.nn.Module, context: int, link: Link, orders: Orders | None = None, i: int = 0
) -> ChainLayer | None:
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if weight is None or weight.dim() != 2 or weight.shape[1] < context:
        return None
    if bias is None and getattr(linear, "bias", None) is not None:
        return None
    link.watch(linear)
    link.read(linear, "weight")
    if bias is None:
        link.absent.append((linear, "bias"))
    else:
        link.read(linear, "bias")
    outputs, inputs = weight.shape[0], weight.shape[1] - context
    if orders is None:
        return ChainLayer(outputs, inputs, bias is not None)
    return ChainLayer(
        outputs,
        inputs,
        bias is not None,
        prefixes=orders.prefixes[i],
        columns=orders.columns[i],
        rows=orders.rows[i],
    )


def _network(
    layers: list[ChainLayer],
    activation: str,
    features: int,
    context: int,
    link: Link,
    residual: bool = False,
) -> ChainNetwork | None:
    link.context_features = context
    if layers[0].inputs != features:
        return None
    try:
        first, form = "joined" if context else "none", (residual, not residual)
        return ChainNetwork(layers, activation, *form, first, activate_blocks=not residual)
    except ValueError:  # layers that do not fit each other: calling them says so
        return None


def _orders(masks: list[Tensor], features: int, outputs: int) -> Orders | None:
    """Return orders in which each unit reads the first ones before it; None where there are none."""
    first = masks[0][:, :features]
    if not masks[0][:, features:].all() or masks[-1].shape[0] != features * outputs:
        return None
    if any(b.shape[1] != a.shape[0] for a, b in itertools.pairwise(masks)):
        return None
    sees = first.float()
    for mask in masks[1:]:
        sees = (mask.float() @ sees > 0).float()
    counts = sees.view(features, outputs, features).amax(1).sum(-1)
    order: list[int] = counts.argsort(stable=True).tolist()
    found = Orders(order, [order], [], [])
    for i, mask in enumerate([first, *masks[1:]]):
        counts, columns = mask.sum(1), found.columns[-1]
        if i == len(masks) - 1:
            rows = [at * outputs + k for at in order for k in range(outputs)]
        else:
            rows = counts.argsort(stable=True).tolist()
            found.columns.append(rows)
        prefixes = counts[rows]
        wanted = torch.arange(mask.shape[1], device="cpu") < prefixes[:, None]
        if (prefixes.diff() < 0).any() or not torch.equal(mask[rows][:, columns], wanted):
            return None
        found.rows.append(rows)
        found.prefixes.append(prefixes.tolist())
    return found
