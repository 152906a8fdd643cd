"""Results that are used again while the tensors they were made from hold the same values."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyflowkern._library import observed
from pyflowkern.core.dtypes import PLAIN_TENSORS

__all__ = ["Kept"]

T = TypeVar("T")

_memcmp: Any = getattr(ctypes.pythonapi, "memcmp", None)
if _memcmp is not None:
    _memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    _memcmp.restype = ctypes.c_int


class _Copy(NamedTuple):
    """A contiguous copy of a tensor, and what is compared of it."""

    values: Tensor
    dtype: torch.dtype
    shape: torch.Size
    address: int
    size: int

    @classmethod
    def of(cls, t: Tensor) -> _Copy:
        values = t.detach().clone(memory_format=torch.contiguous_format)
        return cls(values, t.dtype, t.shape, values.data_ptr(), values.nbytes)


class Kept(Generic[T]):
    """One result, and copies of the tensors that it was made from.

    The tensors are compared with the copies at each call, bit by bit, as -0.0 may give another result than 0.0: no
    version counter tells of every write (``.data`` and fused optimizers do not count), and comparing small tensors
    costs a few microseconds.

    Nothing is kept, and every call makes its result, unless all tensors are plain ones on the CPU that need no gradient
    and no compiler, function transform or dispatch mode sees the calls: only then can they be compared without waiting
    for a device.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        #: The copies, the result, and whether it was made in inference mode: if so, it is used only there.
        self._kept: tuple[list[_Copy], T, bool] | None = None

    def get(self, tensors: Sequence[Tensor], make: Callable[..., T], *args: Any) -> T:
        """Return the kept result if ``tensors`` are what they were, else ``make(*args)``."""
        if observed():
            return make(*args)
        recorded = torch.is_grad_enabled()
        # a loop, and is_cpu: device.type takes half as long as a comparison
        for t in tensors:
            if type(t) not in PLAIN_TENSORS or not t.is_cpu or (recorded and t.requires_grad):
                return make(*args)
        if self._kept is not None:
            copies, result, inference = self._kept
            if len(copies) == len(tensors):
                # without strict=, which takes time: the lengths are compared above
                for t, (values, dtype, shape, address, size) in zip(tensors, copies):  # noqa: B905
                    if t.dtype != dtype or t.shape != shape:
                        break
                    if not t.is_contiguous():
                        t = t.contiguous()
                    if _memcmp is None:
                        if not torch.equal(_bytes(t), _bytes(values)):
                            break
                    elif _memcmp(t.data_ptr(), address, size):
                        break
                else:
                    if not inference or torch.is_inference_mode_enabled():
                        return result
        # copied first: a write from another thread during make() is then seen at the next call
        copies = [_Copy.of(t) for t in tensors]
        result = make(*args)
        self._kept = copies, result, torch.is_inference_mode_enabled()
        return result

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        """Copies and pickles start empty."""
        return Kept, ()


def _bytes(t: Tensor) -> Tensor:
    """Return the bytes of a contiguous tensor."""
    return t.detach().reshape(-1).view(torch.uint8)
