"""Results that are used again while the tensors they were made from hold the same values."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pyflowkern._library import observed

__all__ = ["Kept"]

T = TypeVar("T")
_PLAIN = frozenset((Tensor, torch.nn.Parameter))

#: From so many elements comparing bytes pays for the call, where ``torch.equal`` compares numbers one by one.
_LARGE = 1024
_memcmp: Any = getattr(ctypes.pythonapi, "memcmp", None)
if _memcmp is not None:
    _memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    _memcmp.restype = ctypes.c_int
_Equal = Callable[[Tensor, Tensor], bool]


class Kept(Generic[T]):
    """One result, and copies of the tensors that it was made from.

    The tensors are compared with the copies at each call: no version counter tells of every write (``.data`` and fused
    optimizers do not count), and comparing small tensors costs a few microseconds.

    Nothing is kept, and every call makes its result, unless all tensors are plain ones on the CPU that need no gradient
    and no compiler, function transform or dispatch mode sees the calls: only then can they be compared without waiting
    for a device.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        #: The copies, each with how it is compared; the result; and whether it was made in inference mode: if so, it
        #: is used only there.
        self._kept: tuple[list[tuple[Tensor, _Equal]], T, bool] | None = None

    def get(self, tensors: Sequence[Tensor], make: Callable[..., T], *args: Any) -> T:
        """Return the kept result if ``tensors`` are what they were, else ``make(*args)``."""
        if observed():
            return make(*args)
        recorded = torch.is_grad_enabled()
        # a loop, and is_cpu: device.type takes half as long as a comparison
        for t in tensors:
            if type(t) not in _PLAIN or not t.is_cpu or (recorded and t.requires_grad):
                return make(*args)
        if self._kept is not None:
            pairs, result, inference = self._kept
            if len(pairs) == len(tensors):
                for t, (c, equal) in zip(tensors, pairs):  # noqa: B905  (checked before: this is run often)
                    if t.dtype != c.dtype or not equal(t, c):
                        break
                else:
                    if not inference or torch.is_inference_mode_enabled():
                        return result
        # copied first: a write from another thread during make() is then seen at the next call
        copies = [t.detach().clone() for t in tensors]
        result = make(*args)
        pairs = [(c, torch.equal if c.numel() < _LARGE else _equal_bytes) for c in copies]
        self._kept = pairs, result, torch.is_inference_mode_enabled()
        return result

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        """Copies and pickles start empty."""
        return Kept, ()


def _equal_bytes(t: Tensor, copy: Tensor) -> bool:
    """Whether two tensors of one dtype on the CPU are equal, number by number unless both are contiguous."""
    if _memcmp is None or not (
        t.shape == copy.shape and t.is_contiguous() and copy.is_contiguous()
    ):
        return torch.equal(t, copy)
    same: int = _memcmp(t.data_ptr(), copy.data_ptr(), t.nbytes)
    return same == 0
