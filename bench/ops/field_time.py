"""Biases and gates of a field's layers at one time, against plain PyTorch on all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Outputs
from pyflowkern.ops.field_time import at_time, at_time_reference


def make_inputs(widths: Sequence[int], rows: int) -> Callable[..., Inputs]:
    """Return a ``make_inputs`` of a time and each layer's bias ``[out]`` and time coefficients ``[rows, out]``."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        found = {"time": normal()}
        for i, width in enumerate(widths):
            found |= {f"b{i}": normal(width), f"r{i}": normal(rows, width)}
        return found

    return make


def _provider(function: Callable[..., Any]) -> Callable[..., Outputs]:
    def run(time: Tensor, **parameters: Tensor) -> Outputs:
        count = len(parameters) // 2
        biases = [parameters[f"b{i}"] for i in range(count)]
        found, gates = function(time, biases, [parameters[f"r{i}"] for i in range(count)])
        return (*found, *gates)

    return run


def case(name: str, widths: Sequence[int], rows: int, **more: Any) -> Case:
    """Return the case of one field; ``rows`` is 1 for "concat" and 3 for "concatsquash"."""
    return Case(
        name=name,
        make_inputs=make_inputs(widths, rows),
        providers={"eager": _provider(at_time_reference), "ours": _provider(at_time)},
        passes=("forward", "forward+backward"),
        **more,
    )


CASES = [
    case("concatsquash 60x3-6", (60, 60, 60, 6), 3),
    case("concat 64x3-2", (64, 64, 64, 2), 1, extra=True),
]
