"""The tensors of a plan of entropic optimal transport."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PlanTensors"]


class PlanTensors(NamedTuple):
    """Points ``x`` ``[B, n, d]`` and ``y`` ``[B, m, d]``, their masses ``a``, ``b`` and potentials ``f``, ``g``."""

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    f: Tensor
    g: Tensor

    def transposed(self) -> PlanTensors:
        """Return the plan from ``y`` to ``x``."""
        return PlanTensors(self.y, self.x, self.b, self.a, self.g, self.f)

    def constants(self) -> PlanTensors:
        """Return them without gradient, the masses in float64."""
        x, y, a, b, f, g = (t.detach() for t in self)
        return PlanTensors(x, y, a.double(), b.double(), f, g)

    def per_mass(self) -> PlanTensors:
        """Return the plan whose rows are divided by the masses of ``x``, also where these are zero."""
        return self._replace(a=torch.ones_like(self.a))
