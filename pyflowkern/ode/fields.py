"""Fields that differentiate: forces from energies, scores from densities."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowkern.ode.packing import Field

__all__ = ["recording_where_needed"]


def recording_where_needed(field: Field) -> Field:
    """Return a field that works while nothing is recorded even if it calls ``torch.autograd.grad`` itself.

    Solvers evaluate fields without a graph.  Where a field then finds that its state does not require a gradient, it is
    evaluated with one, here and from then on.

    Args:
        field: ``(t, y) -> dy/dt``.
    """
    needed = False

    def evaluate(t: Tensor, y: Tensor) -> Tensor:
        nonlocal needed
        if needed and not torch.is_grad_enabled():
            return recorded(t, y)
        try:
            return field(t, y)
        except RuntimeError as error:
            if torch.is_grad_enabled() or "does not require grad" not in str(error):
                raise
        slope = recorded(t, y)
        needed = True
        return slope

    def recorded(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            return field(t, y.detach().requires_grad_()).detach()

    return evaluate
