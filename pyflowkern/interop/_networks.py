"""Networks of nflows, and of libraries that have copies of them, as networks of a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.interop._watches import Holds, InTraining
from pyflowkern.nn.links import ACTIVATIONS, Link
from pyflowkern.ops.chain_network import ChainLayer, ChainNetwork

__all__ = [
    "Family",
    "MaskedNetwork",
    "activation_of",
    "idle",
    "masked_network",
    "multilayer",
    "residual_network",
]

#: Functions that networks are made with.
_FUNCTIONS: dict[Callable[..., Any], str] = {
    functional.relu: "relu",
    torch.relu: "relu",
    functional.leaky_relu: "leaky_relu",
    functional.elu: "elu",
    functional.tanh: "tanh",
    torch.tanh: "tanh",
    functional.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    functional.silu: "silu",
    functional.gelu: "gelu",
    functional.softplus: "softplus",
}
#: Those of packages that need not be installed.
_NAMED = {"nessai.flows.utils.silu": "silu"}


@dataclass(frozen=True)
class Family:
    """Where the classes of a library's copy lie, and in what copies differ.

    Args:
        resnet: the module of ResidualNet.
        made: the module of MADE.
        first_context: what a MADE's first layer adds: ``"activated"`` :math:`a(C c + d)`, ``"add"`` :math:`C c + d`.
        block_context: what blocks of a MADE do with it: ``"add"`` after the first layer, ``"gate"`` at the end.
        activated: whether a MADE has an activation of its own, which follows the first layer of feed-forward blocks.
    """

    resnet: str
    made: str
    first_context: str
    block_context: str
    activated: bool = True

    def has(self, module: Any, where: str, name: str) -> bool:
        """Whether a module is of exactly that class of ``resnet`` or ``made``."""
        cls = type(module)
        return (cls.__module__, cls.__qualname__) == (getattr(self, where), name)


def activation_of(owners: Sequence[Any], link: Link, attribute: str = "activation") -> str | None:
    """Return the name of the one activation that all have under that name, after noting it; None for others."""
    names = set()
    for owner in owners:
        module = owner._modules.get(attribute)
        if module is None:
            name = _name_of(owner.__dict__.get(attribute))
            if not name:
                return None
            link.watch(owner, attribute)
        else:
            name, options = ACTIVATIONS.get(type(module), ("", {}))
            # one in place writes into what a residual block adds in the end
            if "inplace" in module.__dict__:
                options = {**options, "inplace": False}
            if any(getattr(module, key) != value for key, value in options.items()):
                return None
            link.watch(owner)
            link.watch(module, *options)
        if not name:
            return None
        names.add(name)
    if names == {"softplus"}:  # torch's own is linear from 20 on
        link.in_float64 = False
    return names.pop() if len(names) == 1 else None if names else "identity"


def _name_of(function: Any) -> str:
    known = next((name for f, name in _FUNCTIONS.items() if f is function), "")
    if known:
        return known
    where = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    return _NAMED.get(where, "")


def idle(dropout: Any, link: Link) -> bool:
    """Whether a module is a dropout; it is noted, so that its network is called where it drops something."""
    if type(dropout) is not torch.nn.Dropout:
        return False
    link.watch(dropout, "p")
    if dropout.p > 0:
        link.waits.append(InTraining(dropout))
    return True


def multilayer(
    layers: Sequence[Any], activation: str | None, link: Link, joined: int = 0
) -> ChainNetwork | None:
    """Return linear layers with one activation between them as a network, after noting the layers.

    Args:
        layers: first to last.
        activation: its name; None for one that is not known.
        link: what they are noted in.
        joined: how many of the first layer's inputs, the last ones, are a context.
    """
    found = [_linear(layer, link, 0 if i else joined) for i, layer in enumerate(layers)]
    if None in found or activation is None:
        return None
    link.context_features = joined
    link.network(found)
    return _network(found, activation, False, True, "joined" if joined else "none")


def residual_network(family: Family, net: Any, link: Link) -> ChainNetwork | None:
    """Return a ResidualNet, after noting it; None where a part of it is another, or does what no chain does."""
    if not family.has(net, "resnet", "ResidualNet"):
        return None
    inner = net._modules
    blocks = inner.get("blocks")
    if type(blocks) is not torch.nn.ModuleList or getattr(net, "preprocessing", None) is not None:
        return None
    found: list[Any] = [*blocks._modules.values()]
    context = net.context_features or 0
    link.watch(
        net, "context_features", *(["preprocessing"] if "preprocessing" in vars(net) else [])
    )
    link.watch(blocks)
    if not all(family.has(b, "resnet", "ResidualBlock") and _plain_block(b, link) for b in found):
        return None
    if (activation := activation_of(found, link)) is None:
        return None
    layers = [_linear(inner.get("initial_layer"), link, joined=context)]
    for block in found:
        first, second = block._modules["linear_layers"]._modules.values()
        layers.append(_linear(first, link))
        gate = _context_layer(block, context) if context else None
        if context and gate is None:
            return None
        layers.append(_linear(second, link, gate=gate))
    layers.append(_linear(inner.get("final_layer"), link))
    if None in layers:
        return None
    link.context_features = context
    link.network(layers)
    return _network(layers, activation, True, False, "joined" if context else "none")


@dataclass(frozen=True)
class MaskedNetwork:
    """A MADE as a network of a chain.

    Args:
        network: in the order of the features.
        order: the features, each behind those that it depends on.
    """

    network: ChainNetwork
    order: list[int]


def masked_network(
    family: Family, net: Any, link: Link, parameters: Sequence[int]
) -> MaskedNetwork | None:
    """Return a MADE, after noting it; None where a part of it is another, or does what no chain does.

    Args:
        family: the library's.
        net: the network.
        link: what it is noted in.
        parameters: of each of a feature's parameters, where it stands among the network's outputs for that feature.
    """
    if not family.has(net, "made", "MADE"):
        return None
    inner = net._modules
    preprocessing = inner.get("preprocessing")
    blocks = inner.get("blocks")
    if type(blocks) is not torch.nn.ModuleList:
        return None
    if preprocessing is not None and type(preprocessing) is not torch.nn.Identity:
        return None
    found: list[Any] = [*blocks._modules.values()]
    link.watch(net, *(["use_residual_blocks"] if family.activated else []))
    link.watch(blocks)
    if preprocessing is not None:
        link.watch(preprocessing)
    residual = bool(net.use_residual_blocks) if family.activated else True
    if (between := _linears_between(family, found, residual, link)) is None:
        return None
    linears = [inner.get("initial_layer"), *between, inner.get("final_layer")]
    owners = [net, *found] if family.activated else found
    activation = activation_of(owners, link) if owners else None
    if activation is None or not all(family.has(m, "made", "MaskedLinear") for m in linears):
        return None
    order = _order(linears[-1], len(parameters))
    if order is None:
        return None
    form = _MadeForm(family, net, found, residual, order, parameters)
    layers = form.layers(linears, link)
    if layers is None:
        return None
    network = _network(layers, activation, residual, not residual, form.first)
    return None if network is None else MaskedNetwork(network, order)


def _linears_between(
    family: Family, blocks: Sequence[Any], residual: bool, link: Link
) -> list[Any] | None:
    """Return the masked layers of all blocks, after noting the blocks; None where they do what no chain does."""
    if residual:
        if not all(family.has(b, "made", "MaskedResidualBlock") for b in blocks):
            return None
        if not all(_plain_block(b, link) for b in blocks):
            return None
        return [m for b in blocks for m in b._modules["linear_layers"]._modules.values()]
    if not family.activated:
        return None
    for block in blocks:
        if not family.has(block, "made", "MaskedFeedforwardBlock"):
            return None
        if block.batch_norm is not None or not idle(block._modules.get("dropout"), link):
            return None
        link.watch(block)
        link.absent.append((block, "batch_norm"))
    return [block._modules.get("linear") for block in blocks]


class _MadeForm:
    """The orders in which a MADE's layers are read, and what they do with the context."""

    def __init__(
        self,
        family: Family,
        net: Any,
        blocks: Sequence[Any],
        residual: bool,
        order: list[int],
        parameters: Sequence[int],
    ) -> None:
        self.family, self.net, self.blocks, self.residual = family, net, blocks, residual
        self.order, self.parameters = order, parameters
        layer = net._modules.get("context_layer")
        self.context = 0 if layer is None else int(layer.in_features)
        self.first = family.first_context if self.context else "none"

    def layers(self, linears: Sequence[Any], link: Link) -> list[ChainLayer] | None:
        """Return all layers, after noting their tensors."""
        found: list[ChainLayer] = []
        columns, last = self.order, len(linears) - 1
        per = len(self.parameters)
        for i, linear in enumerate(linears):
            mask = linear._buffers["mask"]
            if i == last:
                rows = [feature * per + p for feature in self.order for p in self.parameters]
            else:
                rows = mask.sum(1).argsort(stable=True).tolist()
            prefixes = _prefixes(mask[rows][:, columns])
            if prefixes is None or mask.shape != linear.weight.shape:
                return None
            if 0 < i < last and rows != columns and self.residual:
                return None  # blocks add units, which must be the same ones
            link.holds.append(Holds(linear, "mask"))
            options: dict[str, Any] = {"prefixes": prefixes, "columns": columns, "rows": rows}
            if not self._read(i, last, linear, link, options):
                return None
            found.append(ChainLayer(*mask.shape, **options))
            columns = rows
        if self.context and not self._read_first(link):
            return None
        link.context_features = self.context
        return found

    def _read(self, i: int, last: int, linear: Any, link: Link, options: dict[str, Any]) -> bool:
        """Note weight and bias of a layer, and those of its context."""
        if linear._parameters.get("bias") is None or linear._parameters.get("weight") is None:
            return False
        link.watch(linear)
        link.read(linear, "weight")
        if i == 0 and self.first == "add":  # two biases
            net = self.net
            link.make(linear, ("bias",), lambda inverse: (linear.bias + net.context_layer.bias,))
        else:
            link.read(linear, "bias")
        of_block = i % 2 == (1 if self.family.block_context == "add" else 0)
        if not self.context or i in (0, last) or not of_block or not self.residual:
            return True
        layer = _context_layer(self.blocks[(i - 1) // 2], self.context)
        if layer is None:
            return False
        link.watch(layer)
        link.read(layer, "weight", "bias")
        options["context"] = self.family.block_context
        if self.family.block_context == "add":
            options["context_bias"] = True
        return True

    def _read_first(self, link: Link) -> bool:
        """Note the tensors of the first layer's context."""
        layer = _context_layer(self.net, self.context)
        if layer is None:
            return False
        link.watch(layer)
        link.read(layer, "weight")
        if self.first == "activated":
            link.read(layer, "bias")
        return True


def _plain_block(block: Any, link: Link) -> bool:
    """Whether a block has two linear layers, no batch norm, and no dropout that is active; it is noted."""
    layers, dropout = (block._modules.get(name) for name in ("linear_layers", "dropout"))
    if type(layers) is not torch.nn.ModuleList or len(layers._modules) != 2:
        return False
    if block.use_batch_norm:
        return False
    link.watch(block, "use_batch_norm")
    link.watch(layers)
    return idle(dropout, link)


def _context_layer(block: Any, size: int) -> torch.nn.Linear | None:
    layer = block._modules.get("context_layer")
    if type(layer) is not torch.nn.Linear or layer.bias is None:
        return None
    return layer if layer.weight.shape[1] == size else None


def _linear(
    layer: Any, link: Link, joined: int = 0, gate: torch.nn.Linear | None = None
) -> ChainLayer | None:
    """Return a linear layer, after noting its tensors; the first one may read the context as its last inputs."""
    if type(layer) is not torch.nn.Linear:
        return None
    weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or bias is None or weight.dim() != 2:
        return None
    link.watch(layer)
    link.read(layer, "weight", "bias")
    outputs, inputs = weight.shape
    if gate is None:
        return ChainLayer(outputs, inputs - joined)
    if gate.weight.shape[0] != outputs:
        return None
    link.watch(gate)
    link.read(gate, "weight", "bias")
    return ChainLayer(outputs, inputs, context="gate")


def _order(last: Any, per: int) -> list[int] | None:
    """Return the features in the order of their degrees, each of which ``per`` outputs of the last layer have."""
    degrees = last._buffers.get("degrees")
    if degrees is None or degrees.numel() % per:
        return None
    of_features = degrees.view(-1, per)[:, 0]
    return [int(i) for i in of_features.argsort(stable=True)]


def _prefixes(mask: Tensor) -> list[int] | None:
    """Return how many columns each row reads; None unless they are the first ones, and more in later rows."""
    counts = mask.sum(1).long()
    first = torch.arange(mask.shape[1], device=mask.device) < counts[:, None]
    ascending = bool((counts[1:] >= counts[:-1]).all())
    return counts.tolist() if ascending and torch.equal(mask, first.to(mask.dtype)) else None


def _network(
    layers: Sequence[ChainLayer | None],
    activation: str,
    residual: bool,
    activate_last: bool,
    context: str,
) -> ChainNetwork | None:
    try:
        known = [layer for layer in layers if layer is not None]
        return ChainNetwork(known, activation, residual, activate_last, context)
    except ValueError:  # layers that do not fit each other: calling them says so
        return None
