"""The last layers of conditioners, where a new layer's start is decided."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern.nn.conditioners import NetworkBase, PeriodicInput

__all__ = ["last_layer", "start_at"]


def start_at(conditioner: torch.nn.Module, values: Tensor) -> None:
    """Make a new conditioner of this package return ``values`` on its channel axis; do nothing to others."""
    if isinstance(conditioner, PeriodicInput):
        start_at(conditioner.net, values)
    elif (last := last_layer(conditioner)) is not None:
        with torch.no_grad():
            last.bias.copy_(values)  # type: ignore[operator]


def last_layer(conditioner: torch.nn.Module) -> torch.nn.Module | None:
    """Return the layer that makes the output of a network of this package; None for others."""
    if not isinstance(conditioner, NetworkBase):
        return None
    last = conditioner.last
    while isinstance(last, torch.nn.Sequential):
        last = last[-1]
    return last
