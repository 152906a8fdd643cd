"""Whether values and modes are still what steps of a chain followed from."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Holds", "InTraining"]

#: Numbers that are compared in a microsecond.
_SHORT = 64


class Holds:
    """Whether a buffer is still what steps followed from.

    Short ones on the CPU are compared at each call.  Others are where they are another tensor or were written to, as by
    load_state_dict: masks are as large as weights, and on a GPU a comparison waits.
    """

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self._module, self._name = module, name
        values = module._buffers[name]
        assert values is not None
        self._values = values.clone()
        self._always = values.is_cpu and values.numel() <= _SHORT
        self._seen = self._state(values)

    @staticmethod
    def _state(values: Tensor) -> tuple[int, int, int]:
        version = -1 if values.is_inference() else values._version
        return id(values), values.data_ptr(), version

    def __call__(self) -> bool:
        now = self._module._buffers.get(self._name)
        if now is None:
            return False
        if not self._always:
            state = self._state(now)
            if state == self._seen and state[2] >= 0:
                return True
            self._seen = state
        known = self._values
        if now.dtype == known.dtype and now.device == known.device and torch.equal(now, known):
            return True
        self._seen = 0, 0, -1
        return False


class InTraining:
    """Whether a module is in training, where it does something else than a chain."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __call__(self) -> bool:
        return self._module.training
