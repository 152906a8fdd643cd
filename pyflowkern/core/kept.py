"""Results that are used again while the tensors they were made from hold the same values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pyflowkern._library import transformed

__all__ = ["Kept", "may_keep"]

T = TypeVar("T")
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class Kept(Generic[T]):
    """One result, and copies of the tensors that it was made from.

    The tensors are compared with the copies at each call: no version counter tells of every write (``.data`` and fused
    optimizers do not count), and comparing small tensors costs a few microseconds.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        #: The copies, the result, and whether it was made in inference mode: if so, it is used only there.
        self._kept: tuple[list[Tensor], T, bool] | None = None

    def get(self, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """Return the kept result if ``tensors`` are what they were, else a new one; see :func:`may_keep`."""
        if self._kept is not None:
            copies, result, inference = self._kept
            if len(copies) == len(tensors):
                for t, c in zip(tensors, copies):  # noqa: B905  (checked before: this is run often)
                    if t.dtype != c.dtype or not torch.equal(t, c):
                        break
                else:
                    if not inference or torch.is_inference_mode_enabled():
                        return result
        # copied first: a write from another thread during make() is then seen at the next call
        copies = [t.detach().clone() for t in tensors]
        result = make()
        self._kept = copies, result, torch.is_inference_mode_enabled()
        return result

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        """Copies and pickles start empty."""
        return Kept, ()


def may_keep(tensors: Sequence[Tensor]) -> bool:
    """Whether a result of these tensors may be kept, and the tensors compared without waiting for a device.

    True for plain tensors on the CPU that need no gradient, while no compiler, function transform or dispatch mode
    sees the calls.
    """
    if torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack():
        return False
    recorded = torch.is_grad_enabled()
    # a loop, and is_cpu: device.type takes half as long as a comparison
    for t in tensors:  # noqa: SIM110
        if type(t) not in _PLAIN or not t.is_cpu or (recorded and t.requires_grad):
            return False
    return True
