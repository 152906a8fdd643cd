"""Networks of convolutions at the sizes of Glow's conditioners, against torch's convolutions one after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Outputs, Provider, nbytes
from pyflowkern import ops

GLOW = (3, 1, 3)


def provider(function: Callable[..., Tensor], residual: bool) -> Provider:
    def run(x: Tensor, **parameters: Tensor) -> Tensor:
        count = len(parameters) // 2
        weights = [parameters[f"weight{i}"] for i in range(count)]
        biases = [parameters[f"bias{i}"] for i in range(count)]
        return function(x, weights, biases, residual=residual)

    return run


def make_inputs(
    samples: int, side: int, channels: Sequence[int], filters: Sequence[int], channels_last: bool
) -> Callable[..., Inputs]:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        x = normal(samples, channels[0], side, side)
        found: Inputs = {"x": x.contiguous(memory_format=layout)}
        for i, ((a, b), k) in enumerate(zip(itertools.pairwise(channels), filters, strict=True)):
            weight = normal(b, a, k, k) * (2 / (a * k * k)) ** 0.5
            found[f"weight{i}"] = weight.contiguous(memory_format=layout)
            found[f"bias{i}"] = normal(b)
        return found

    return make


def _flops(inputs: Inputs) -> float:
    n, _, height, width = inputs["x"].shape
    weights = sum(v.numel() for k, v in inputs.items() if k.startswith("weight"))
    return 2.0 * n * height * width * weights


def _backward_bytes(inputs: Inputs, outputs: Outputs) -> int:
    """Read the output's gradient, the input and the weights, write as many gradients."""
    return 2 * nbytes(*inputs.values()) + nbytes(*outputs)


def network(
    samples: int,
    side: int,
    channels: Sequence[int],
    filters: Sequence[int] = GLOW,
    residual: bool = False,
    channels_last: bool = False,
    **case: Any,
) -> Case:
    kind = "residual" if residual else "plain"
    layout = ", channels last" if channels_last else ""
    return Case(
        name=f"{kind} {samples} x {side}x{side} {'-'.join(map(str, channels))}{layout}",
        make_inputs=make_inputs(samples, side, channels, filters, channels_last),
        providers={
            "eager": provider(ops.conv_network_reference, residual),
            "ours": provider(ops.conv_network, residual),
        },
        passes=("forward", "forward+backward"),
        backward_bytes=_backward_bytes,
        flops=_flops,
        devices=("cpu",),
        **case,
    )


CASES = [
    network(32, 16, (6, 64, 64, 12), targets={"forward+backward vs eager": 1.3}),
    network(32, 8, (12, 64, 64, 24), targets={"forward+backward vs eager": 1.1}),
    network(32, 4, (24, 64, 64, 48)),
    network(32, 16, (6, 64, 64, 12), channels_last=True),
    network(32, 16, (6, 128, 128, 12)),
    network(8, 16, (6, 64, 64, 64, 64, 64, 12), (3, 3, 3, 3, 3, 1), residual=True, extra=True),
]
