"""Networks of linear layers and ReLUs at the sizes of conditioners, against torch's layers one after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Outputs, Provider, nbytes
from pyflowkern import ops


def provider(function: Callable[..., Tensor], residual: bool) -> Provider:
    def run(x: Tensor, **parameters: Tensor) -> Tensor:
        count = len(parameters) // 2
        weights = [parameters[f"weight{i}"] for i in range(count)]
        biases = [parameters[f"bias{i}"] for i in range(count)]
        return function(x, weights, biases, residual=residual)

    return run


def make_inputs(samples: int, sizes: Sequence[int]) -> Callable[..., Inputs]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        found: Inputs = {"x": normal(samples, sizes[0])}
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            found[f"weight{i}"] = normal(b, a) * (2 / a) ** 0.5
            found[f"bias{i}"] = normal(b)
        return found

    return make


def _flops(inputs: Inputs) -> float:
    weights = sum(v.numel() for k, v in inputs.items() if k.startswith("weight"))
    return 2.0 * inputs["x"].shape[0] * weights


def _backward_bytes(inputs: Inputs, outputs: Outputs) -> int:
    """Read the output's gradient, the input and the weights, write as many gradients."""
    return 2 * nbytes(*inputs.values()) + nbytes(*outputs)


def network(samples: int, sizes: Sequence[int], residual: bool, **case: Any) -> Case:
    kind = "residual" if residual else "plain"
    return Case(
        name=f"{kind} {samples} x {'-'.join(map(str, sizes))}",
        make_inputs=make_inputs(samples, sizes),
        providers={
            "eager": provider(ops.relu_network_reference, residual),
            "ours": provider(ops.relu_network, residual),
        },
        passes=("forward", "forward+backward"),
        backward_bytes=_backward_bytes,
        flops=_flops,
        devices=("cpu",),
        **case,
    )


CASES = [
    network(200, (3, *[50] * 5, 87), True, targets={"forward+backward vs eager": 1.2}),
    network(512, (3, *[256] * 5, 69), True, targets={"forward+backward vs eager": 1.1}),
    network(4096, (10, *[64] * 5, 230), True),
    network(1000, (21, 512, 512, 88), False),
    network(64, (2, 128, 128, 4), False, extra=True),
]
