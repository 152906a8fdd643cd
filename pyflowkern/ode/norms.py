"""Norms of the error of a step over what is allowed: one number for a state, or one for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.ode.packing import Packing

__all__ = ["NORMS", "MaxSample", "Norm", "Rms", "norm_of"]

Norm = Callable[[Tensor], Tensor]

#: Names of norms: the root of the mean square of everything, the largest of any sample, the largest number.
NORMS = ("rms", "max_sample", "max")

_PARTS, _ROW = 32768, 4096


def rms(r: Tensor) -> Tensor:
    """Root of the mean square of everything; 0 of nothing."""
    return _size(r.reshape(-1)) * (1 / math.sqrt(max(r.numel(), 1)))


def _size(r: Tensor) -> Tensor:
    """Euclidean norm, in an order of summation that does not depend on the number of threads.

    PyTorch divides the sum of a whole tensor among threads from 32768 numbers on, but never the sum of a row.
    """
    if r.numel() <= _PARTS:
        whole: Tensor = torch.linalg.vector_norm(r)
        return whole
    rows = r.numel() // _ROW
    parts = torch.linalg.vector_norm(r[: rows * _ROW].view(rows, _ROW), dim=1)
    rest = torch.linalg.vector_norm(r[rows * _ROW :])
    return _size(torch.cat([parts, rest[None]]))


def rms_rows(r: Tensor) -> Tensor:
    """Root of the mean square of each row."""
    size: Tensor = torch.linalg.vector_norm(r, dim=-1)
    return size * (1 / math.sqrt(max(r.shape[-1], 1)))


class Rms:
    """The root of the mean square, of parts of the last axis the largest.

    Args:
        sizes: of the parts, beyond which nothing counts; none for the whole.
        rows: a norm for each row.
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
    """The largest root of the mean square of any sample, and of any entry of a tuple.

    The mean over a batch hides a few samples that are wrong: of 1000, one may err by 30 tolerances.

    Args:
        shapes: of the entries as they lie in the packed state, end to end; the first axis is the batch.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        self.rows = [shape[0] for shape in shapes]
        self.sizes = [math.prod(shape) for shape in shapes]

    def __call__(self, r: Tensor) -> Tensor:
        """Return the norm."""
        parts = r.reshape(-1).split(self.sizes) if len(self.sizes) > 1 else (r,)
        found = [
            rms_rows(p.reshape(n, -1)).amax()
            for p, n in zip(parts, self.rows, strict=True)
            if p.numel()
        ]
        if not found:
            return r.new_zeros(())
        return found[0] if len(found) == 1 else torch.stack(found).amax()


def largest(r: Tensor) -> Tensor:
    """Return the largest absolute value; 0 of nothing."""
    return r.abs().amax() if r.numel() else r.new_zeros(())


def largest_rows(r: Tensor) -> Tensor:
    """Return the largest absolute value of each row."""
    return r.abs().amax(-1) if r.shape[-1] else r.new_zeros(r.shape[:-1])


def norm_of(packing: Packing, norm: str | Callable[[Any], Tensor] | None) -> Norm:
    """Return the norm of a packed state.

    Args:
        packing: of the state.
        norm: one of :data:`NORMS`, a function of a state as the user sees it, or None for "rms".
    """
    if norm is not None and not isinstance(norm, str):
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
