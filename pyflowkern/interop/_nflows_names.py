"""Where the classes of nflows lie, in it and in its copies."""

from __future__ import annotations

__all__ = ["PREFIXES", "is_named"]

#: The packages that hold it.
PREFIXES = ("nflows", "glasflow.nflows")


def is_named(thing: object, *where: str) -> bool:
    """Whether an object is of exactly a class that lies there, such as ``"nn.nets.resnet.ResidualNet"``."""
    cls = type(thing)
    name = f"{cls.__module__}.{cls.__qualname__}"
    return any(name == f"{prefix}.{place}" for prefix in PREFIXES for place in where)
