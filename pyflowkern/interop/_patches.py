"""Functions of installed libraries that ours stand for in this process, under every name that holds them."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import FunctionType
from typing import Any, NamedTuple

import torch

from pyflowkern.interop._classes import is_installed
from pyflowkern.interop._doors import ORIGINAL, is_off

__all__ = ["PATCHES", "Patch", "patch_functions", "restore_functions"]


class Patch(NamedTuple):
    """Functions of a module of another library.

    Args:
        package: that must be installed.
        module: of the library.
        names: of the functions, there and here.
        ours: the module of this package that has them.
        falls_back: whether the library's own function is called where ours refuses arguments; else ours does that.
    """

    package: str
    module: str
    names: tuple[str, ...]
    ours: str
    falls_back: bool = True


def _of_nflows(package: str) -> Iterator[Patch]:
    for kind in ("linear", "quadratic", "cubic", "rational_quadratic"):
        names = (f"{kind}_spline", f"unconstrained_{kind}_spline")
        module = f"{package}.transforms.splines.{kind}"
        yield Patch(package, module, names, "pyflowkern.interop.nflows")


PATCHES: tuple[Patch, ...] = (
    *_of_nflows("nflows"),
    *_of_nflows("glasflow.nflows"),
    Patch(
        "normflows",
        "normflows.utils.splines",
        ("rational_quadratic_spline", "unconstrained_rational_quadratic_spline"),
        "pyflowkern.interop.normflows",
    ),
    Patch(
        "torchdiffeq",
        "torchdiffeq",
        ("odeint", "odeint_adjoint", "odeint_event"),
        "pyflowkern.interop.torchdiffeq",
        falls_back=False,
    ),
)
#: What calls itself by these names must go on to do so.
_INSIDE = "torchdiffeq._impl"
_lock = threading.RLock()
#: The libraries' functions that are replaced now, each with what stands for it.
_replaced: list[tuple[FunctionType, FunctionType]] = []


def patch_functions() -> list[str]:
    """Let our functions stand for those of the libraries that are installed, which are imported for that.

    Every module that was imported gets them, under whatever global name it holds the library's; modules that are
    imported later take them from the library.  What holds a function otherwise (an attribute, a default argument, a
    closure) keeps the library's.

    Returns:
        The modules of libraries whose functions are replaced.
    """
    found = []
    with _lock:
        new = []
        for patch in PATCHES:
            if not is_installed(patch.package):
                continue
            try:
                theirs, ours = import_module(patch.module), import_module(patch.ours)
            except Exception:  # a version without this module, or one that cannot be imported here
                continue
            found.append(patch.module)
            for name in patch.names:
                function = getattr(theirs, name, None)
                if isinstance(function, FunctionType) and not hasattr(function, ORIGINAL):
                    new.append((function, _stand_in(function, getattr(ours, name), patch)))
        _swap({id(function): stand_in for function, stand_in in new})
        _replaced.extend(new)
    return found


def restore_functions() -> None:
    """Give all modules the libraries' own functions back, those that were imported meanwhile, too."""
    with _lock:
        _swap({id(stand_in): function for function, stand_in in _replaced})
        _replaced.clear()


def _stand_in(theirs: FunctionType, ours: Callable[..., Any], patch: Patch) -> FunctionType:
    """Return a function that runs ours, or theirs for compilers and for what ours refuses."""
    ours = getattr(ours, "__wrapped__", ours)  # errors are raised by the library itself

    @functools.wraps(theirs)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or is_off():
            return theirs(*args, **kwargs)
        if not patch.falls_back:
            return ours(*args, **kwargs)
        try:
            return ours(*args, **kwargs)
        except (TypeError, ValueError):
            return theirs(*args, **kwargs)

    stand_in.__module__ = patch.module  # where pickle finds it
    setattr(stand_in, ORIGINAL, theirs)
    assert isinstance(stand_in, FunctionType)
    return stand_in


def _swap(new: Mapping[int, FunctionType]) -> None:
    """Replace functions, given by their ``id``, among the globals of all modules."""
    if not new:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith(_INSIDE):
            continue
        try:  # not getattr: it would load modules that wait for their first use
            names = object.__getattribute__(module, "__dict__")
        except AttributeError:
            continue
        for key, value in list(names.items()):
            if (
                type(value) is FunctionType and id(value) in new
            ):  # isinstance would ask proxies, too
                names[key] = new[id(value)]
