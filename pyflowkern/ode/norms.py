"""Norms of the scaled error of a step (error over tolerance): one number for a state, or one for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.checks import check_callable
from pyflowkern.ode.packing import Packing

__all__ = ["NORMS", "MaxSample", "Norm", "Rms", "norm_of"]

Norm = Callable[[Tensor], Tensor]

#: Root mean square of the whole state; the largest root mean square over samples; the largest absolute value.
NORMS = ("rms", "max_sample", "max")

#: PyTorch sums larger tensors in parallel; the length of the rows into which those are divided here.
_SERIAL, _ROW = 32768, 4096


def rms(r: Tensor) -> Tensor:
    """Root mean square of all numbers; 0 for an empty tensor."""
    return _euclidean(r.reshape(-1)) * (1 / math.sqrt(max(r.numel(), 1)))


def _euclidean(r: Tensor) -> Tensor:
    """Euclidean norm, in an order of summation that does not depend on the number of threads.

    PyTorch divides the sum of a tensor among threads if it is large, but never the sum of a row.
    """
    if r.numel() <= _SERIAL:
        whole: Tensor = torch.linalg.vector_norm(r)
        return whole
    rows = r.numel() // _ROW
    parts = torch.linalg.vector_norm(r[: rows * _ROW].view(rows, _ROW), dim=1)
    rest = torch.linalg.vector_norm(r[rows * _ROW :])
    return _euclidean(torch.cat([parts, rest[None]]))


def rms_rows(r: Tensor) -> Tensor:
    """Root mean square of each row."""
    size: Tensor = torch.linalg.vector_norm(r, dim=-1)
    return size * (1 / math.sqrt(max(r.shape[-1], 1)))


class Rms:
    """Root mean square; with several segments of the last axis, the largest of theirs.

    Args:
        sizes: lengths of the segments; what lies beyond them does not count.  Empty: one segment, everything.
        rows: return a norm for each row.
    """

    def __init__(self, sizes: Sequence[int], rows: bool = False) -> None:
        self.sizes, self.rows = list(sizes), rows

    def __call__(self, r: Tensor) -> Tensor:
        """Return the norm."""
        one = rms_rows if self.rows else rms
        if not self.sizes:
            return one(r)
        parts = r[..., : sum(self.sizes)].split(self.sizes, -1)
        return torch.stack([one(part) for part in parts]).amax(0)


class MaxSample:
    """The largest root mean square over samples, and over the entries of a tuple.

    A mean over the batch would hide a few wrong samples: one of 1000 may be off by 30 tolerances.

    Args:
        shapes: of the entries, which the packed state holds end to end; the first axis is the batch.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        self.rows = [shape[0] for shape in shapes]
        self.sizes = [math.prod(shape) for shape in shapes]

    def __call__(self, r: Tensor) -> Tensor:
        """Return the norm."""
        parts = r.reshape(-1).split(self.sizes) if len(self.sizes) > 1 else (r,)
        norms = [
            rms_rows(p.reshape(n, -1)).amax()
            for p, n in zip(parts, self.rows, strict=True)
            if p.numel()
        ]
        if not norms:
            return r.new_zeros(())
        return norms[0] if len(norms) == 1 else torch.stack(norms).amax()


def largest(r: Tensor) -> Tensor:
    """Return the largest absolute value; 0 for an empty tensor."""
    return r.abs().amax() if r.numel() else r.new_zeros(())


def largest_rows(r: Tensor) -> Tensor:
    """Return the largest absolute value of each row; 0 for an empty one."""
    return r.abs().amax(-1) if r.shape[-1] else r.new_zeros(r.shape[:-1])


def norm_of(packing: Packing, norm: str | Callable[[Any], Tensor] | None) -> Norm:
    """Return a norm of packed states.

    Args:
        packing: of the state.
        norm: one of :data:`NORMS`, a function of a state in the user's structure, or None for "rms".
    """
    if norm is not None and not isinstance(norm, str):
        check_callable("norm", norm)
        user = norm
        return lambda r: user(packing.unpack(r))
    if norm is None:
        norm = "rms"
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS} or a function, got {norm!r}")
    if norm == "max":
        return largest_rows if packing.per_sample else largest
    if norm == "rms" or packing.per_sample:
        return Rms(packing.sizes if len(packing.sizes) > 1 else [], packing.per_sample)
    shapes = [
        (*shape, 2) if kind.is_complex else tuple(shape)
        for shape, kind in zip(packing.shapes, packing.dtypes, strict=True)
    ]
    if any(len(shape) == 0 for shape in packing.shapes) or len({s[0] for s in shapes}) > 1:
        raise ValueError(
            "norm='max_sample' needs a batch axis of one length in every entry of y0, "
            f"got {[tuple(s) for s in packing.shapes]}"
        )
    return MaxSample(shapes)
