"""Which classes of other libraries are known, and what is done with an instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch

from pyflowkern.nn.links import Door

__all__ = [
    "LIBRARIES",
    "Kind",
    "Library",
    "Outcome",
    "class_test",
    "kind_of",
    "known_base",
    "libraries",
]


def class_test(*prefixes: str) -> Callable[..., bool]:
    """Return a test of whether an object is of exactly one of some classes of a package, or of a copy of it.

    It is called with the object and the places of classes, such as ``"nn.nets.resnet.ResidualNet"``.
    """

    def is_of(thing: object, *places: str) -> bool:
        cls = type(thing)
        name = f"{cls.__module__}.{cls.__qualname__}"
        return any(name == f"{prefix}.{place}" for prefix in prefixes for place in places)

    return is_of


@dataclass(frozen=True)
class Outcome:
    """What is done with one instance.

    Args:
        doors: what is put in the place of its methods; none where it is left alone.
        runs: ``"one op"`` or ``"own op"``, for the report.
        gain: what to expect, from committed measurements.
        note: for the report: why it is left alone, or what to know.
    """

    doors: Sequence[Door] = ()
    runs: str = ""
    gain: str = ""
    note: str = ""


@dataclass(frozen=True)
class Kind:
    """A class of another library.

    Args:
        look: finds out what is done with an instance; its parts have their doors already.
        methods: the methods that doors stand for.
        quiet: whether instances that are left alone are no news.
    """

    look: Callable[[torch.nn.Module], Outcome]
    methods: Sequence[str] = ("forward", "inverse")
    quiet: bool = False


@dataclass(frozen=True)
class Library:
    """Another library.

    Args:
        name: for reports.
        prefixes: the packages in which it, or a copy of it, lies.
        kinds: by module below the package and class, such as ``"transforms.lu.LULinear"``.
    """

    name: str
    prefixes: Sequence[str]
    kinds: Mapping[str, Kind]

    def kind_of(self, cls: type) -> Kind | None:
        """Return what is known of a class; None for nothing."""
        where = f"{cls.__module__}.{cls.__qualname__}"
        for prefix in self.prefixes:
            if where.startswith(prefix + "."):
                return self.kinds.get(where[len(prefix) + 1 :])
        return None


#: Modules of this package that have a ``LIBRARY``; each is imported with the first look at a model.
LIBRARIES: tuple[str, ...] = ("nflows", "nessai", "glasflow", "normflows", "glow", "zuko", "freia")


def libraries() -> list[Library]:
    """Return all libraries that are known, none of which need be installed."""
    return [import_module(f"pyflowkern.interop.{name}").LIBRARY for name in LIBRARIES]


def kind_of(cls: type) -> tuple[Kind, str] | None:
    """Return what is known of a class, and how reports call it; None for classes that no library has."""
    for library in libraries():
        if (kind := library.kind_of(cls)) is not None:
            return kind, f"{library.name}.{cls.__name__}"
    return None


def known_base(cls: type) -> str:
    """Return how reports call the nearest known class that this one is a subclass of; empty for none."""
    return next((found[1] for base in cls.__mro__[1:] if (found := kind_of(base))), "")
