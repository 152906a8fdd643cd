"""Conversion of states: the user's tensor or tuple, and the solvers' one contiguous float32 or float64 tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.ode.times import number

__all__ = ["Field", "Packing", "State", "check_allowed"]

State = Tensor | tuple[Tensor, ...]
Field = Callable[[Tensor, Tensor], Tensor]
_HALF = (torch.float16, torch.bfloat16)


class Packing:
    """Turns a state of the user's structure, shapes and dtypes into one tensor and back.

    A float32 or float64 tensor is used as it is.  The entries of a tuple are concatenated: flat, or along the second
    axis where each sample has its own steps.  Half precision is integrated in float32, and a complex number as two real
    ones, its real and its imaginary part.

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
        dtype = _real_dtype(entries[0])
        for e in entries[1:]:
            dtype = torch.promote_types(dtype, _real_dtype(e))
        self.dtype = torch.float32 if dtype in _HALF else dtype
        start = 1 if per_sample else 0
        self.sizes = [
            math.prod(shape[start:]) * (2 if kind.is_complex else 1)
            for shape, kind in zip(self.shapes, self.dtypes, strict=True)
        ]
        self._has_complex = any(kind.is_complex for kind in self.dtypes)
        self.trivial = not (self.is_tuple or per_sample) and self.dtypes[0] == self.dtype

    def pack(self, state: Any) -> Tensor:
        """Return a state or a result of the field as one tensor.

        Raises:
            TypeError: for another structure than that of the first state.
            ValueError: for another shape.
        """
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
        pairs = self._has_complex
        for e, shape in zip(entries, self.shapes, strict=True):
            pairs = pairs or e.is_complex()
            if e.shape != shape:
                raise ValueError(
                    f"func must return the shapes of y0, {[tuple(s) for s in self.shapes]}, "
                    f"got {[tuple(e.shape) for e in entries]}"
                )
        if pairs:
            entries = [_real(e, kind) for e, kind in zip(entries, self.dtypes, strict=True)]
        return self._joined(entries)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return real entries as one tensor."""
        if self.per_sample:
            rows = self.shapes[0][0]
            if len(parts) == 1:
                return parts[0].reshape(rows, self.sizes[0]).to(self.dtype)
            columns = [
                e.reshape(rows, n).to(self.dtype) for e, n in zip(parts, self.sizes, strict=True)
            ]
            return torch.cat(columns, 1)
        if not self.is_tuple:
            return parts_to(parts[0], self.dtype)
        return torch.cat([e.reshape(-1).to(self.dtype) for e in parts])

    def unpack(self, y: Tensor, lead: Sequence[int] = ()) -> Any:
        """Return the user's state from a packed one; ``lead`` are axes in front of those of the state."""
        if self.trivial:
            return y
        parts = y.split(self.sizes, -1) if self.is_tuple or self.per_sample else (y,)
        entries = tuple(
            _restored(p, (*lead, *shape), dtype)
            if dtype.is_complex
            else p.reshape((*lead, *shape)).to(dtype)
            for p, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        )
        return entries if self.is_tuple else entries[0]

    def tolerance(self, name: str, value: Any, device: torch.device) -> float | Tensor:
        """Return a tolerance as a number, or as a tensor that broadcasts with the packed state.

        Args:
            name: for messages.
            value: a number, a tensor that broadcasts with the state, or a sequence of these, one for each entry.
            device: of the state.
        """
        if type(value) is float and value >= 0:
            return value
        if self.is_tuple and isinstance(value, Tensor) and value.dim() > 0:
            value = tuple(value)
        several = isinstance(value, (tuple, list))
        if several and not (self.is_tuple and len(value) == len(self.sizes)):
            raise ValueError(f"{name} must be a number or one for each entry of a tuple y0")
        values = list(value) if several else [value]
        single = [_check_tolerance(name, v) for v in values]
        if not several and single[0]:
            return number(value)
        if several and all(single):
            numbers = zip(self.sizes, values, strict=True)
            return torch.cat([torch.full((n,), number(v), dtype=self.dtype, device=device)
                              for n, v in numbers])  # fmt: skip
        entries = [
            self._each(name, v, shape, kind, device)
            for v, shape, kind in zip(values, self.shapes, self.dtypes, strict=True)
        ]
        return self._joined(entries)

    def _each(
        self, name: str, value: Any, shape: torch.Size, kind: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return a tolerance for each element of an entry."""
        each = torch.as_tensor(value).detach().to(device, self.dtype)
        try:
            each = each.expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"{name} must broadcast to the shape of y0, {tuple(shape)}, got {tuple(each.shape)}"
            ) from error
        return each[..., None].expand(*shape, 2) if kind.is_complex else each


def check_allowed(rtol: float | Tensor, atol: float | Tensor) -> None:
    """Raise ValueError where both tolerances are zero, which no step can meet."""
    if isinstance(rtol, Tensor) or isinstance(atol, Tensor):
        none = bool(((torch.as_tensor(rtol) == 0) & (torch.as_tensor(atol) == 0)).any())
    else:
        none = rtol == 0 and atol == 0
    if none:
        raise ValueError(f"rtol and atol must not both be 0, got {rtol} and {atol}")


def _real_dtype(e: Tensor) -> torch.dtype:
    return e.dtype.to_real() if e.is_complex() else e.dtype  # which torch.compile cannot call


def _real(e: Tensor, kind: torch.dtype) -> Tensor:
    """Return an entry as real numbers, complex ones as pairs in a last axis of length 2."""
    if not kind.is_complex:
        if e.is_complex():
            raise TypeError(f"func must return {kind} where y0 has it, got {e.dtype}")
        return e
    if e.is_complex():
        return torch.view_as_real(e.resolve_conj())
    return torch.stack([e, torch.zeros_like(e)], -1)


def _restored(part: Tensor, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """Return a complex entry in the user's shape and dtype."""
    return torch.view_as_complex(part.reshape((*shape, 2)).contiguous()).to(kind)


def parts_to(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor of this dtype."""
    return t.to(dtype).contiguous()


def _check_tolerance(name: str, value: Any) -> bool:
    """Raise TypeError or ValueError for a wrong tolerance; return whether it is a single number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if isinstance(value, Tensor) and value.numel() != 1:
        if not bool((value >= 0).all()):
            raise ValueError(f"{name} must be at least 0, got {value}")
        return False
    if not number(value) >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return True


def _check_entries(entries: tuple[Any, ...], per_sample: bool) -> None:
    if not entries:
        raise ValueError("y0 must hold at least one tensor")
    for e in entries:
        if not isinstance(e, Tensor):
            raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {type(e).__name__}")
        if not (e.is_floating_point() or e.is_complex()):
            raise TypeError(f"y0 must be floating-point or complex, got {e.dtype}")
        if e.device != entries[0].device:
            raise ValueError("all entries of y0 must be on one device")
        if per_sample and (e.dim() < 1 or e.shape[0] != entries[0].shape[0]):
            raise ValueError(
                "control='sample' needs a batch axis of one length in every entry of y0, "
                f"got {[tuple(e.shape) for e in entries]}"
            )
