"""What networks with ReLUs between their layers have in common, linear ones and those of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pyflowkern.core.checks import (
    check_floating,
    check_list,
    check_same_device,
    check_shape,
)
from pyflowkern.core.dtypes import full_precision

__all__ = ["check_layers", "run_layers"]


def run_layers(
    x: Tensor,
    context: Tensor | None,
    layer: Callable[[int, Tensor], Tensor],
    count: int,
    residual: bool,
    activate_last: bool,
) -> Tensor:
    """Evaluate a network in plain PyTorch.

    Args:
        x: the input of the first layer.
        context: added to the output of the first layer.
        layer: computes layer ``i`` of an input.
        count: number of layers.
        residual: the layers between the first and the last are pairs, each a residual block.
        activate_last: a ReLU before the last layer, too.
    """
    last = count - 1
    with full_precision(x):  # the kernel computes in the dtype of its arguments
        h = layer(0, x)
        if context is not None:
            h = h + context
        for i in range(1, last, 2 if residual else 1):
            inner = layer(i, h.relu())
            h = h + layer(i + 1, inner.relu()) if residual else inner
        return layer(last, h.relu() if activate_last else h)


def check_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    residual: bool,
    activate_last: bool,
    check_weight: Callable[[int, Tensor, int, int | None], None],
) -> None:
    """Raise where layers, context and form do not fit each other.

    Args:
        x: ``[N, in, ...]``.
        weights: of each layer, ``[out, in, ...]``.
        biases: of each layer, ``[out]``.
        context: ``[N, out]`` of the first layer, or None.
        residual: whether the layers between the first and the last are pairs.
        activate_last: whether a ReLU stands before the last layer.
        check_weight: raises unless weight ``i`` has this many inputs and, if given, this many outputs.
    """
    for name, tensors in (("weights", weights), ("biases", biases)):
        check_list(name, tensors)
    count = len(weights)
    if count < 2 or len(biases) != count:
        raise ValueError(
            f"weights and biases must have one entry for each of at least two layers, "
            f"got {count} and {len(biases)}"
        )
    if residual and count % 2:
        raise ValueError(f"residual blocks are pairs of layers, got {count - 2} between the ends")
    if not residual and not activate_last:
        raise ValueError("activate_last=False is for residual networks, got residual=False")
    size = x.shape[1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_floating(f"weights[{i}]", weight)
        check_floating(f"biases[{i}]", bias)
        check_weight(
            i, weight, size, weights[0].shape[0] if residual and 0 < i < count - 1 else None
        )
        size = weight.shape[0]
        check_shape(f"biases[{i}]", bias, (size,))
        if weight.dtype != x.dtype or bias.dtype != x.dtype:
            raise TypeError(
                f"weights[{i}] and biases[{i}] must have the dtype of x, {x.dtype}, "
                f"got {weight.dtype} and {bias.dtype}"
            )
        check_same_device(x=x, weight=weight, bias=bias)
    if context is not None:
        check_floating("context", context)
        check_shape("context", context, (x.shape[0], weights[0].shape[0]))
        if context.dtype != x.dtype:
            raise TypeError(f"context must have the dtype of x, {x.dtype}, got {context.dtype}")
        check_same_device(x=x, context=context)
