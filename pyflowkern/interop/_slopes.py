"""Activations and their slopes in plain PyTorch, for traces of Jacobians in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["SLOPES", "Function"]

Function = Callable[[Tensor], Tensor]


def _leaky_slope(a: Tensor) -> Tensor:
    return torch.where(a > 0, 1.0, 0.01)


def _silu_slope(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _sigmoid_slope(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 - s)


def _gelu_slope(a: Tensor) -> Tensor:
    density = torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * density


#: By name, activations and their slopes; both can be differentiated again.
SLOPES: dict[str, tuple[Function, Function]] = {
    "identity": (lambda a: a, torch.ones_like),
    "relu": (functional.relu, lambda a: (a > 0).to(a.dtype)),
    "leaky_relu": (functional.leaky_relu, lambda a: _leaky_slope(a).to(a.dtype)),
    # exp is not taken where it could overflow: its gradient would be inf times 0
    "elu": (functional.elu, lambda a: a.clamp(max=0).exp()),
    "tanh": (torch.tanh, lambda a: 1 - torch.tanh(a).square()),
    "sigmoid": (torch.sigmoid, _sigmoid_slope),
    "silu": (functional.silu, _silu_slope),
    "gelu": (functional.gelu, _gelu_slope),
}
