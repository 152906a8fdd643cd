"""What transforms of FrEIA have in common: how they are called, and the functions that they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.structure import Structure
from pyflowkern.interop._layers import ForeignLayer
from pyflowkern.ops import ScaleMap

__all__ = ["PREFIXES", "Constants", "FreiaLayer", "called", "clamp_of", "global_map_of"]

PREFIXES = ("FrEIA", "anomalib.models.components.flow")
Pair = tuple[Tensor, Tensor]


class FreiaLayer(ForeignLayer):
    """A transform of FrEIA, which is called with a tuple and returns one; ``rev`` says the direction."""

    module: Any
    #: Whether the library returns the number 0 for its log-determinant.
    preserves_volume = False
    #: Whether it is more than a coupling.
    is_block = False

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        dims = module.dims_in
        shape = dims if dims and isinstance(dims[0], int) else dims[0]
        if len(shape) == 1:
            self.features = int(shape[0])

    @property
    def sizes(self) -> list[int]:
        """Numbers of features of the conditions."""
        return [int(shape[0]) for shape in self.module.dims_c]

    def __call__(self, x: Tensor, context: Tensor | None = None, /) -> Pair:
        """Run the library's own transform from data to latent, given its conditions side by side."""
        return self._call(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None, /) -> Pair:
        """Run the library's own transform from latent to data."""
        return self._call(z, context, True)

    def _call(self, x: Tensor, context: Tensor | None, rev: bool) -> Pair:
        given = {} if context is None else {"c": list(context.split(self.sizes, 1))}
        (y,), log_det = self.module((x,), rev=rev, **given)
        if not isinstance(log_det, Tensor):
            log_det = x.new_tensor(float(log_det))
        return y, log_det.expand(x.shape[0]) if log_det.numel() == 1 else log_det


class Constants:
    """Tensors of one number that steps take, made once for each dtype and device."""

    def __init__(self, shape: Sequence[int], value: float) -> None:
        with torch.inference_mode(False), torch.device("cpu"):
            self._double = Structure(torch.full(tuple(shape), value, dtype=torch.float64))
            self._single = Structure(torch.full(tuple(shape), value, dtype=torch.float32))

    def like(self, x: Tensor) -> Tensor:
        """Return them in the dtype of ``x``, and where it is."""
        kept = self._double if x.dtype == torch.float64 else self._single
        with torch.inference_mode(False):
            return kept.on(x.device)


def called(
    x: Any, c: Any = None, rev: Any = False, jac: Any = True
) -> tuple[Tensor, Sequence[Tensor], bool] | None:
    """Return what a transform is to do, by arguments as the library takes them; None where it must look itself."""
    if type(x) not in (tuple, list) or len(x) != 1 or not isinstance(rev, bool):
        return None
    given = () if c is None else c
    if type(given) not in (tuple, list) or not all(isinstance(t, Tensor) for t in (*x, *given)):
        return None
    return x[0], given, rev


#: Where functions that the library makes are looked at.
_PROBE = (-3.0, -0.4, 0.2, 1.1, 6.0)


def clamp_of(function: Any, clamp: float) -> ScaleMap | None:
    """Return the map ``log s = clamp f(u)`` of a coupling; None for a function that is not one of the library's."""
    maps: dict[str, tuple[Callable[[Tensor], Tensor], ScaleMap]] = {
        "ATAN": (_atan, ScaleMap("atan", clamp=clamp, gain=clamp)),
        "TANH": (torch.tanh, ScaleMap("tanh", clamp=clamp, gain=clamp)),
        "SIGMOID": (_two_sigmoid, ScaleMap("tanh", clamp=clamp, gain=clamp / 2)),
    }
    if function is torch.tanh:
        return maps["TANH"][1]
    if not _of_the_library(function):
        return None
    return next((m for f, m in maps.values() if _same(function, f)), None)


def global_map_of(function: Any) -> tuple[ScaleMap, float] | None:
    """Return the map of an AllInOneBlock's global scale and a factor on its output; None for another function."""
    maps: tuple[tuple[Callable[[Tensor], Tensor], ScaleMap, float], ...] = (
        (torch.exp, ScaleMap("exp"), 1.0),
        (_ten_sigmoid, ScaleMap("sigmoid", offset=-2.0, max_scale=10.0), 1.0),
        # 0.1 softplus of beta 0.5 = 0.2 log(1 + exp(u / 2)), where torch's leaves out 2e-9 from u = 40 on
        (_tenth_softplus, ScaleMap("softplus", gain=0.5, shift_gain=5.0), 0.2),
    )
    if not _of_the_library(function):
        return None
    return next(((m, factor) for f, m, factor in maps if _same(function, f)), None)


def _of_the_library(function: Any) -> bool:
    where = getattr(function, "__module__", None) or ""
    return any(where.startswith(prefix + ".") for prefix in PREFIXES)


def _same(function: Any, other: Callable[[Tensor], Tensor]) -> bool:
    """Whether two functions of a number are the same."""
    at = torch.tensor(_PROBE, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        try:
            return torch.allclose(function(at), other(at), rtol=1e-9, atol=1e-9)
        except Exception:
            return False


def _atan(u: Tensor) -> Tensor:
    return 0.636 * torch.atan(u)


def _two_sigmoid(u: Tensor) -> Tensor:
    return 2 * torch.sigmoid(u) - 1


def _ten_sigmoid(u: Tensor) -> Tensor:
    return 10 * torch.sigmoid(u - 2)


def _tenth_softplus(u: Tensor) -> Tensor:
    return 0.1 * torch.nn.functional.softplus(u, beta=0.5)


LOG_FIFTH = math.log(0.2)
