"""Functions of the user's that are called at each step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Callbacks", "callbacks_of"]

Callback = Callable[[Tensor, Any, Tensor], Any]
NAMES = ("callback_step", "callback_accept_step", "callback_reject_step")


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a field, called with ``(t, y, dt)`` of each step, where ``y`` is the state at its start.

    Args:
        begin: called before a step is tried.
        accept: called after an accepted step.
        reject: called after a rejected step.
        unpack: turns packed states into the user's.
    """

    begin: Callback | None
    accept: Callback | None
    reject: Callback | None
    unpack: Callable[[Tensor], Any]

    def _call(self, callback: Callback | None, t: float, y: Tensor, dt: float) -> None:
        if callback is not None:
            time, size = (torch.tensor(v, dtype=torch.float64) for v in (t, abs(dt)))
            callback(time, self.unpack(y), size)

    def started(self, t: float, y: Tensor, dt: float) -> None:
        """Report that a step is tried."""
        self._call(self.begin, t, y, dt)

    def decided(self, accepted: bool, t: float, y: Tensor, dt: float) -> None:
        """Report whether it was accepted."""
        self._call(self.accept if accepted else self.reject, t, y, dt)


def callbacks_of(
    func: Any, unpack: Callable[[Tensor], Any], allowed: int, backward: bool = False
) -> Callbacks | None:
    """Return the callbacks that a field has as attributes, None without any.

    Args:
        func: the user's field.
        unpack: turns packed states into what callbacks are given.
        allowed: how many of :data:`NAMES`, the first ones, the solver calls; a warning names the others.
        backward: look for the callbacks of the backward solve, whose names end with ``_adjoint``.
    """
    names = [name + "_adjoint" for name in NAMES] if backward else list(NAMES)
    methods = [getattr(func, name, None) for name in names]
    if methods == [None, None, None]:
        return None
    unused = [n for i, n in enumerate(names) if i >= allowed and methods[i] is not None]
    if unused:
        warnings.warn(
            f"this solve does not call {', '.join(unused)}: fixed steps call only {names[0]}, "
            "and adjoint='reversible' and control='sample' or 'device' call no callback",
            UserWarning,
            stacklevel=4,
        )
    begin, accept, reject = (f if i < allowed else None for i, f in enumerate(methods))
    if begin is accept is reject is None:
        return None
    return Callbacks(begin, accept, reject, unpack)
