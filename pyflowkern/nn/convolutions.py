"""Where :func:`pyflowkern.ops.conv_network` may replace calls of convolutions one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import transformed
from pyflowkern.core.dtypes import autocasts
from pyflowkern.nn._hooks import may_be_read

__all__ = ["convolutions"]

#: Measured: of smaller images vectors stay half empty, and wider layers leave nothing to gain over torch's; the more
#: pixels, the wider.
_WIDEST = ((256, 512), (64, 256), (16, 128))
#: The op gives an image to one thread; torch divides it, which is worth it from so many pixels on.
_PIXELS_OF_A_THREAD = 1024


def convolutions(
    x: Tensor, layers: Sequence[Any], activations: Sequence[Any]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return weights and biases for the op, or None where the layers must be called, or are faster.

    They must be called for other activations than one ReLU (or LeakyReLU of slope 0) between any two, for layers that
    were replaced, hooked or parametrized, with hooks of all modules (:func:`may_be_read`), under autocast and under a
    function transform.  Under a compiler they are called because it fuses them itself, and under ``torch.jit.trace``,
    which knows torch's alone.
    """
    if torch.compiler.is_compiling() or transformed() or torch._C._get_tracing_state() is not None:
        return None
    if x.dim() != 4 or x.device.type != "cpu" or autocasts(x):
        return None
    widest = _widest(x)
    if not widest:
        return None
    if len(activations) != len(layers) - 1:  # something was appended
        return None
    if not (may_be_read(layers, torch.nn.Conv2d) and _are_relus(activations)):
        return None
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for layer in layers:
        inside = layer.__dict__["_parameters"]  # nn.Module's own look-up takes longer
        if (weight := inside.get("weight")) is None or (bias := inside.get("bias")) is None:
            return None
        if bias.dtype != x.dtype or not _keeps_size(layer, weight) or bias.shape[0] > widest:
            return None
        weights.append(weight)
        biases.append(bias)
    # with a wrong input the layers are called, so that the error is torch's own
    return (weights, biases) if x.shape[1] == weights[0].shape[1] else None


def _are_relus(activations: Sequence[Any]) -> bool:
    """Whether all are ReLUs, by whatever name."""
    return may_be_read(activations, torch.nn.ReLU, torch.nn.LeakyReLU) and all(
        getattr(a, "negative_slope", 0.0) == 0 for a in activations
    )


def _widest(x: Tensor) -> int:
    """Return the most channels of layers for which the op is faster, 0 for none."""
    pixels = x.shape[2] * x.shape[3]
    if x.shape[0] * pixels > _PIXELS_OF_A_THREAD and x.shape[0] < torch.get_num_threads():
        return 0
    return next((width for least, width in _WIDEST if pixels >= least), 0)


def _keeps_size(layer: torch.nn.Conv2d, weight: Tensor) -> bool:
    """Whether images stay as large as they are.  As for torch, the weight says how large its filter is."""
    side = weight.shape[-1]
    return (
        side in (1, 3)
        and weight.shape[2:] == (side, side)
        and layer.padding == (side // 2, side // 2)
        and layer.stride == (1, 1)
    )
