"""Classes of installed libraries whose instances are accelerated at their first call."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from pyflowkern._library import observed
from pyflowkern.interop._doors import ORIGINAL, MethodDoor, is_off, take_away
from pyflowkern.interop._kinds import kind_of, libraries

__all__ = ["is_installed", "patch_classes", "restore_classes"]

Equip = Callable[[torch.nn.Module], object]
_lock = threading.RLock()
#: Instances that were looked at since classes were patched.
_seen: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
#: What was replaced: a class, the name of the method, and the method before.
_replaced: list[tuple[type, str, Any]] = []


def patch_classes(equip: Equip) -> list[str]:
    """Let each instance of a known class be equipped at its first call; return the names of the libraries found.

    Args:
        equip: what puts doors on an instance and its parts.
    """
    found = []
    with _lock:
        for library in libraries():
            for prefix in library.prefixes:
                if not is_installed(prefix):
                    continue
                found.append(prefix)
                for where, kind in library.kinds.items():
                    if kind.methods and (cls := _class_of(f"{prefix}.{where}")) is not None:
                        for name in kind.methods:
                            _patch(cls, name, equip)
    return found


def restore_classes() -> None:
    """Give all classes, and the instances that were equipped by them, their methods back."""
    with _lock:
        while _replaced:
            cls, name, before = _replaced.pop()
            setattr(cls, name, before)
        for module in list(_seen):
            take_away(module)
        _seen.clear()


def is_installed(package: str) -> bool:
    """Whether a package is there; a top-level one is imported, one inside of another only if that was."""
    top, _, inner = package.partition(".")
    if inner and top not in sys.modules:
        return False
    try:
        return package in sys.modules or find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _class_of(where: str) -> type | None:
    module, _, name = where.rpartition(".")
    try:
        cls = getattr(import_module(module), name, None)
    except Exception:  # a version that has no such module, or one that cannot be imported here
        return None
    return cls if isinstance(cls, type) else None


def _patch(cls: type, name: str, equip: Equip) -> None:
    """Replace a method where it is defined: in the class itself, or in one that it inherits from."""
    home = next((c for c in cls.__mro__ if name in vars(c)), None)
    if home is None or home is torch.nn.Module:
        return
    method = vars(home)[name]
    if not hasattr(method, ORIGINAL):
        _replaced.append((home, name, method))
        setattr(home, name, _through_door(method, name, equip))


def _through_door(method: Callable[..., Any], name: str, equip: Equip) -> Callable[..., Any]:
    @functools.wraps(method)
    def through_door(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or is_off():
            return method(self, *args, **kwargs)
        if self not in _seen and not _recorded():
            with _lock:
                _look(self, equip)
        door = self.__dict__.get(name)
        if isinstance(door, MethodDoor):
            return door(*args, **kwargs)
        return method(self, *args, **kwargs)

    setattr(through_door, ORIGINAL, method)
    return through_door


def _recorded() -> bool:
    """Whether something records or transforms what is computed now: no look at a module belongs to that."""
    return observed() or torch._C._get_tracing_state() is not None


def _look(module: torch.nn.Module, equip: Equip) -> None:
    """Equip an instance of exactly a known class; subclasses run their own code."""
    if module in _seen or not _replaced:  # another thread was here first, or has restored all
        return
    if kind_of(type(module)) is not None:
        equip(module)
        _seen.update(module.modules())
    else:
        _seen.add(module)
