"""What stands in the place of a method of one instance, so that an op of this package runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pyflowkern.nn.links import Door

__all__ = [
    "ORIGINAL",
    "MethodDoor",
    "ReplicaDoor",
    "doors_of",
    "is_off",
    "put",
    "take_away",
    "the_library_itself",
]

#: Where a method of a class that was patched keeps the one before it.
ORIGINAL = "_pyflowkern_original"


class _State(threading.local):
    off = False


_state = _State()


@contextmanager
def the_library_itself() -> Iterator[None]:
    """Within it, this thread runs the library's own methods."""
    before, _state.off = _state.off, True
    try:
        yield
    finally:
        _state.off = before


def is_off() -> bool:
    """Whether this thread runs the library's own methods."""
    return _state.off


class MethodDoor(Door):
    """A method that runs an op, or the library's own code where that would notice.

    Subclasses define :meth:`run`, which takes what the method takes and returns what it returns.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the method does."""
        # compilers see the library's own code, as they did before
        if torch.compiler.is_compiling() or _state.off:
            return self.own(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the method does, by an op where one serves."""
        raise NotImplementedError

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """Run the library's own method."""
        method = getattr(type(self.module), self.name)
        return getattr(method, ORIGINAL, method)(self.module, *args, **kwargs)


class ReplicaDoor(Door):
    """Replicas of ``torch.nn.DataParallel`` are shallow copies: without this, they would run the original."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module, "_replicate_for_data_parallel")

    def __call__(self) -> torch.nn.Module:
        """Return a replica that has the library's own methods."""
        replica: torch.nn.Module = type(self.module)._replicate_for_data_parallel(self.module)
        for door in doors_of(replica):
            del replica.__dict__[door.name]
        return replica


def put(door: Door) -> None:
    """Put a door in the place of its method."""
    door.module.__dict__[door.name] = door


def doors_of(module: torch.nn.Module) -> list[Door]:
    """Return the doors of one module."""
    return [value for value in module.__dict__.values() if isinstance(value, Door)]


def take_away(module: torch.nn.Module) -> None:
    """Give one module its methods back."""
    for door in doors_of(module):
        del module.__dict__[door.name]
