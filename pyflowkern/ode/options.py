"""What a solver is told, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pyflowkern.ode.tableaus import Tableau

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """Settings of a solve; :func:`pyflowkern.ode.solve` documents them."""

    method: Tableau
    rtol: float | Tensor
    atol: float | Tensor
    norm: Callable[[Tensor], Tensor]
    adjoint: str
    checkpoint: bool
    seminorm: bool
    coupling: float
    step_size: float | None
    first_step: float | None
    min_step: float
    max_step: float
    max_steps: int
    per_sample: bool
    check_every: int
    torchdiffeq: bool
    dense: bool
    on_device: bool = False

    def __post_init__(self) -> None:
        choices = ("direct", "continuous", "reversible")
        if self.adjoint not in choices:
            raise ValueError(f"adjoint must be one of {choices}, got {self.adjoint!r}")
        for name in ("step_size", "first_step", "max_step", "min_step", "coupling"):
            value = getattr(self, name)
            optional = name in ("step_size", "first_step")
            if not (isinstance(value, (int, float)) or (value is None and optional)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        for name in ("step_size", "first_step", "max_step"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.min_step < math.inf:
            raise ValueError(f"min_step must be at least 0, got {self.min_step}")
        if not 0 < self.coupling <= 1:
            raise ValueError(f"coupling must be in (0, 1], got {self.coupling}")
        for name in ("max_steps", "check_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.per_sample:
            if not self.adaptive:
                raise ValueError(
                    "control='sample' needs a method with error weights and no step_size"
                )
            if self.adjoint != "direct" or self.torchdiffeq or self.dense or not self.checkpoint:
                raise ValueError(
                    "control='sample' goes with adjoint='direct' and checkpoint=True, without compat and dense"
                )
        if self.on_device:
            if not self.adaptive:
                raise ValueError(
                    "control='device' needs a method with error weights and no step_size"
                )
            if self.adjoint == "reversible" or self.torchdiffeq or not self.checkpoint:
                raise ValueError(
                    "control='device' goes with adjoint='direct' or 'continuous' and checkpoint=True, without compat"
                )
        if self.adjoint == "reversible" and (self.torchdiffeq or self.dense):
            raise ValueError("adjoint='reversible' goes without compat and dense")

    @property
    def adaptive(self) -> bool:
        """Whether the steps follow the error."""
        return self.method.error is not None and self.step_size is None
