"""Masked networks in plain PyTorch: the values of their layers, and the inverse of a flow by passes of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyflowkern.ops.elements import ElementMap, apply_elements

__all__ = ["Apply", "Connection", "elementwise", "inverse_by_passes", "layer_values"]

#: Elements, their parameters and whether it is the inverse that is wanted; returns elements and ``log_det[N]``.
Apply = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


class Connection(NamedTuple):
    """What a layer reads and adds."""

    #: The layer that is read; -1 for the network's input.
    source: int
    #: Applied to what is read.
    activation: Callable[[Tensor], Tensor]
    #: The layer whose values are added, or None.
    residual: int | None
    gated: bool


def layer_values(
    x: Tensor,
    connections: Sequence[Connection],
    linear: Callable[[int, Tensor], Tensor],
    gates: Sequence[Tensor] = (),
    residual: Callable[[int, Tensor], Tensor] = lambda i, values: values,
) -> list[Tensor]:
    """Return the values of every layer, first to last.

    Args:
        x: the network's input ``[N, D]``.
        connections: of each layer.
        linear: ``(i, h)``, the masked product of layer ``i`` with what it reads, and its bias.
        gates: factors of the layers that are gated, in their order.
        residual: ``(i, values)``, the values that layer ``i`` adds in the order of its own units.
    """
    left = iter(gates)
    values: list[Tensor] = []
    for i, layer in enumerate(connections):
        value = linear(i, layer.activation(x if layer.source < 0 else values[layer.source]))
        if layer.gated:
            value = value * next(left)
        if layer.residual is not None:
            value = value + residual(i, values[layer.residual])
        values.append(value)
    return values


def inverse_by_passes(
    network: Callable[[Tensor], Tensor],
    z: Tensor,
    level: Tensor,
    levels: int,
    apply: Apply,
) -> tuple[Tensor, Tensor]:
    """Return ``x`` and the inverse's log-determinant: each pass finds the features of one level.

    Args:
        network: returns the parameters ``[N, D, P]`` of ``x`` ``[N, D]``.
        z: latent ``[N, D]``.
        level: level of each feature ``[D]``, from 0; its parameters depend on features of lower levels alone.
        levels: how many there are.
        apply: what the features went through: :func:`elementwise`.
    """
    x = torch.zeros_like(z)
    for t in range(levels):
        inverted, _ = apply(z, network(x), True)
        x = torch.where(level == t, inverted, x)
    return x, -apply(x, network(x), False)[1]


def elementwise(transform: ElementMap) -> Apply:
    """Return a map of elements as a function of elements, their parameters, and whether it is the inverse."""

    def apply(x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return apply_elements(x, params, transform, inverse=inverse, reference=True)

    return apply
