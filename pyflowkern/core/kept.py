"""Results that are used again while the tensors they were made from hold the same values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pyflowkern._library import transformed

__all__ = ["Kept", "may_keep"]

T = TypeVar("T")


class Kept(Generic[T]):
    """One result, and copies of the tensors that it was made from.

    The tensors are compared with the copies at each call: no version counter tells of every write (``.data`` and fused
    optimizers do not count), and comparing small tensors costs a few microseconds.
    """

    __slots__ = ("_copies", "_result")

    def __init__(self) -> None:
        self._copies: list[Tensor] | None = None
        self._result: T | None = None

    def get(self, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """Return the kept result if ``tensors`` are what they were, else a new one; see :func:`may_keep`."""
        copies = self._copies
        if (
            copies is not None
            and self._result is not None
            and len(copies) == len(tensors)
            and all(
                t.dtype == c.dtype and torch.equal(t, c)
                for t, c in zip(tensors, copies, strict=True)
            )
        ):
            return self._result
        # copied first: a write from another thread during make() is then seen at the next call
        self._copies, copies = None, [t.detach().clone() for t in tensors]
        self._result = result = make()
        self._copies = copies
        return result

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        """Copies and pickles start empty."""
        return Kept, ()


def may_keep(tensors: Sequence[Tensor]) -> bool:
    """Whether a result of these tensors may be kept and they may be compared on the host without waiting.

    So on the CPU, for plain tensors, without gradients, and where nobody (a compiler, a function transform, a dispatch
    mode) watches the calls.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    if torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack():
        return False
    return all(t.device.type == "cpu" and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
