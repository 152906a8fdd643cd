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
    "label_of_unknown",
    "libraries",
]


def class_test(*prefixes: str) -> Callable[..., bool]:
    """Return a test of whether an object is of exactly one of some classes of a package, or of a copy of it.

    It is called with the object and the places of classes, such as ``"nn.nets.resnet.ResidualNet"``.
    """

    def is_of(thing: object, *places: str) -> bool:
        name = _place_of(type(thing))
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
        holds: whether it consists of transforms that count by themselves, as sequences and flows do.
    """

    look: Callable[[torch.nn.Module], Outcome]
    methods: Sequence[str] = ("forward", "inverse")
    quiet: bool = False
    holds: bool = False


@dataclass(frozen=True)
class Library:
    """Another library.

    Args:
        name: for reports.
        prefixes: the packages in which it, or a copy of it, lies.
        kinds: by module below the package and class, such as ``"transforms.lu.LULinear"``.
        roots: classes of which all its transforms and densities are subclasses, by module and class.
        plain: those of them of which nothing is to be said where no kind knows them: they only reshape, or hold others.
    """

    name: str
    prefixes: Sequence[str]
    kinds: Mapping[str, Kind]
    roots: Sequence[str] = ()
    plain: Sequence[str] = ()

    def kind_of(self, cls: type) -> Kind | None:
        """Return what is known of a class; None for nothing."""
        return self.kinds.get(self._within(cls))

    def label(self, cls: type) -> str:
        """Return how reports call a class of this library that no kind knows; empty for one of another place."""
        where = self._within(cls)
        return f"{self.name}.{cls.__name__}" if where else ""

    def has(self, cls: type, places: Sequence[str]) -> bool:
        """Whether a class is one of those that lie at some places of this library."""
        return self._within(cls) in places

    def _within(self, cls: type) -> str:
        """Return where a class lies in the package; empty for one of another package."""
        where = _place_of(cls)
        found = next((p for p in self.prefixes if where.startswith(p + ".")), None)
        return "" if found is None else where[len(found) + 1 :]


#: Modules of this package that have a ``LIBRARY``; each is imported with the first look at a model.
LIBRARIES: tuple[str, ...] = (
    "nflows",
    "nessai",
    "glasflow",
    "normflows",
    "glow",
    "zuko",
    "sbi",
    "freia",
)


def libraries() -> list[Library]:
    """Return all libraries that are known, none of which need be installed."""
    return [import_module(f"pyflowkern.interop.{name}").LIBRARY for name in LIBRARIES]


def kind_of(cls: type) -> tuple[Kind, str] | None:
    """Return what is known of a class, and how reports call it; None for classes that no library has."""
    for library in libraries():
        if (kind := library.kind_of(cls)) is not None:
            return kind, f"{library.name}.{cls.__name__}"
    return None


def known_base(cls: type) -> tuple[Kind, str] | None:
    """Return what is known of the nearest known class that this one is a subclass of, and how reports call that."""
    return next((found for base in cls.__mro__[1:] if (found := kind_of(base))), None)


def label_of_unknown(cls: type) -> str:
    """Return how reports call a transform or a density that no kind knows; empty for other classes, and plain ones."""
    found = libraries()
    if any(library.has(cls, library.plain) for library in found):
        return ""
    if not any(library.has(base, library.roots) for library in found for base in cls.__mro__):
        return ""
    return next((label for library in found if (label := library.label(cls))), _place_of(cls))


def _place_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
