"""Residual blocks, and their gates: gated linear units of a context, as Durkan et al. (2019) have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyflowkern.core.checks import check_flag

__all__ = ["gate_layers", "gate_values", "linear_layer", "residual_block", "run_blocks"]


def residual_block(
    first: torch.nn.Module, second: torch.nn.Module, activation: Callable[[], torch.nn.Module]
) -> torch.nn.Module:
    """Return what a block adds to its input: two layers, each behind an activation."""
    return torch.nn.Sequential(activation(), first, activation(), second)


def gate_layers(
    gated: bool, context_features: int, hidden: int, blocks: int
) -> torch.nn.ModuleList | None:
    """Return the layers of the gates of residual blocks; None for none.

    Raises:
        ValueError: for gates that have no context to depend on.
    """
    if not check_flag("gated", gated):
        return None
    if not context_features:
        raise ValueError("gated=True needs context_features, got 0")
    return torch.nn.ModuleList(torch.nn.Linear(context_features, hidden) for _ in range(blocks))


def gate_values(network: torch.nn.Module, context: Tensor | None) -> list[Tensor]:
    """Return the gate of each block ``[N, hidden]``; none for a network without gates."""
    layers = network._modules.get("gates")  # networks of older files lack it
    if layers is None:
        return []
    assert context is not None  # checked where it is added
    return [torch.sigmoid(layer(context)) for layer in layers]  # type: ignore[attr-defined]


def run_blocks(network: torch.nn.Module, h: Tensor, context: Tensor | None) -> Tensor:
    """Return ``h`` after the network's residual blocks."""
    blocks: torch.nn.ModuleList = network.blocks  # type: ignore[assignment]
    gates = gate_values(network, context)
    for i, block in enumerate(blocks):
        h = h + (block(h) * gates[i] if gates else block(h))
    return h


def linear_layer(inputs: int, outputs: int) -> torch.nn.Linear:
    """Return a layer; without inputs, of which torch warns, its output is its bias."""
    layer = torch.nn.Linear(max(inputs, 1), outputs)
    if not inputs:
        layer.weight = torch.nn.Parameter(layer.weight.detach()[:, :0].clone())
        layer.in_features = 0
    return layer
