"""sbi's networks of vector fields, with tangents carried forward through their layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.core.activations import ACTIVATIONS, activation_and_slope
from pyflowkern.interop._kinds import class_test
from pyflowkern.nn.links import Link, activation_name

__all__ = ["Dual", "Network", "is_of", "network_of"]

#: Whether an object is of exactly the class of sbi that lies there.
is_of = class_test("sbi")
_NETS = "neural_nets.net_builders.vector_field_nets."


class Dual(NamedTuple):
    """Values of a layer, and their derivatives along some directions of the input.

    Args:
        value: ``[*, H]``.
        tangents: ``[directions, *, H]``, or with sizes of 1 for what is the same in a batch; None for values alone.
    """

    value: Tensor
    tangents: Tensor | None

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Dual:
        """Return what a linear layer makes of it."""
        value = functional.linear(self.value, weight, bias)
        found = self.tangents
        return Dual(value, None if found is None else functional.linear(found, weight))

    def activated(self, activation: str) -> Dual:
        """Return what an activation makes of it."""
        if self.tangents is None:
            return Dual(ACTIVATIONS[activation](self.value), None)
        value, slope = activation_and_slope(self.value, activation)
        return Dual(value, slope * self.tangents)

    def shifted(self, shift: Tensor) -> Dual:
        """Return the sum with what does not depend on the input."""
        return Dual(self.value + shift, self.tangents)

    def scaled(self, scale: Tensor) -> Dual:
        """Return the product with what does not depend on the input."""
        tangents = None if self.tangents is None else scale * self.tangents
        return Dual(scale * self.value, tangents)

    def plus(self, other: Dual) -> Dual:
        """Return the sum of both."""
        one, more = self.tangents, other.tangents
        tangents = None if one is None or more is None else one + more
        return Dual(self.value + other.value, tangents)

    def normalized(self, norm: Any) -> Dual:
        """Return what a LayerNorm of the last axis makes of it."""
        x, dx = self
        value = functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        if dx is None:
            return Dual(value, None)
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
        unit = centred * scale
        along = (dx * unit).mean(-1, keepdim=True)
        tangents = scale * (dx - dx.mean(-1, keepdim=True) - unit * along)
        return Dual(value, tangents if norm.weight is None else tangents * norm.weight)


class Network:
    """A network of a vector field: subclasses say which of sbi's it is.

    Args:
        net: the network.
        link: where its parts are noted, so that none has hooks or another class.
    """

    def __init__(self, net: Any, link: Link) -> None:
        self.net = net
        for part in net.modules():
            link.watch(part)

    def hidden(self, given: Dual, condition: Tensor, time: Tensor) -> Dual:
        """Return what the last layer reads.

        Args:
            given: the state, ``[*, D]``.
            condition: ``[*, K]``, which spreads over the state.
            time: ``[1]``: all samples are at one time.
        """
        raise NotImplementedError

    @property
    def last(self) -> Any:
        """The last layer, which is linear."""
        raise NotImplementedError


class _Plain(Network):
    """``VectorFieldMLP``: linear layers of one width, with LayerNorm and connections past each layer where wanted."""

    def __init__(self, net: Any, link: Link, activation: str) -> None:
        super().__init__(net, link)
        link.facts.append((net, ("skip_connections", "layer_norm")))
        self._activation = activation

    @classmethod
    def read(cls, net: Any, link: Link) -> Network | None:
        """Return the network; None for one of other parts."""
        inner, activation = net._modules, _activation(net._modules.get("activation"), link)
        names = ("input_layer", "condition_layer", "input_merge_layer", "time_linear_layer")
        ends = [inner.get(name) for name in (*names, "output_layer")]
        hidden, norms = inner.get("layers"), inner.get("layers_norm")
        if type(hidden) is not torch.nn.ModuleList or activation is None:
            return None
        if not all(type(layer) is torch.nn.Linear for layer in (*ends, *hidden)):
            return None
        if net.layer_norm:
            if type(norms) is not torch.nn.ModuleList or len(norms) != len(hidden):
                return None
            if not all(
                type(n) is torch.nn.LayerNorm and len(n.normalized_shape) == 1 for n in norms
            ):
                return None
        return cls(net, link, activation)

    def hidden(self, given: Dual, condition: Tensor, time: Tensor) -> Dual:
        """Return what the last layer reads."""
        net, activation = self.net, self._activation
        merge, width = net.input_merge_layer, net.input_layer.out_features
        # condition and time are the same for many samples, and go through their layers once
        of_condition = functional.linear(
            ACTIVATIONS[activation](net.condition_layer(condition)),
            merge.weight[:, width:],
            merge.bias,
        )
        of_time = net.time_linear_layer(net.time_emb(time)).squeeze(0)
        first = net.input_layer
        found = given.linear(first.weight, first.bias).activated(activation)
        found = found.linear(merge.weight[:, :width]).shifted(of_condition).activated(activation)
        for i, layer in enumerate(net.layers):
            before = found
            found = found.linear(layer.weight, layer.bias).activated(activation).shifted(of_time)
            if net.skip_connections:
                found = found.plus(before)
            if net.layer_norm:
                found = found.normalized(net.layers_norm[i])
        return found

    @property
    def last(self) -> Any:
        return self.net.output_layer


class _Adaptive(Network):
    """``VectorFieldAdaMLP``: residual blocks that time and condition scale, shift and gate."""

    def __init__(self, net: Any, link: Link, activations: list[str]) -> None:
        super().__init__(net, link)
        self._activations = activations

    @classmethod
    def read(cls, net: Any, link: Link) -> Network | None:
        """Return the network; None for one of other parts."""
        layers = net._modules.get("layers")
        if type(layers) is not torch.nn.ModuleList or len(layers) < 2:
            return None
        first, *blocks, last = layers
        if type(first) is not torch.nn.Linear or type(last) is not torch.nn.Linear:
            return None
        activations = []
        for block in blocks:
            inner: Any = block._modules.get("block")
            if not is_of(block, f"{_NETS}AdaMLPBlock") or type(inner) is not torch.nn.Sequential:
                return None
            kinds = [type(part) for part in inner]
            if len(kinds) != 3 or kinds[::2] != [torch.nn.Linear] * 2:
                return None
            if (activation := _activation(inner[1], link)) is None:
                return None
            activations.append(activation)
        return cls(net, link, activations)

    def hidden(self, given: Dual, condition: Tensor, time: Tensor) -> Dual:
        """Return what the last layer reads."""
        net, first = self.net, self.net.layers[0]
        rows = condition.reshape(-1, condition.shape[-1])
        both = net.global_mlp(time.expand(len(rows)), x_emb=rows)
        both = both.reshape(*condition.shape[:-1], both.shape[-1])
        found = given.linear(first.weight, first.bias)
        for block, activation in zip(net.layers[1:-1], self._activations, strict=True):
            shift, scale, gate = block.ada_ln(both).chunk(3, -1)
            into, _, out = block.block
            inner = found.scaled(scale + 1).shifted(shift).linear(into.weight, into.bias)
            inner = inner.activated(activation).linear(out.weight, out.bias)
            found = found.plus(inner.scaled(gate + 1))
        return found

    @property
    def last(self) -> Any:
        return self.net.layers[-1]


def network_of(net: object, link: Link) -> Network | None:
    """Return a network, after noting all its parts; None for one that is not known."""
    if is_of(net, f"{_NETS}VectorFieldMLP"):
        return _Plain.read(net, link)
    return _Adaptive.read(net, link) if is_of(net, f"{_NETS}VectorFieldAdaMLP") else None


def _activation(module: torch.nn.Module | None, link: Link) -> str | None:
    """Return the name of an activation, after noting it; None for one that is not known, or not in float64."""
    name = activation_name([module], link)
    return name if link.in_float64 else None
