"""Solves that end a step at given times, as where the field jumps: one stretch between two of them after another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflowkern.ode.packing import Field

__all__ = ["Stretch", "jump_times", "stretches"]


@dataclass(frozen=True)
class Stretch:
    """A part of a solve in which the field does not jump.

    Args:
        times: its start, the outputs in it, and its end.
        outputs: numbers of the outputs among all of them.
        low: time at which the field is evaluated for its start.
        high: time at which the field is evaluated for its end.
    """

    times: list[float]
    outputs: list[int]
    low: float
    high: float

    def field(self, field: Field) -> Field:
        """Return the field, seen from within the stretch alone."""
        least, most = min(self.low, self.high), max(self.low, self.high)
        return lambda t, y: field(t.clamp(least, most), y)

    def tensor(self, t: Tensor) -> Tensor:
        """Return its times as a tensor, the outputs with their gradients."""
        edges = t.detach().new_tensor(self.times)
        found = list(edges.unbind())
        for i, j in enumerate(self.outputs, 1):
            found[i] = t[j]
        if self.times[0] == float(t[0].detach()):
            found[0] = t[0]
        return torch.stack(found)


def jump_times(jump_t: Tensor | Sequence[float] | None) -> list[float]:
    """Return the times of jumps in ascending order; raise for what are none."""
    if jump_t is None:
        return []
    try:
        found = [float(t) for t in jump_t]
    except TypeError as error:
        raise TypeError(
            f"jump_t must be a tensor or a sequence of numbers, got {jump_t!r}"
        ) from error
    if any(math.isnan(t) for t in found):
        raise ValueError(f"jump_t must not hold NaN, got {found}")
    return sorted(set(found))


def stretches(times: Sequence[float], jumps: Sequence[float], like: Tensor) -> Iterator[Stretch]:
    """Divide a solve at the jumps within it.

    The field is evaluated at the number next to a jump, before or after it, in the dtype of the state.

    Args:
        times: of the outputs.
        jumps: ascending.
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
        # an output at a jump is beside the end of the stretch: where it is moved, the end stays
        end = [] if b == last else [b]
        yield Stretch(
            [a, *inside, *end],
            outputs,
            a if a == first else beside(a, b),
            b if b == last else beside(b, a),
        )
