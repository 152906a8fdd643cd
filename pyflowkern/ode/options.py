"""The settings of a solve, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.checks import check_callable, check_flag
from pyflowkern.ode.callbacks import Callbacks
from pyflowkern.ode.norms import norm_of
from pyflowkern.ode.packing import Packing, check_allowed
from pyflowkern.ode.tableaus import Tableau, end_slope, tableau, torchdiffeq_dense

__all__ = ["Options", "name_from_torchdiffeq", "options_for"]

#: Default of ``max_steps``; with ``compat`` a number that only keeps the list of steps from filling the memory.
_MAX_STEPS, _NO_LIMIT = 10_000, 10_000_000

#: Settings that the backward solve may have different from the forward solve's.
_BACKWARD = frozenset(
    [
        "method",
        "rtol",
        "atol",
        "norm",
        "seminorm",
        "step_size",
        "first_step",
        "min_step",
        "max_step",
        "max_steps",
        "grid",
        "interp",
        "perturb",
    ]
)

#: torchdiffeq's names of methods that have another name here.
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
    grid: Callable[[Sequence[float]], Sequence[float]] | None = None
    interp: str = "linear"
    perturb: bool = False
    callbacks: Callbacks | None = None
    backward_callbacks: Callbacks | None = None
    backward: Options | None = None
    augmented_norm: Callable[..., Tensor] | None = None

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
        if self.interp not in ("linear", "cubic"):
            raise ValueError(f"interp must be 'linear' or 'cubic', got {self.interp!r}")
        if not isinstance(self.perturb, bool):
            raise TypeError(f"perturb must be a bool, got {type(self.perturb).__name__}")
        if self.grid is not None:
            check_callable("grid", self.grid)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.grid is not None and self.step_size is not None:
            raise ValueError("step_size and grid exclude each other")
        if self.perturb and (self.adaptive or self.adjoint == "reversible"):
            raise ValueError("perturb is for fixed steps, with adjoint='direct' or 'continuous'")
        if self.grid is not None and self.adjoint == "reversible":
            raise ValueError("grid goes with adjoint='direct' or 'continuous'")
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
        """Whether the error estimate chooses the steps."""
        return self.method.error is not None and self.step_size is None and self.grid is None

    @property
    def linear(self) -> bool:
        """Whether the output between two steps is on the straight line between them."""
        return not self.adaptive and self.interp == "linear"

    @property
    def perturbed(self) -> str:
        """Which ends of a step the field is evaluated beside: "", "end" or "both"."""
        if self.adaptive:
            return "end" if self.torchdiffeq else ""
        return "both" if self.perturb else ""


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
    backward: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Options:
    """Check the user's settings of a solve and return them for packed states.

    Args:
        packing: of the first state.
        device: of the first state.
        method: name or tableau; with ``compat`` torchdiffeq's name.
        rtol: relative tolerance, as the user gave it.
        atol: absolute tolerance, as the user gave it.
        norm: a name, or a function of a state in the user's structure.
        control: "batch", "sample" or "device".
        check_every: steps between two questions to the device whether the solve has ended; None for the default.
        dense: whether a dense output is wanted.
        compat: None or "torchdiffeq".
        max_steps: None for the default: 10,000, with ``compat`` ten million.
        backward: settings of the backward solve of ``adjoint="continuous"`` that differ.
        **settings: fields of :class:`Options`.
    """
    if compat not in (None, "torchdiffeq"):
        raise ValueError(f"compat must be None or 'torchdiffeq', got {compat!r}")
    if control not in ("batch", "device", "sample"):
        raise ValueError(f"control must be 'batch', 'device' or 'sample', got {control!r}")
    if not isinstance(backward, Mapping | None):
        raise TypeError(f"backward must be a dict of settings, got {type(backward).__name__}")
    check_flag("dense", dense)
    for name in ("checkpoint", "seminorm"):
        check_flag(name, settings.get(name, True))
    chosen = tableau(method if compat is None else name_from_torchdiffeq(method))
    if dense or chosen.error is not None or settings.get("interp") == "cubic":
        chosen = end_slope(chosen)
    if compat is not None:
        chosen = torchdiffeq_dense(chosen)
    if max_steps is None:
        max_steps = _MAX_STEPS if compat is None else _NO_LIMIT
    if check_every is None:
        check_every = 1 if device.type == "cpu" else 8
    back = None
    if backward is not None:
        back = _backward_options(
            packing, device, backward, method=method, rtol=rtol, atol=atol, norm=norm,
            control=control, check_every=check_every, compat=compat, **settings,
        )  # fmt: skip
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
        backward=back,
        **settings,
    )
    if options.adaptive:
        check_allowed(options.rtol, options.atol)
    return options


def _backward_options(
    packing: Packing, device: torch.device, changes: Mapping[str, Any], **settings: Any
) -> Options:
    """Return the settings of the backward solve: those of the forward solve with some changes."""
    unknown = sorted(changes.keys() - _BACKWARD)
    if unknown:
        raise ValueError(
            f"backward takes {', '.join(sorted(_BACKWARD))}, got {', '.join(unknown)}"
        )
    if "method" in changes or changes.keys() & {"step_size", "grid"}:
        settings |= {"step_size": None, "grid": None, "perturb": False, "interp": "linear"}
    augmented = changes.get("norm") if callable(changes.get("norm")) else None
    kept = {k: v for k, v in changes.items() if not (k == "norm" and augmented is not None)}
    made = options_for(packing, device, **(settings | {"first_step": None} | kept))
    if augmented is None:
        return made

    def norm(y: Tensor, adjoint: Tensor, *params: Tensor) -> Tensor:
        entries = [packing.unpack(v) for v in (y, adjoint)]
        parts = [p for e in entries for p in (e if packing.is_tuple else (e,))]
        return torch.as_tensor(augmented((y.new_zeros(()), *parts, *params)))

    return replace(made, augmented_norm=norm)


def name_from_torchdiffeq(method: str | Tableau) -> str | Tableau:
    """Return the name that a method of torchdiffeq has here."""
    return _TORCHDIFFEQ_NAMES.get(method, method) if isinstance(method, str) else method
