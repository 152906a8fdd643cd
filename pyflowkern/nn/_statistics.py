"""Layers whose buffers are statistics of data, which half precision must not round."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyflowkern.core.dtypes import accumulation_dtype
from pyflowkern.nn._base import Bijection

__all__ = ["OfStatistics"]


class OfStatistics(Bijection):
    """A layer whose buffers stay float32 where its parameters become half, and counts in any case."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OfStatistics:
        before = {k: t for k, t in self._buffers.items() if t is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            # compilers lose additions to a float64 number without axes
            wanted = old.dtype if old.dim() == 0 else accumulation_dtype(new.dtype)  # type: ignore[union-attr]
            if new is not None and new.dtype != wanted:
                self._buffers[name] = old.to(new.device, wanted)
        return self
