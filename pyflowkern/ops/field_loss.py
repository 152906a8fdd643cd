r"""The squared error of a field of dense layers, with its gradients in one pass: what flow matching is trained by.

Layers are :math:`h_l = \sigma(W_l h_{l-1} + R_l^T c + b_l)`, the last without :math:`\sigma`, where the inputs ``c``,
such as the time of each sample, enter every layer.  The loss is

.. math:: \operatorname{mean}_{n,j}\, w_n (s_n y_{nj} - u_{nj})^2 .

On the CPU the forward pass computes the gradients, too: a tile of samples goes through all layers and back before the
next one is loaded, so that no activation is kept in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern._library import kernel_serves, observed
from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.core.dtypes import full_precision
from pyflowkern.core.lists import quick_apply
from pyflowkern.core.register import register
from pyflowkern.core.second_derivatives import gradient_of_reference, wants_reference

__all__ = ["field_loss", "field_loss_reference", "serves_field_loss"]

_DTYPES = (torch.float32, torch.float64)
_KINDS = tuple(ACTIVATIONS)
#: Wider layers are left to products of all samples: every task has sums as large as the weights.
_WIDEST = 512


def serves_field_loss(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a kernel computes the loss at such states: else layers, or other ops, are as good."""
    if torch.compiler.is_compiling() or not kernel_serves("field_loss", x, dtypes=_DTYPES):
        return False
    return all(max(weight.shape) <= _WIDEST for weight in weights)


def field_loss(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    joined: Tensor | None = None,
    rows: Sequence[Tensor] = (),
    activation: str = "tanh",
    scale: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Return the mean squared error, a scalar; arguments have been checked.

    Args:
        x: states ``[N, in]``, float32 or float64.
        target: ``[N, out]``, as all tensors of the dtype of ``x``.
        weights: of each layer, ``[out, in]``.
        biases: of each layer, ``[out]``.
        joined: inputs of every layer, ``[N, K]``; None for none.
        rows: their coefficients in each layer, ``[K, out]``.
        activation: one of :data:`pyflowkern.core.activations.ACTIVATIONS`.
        scale: factor on the outputs of each sample, ``[N]``; None for 1.
        weight: factor on the squared errors of each sample, ``[N]``; None for 1.
    """
    kind = _KINDS.index(activation)
    parameters = (*weights, *biases, *rows)
    others = (target, joined, scale, weight, *parameters)
    if not serves_field_loss(x, weights) or any(
        t is not None and (t.dtype != x.dtype or t.device != x.device) for t in others
    ):
        return _reference(x, target, joined, scale, weight, weights, biases, rows, kind)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, *others):
        loss: Tensor = _loss(len(weights), kind, x, target, joined, scale, weight, *parameters)
        return loss
    lists = list(weights), list(biases), list(rows)
    value: Tensor = _op(x, target, joined, scale, weight, *lists, kind, False, False)[0]
    return value


def field_loss_reference(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    joined: Tensor | None = None,
    rows: Sequence[Tensor] = (),
    activation: str = "tanh",
    scale: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute :func:`field_loss` in plain PyTorch."""
    kind = _KINDS.index(activation)
    return _reference(x, target, joined, scale, weight, weights, biases, rows, kind)


def _reference(
    x: Tensor,
    target: Tensor,
    joined: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Sequence[Tensor],
    activation: int,
    *_: Any,
) -> Tensor:
    h = x
    with full_precision(x):
        for i, (w, bias) in enumerate(zip(weights, biases, strict=True)):
            h = functional.linear(h, w, bias)
            if joined is not None:
                h = h + joined @ rows[i]
            if i < len(weights) - 1:
                h = ACTIVATIONS[_KINDS[activation]](h)
    error = (h if scale is None else scale[:, None] * h) - target
    square = error.square()
    return (square if weight is None else weight[:, None] * square).mean()


# --- op ------------------------------------------------------------------------------------------


def _fake(
    x: Tensor,
    target: Tensor,
    joined: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    rows: list[Tensor],
    activation: int,
    keep: bool,
    inputs: bool,
) -> tuple[Tensor, list[Tensor]]:
    of_inputs = [t for t in (x, target, joined) if t is not None] if inputs else []
    kept = [*weights, *biases, *rows, *of_inputs] if keep else []
    return x.new_empty(()), [t.new_empty(t.shape) for t in kept]


def _flops(
    x: torch.Size,
    target: torch.Size,
    joined: torch.Size | None,
    scale: torch.Size | None,
    weight: torch.Size | None,
    weights: list[torch.Size],
    biases: list[torch.Size],
    rows: list[torch.Size],
    activation: int,
    keep: bool,
    inputs: bool,
) -> int:
    """Count the gradients, too."""
    forward = 2 * x[0] * sum(w.numel() for w in (*weights, *rows))
    if not keep:
        return forward
    unneeded = 0 if inputs else 2 * x[0] * sum(w.numel() for w in (weights[0], *rows))
    return 3 * forward - unneeded


# with ``keep`` also the gradients: of weights, biases and rows, with ``inputs`` of x, the target and what is joined
_op = register(
    "field_loss(Tensor x, Tensor target, Tensor? joined, Tensor? scale, Tensor? weight, Tensor[] weights, "
    "Tensor[] biases, Tensor[] rows, int activation, bool keep, bool inputs) -> (Tensor, Tensor[])",
    fake=_fake,
    flops=_flops,
)


class _FieldLoss(torch.autograd.Function):
    """The op with its gradients.  They are given away once; a second backward pass computes them anew."""

    @staticmethod
    def forward(ctx: Any, layers: int, kind: int, *tensors: Tensor | None) -> Tensor:
        ctx.layers, ctx.kind = layers, kind
        ctx.inputs = any(ctx.needs_input_grad[2:5])
        ctx.save_for_backward(*tensors)
        loss: Tensor
        loss, ctx.gradients = _FieldLoss.run(ctx, tensors)
        return loss

    @staticmethod
    def run(ctx: Any, tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and its gradients."""
        return _op(*_FieldLoss.arguments(ctx, tensors), True, ctx.inputs)  # type: ignore[no-any-return]

    @staticmethod
    def arguments(ctx: Any, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Return what was given, the parameters as lists."""
        n, parameters = ctx.layers, list(tensors[5:])
        lists = parameters[:n], parameters[n : 2 * n], parameters[2 * n :]
        return *tensors[:5], *lists, ctx.kind

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if wants_reference(grad) or any(ctx.needs_input_grad[5:7]):  # of scale and weight
            given = _FieldLoss.arguments(ctx, ctx.saved_tensors)
            found = gradient_of_reference(_reference, given, (grad,))
            lists = [part or [] for part in found[5:8]]
            return None, None, *found[:5], *itertools.chain(*lists)
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = _FieldLoss.run(ctx, ctx.saved_tensors)[1]
        if observed() or type(grad) is not Tensor or float(grad) != 1:  # who traces has no numbers
            torch._foreach_mul_(gradients, grad)
        of_inputs: list[Tensor | None] = [None, None, None]
        if ctx.inputs:  # x, the target, and if it was given what is joined
            count = len(ctx.needs_input_grad) - 7
            of_inputs[: len(gradients) - count] = gradients[count:]
            gradients = gradients[:count]
        return None, None, *of_inputs, None, None, *gradients


_loss = quick_apply(_FieldLoss)
