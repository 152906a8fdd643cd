"""Whether values and modes are still what steps of a chain followed from."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from pyflowkern.nn.links import Link

__all__ = ["Holds", "InTraining", "is_fixed"]


class Holds:
    """Whether a buffer, or a parameter that never learns, is still what steps followed from.

    On the CPU all of it is compared at each call, since writes through ``.data`` leave no trace.  The library itself
    reads it at each call, and does more with it.  On a GPU, where a comparison would wait, it is compared where it is
    another tensor or was written to, as by load_state_dict.
    """

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self._home = module._parameters if name in module._parameters else module._buffers
        self._name = name
        values = self._home[name]
        assert values is not None
        self._values = values.detach().clone()
        self._seen = _seen(values)

    def __call__(self) -> bool:
        now = self._home.get(self._name)
        if now is None:
            return False
        if self._seen.is_still(now):
            return True
        known = self._values
        if now.dtype == known.dtype and now.device == known.device and torch.equal(now, known):
            self._seen = _seen(now)
            return True
        return False


class _Seen:
    """A tensor whose values were compared.

    The alias keeps its memory: while it lives, no other tensor has that address.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.alias = tensor, tensor.detach()
        self.address = tensor.data_ptr()

    def is_still(self, now: Tensor) -> bool:
        """Whether this is the same tensor with the same memory, and nothing has written to it."""
        return now is self.tensor and now.data_ptr() == self.address and self._unwritten(now)

    def _unwritten(self, now: Tensor) -> bool:
        raise NotImplementedError


class _Memory(_Seen):
    """One whose memory is looked at: the bytes of it, for which Python needs a fraction of a microsecond."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        size = tensor.numel() * tensor.element_size()
        self._now: Any = (ctypes.c_char * size).from_address(self.address) if size else b""
        self._known = bytearray(self._now)

    def _unwritten(self, now: Tensor) -> bool:
        same: bool = self._known == self._now
        return same


class _Versions(_Seen):
    """One that is asked how often it was written to."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self._version = -1 if tensor.is_inference() else tensor._version

    def _unwritten(self, now: Tensor) -> bool:
        return self._version >= 0 and now._version == self._version


class _Unknown(_Seen):
    """One whose memory has gaps, of which nothing is known before it is compared."""

    def _unwritten(self, now: Tensor) -> bool:
        return False


def _seen(tensor: Tensor) -> _Seen:
    if not tensor.is_cpu:
        return _Versions(tensor)
    return _Memory(tensor) if tensor.is_contiguous() else _Unknown(tensor)


class InTraining:
    """Whether a module is in training, where it does something else than a chain."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __call__(self) -> bool:
        return self._module.training


def is_fixed(link: Link, module: torch.nn.Module, name: str, values: Tensor) -> bool:
    """Whether a buffer has the values that steps take for granted, such as those of a unit matrix; it is noted then."""
    now = module._buffers.get(name)
    if now is None or now.shape != values.shape or not torch.equal(now, values.to(now)):
        return False
    link.holds.append(Holds(module, name))
    return True
