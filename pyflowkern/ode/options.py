"""What a solver is told, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyflowkern.ode.norms import norm_of
from pyflowkern.ode.packing import Packing, check_allowed
from pyflowkern.ode.tableaus import Tableau, end_slope, tableau, torchdiffeq_dense

__all__ = ["Options", "name_from_torchdiffeq", "options_for"]

#: Steps of a solve unless the user says more; with ``compat`` there is no limit but what a list of steps may hold.
_MAX_STEPS, _NO_LIMIT = 10_000, 10_000_000

#: What torchdiffeq calls methods that have another name here.
_TORCHDIFFEQ_NAMES = {"rk4": "rk4_38"}


@dataclass(frozen=True)
class Options:
    """Settings of a solve; :func:`pyflowkern.ode.solve` documents them."""

    method: Tableau
    rtol: float | Tensor
    atol: float | Tensor
    norm: Callable[[Tensor], Tensor]
    adjoint: str = "direct"
    checkpoint: bool = True
    seminorm: bool = True
    coupling: float = 0.99
    step_size: float | None = None
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_steps: int = 10_000
    per_sample: bool = False
    on_device: bool = False
    check_every: int = 1
    torchdiffeq: bool = False
    dense: bool = False

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


def options_for(
    packing: Packing,
    device: torch.device,
    *,
    method: str | Tableau,
    rtol: Any,
    atol: Any,
    norm: str | Callable[[Any], Tensor] | None = None,
    control: str = "batch",
    check_every: int | None = None,
    dense: bool = False,
    compat: str | None = None,
    max_steps: int | None = None,
    **settings: Any,
) -> Options:
    """Return the settings of a solve, checked, in the terms of packed states.

    Args:
        packing: of the first state.
        device: of the first state.
        method: name or tableau; with ``compat`` a name of torchdiffeq's.
        rtol: relative tolerance, as the user gave it.
        atol: absolute tolerance, as the user gave it.
        norm: a name, or a function of a state as the user sees it.
        control: who decides about steps.
        check_every: rounds between two looks at the device; None for the default.
        dense: whether the state between steps will be asked for.
        compat: None or "torchdiffeq".
        max_steps: None for the default: 10,000, or no limit where torchdiffeq has none.
        **settings: fields of :class:`Options`.
    """
    if compat not in (None, "torchdiffeq"):
        raise ValueError(f"compat must be None or 'torchdiffeq', got {compat!r}")
    if control not in ("batch", "device", "sample"):
        raise ValueError(f"control must be 'batch', 'device' or 'sample', got {control!r}")
    chosen = tableau(method if compat is None else name_from_torchdiffeq(method))
    if dense or chosen.error is not None:
        chosen = end_slope(chosen)
    if compat is not None:
        chosen = torchdiffeq_dense(chosen)
    if max_steps is None:
        max_steps = _MAX_STEPS if compat is None else _NO_LIMIT
    if check_every is None:
        check_every = 1 if device.type == "cpu" else 8
    options = Options(
        method=chosen,
        rtol=packing.tolerance("rtol", rtol, device),
        atol=packing.tolerance("atol", atol, device),
        norm=norm_of(packing, norm),
        per_sample=control == "sample",
        on_device=control == "device",
        check_every=check_every,
        torchdiffeq=compat is not None,
        dense=dense,
        max_steps=max_steps,
        **settings,
    )
    if options.adaptive:
        check_allowed(options.rtol, options.atol)
    return options


def name_from_torchdiffeq(method: str | Tableau) -> str | Tableau:
    """Return the name that a method of torchdiffeq has here."""
    return _TORCHDIFFEQ_NAMES.get(method, method) if isinstance(method, str) else method
