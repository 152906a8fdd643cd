"""How exactly layers are undone: errors are measured now and then, and inputs that do not come back are kept."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Guard", "fingerprint", "finite_samples", "not_finite", "relative_error", "scale_of"]

#: Passes from one look to the next.
EVERY = 1000
#: The largest relative error that is left alone.
LARGEST = {torch.float32: 1e-4, torch.float64: 1e-11}


class Guard:
    """What is known of the layers that one direction of a sequence undoes.

    The first pass, and one of :data:`EVERY`, is looked at: each layer alone, there and back, and then what has added up
    on the way back from the end.  A layer whose input is not found to within :meth:`bound` keeps it from then on.
    """

    def __init__(self) -> None:
        self._layers: list[torch.nn.Module] = []
        self._passes = 0
        #: Places of layers that keep their inputs.
        self.kept: set[int] = set()
        self._found: list[str] = []
        self._lost: dict[int, Tensor] = {}

    def begin(self, layers: list[torch.nn.Module]) -> bool:
        """Note that a pass begins; return whether it is looked at."""
        if self._layers != layers:
            self._layers, self._passes = layers, 0
            self.kept, self._lost = set(), {}
        looks = self._passes % EVERY == 0
        self._passes += 1
        if looks:
            lost, self._lost = self._lost, {}
            for place, count in lost.items():
                if (n := int(count)) > 0:
                    self.keep(place, f"of {n} samples was not finite")
        return looks

    def keep(self, place: int, why: str) -> None:
        """Let a layer keep its input, and say why at the end of the pass; look again at the next one."""
        if place not in self.kept:
            layer = self._layers[place]
            self._found.append(f"layers[{place}] ({type(layer).__name__}), which {why}")
        # replaced and not changed: other threads may read it
        self.kept = {*self.kept, place}
        self._passes = 0

    def lose(self, place: int, count: Tensor) -> None:
        """Note samples that did not come back; on a GPU they are counted without waiting for it."""
        if not count.is_cpu:
            known = self._lost.get(place)
            self._lost[place] = count if known is None else known + count
        elif (n := int(count)) > 0:
            self.keep(place, f"of {n} samples was not finite")
            self.report()

    def report(self) -> None:
        """Warn of the layers that were found since the last report."""
        found, self._found = self._found, []
        if not found:
            return
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        warnings.warn(
            "memory='reversible' makes inputs of layers again by their inverses, and some do not come back: "
            f"that of {', that of '.join(found[:3])}{more}.  These inputs are kept from now on",
            stacklevel=2,
        )

    @staticmethod
    def bound(x: Tensor, casts: torch.dtype | None) -> float:
        """Return the largest relative error that is left alone; networks under autocast round more than that."""
        own = LARGEST[x.dtype]
        return own if casts is None else max(own, torch.finfo(casts).eps)

    def __reduce__(self) -> tuple[type[Guard], tuple[()]]:
        """Copies and pickles start anew."""
        return Guard, ()


def _flat(x: Tensor) -> Tensor:
    """Return the elements of each sample, ``[N, D]``."""
    return x.flatten(1) if x.dim() > 1 else x[:, None]


def finite_samples(x: Tensor) -> Tensor:
    """Return which samples are finite, ``[N]``, after one pass over ``x``: those whose sum is."""
    return _flat(x).sum(1).isfinite()


def not_finite(x: Tensor) -> Tensor | None:
    """Return which samples are not finite, ``[N]``; None where all are, which only a CPU says at once."""
    if x.is_cpu and math.isfinite(x.detach().sum()):
        return None
    return ~finite_samples(x.detach())


def scale_of(x: Tensor, finite: Tensor) -> Tensor:
    """Return what errors of each sample are relative to: its norm, or the median norm if that is larger."""
    norms = torch.linalg.vector_norm(_flat(x), dim=1)
    typical = norms[finite].median() if bool(finite.any()) else norms.new_zeros(())
    return torch.maximum(norms, typical).clamp_min(torch.finfo(x.dtype).tiny)


def relative_error(found: Tensor, wanted: Tensor, finite: Tensor) -> float:
    """Return the root mean square over samples of the relative error; inf where a finite one did not come back."""
    if not bool(finite.any()):
        return 0.0
    found, scale = found[finite], scale_of(wanted, finite)[finite]
    error = torch.linalg.vector_norm(_flat(found - wanted[finite]), dim=1) / scale
    mean = float(error.square().mean().sqrt())
    return mean if mean == mean else float("inf")


@lru_cache(maxsize=64)
def _signs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, shape, generator=generator, device="cpu") * 2 - 1
    return signs.to(device, dtype)


def fingerprint(x: Tensor) -> Tensor:
    """Return one number a sample, ``[N]``: its elements summed with random signs.

    That of an error is as large as the error's norm, on the average over signs: what was not kept can be compared.
    """
    return _flat(x * _signs(tuple(x.shape[1:]), x.dtype, x.device)).sum(1)
