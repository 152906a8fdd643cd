r"""Networks of linear layers and ReLUs as one op: what the couplings of most flows are conditioned by.

Plain layers are :math:`h_l = W_l\, r(h_{l-1}) + b_l` with :math:`r(h) = \max(h, 0)`, the first of them
without the ReLU and with a context added; residual networks have blocks
:math:`h \leftarrow h + W'' r(W' r(h) + b') + b''` between the first and the last layer.
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

__all__ = ["relu_network", "relu_network_reference"]

_DTYPES = (torch.float32, torch.float64)


# --- public functions ----------------------------------------------------------------------------


def relu_network(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    context: Tensor | None = None,
    residual: bool = False,
    activate_last: bool = True,
) -> Tensor:
    r"""Evaluate a network of linear layers and ReLUs.

    With :math:`r(h) = \max(h, 0)` and the context :math:`c`, the layers are :math:`h_1 = W_1 x + b_1 + c` and
    :math:`h_l = W_l\, r(h_{l-1}) + b_l`; with ``residual`` two layers between the first and the last make
    :math:`h \leftarrow h + W'' r(W' r(h) + b') + b''`.

    On the CPU all layers of a few samples run before the next samples are read, so that activations stay
    in cache, and no layer waits for the threads of another.  The inputs of the layers are kept for the
    backward pass, ``N`` numbers a hidden unit.

    Args:
        x: ``[N, in]``, float32 or float64 for the kernel.
        weights: of each layer, ``[out, in]``; two at least.
        biases: of each layer, ``[out]``.
        context: added to the output of the first layer, ``[N, out]``; None for none.
        residual: the layers between the first and the last are pairs, each a residual block.
        activate_last: a ReLU before the last layer, too; plain networks always have it.

    Returns:
        ``[N, out]`` of the last layer.

    Raises:
        TypeError: for tensors that are not floating-point, or of different dtypes.
        ValueError: for shapes that do not fit, fewer than two layers, an odd number of layers between the
            first and the last with ``residual``, or tensors on different devices.

    Source: He et al., "Identity mappings in deep residual networks" (2016), for the residual form.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import relu_network
        >>> w = [torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, 1.0]])]
        >>> relu_network(torch.tensor([[-3.0], [2.0]]), w, [torch.zeros(2), torch.ones(1)]).tolist()
        [[4.0], [3.0]]
    """
    residual = check_flag("residual", residual)
    activate_last = check_flag("activate_last", activate_last)
    _check(x, weights, biases, context, residual, activate_last)
    return evaluate_network(x, list(weights), list(biases), context, residual, activate_last)


def evaluate_network(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    context: Tensor | None,
    residual: bool,
    activate_last: bool,
) -> Tensor:
    """Do what :func:`relu_network` does, with arguments that have been checked."""
    if not kernel_serves("relu_network", x, context, *weights, *biases, dtypes=_DTYPES):
        return _reference(x, context, weights, biases, residual, activate_last)
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, context, *weights, *biases)
    )
    out: Tensor = _op(x, context, weights, biases, residual, activate_last, keep)[0]
    return out


# --- reference -----------------------------------------------------------------------------------


def relu_network_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    context: Tensor | None = None,
    residual: bool = False,
    activate_last: bool = True,
) -> Tensor:
    """Compute :func:`relu_network` in plain PyTorch."""
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
        return functional.linear(h, weights[i], biases[i])

    return run_layers(x, context, layer, len(weights), residual, activate_last)


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
    if x.dim() != 2:
        raise ValueError(f"x must have shape [N, in], got {tuple(x.shape)}")
    check_layers(x, weights, biases, context, residual, activate_last, _check_weight)


def _check_weight(i: int, weight: Tensor, size: int, hidden: int | None) -> None:
    """Raise unless it is ``[out, size]`` with, if given, ``hidden`` outputs."""
    if weight.dim() != 2 or weight.shape[1] != size or hidden not in (None, weight.shape[0]):
        want = f"[{'out' if hidden is None else hidden}, {size}]"
        raise ValueError(f"weights[{i}] must have shape {want}, got {tuple(weight.shape)}")


# --- ops -----------------------------------------------------------------------------------------


def _padded(size: int) -> int:
    """Return the step between rows of ``size`` numbers, as the kernel keeps them."""
    padded = (size + 15) // 16 * 16
    return padded + 16 if padded % 64 == 0 else padded


def _fake(
    x: Tensor,
    context: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: bool,
    activate_last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    kept = sum(_padded(w.shape[1]) for w in weights[1:]) * n if keep else 0
    return x.new_empty(n, weights[-1].shape[0]), x.new_empty(kept)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, context, weights, biases, ctx.residual, ctx.activate_last, ctx.kept = inputs
    ctx.layers = len(weights)
    ctx.save_for_backward(x, context, output[1], *weights, *biases)
    ctx.set_materialize_grads(False)


def _inputs(ctx: Any) -> tuple[Any, ...]:
    x, context, _, *parameters = ctx.saved_tensors
    n = ctx.layers
    return x, context, parameters[:n], parameters[n:], ctx.residual, ctx.activate_last, ctx.kept


def _op_reference(*inputs: Any) -> Tensor:
    """Do what the op does, but for what it keeps."""
    return _reference(*inputs[:-1])


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, context, kept, *parameters = ctx.saved_tensors
    weights = parameters[: ctx.layers]
    if grad is None:
        grad = x.new_zeros(x.shape[0], weights[-1].shape[0])
    if not ctx.kept:  # a graph exported without gradients kept nothing, and may meet them later
        return tuple(gradient_of_reference(_op_reference, _inputs(ctx), (grad,)))
    with_context = context is not None
    form = ctx.residual, ctx.activate_last, x.requires_grad, with_context
    grad_x, grad_context, *lists = _backward_op(grad, x, weights, kept, *form)
    return (
        grad_x if x.requires_grad else None,
        grad_context if with_context else None,
        *lists,
        *[None] * 3,
    )


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    kept: Tensor,
    residual: bool,
    activate_last: bool,
    with_x: bool,
    with_context: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    n, hidden = x.shape[0], weights[0].shape[0]
    return (
        x.new_empty(n if with_x else 0, x.shape[1]),
        x.new_empty(n if with_context else 0, hidden),
        [w.new_empty(w.shape) for w in weights],
        [w.new_empty(w.shape[0]) for w in weights],
    )


def _flops(x: torch.Size, context: torch.Size | None, weights: list[torch.Size], *_: Any) -> int:
    return 2 * x[0] * sum(w.numel() for w in weights)


def _backward_flops(
    grad: torch.Size, x: torch.Size, weights: list[torch.Size], *others: Any
) -> int:
    *_, with_x, _ = others
    unneeded = 0 if with_x else 2 * x[0] * weights[0].numel()
    return 2 * _flops(x, None, weights) - unneeded


# the second result is what is kept for the backward pass: the inputs of all layers but the first
_op = register(
    "relu_network(Tensor x, Tensor? context, Tensor[] weights, Tensor[] biases, bool residual, "
    "bool activate_last, bool keep) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    reference=_op_reference,
    inputs=_inputs,
    flops=_flops,
)
_backward_op = register(
    "relu_network_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor kept, bool residual, "
    "bool activate_last, bool with_x, bool with_context) -> (Tensor, Tensor, Tensor[], Tensor[])",
    fake=_backward_fake,
    flops=_backward_flops,
)
