"""Checks of the output times."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["joined", "number", "output_times"]


def number(value: Tensor | float) -> float:
    """Return a number that may come as a tensor; no gradient passes."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def joined(t: Tensor | Sequence[float]) -> Tensor | Sequence[float]:
    """Return times as one tensor where one of a sequence requires a gradient, so that it is not lost."""
    if isinstance(t, (list, tuple)):
        for v in t:
            if isinstance(v, Tensor) and v.requires_grad:
                numbers = (torch.as_tensor(w, dtype=torch.float64, device=v.device) for w in t)
                return torch.stack([w.reshape(()) for w in numbers])
    return t


def output_times(t: Tensor | Sequence[float], y0: Tensor, per_sample: bool) -> tuple[Any, Tensor]:
    """Return the times as the loops take them (a list of numbers, or ``[T, N]`` per sample), and as a float64 tensor.

    Raises:
        TypeError: for times that are not floating-point numbers.
        ValueError: for times of a wrong shape, or not finite and monotone.
    """
    times: list[float] | None = None
    if isinstance(t, Tensor):
        if not t.is_floating_point():
            raise TypeError(f"t must be floating-point, got {t.dtype}")
        ts = t.detach().to(torch.float64)
    else:
        try:
            times = [number(v) for v in t]
            ts = torch.tensor(times, dtype=torch.float64, device="cpu")
        except TypeError as error:
            raise TypeError(f"t must be a tensor or a sequence of numbers, got {t!r}") from error
    if ts.dim() != 1 and not (per_sample and ts.dim() == 2):
        raise ValueError(f"t must have one axis, got shape {tuple(ts.shape)}")
    if ts.shape[0] < 1:
        raise ValueError("t must hold at least one time")
    if per_sample:
        ts = ts.to(y0.device)
        columns = ts if ts.dim() == 2 else ts[:, None].expand(-1, y0.shape[0])
        if columns.shape[1] != y0.shape[0]:
            raise ValueError(f"t must be [T] or [T, {y0.shape[0]}], got {tuple(ts.shape)}")
        gaps = columns.diff(dim=0)
        fine = torch.isfinite(columns).all() & ((gaps >= 0).all(0) | (gaps <= 0).all(0)).all()
        if not bool(fine):
            raise ValueError("t must be finite and monotone for each sample")
        return columns.contiguous(), ts
    if times is None:  # numbers stay the user's own: torch.export then knows their values
        times = ts.tolist()
    later = times[1:]
    monotone = all(map(operator.le, times, later)) or all(map(operator.ge, times, later))
    if not (monotone and all(map(math.isfinite, times))):
        raise ValueError(f"t must be finite and monotone, got {times}")
    if max(abs(times[0]), abs(times[-1])) > torch.finfo(y0.dtype).max:
        raise ValueError(f"t must be in the range of the state's {y0.dtype}, got {times}")
    return times, ts
