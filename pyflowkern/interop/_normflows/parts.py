"""What several transforms of normflows consist of."""

from __future__ import annotations

import torch

from pyflowkern.interop._kinds import class_test
from pyflowkern.interop._networks import Family
from pyflowkern.ops import ScaleMap

__all__ = ["FAMILY", "PREFIX", "Awaits", "is_named", "scale_map_of"]

PREFIX = "normflows"
#: Whether a module is of exactly a class that lies there in the package.
is_named = class_test(PREFIX)
FAMILY = Family("normflows.nets.resnet", "normflows.nets.made", "add", "gate", activated=False)
#: From latent to data; ``sigmoid`` divides there.
_SCALE_MAPS = {
    "exp": ScaleMap("exp"),
    "sigmoid": ScaleMap("sigmoid", offset=2.0, divide=True),
    "sigmoid_inv": ScaleMap("sigmoid", offset=2.0),
}


class Awaits:
    """Whether an ActNorm has seen no batch yet, by which it would initialise itself, in evaluation mode, too."""

    def __init__(self, norm: torch.nn.Module) -> None:
        self._norm = norm

    def __call__(self) -> bool:
        done = self._norm._buffers.get("data_dep_init_done")
        return done is None or not done > 0.0


def scale_map_of(scale: object, name: object) -> ScaleMap | None:
    """Return the map of an AffineCoupling, from latent to data; None for one that the library does not know."""
    if not isinstance(scale, bool) or not isinstance(name, str):
        return None
    return _SCALE_MAPS.get(name) if scale else ScaleMap("additive")
