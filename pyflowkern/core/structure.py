"""Masks and permutations of layers, which nothing that changes a model's state may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.kept import Kept

__all__ = ["HasPermutations", "Structure", "structure_device"]

#: Dtype of saved permutations: the average of equal floats is exact, that of integers may be rounded down.
_SAVED = torch.float32


class Structure:
    """A tensor that follows from a layer's arguments, copied to each device at its first use there.

    It is not a buffer, so nothing that averages, casts, empties or loads a model's state changes it.

    Args:
        value: the tensor.
    """

    def __init__(self, value: Tensor) -> None:
        with torch.inference_mode(False):  # calls that are differentiated may use it later
            self.host = value.detach().clone().cpu()
        self._on_device = {self.host.device: self.host}

    def on(self, device: torch.device) -> Tensor:
        """Return the tensor on a device."""
        if device not in self._on_device:
            with torch.inference_mode(False):
                self._on_device[device] = self.host.to(device)
        return self._on_device[device]

    def __getstate__(self) -> Tensor:
        return self.host

    def __setstate__(self, host: Tensor) -> None:
        self.host, self._on_device = host, {host.device: host}


def structure_device() -> torch.device | None:
    """Return None for the default device, or the host where that is meta: a mask needs its values there, too."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else None


class HasPermutations(torch.nn.Module):
    """A module with permutations among its state.

    They are saved as float32 buffers.  ``torch.optim.swa_utils.AveragedModel(use_buffers=True)`` averages all buffers,
    and averages of equal integers are rounded down to others.
    """

    def register_permutation(self, name: str, order: Tensor) -> None:
        """Register ``order`` ``[C]`` as a buffer; :meth:`permutation_of` returns it."""
        self.__dict__.setdefault("_permutations", {})[name] = Kept()
        self.register_buffer(name, order.to(_SAVED))

    def permutation_of(self, name: str) -> Tensor:
        """Return a permutation as int64 indices: not to be written to."""
        saved = self._buffers[name]
        assert saved is not None
        kept: Kept[Tensor] = self.__dict__["_permutations"][name]
        return kept.get((saved,), _as_indices, saved)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = {name: self._buffers[name] for name in self.__dict__.get("_permutations", ())}
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                # half types hold no large indices
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in self.__dict__.get("_permutations", ()):
            loaded = self._buffers[name]  # int64 in older files, if it was assigned
            if loaded is not None and loaded.dtype != _SAVED:
                self._buffers[name] = loaded.to(_SAVED)


def _as_indices(saved: Tensor) -> Tensor:
    return saved.round().long()
