"""Where the classes of nflows lie, in it and in its copies."""

from __future__ import annotations

from pyflowkern.interop._kinds import class_test

__all__ = ["PREFIXES", "is_named"]

#: The packages that hold it.
PREFIXES = ("nflows", "glasflow.nflows")
#: Whether an object is of exactly a class that lies there, such as ``"nn.nets.resnet.ResidualNet"``.
is_named = class_test(*PREFIXES)
