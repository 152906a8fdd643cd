"""Classifier-free guidance: labels as weights of classes, and the velocity of a guided sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyflowkern._library import transformed
from pyflowkern.core.checks import check_number

__all__ = ["GuidedVelocity", "check_dropout", "check_guidance", "check_labels", "weights_of"]

#: How often labels are left out by default (Ho and Salimans 2022 found 0.1 and 0.2 to do equally well).
DROPOUT = 0.1


class GuidedVelocity(torch.nn.Module):
    r"""The network :math:`f(t, x, \varnothing) + w\,(f(t, x, c) - f(t, x, \varnothing))`, both from one batch.

    Args:
        field: ``f``.
        null: what stands for no context, ``[K]``.
        weight: ``w``.
    """

    def __init__(self, field: torch.nn.Module, null: Tensor, weight: float) -> None:
        super().__init__()
        self.field, self.null, self.weight = field, null, weight

    def forward(self, t: Tensor | float, x: Tensor, context: Tensor) -> Tensor:
        """Return the velocity, shaped like ``x``."""
        if isinstance(t, Tensor) and t.dim():  # a time for each sample
            t = torch.cat([t, t])
        contexts = torch.cat([context, self.null.to(context).expand_as(context)])
        given, without = self.field(t, torch.cat([x, x]), contexts).chunk(2)
        velocity: Tensor = torch.lerp(without, given, self.weight)
        return velocity


def check_guidance(name: str, weight: float, dropout: float) -> float:
    """Return the weight of guidance; raise where the flow never learned to do without a context."""
    number = check_number(name, weight)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {weight}")
    if number != 1 and not dropout:
        raise ValueError(f"{name} must be 1 in a flow made with context_dropout=0, got {weight}")
    return number


def check_dropout(dropout: float | None, classes: int, features: int) -> float:
    """Return how often contexts are left out in training; raise where there are none."""
    if dropout is None:
        return DROPOUT if classes else 0.0
    share = check_number("context_dropout", dropout)
    if not 0 <= share < 1:
        raise ValueError(f"context_dropout must be from 0 to below 1, got {dropout}")
    if share and not (classes or features):
        raise ValueError(
            f"context_dropout must be 0 without classes or context_features, got {dropout}"
        )
    return share


def check_labels(context: Tensor, n: int, features: int) -> None:
    """Raise unless the labels of ``n`` samples are ``[n]``, ``[1]`` or ``[]``; their weights are checked elsewhere."""
    shape = tuple(context.shape)
    if context.is_floating_point():
        if len(shape) < 2 and shape != (features,):
            raise TypeError(f"context must be labels of torch.int64, got {context.dtype}")
    elif len(shape) > 1:
        raise TypeError(
            f"context must be labels ({n},) of torch.int64 or floating weights of classes, "
            f"got {context.dtype} of shape {shape}"
        )
    elif shape not in ((), (1,), (n,)):
        raise ValueError(f"context must be labels of shape ({n},), got {shape}")


def weights_of(labels: Tensor, classes: int, features: int, dtype: torch.dtype) -> Tensor:
    """Return labels ``[...]`` as one-hot weights ``[..., features]``.

    Raises:
        TypeError: for another dtype than int64.
        ValueError: for labels that are none of the classes.  Where a compiler or a function transform sees them they
            give NaN instead.
    """
    if labels.dtype != torch.int64:
        raise TypeError(f"context must be labels of torch.int64, got {labels.dtype}")
    known = not (torch.compiler.is_compiling() or transformed() or labels.is_meta)
    if known and labels.numel():
        low, high = (int(end) for end in torch.aminmax(labels))
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ValueError(
                f"context must be labels from 0 to {classes - 1}, one of them is {wrong}"
            )
    classes_of = torch.arange(features, device=labels.device)
    weights = (labels[..., None] == classes_of).to(dtype)
    if known:
        return weights
    return weights.masked_fill(((labels < 0) | (labels >= classes))[..., None], torch.nan)
