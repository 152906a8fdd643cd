r"""Networks of convolutions and ReLUs as one op: what the couplings of flows on images are conditioned by.

Plain layers are :math:`h_l = W_l * r(h_{l-1}) + b_l` with :math:`r(h) = \max(h, 0)`, the first of them without the
ReLU and with a context added; residual networks have blocks :math:`h \leftarrow h + W'' * r(W' * r(h) + b') + b''`
between the first and the last layer.  The filters are 3x3 or 1x1, with zeros around the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern._library import kernel_serves
from pyflowkern.core.checks import check_flag, check_floating
from pyflowkern.core.register import register
from pyflowkern.core.second_derivatives import gradient_of_reference
from pyflowkern.ops._relu_layers import check_layers, run_layers

__all__ = ["conv_network", "conv_network_reference"]

_DTYPES = (torch.float32, torch.float64)


# --- public functions ----------------------------------------------------------------------------


def conv_network(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    context: Tensor | None = None,
    residual: bool = False,
    activate_last: bool = True,
) -> Tensor:
    r"""Evaluate a network of 3x3 and 1x1 convolutions and ReLUs.

    With :math:`r(h) = \max(h, 0)` and the context :math:`c`, the same at all pixels, the layers are
    :math:`h_1 = W_1 * x + b_1 + c` and :math:`h_l = W_l * r(h_{l-1}) + b_l`; with ``residual`` two layers between the
    first and the last make :math:`h \leftarrow h + W'' * r(W' * r(h) + b') + b''`.  Images have zeros around them, so
    that all layers have as many pixels.

    On the CPU all layers of a few images run before the next images are read, so that activations stay in cache,
    and no layer waits for the threads of another.  The inputs of all layers but the first are kept for the backward
    pass, as many numbers as torch's convolutions keep.

    Args:
        x: ``[N, in, H, W]``, float32 or float64 for the kernel.
        weights: of each layer, ``[out, in, k, k]`` with ``k`` 1 or 3; two at least.
        biases: of each layer, ``[out]``.
        context: added to the output of the first layer, ``[N, out]``; None for none.
        residual: the layers between the first and the last are pairs, each a residual block.
        activate_last: a ReLU before the last layer, too; plain networks always have it.

    Returns:
        ``[N, out, H, W]`` of the last layer, in the memory format of ``x``.

    Raises:
        TypeError: for tensors that are not floating-point, or of different dtypes.
        ValueError: for shapes that do not fit, images without pixels, layers without channels, fewer than two layers,
            an odd number of layers between the first and the last with ``residual``, or tensors on different devices.

    Source: Kingma and Dhariwal, "Glow: Generative flow with invertible 1x1 convolutions" (2018); He et al., "Identity
    mappings in deep residual networks" (2016), for the residual form.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import conv_network
        >>> w = [torch.ones(1, 1, 3, 3), -torch.ones(1, 1, 1, 1)]
        >>> conv_network(torch.ones(1, 1, 2, 3), w, [torch.zeros(1), torch.ones(1)]).tolist()
        [[[[-3.0, -5.0, -3.0], [-3.0, -5.0, -3.0]]]]
    """
    residual = check_flag("residual", residual)
    activate_last = check_flag("activate_last", activate_last)
    _check(x, weights, biases, context, residual, activate_last)
    return evaluate_convolutions(x, list(weights), list(biases), context, residual, activate_last)


def evaluate_convolutions(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    context: Tensor | None,
    residual: bool,
    activate_last: bool,
) -> Tensor:
    """Do what :func:`conv_network` does, with arguments that have been checked."""
    if not kernel_serves("conv_network", x, context, *weights, *biases, dtypes=_DTYPES):
        return _reference(x, context, weights, biases, residual, activate_last)
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, context, *weights, *biases)
    )
    channels_last = x.stride(1) == 1 < x.stride(3)
    form = residual, activate_last, channels_last, keep
    out: Tensor = _op(x, context, weights, biases, *form)[0]
    return out


# --- reference -----------------------------------------------------------------------------------


def conv_network_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    context: Tensor | None = None,
    residual: bool = False,
    activate_last: bool = True,
) -> Tensor:
    """Compute :func:`conv_network` in plain PyTorch."""
    residual = check_flag("residual", residual)
    activate_last = check_flag("activate_last", activate_last)
    _check(x, weights, biases, context, residual, activate_last)
    return _reference(x, context, weights, biases, residual, activate_last)


def _reference(
    x: Tensor,
    context: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: bool,
    activate_last: bool,
) -> Tensor:
    def layer(i: int, h: Tensor) -> Tensor:
        return functional.conv2d(h, weights[i], biases[i], padding=weights[i].shape[2] // 2)

    each = None if context is None else context[:, :, None, None]
    return run_layers(x, each, layer, len(weights), residual, activate_last)


# --- argument checks -----------------------------------------------------------------------------


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    context: Tensor | None,
    residual: bool,
    activate_last: bool,
) -> None:
    check_floating("x", x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"x must have shape [N, in, H, W] with at least one channel and pixel, got {tuple(x.shape)}"
        )
    check_layers(x, weights, biases, context, residual, activate_last, _check_weight)


def _check_weight(i: int, weight: Tensor, size: int, hidden: int | None) -> None:
    """Raise unless it is ``[out, size, k, k]`` with ``k`` 1 or 3 and, if given, ``hidden`` outputs."""
    shape = tuple(weight.shape)
    fits = weight.dim() == 4 and shape[1] == size and shape[2:] in ((1, 1), (3, 3)) and shape[0]
    if not fits or hidden not in (None, shape[0]):
        want = f"[{'out' if hidden is None else hidden}, {size}, k, k] with k 1 or 3"
        raise ValueError(f"weights[{i}] must have shape {want}, got {shape}")


# --- ops -----------------------------------------------------------------------------------------


def _images(like: Tensor, samples: int, channels: int, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return like.new_empty(samples, channels, *like.shape[2:]).contiguous(memory_format=layout)


def _kept_numbers(x: Tensor, weights: list[Tensor]) -> int:
    """Return how many numbers the kernel keeps of the inputs of all layers but the first."""
    plane = (x.shape[2] * x.shape[3] + 15) // 16 * 16
    images = max(128 // plane, 1)  # of a group
    row = images * plane + 16
    row += 16 * (row % 64 == 0)
    groups = (x.shape[0] + images - 1) // images
    return groups * (16 + sum(w.shape[1] for w in weights[1:]) * row) + 16


def _fake(
    x: Tensor,
    context: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: bool,
    activate_last: bool,
    channels_last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    out = _images(x, x.shape[0], weights[-1].shape[0], channels_last)
    return out, x.new_empty(_kept_numbers(x, weights) if keep else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, context, weights, biases, *ctx.form = inputs
    ctx.layers = len(weights)
    ctx.save_for_backward(x, context, output[1], *weights, *biases)
    ctx.set_materialize_grads(False)


def _inputs(ctx: Any) -> tuple[Any, ...]:
    x, context, _, *parameters = ctx.saved_tensors
    n = ctx.layers
    return x, context, parameters[:n], parameters[n:], *ctx.form


def _op_reference(*inputs: Any) -> Tensor:
    """Do what the op does, but for what it keeps and the memory format."""
    return _reference(*inputs[:-2])


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, context, kept, *parameters = ctx.saved_tensors
    weights = parameters[: ctx.layers]
    *form, was_kept = ctx.form
    if grad is None:
        grad = x.new_zeros(x.shape[0], weights[-1].shape[0], *x.shape[2:])
    if not was_kept:  # a graph exported without gradients kept nothing, and may meet them later
        return tuple(gradient_of_reference(_op_reference, _inputs(ctx), (grad,)))
    with_context = context is not None
    found = _backward_op(grad, x, weights, kept, *form, x.requires_grad, with_context)
    grad_x, grad_context, *lists = found
    return (
        grad_x if x.requires_grad else None,
        grad_context if with_context else None,
        *lists,
        *[None] * 4,
    )


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    kept: Tensor,
    residual: bool,
    activate_last: bool,
    channels_last: bool,
    with_x: bool,
    with_context: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    n, hidden = x.shape[0], weights[0].shape[0]
    return (
        _images(x, n if with_x else 0, x.shape[1], channels_last),
        x.new_empty(n if with_context else 0, hidden),
        [w.new_empty(w.shape) for w in weights],
        [w.new_empty(w.shape[0]) for w in weights],
    )


def _flops(x: torch.Size, context: torch.Size | None, weights: list[torch.Size], *_: Any) -> int:
    return 2 * x[0] * x[2] * x[3] * sum(w.numel() for w in weights)


def _backward_flops(
    grad: torch.Size, x: torch.Size, weights: list[torch.Size], *others: Any
) -> int:
    *_, with_x, _ = others
    unneeded = 0 if with_x else _flops(x, None, weights[:1])
    return 2 * _flops(x, None, weights) - unneeded


# the second result is what is kept for the backward pass: the inputs of all layers but the first
_op = register(
    "conv_network(Tensor x, Tensor? context, Tensor[] weights, Tensor[] biases, bool residual, "
    "bool activate_last, bool channels_last, bool keep) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    reference=_op_reference,
    inputs=_inputs,
    flops=_flops,
)
_backward_op = register(
    "conv_network_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor kept, bool residual, "
    "bool activate_last, bool channels_last, bool with_x, bool with_context) "
    "-> (Tensor, Tensor, Tensor[], Tensor[])",
    fake=_backward_fake,
    flops=_backward_flops,
)
