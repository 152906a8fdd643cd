"""The user's function as a field of packed states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyflowkern.ode.packing import Field, Packing

__all__ = ["packed_field"]


def packed_field(func: Callable[..., Any], packing: Packing) -> Field:
    """Return ``func`` as a function of a packed state.

    Solvers evaluate fields under ``no_grad``.  A field that calls autograd itself (forces from an energy, for example)
    fails there, because its state requires no gradient.  The first such failure is caught: that evaluation and all
    later ones then run with gradients enabled, on a state that requires one.

    Args:
        func: ``(t, y) -> dy/dt`` of the user's states.
        packing: of these states.
    """
    pack, unpack, trivial = packing.pack, packing.unpack, packing.trivial
    shape = packing.shapes[0]
    differentiates = False

    def recorded(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            return pack(func(t, unpack(leaf))).detach()

    def evaluate(t: Tensor, y: Tensor) -> Tensor:
        nonlocal differentiates
        if differentiates and not torch.is_grad_enabled():
            return recorded(t, y)
        try:
            if not trivial:
                return pack(func(t, unpack(y)))
            slope = func(t, y)
            return slope if type(slope) is Tensor and slope.shape == shape else pack(slope)
        except RuntimeError as error:
            if torch.is_grad_enabled() or "does not require grad" not in str(error):
                raise
        slope = recorded(t, y)
        differentiates = True
        return slope

    return evaluate
