"""States as the solvers see them: one contiguous tensor of float32 or float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Field", "Packing", "State"]

State = Tensor | tuple[Tensor, ...]
Field = Callable[[Tensor, Tensor], Tensor]
_HALF = (torch.float16, torch.bfloat16)


class Packing:
    """Turns states of a user's shapes and dtypes into one tensor and back.

    A tensor of float32 or float64 stays what it is.  The entries of a tuple are laid end to end, or side by side
    after the batch axis where each sample has its own steps; half precision is integrated in float32.

    Args:
        state: an example.
        per_sample: keep the batch axis: ``[N, F]``.
    """

    def __init__(self, state: State, per_sample: bool) -> None:
        self.is_tuple = isinstance(state, tuple)
        entries = state if isinstance(state, tuple) else (state,)
        _check_entries(entries, per_sample)
        self.per_sample = per_sample
        self.shapes = [e.shape for e in entries]
        self.dtypes = [e.dtype for e in entries]
        dtype = entries[0].dtype
        for e in entries[1:]:
            dtype = torch.promote_types(dtype, e.dtype)
        self.dtype = torch.float32 if dtype in _HALF else dtype
        start = 1 if per_sample else 0
        self.sizes = [shape[start:].numel() for shape in self.shapes]
        self.trivial = not (self.is_tuple or per_sample) and dtype == self.dtype

    def pack(self, state: Any) -> Tensor:
        """Return one tensor; raise where the structure is not that of the first state."""
        if self.trivial:
            if not isinstance(state, Tensor):
                raise TypeError(f"func must return a tensor, got {type(state).__name__}")
            if state.shape != self.shapes[0]:
                raise ValueError(
                    f"func must return the shape of y0, {tuple(self.shapes[0])}, "
                    f"got {tuple(state.shape)}"
                )
            return state
        entries = state if self.is_tuple else (state,)
        if not isinstance(entries, (tuple, list)) or len(entries) != len(self.shapes):
            raise TypeError(f"func must return a tuple of {len(self.shapes)} tensors")
        for e, shape in zip(entries, self.shapes, strict=True):
            if e.shape != shape:
                raise ValueError(
                    f"func must return the shapes of y0, {[tuple(s) for s in self.shapes]}, "
                    f"got {[tuple(e.shape) for e in entries]}"
                )
        if self.per_sample:
            rows = self.shapes[0][0]
            parts = [
                e.reshape(rows, n).to(self.dtype) for e, n in zip(entries, self.sizes, strict=True)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if not self.is_tuple:
            return parts_to(entries[0], self.dtype)
        return torch.cat([e.reshape(-1).to(self.dtype) for e in entries])

    def unpack(self, y: Tensor, lead: Sequence[int] = ()) -> Any:
        """Return the state of ``y``; ``lead`` are axes before those of the state."""
        if self.trivial:
            return y
        parts = y.split(self.sizes, -1) if self.is_tuple or self.per_sample else (y,)
        entries = tuple(
            p.reshape(*lead, *shape).to(dtype)
            for p, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        )
        return entries if self.is_tuple else entries[0]

    def field(self, func: Callable[..., Any]) -> Field:
        """Return ``func`` as a function of a packed state."""
        if self.trivial:
            return lambda t, y: self.pack(func(t, y))
        return lambda t, y: self.pack(func(t, self.unpack(y)))

    def check_allowed(self, rtol: Any, atol: Any) -> None:
        """Raise where no error at all is allowed, which no step could keep to."""
        many = [v if isinstance(v, (tuple, list)) else [v] * len(self.sizes) for v in (rtol, atol)]
        if any(float(r) == 0 and float(a) == 0 for r, a in zip(*many, strict=True)):
            raise ValueError(f"rtol and atol must not both be 0, got {rtol} and {atol}")

    def tolerance(self, name: str, value: Any, device: torch.device) -> float | Tensor:
        """Return a tolerance as a number, or as a tensor shaped like the packed state's last axis."""
        if isinstance(value, (tuple, list)):
            if not self.is_tuple or len(value) != len(self.sizes):
                raise ValueError(f"{name} must be a number or one for each entry of a tuple y0")
            _check_tolerances(name, value)
            parts = [
                torch.full((n,), float(v), dtype=self.dtype, device=device)
                for n, v in zip(self.sizes, value, strict=True)
            ]
            return torch.cat(parts)
        _check_tolerances(name, (value,))
        return float(value)


def parts_to(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor of this dtype."""
    return t.to(dtype).contiguous()


def _check_tolerances(name: str, values: Sequence[Any]) -> None:
    for v in values:
        if isinstance(v, bool) or not (isinstance(v, (int, float, Tensor))):
            raise TypeError(f"{name} must be a number, got {type(v).__name__}")
        if isinstance(v, Tensor) and v.numel() != 1:
            raise ValueError(f"{name} must be a number, got a tensor of shape {tuple(v.shape)}")
        if not float(v) >= 0:
            raise ValueError(f"{name} must be at least 0, got {v}")


def _check_entries(entries: tuple[Any, ...], per_sample: bool) -> None:
    if not entries:
        raise ValueError("y0 must hold at least one tensor")
    for e in entries:
        if not isinstance(e, Tensor):
            raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {type(e).__name__}")
        if not e.is_floating_point():
            raise TypeError(f"y0 must be floating-point, got {e.dtype}")
        if e.device != entries[0].device:
            raise ValueError("all entries of y0 must be on one device")
        if per_sample and (e.dim() < 1 or e.shape[0] != entries[0].shape[0]):
            raise ValueError(
                "control='sample' needs a batch axis of one length in every entry of y0, "
                f"got {[tuple(e.shape) for e in entries]}"
            )
