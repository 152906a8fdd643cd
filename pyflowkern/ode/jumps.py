"""Fields that are discontinuous at known times: the solve is divided there into stretches, one after another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflowkern.ode.packing import Field
from pyflowkern.ode.times import number

__all__ = ["Stretch", "jump_times", "stretches"]


@dataclass(frozen=True)
class Stretch:
    """A part of a solve without a jump of the field inside.

    Args:
        times: its start, the output times in it, and its end.
        outputs: indices of these among all outputs.
        low: time passed to the field at the start: just after the jump there, if there is one.
        high: time passed to the field at the end: just before the jump there, if there is one.
    """

    times: list[float]
    outputs: list[int]
    low: float
    high: float

    def field(self, field: Field) -> Field:
        """Return the field with its times limited to the stretch, so that it never sees the other side of a jump."""
        least, most = min(self.low, self.high), max(self.low, self.high)
        return lambda t, y: field(t.clamp(least, most), y)

    def tensor(self, t: Tensor) -> Tensor:
        """Return the times of the stretch as a tensor; those of outputs carry the gradients of ``t``."""
        edges = t.detach().new_tensor(self.times)
        moved = list(edges.unbind())
        for i, j in enumerate(self.outputs, 1):
            moved[i] = t[j]
        if self.times[0] == number(t[0]):
            moved[0] = t[0]
        return torch.stack(moved)


def jump_times(jump_t: Tensor | Sequence[float] | None) -> list[float]:
    """Return the times of jumps in ascending order; raise TypeError or ValueError for what is no time."""
    if jump_t is None:
        return []
    try:
        times = [number(t) for t in jump_t]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"jump_t must be a tensor or a sequence of numbers, got {jump_t!r}"
        ) from error
    if any(math.isnan(t) for t in times):
        raise ValueError(f"jump_t must not hold NaN, got {times}")
    return sorted(set(times))


def stretches(times: Sequence[float], jumps: Sequence[float], like: Tensor) -> Iterator[Stretch]:
    """Divide a solve at the jumps within it.

    Next to a jump the field is evaluated at the neighbouring floating-point number of the state's dtype.

    Args:
        times: of the outputs.
        jumps: times of the jumps, ascending.
        like: a state.
    """
    first, last = times[0], times[-1]
    sign = 1.0 if last >= first else -1.0
    inner = [t for t in jumps if min(first, last) < t < max(first, last)]
    edges = [first, *(inner if sign > 0 else reversed(inner)), last]
    done = 1

    def beside(t: float, other: float) -> float:
        near: Tensor = torch.nextafter(
            torch.tensor(t, dtype=like.dtype), torch.tensor(other, dtype=like.dtype)
        )
        return near.item()

    for a, b in itertools.pairwise(edges):
        outputs = []
        while done < len(times) and (sign * (b - times[done]) >= 0):
            outputs.append(done)
            done += 1
        inside = [times[i] for i in outputs]
        # the end of the stretch has an entry of its own, even where an output has the same time
        end = [] if b == last else [b]
        yield Stretch(
            [a, *inside, *end],
            outputs,
            a if a == first else beside(a, b),
            b if b == last else beside(b, a),
        )
