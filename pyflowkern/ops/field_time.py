r"""Biases and gates of all layers of a field at a time: one op forward and one backward.

With "concat" a layer's bias is :math:`b + t w`; with "concatsquash" (Grathwohl et al. 2019) its gate is
:math:`g = \mathrm{sigmoid}(c + t u)` and its bias :math:`g b + t v`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.lists import quick_apply
from pyflowkern.core.register import register
from pyflowkern.core.second_derivatives import gradient_of_reference, wants_reference

__all__ = ["TIMES", "at_time", "at_time_reference"]

#: How time enters a field: not at all, or as the module says.
TIMES = ("none", "concat", "concatsquash")

_DTYPES = (torch.float32, torch.float64)
_MOST_LAYERS = 16  # that the kernel takes

Pair = tuple[list[Tensor], list[Tensor]]


def at_time(time: Tensor, biases: Sequence[Tensor], rows: Sequence[Tensor]) -> Pair:
    """Return biases and gates of the layers at a time.

    Args:
        time: a scalar, or ``[N]`` for times of each sample.
        biases: ``[out]`` of each layer.
        rows: of each layer, ``w`` as ``[1, out]``, or ``u``, ``c`` and ``v`` as ``[3, out]``.

    Returns:
        Biases and gates, of "concat" none; ``[out]`` each, or ``[N, out]``.
    """
    if (
        torch.compiler.is_compiling()
        or not biases
        or any(t.dtype != time.dtype for t in (*biases, *rows))
        or not kernel_serves("field_time", time, *biases, *rows, dtypes=_DTYPES)
        or (time.dim() > 0 and rows[0].shape[0] > 1)
    ):
        return at_time_reference(time, biases, rows)
    if time.dim():
        return list(_at_times(time, *biases, *rows)), []
    if len(biases) > _MOST_LAYERS:
        return at_time_reference(time, biases, rows)
    count, parameters = len(biases), (*biases, *rows)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(time, *parameters):
        outputs = list(_AtTime.apply(time, *parameters))  # type: ignore[no-untyped-call]
    else:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _op(time, list(biases), list(rows))
    return outputs[:count], outputs[count:]


def at_time_reference(time: Tensor, biases: Sequence[Tensor], rows: Sequence[Tensor]) -> Pair:
    """Compute :func:`at_time` in plain PyTorch, of all layers at once: small calls take their time."""
    sizes = [b.shape[0] for b in biases]
    time = time[:, None] if time.dim() else time
    bias = torch.cat(list(biases))
    slope, *rest = torch.cat(list(rows), 1).unbind()
    if not rest:
        return list(torch.addcmul(bias, time, slope).split(sizes, -1)), []
    gate = torch.sigmoid(torch.addcmul(rest[0], time, slope))
    bias = torch.addcmul(time * rest[1], gate, bias)
    return list(bias.split(sizes, -1)), list(gate.split(sizes, -1))


# --- ops -----------------------------------------------------------------------------------------


def _fake(time: Tensor, biases: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
    squash = rows[0].shape[0] == 3
    return [b.new_empty(b.shape) for b in (*biases, *(biases if squash else ()))]


def _backward_fake(
    grads: list[Tensor], time: Tensor, biases: list[Tensor], rows: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    of_biases, of_rows = ([t.new_empty(t.shape) for t in part] for part in (biases, rows))
    return time.new_empty(()), of_biases, of_rows


_op = register(
    "field_time(Tensor time, Tensor[] biases, Tensor[] rows) -> Tensor[]",
    fake=_fake,
)
_backward_op = register(
    "field_time_backward(Tensor[] grads, Tensor time, Tensor[] biases, Tensor[] rows)"
    " -> (Tensor, Tensor[], Tensor[])",
    fake=_backward_fake,
)


class _AtTime(torch.autograd.Function):
    """The op with its gradients: autograd wants the tensors of the lists one by one."""

    @staticmethod
    def forward(ctx: Any, time: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(time, *parameters)
        count = len(parameters) // 2
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_op(time, list(parameters[:count]), list(parameters[count:])))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        time, *parameters = ctx.saved_tensors
        count = len(parameters) // 2
        if wants_reference(*grads):

            def forward(time: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
                biases, gates = at_time_reference(time, p[:count], p[count:])
                return (*biases, *gates)

            return tuple(gradient_of_reference(forward, (time, *parameters), grads))
        of_time, biases, rows = _backward_op(
            list(grads), time, parameters[:count], parameters[count:]
        )
        return (of_time, *biases, *rows)


class _AtTimes(torch.autograd.Function):
    """Biases ``[N, out]`` at times of each sample, with "concat"; gradients of a layer are one product of matrices.

    Autograd's own would multiply and sum ``[N, out]`` numbers several times.
    """

    @staticmethod
    def forward(ctx: Any, time: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(time, *parameters)
        count, column = len(parameters) // 2, time[:, None]
        pairs = zip(parameters[:count], parameters[count:], strict=True)
        return tuple(torch.addcmul(bias, column, row) for bias, row in pairs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        time, *parameters = ctx.saved_tensors
        count = len(parameters) // 2
        if wants_reference(*grads):

            def forward(time: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
                return tuple(at_time_reference(time, p[:count], p[count:])[0])

            return tuple(gradient_of_reference(forward, (time, *parameters), grads))
        of_time = None
        if time.requires_grad:
            of_time = sum(g @ row[0] for g, row in zip(grads, parameters[count:], strict=True))
        factors = torch.stack((torch.ones_like(time), time))
        sums = [factors @ g for g in grads]
        return (of_time, *(s[0] for s in sums), *(s[1:] for s in sums))


_at_times = quick_apply(_AtTimes)
