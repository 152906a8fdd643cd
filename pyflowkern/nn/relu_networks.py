"""Where :func:`pyflowkern.ops.relu_network` may replace calls of linear layers one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import transformed
from pyflowkern.core.dtypes import autocasts
from pyflowkern.nn._hooks import may_be_read

__all__ = ["linear_layers"]


def linear_layers(
    x: Tensor, layers: Sequence[Any], activations: Sequence[Any]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return weights and biases for the op, or None where the layers must be called.

    They must be called for activations other than ReLU, for layers that were replaced, hooked or parametrized, with
    hooks of all modules (:func:`may_be_read`), under autocast and under a function transform.  Under a compiler they
    are called because it fuses them itself.
    """
    if torch.compiler.is_compiling() or transformed():
        return None
    if x.dim() != 2 or autocasts(x):
        return None
    if not (may_be_read(layers, torch.nn.Linear) and may_be_read(activations, torch.nn.ReLU)):
        return None
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for layer in layers:
        inside = layer.__dict__["_parameters"]  # nn.Module's own look-up takes longer
        if (weight := inside.get("weight")) is None or (bias := inside.get("bias")) is None:
            return None
        if bias.dtype != x.dtype:
            return None
        weights.append(weight)
        biases.append(bias)
    # with a wrong input the layers are called, so that the error is torch's own
    return (weights, biases) if x.shape[1] == weights[0].shape[1] else None
