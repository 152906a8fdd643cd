"""Whether values and modes are still what steps of a chain followed from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Holds", "InTraining"]

#: Numbers that are compared in a microsecond.
_SHORT = 64


class Holds:
    """Whether a buffer, or a parameter that never learns, is still what steps followed from.

    Short ones on the CPU are compared at each call.  Others are where they are another tensor or were written to, as by
    load_state_dict: masks are as large as weights, and on a GPU a comparison waits.

    Args:
        module: the owner.
        name: of the tensor.
        short: numbers up to which it is short.
    """

    def __init__(self, module: torch.nn.Module, name: str, short: int = _SHORT) -> None:
        self._home = module._parameters if name in module._parameters else module._buffers
        self._name = name
        values = self._home[name]
        assert values is not None
        self._values = values.detach().clone()
        self._always = values.is_cpu and values.numel() <= short
        self._seen = _Seen.of(values)

    def __call__(self) -> bool:
        now = self._home.get(self._name)
        if now is None:
            return False
        if not self._always and self._seen.is_still(now):
            return True
        known = self._values
        if now.dtype == known.dtype and now.device == known.device and torch.equal(now, known):
            self._seen = _Seen.of(now)
            return True
        return False


class _Seen(NamedTuple):
    """A tensor whose values were compared.

    The alias keeps its memory: while it lives, no other tensor has that address.
    """

    tensor: Tensor
    alias: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        version = -1 if tensor.is_inference() else tensor._version
        return cls(tensor, tensor.detach(), version)

    def is_still(self, now: Tensor) -> bool:
        """Whether this is the same tensor with the same memory, to which nothing that counts versions has written."""
        return (
            now is self.tensor
            and now.data_ptr() == self.alias.data_ptr()
            and self.version >= 0
            and now._version == self.version
        )


class InTraining:
    """Whether a module is in training, where it does something else than a chain."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __call__(self) -> bool:
        return self._module.training
