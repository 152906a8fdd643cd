"""Networks of normflows as networks of a chain."""

from __future__ import annotations

import torch

from pyflowkern.interop._normflows_parts import is_named
from pyflowkern.nn.links import Link
from pyflowkern.ops.chain_network import ChainLayer, ChainNetwork

__all__ = ["mlp"]


def mlp(net: torch.nn.Module, link: Link) -> ChainNetwork | None:
    """Return a ``nets.MLP``, after noting it; None where its output goes through a function, and for others."""
    inner = net._modules.get("net")
    if not is_named(net, "nets.mlp.MLP") or type(inner) is not torch.nn.Sequential:
        return None
    link.watch(net)
    link.watch(inner)
    found: list[ChainLayer] = []
    slopes = set()
    after_linear = False
    for part in inner._modules.values():
        if type(part) is torch.nn.Linear and not after_linear:
            if (layer := _linear(part, link)) is None:
                return None
            found.append(layer)
            after_linear = True
        elif type(part) is torch.nn.LeakyReLU and after_linear:
            link.watch(part, "negative_slope")
            slopes.add(part.negative_slope)
            after_linear = False
        elif type(part) is torch.nn.Dropout and not after_linear:
            link.watch(part, "p", "training")
            if part.p > 0 and part.training:
                return None
        else:
            return None
    names = {0.0: "relu", 0.01: "leaky_relu"}
    if not after_linear or len(slopes) > 1 or not slopes <= names.keys():
        return None
    link.widest = max((layer.outputs for layer in found[:-1]), default=0)
    try:
        return ChainNetwork(found, names[slopes.pop()] if slopes else "identity")
    except ValueError:  # layers that do not fit each other
        return None


def _linear(layer: torch.nn.Linear, link: Link) -> ChainLayer | None:
    weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or bias is None or weight.dim() != 2:
        return None
    link.watch(layer)
    link.read(layer, "weight", "bias")
    return ChainLayer(weight.shape[0], weight.shape[1])
