"""Where :func:`pyflowkern.ops.relu_network` may stand for calling linear layers one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import transformed
from pyflowkern.core.dtypes import autocasts

__all__ = ["linear_layers"]


def linear_layers(
    x: Tensor, layers: Sequence[Any], activations: Sequence[Any]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return the weights and the biases where the op may stand for the layers, else None.

    None where someone would notice: activations other than ReLU, layers that were replaced, hooked or
    parametrized, autocast, a function transform, or a compiler, which does the same by itself.
    """
    if torch.compiler.is_compiling() or transformed():
        return None
    if x.dim() != 2 or autocasts(x):
        return None
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for modules, kind in ((layers, torch.nn.Linear), (activations, torch.nn.ReLU)):
        for module in modules:
            known = module.__dict__  # nn.Module's own look-up takes longer
            if type(module) is not kind or known["_forward_hooks"] or known["_forward_pre_hooks"]:
                return None
            if known["_backward_hooks"] or known["_backward_pre_hooks"]:
                return None
            if kind is torch.nn.Linear:
                inside = known["_parameters"]
                if (bias := inside["bias"]) is None or bias.dtype != x.dtype:
                    return None
                weights.append(inside["weight"])
                biases.append(bias)
    # a wrong input is left to the layers, whose errors are known
    return (weights, biases) if x.shape[1] == weights[0].shape[1] else None
