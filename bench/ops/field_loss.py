"""The loss of flow matching with the gradients of all parameters, against plain PyTorch layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Provider
from pyflowkern.ops.field_loss import field_loss, field_loss_reference


def provider(function: Callable[..., Tensor]) -> Provider:
    def run(x: Tensor, target: Tensor, time: Tensor, **parameters: Tensor) -> Tensor:
        count = len(parameters) // 3
        lists = [[parameters[f"{name}{i}"] for i in range(count)] for name in ("w", "b", "r")]
        return function(x, target, *lists[:2], joined=time, rows=lists[2])

    return run


def make_inputs(samples: int, sizes: Sequence[int]) -> Callable[..., Inputs]:
    """Return a ``make_inputs`` of states, targets, times and the parameters of layers."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        found: Inputs = {
            "x": normal(samples, sizes[0]),
            "target": normal(samples, sizes[-1]),
            "time": normal(samples, 1),
        }
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            found |= {f"w{i}": normal(b, a) / a**0.5, f"b{i}": normal(b), f"r{i}": normal(1, b)}
        return found

    return make


def _flops(inputs: Inputs) -> float:
    """Count the forward pass."""
    parameters = sum(v.numel() for k, v in inputs.items() if k[0] in "wbr")
    return 2.0 * inputs["x"].shape[0] * parameters


def loss(samples: int, sizes: Sequence[int], **case: Any) -> Case:
    return Case(
        name=f"{samples} x {'-'.join(map(str, sizes))}",
        make_inputs=make_inputs(samples, sizes),
        providers={"eager": provider(field_loss_reference), "ours": provider(field_loss)},
        passes=("forward+backward",),
        flops=_flops,
        constants=("x", "target", "time"),
        devices=("cpu",),
        **case,
    )


CASES = [
    loss(512, (2, 64, 64, 64, 2), targets={"forward+backward vs eager": 1.5}),
    loss(256, (50, 128, 128, 50), targets={"forward+backward vs eager": 1.2}),
]
