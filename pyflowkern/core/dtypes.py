"""Dtypes and memory layouts of results, and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "PLAIN_TENSORS",
    "accumulation_dtype",
    "autocasts",
    "cast",
    "empty_canonical",
    "full_precision",
    "sum_per_sample",
]


#: The classes of tensors that are memory and nothing else: no quantized or distributed ones, none of a tracer.
PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of log-dets and parameter sums: float32 at least, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``t.to(dtype)``, without the call where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def sum_per_sample(t: Tensor) -> Tensor:
    """Sum everything but the batch axis, ``[N, ...] -> [N]``, in the accumulation dtype."""
    return t.to(accumulation_dtype(t.dtype)).flatten(1).sum(1) if t.dim() > 1 else t


def empty_canonical(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty tensor as a kernel would: channels_last if ``t`` is, else contiguous."""
    if not t.is_contiguous():
        for rank, fmt in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if t.dim() == rank and t.is_contiguous(memory_format=fmt):
                return torch.empty_like(t, dtype=dtype, memory_format=fmt)
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def autocasts(t: Tensor) -> bool:
    """Whether autocast is on where ``t`` is; there is none on the meta device, and asking is an error."""
    return not t.is_meta and torch.is_autocast_enabled(t.device.type)


def full_precision(t: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off where it is on: a matrix product would round to half behind our back."""
    if autocasts(t):
        return torch.autocast(t.device.type, enabled=False)
    return nullcontext()
