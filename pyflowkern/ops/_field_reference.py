"""The formulas of :mod:`pyflowkern.ops.field` in plain PyTorch, on arguments that were checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyflowkern.core.activations import activation_and_slope
from pyflowkern.core.dtypes import accumulation_dtype
from pyflowkern.ops.probe import expand_probe

__all__ = [
    "ACTIVATIONS",
    "exact_reference",
    "hutchinson_trace_reference",
    "stacked_reference",
]

ACTIVATIONS = ("tanh", "softplus", "silu", "gelu")


def stacked_reference(
    x: Tensor,
    probe: Tensor,
    probes: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gates: Sequence[Tensor],
    activation: str,
    with_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``y``, the traces ``[K, N]`` and the norms ``[K, N]`` (``[0, N]`` if not wanted)."""
    e = expand_probe(probe, probes, x)
    h, tangent = x, e
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h, tangent = h @ weight.t(), tangent @ weight.t()
        if gates:
            h, tangent = gates[i] * h, gates[i] * tangent
        h = h + bias
        if i < len(weights) - 1:
            h, slope = activation_and_slope(h, activation)
            tangent = slope * tangent
    norm = tangent.square().sum(-1)
    return h, (e * tangent).sum(-1), norm if with_norm else norm[:0]


def exact_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gates: Sequence[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return ``y`` and the trace of a field with one or two hidden layers."""
    h, slopes = x, []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h = h @ weight.t()
        h = (gates[i] * h if gates else h) + bias
        if i < len(weights) - 1:
            h, slope = activation_and_slope(h, activation)
            slopes.append(gates[i] * slope if gates else slope)
    last = gates[-1].unsqueeze(1) * weights[-1] if gates else weights[-1]
    if len(slopes) == 1:
        return h, slopes[0] @ (last.t() * weights[0]).sum(1)
    coupling = weights[1] * (last.t() @ weights[0].t())
    return h, (slopes[1] * (slopes[0] @ coupling.t())).sum(1)


def hutchinson_trace_reference(e: Tensor, je: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the trace and the norm of :func:`hutchinson_trace` in plain PyTorch."""
    work = accumulation_dtype(torch.promote_types(e.dtype, je.dtype))
    rows = (e.shape[0], math.prod(e.shape[1:]))
    a, b = e.to(work).reshape(rows), je.to(work).reshape(rows)
    return (a * b).sum(1), b.square().sum(1)
