"""The ops of :mod:`pyflowkern.ops.field`: schemas, fakes and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.core.codes import FieldFlag
from pyflowkern.core.register import register
from pyflowkern.ops._field_reference import (
    ACTIVATIONS,
    exact_reference,
    hutchinson_trace_reference,
    stacked_reference,
)

__all__ = ["FLAT", "IN_CACHE", "KEEP", "NORM", "exact_op", "field_op", "trace_op"]

KEEP, IN_CACHE = FieldFlag.KEEP.value, FieldFlag.IN_CACHE.value
NORM, FLAT = FieldFlag.NORM.value, FieldFlag.FLAT.value


def _kept_columns(weights: Sequence[Tensor]) -> int:
    """Return the columns that a forward keeps for its backward: of every second layer from the last."""
    count = len(weights)
    return sum(
        w.shape[0]
        for i, w in enumerate(weights[:-1])
        if (count - i) % 2 == 0 and (i > 0 or w.shape[1] >= w.shape[0])
    )


def _field_fake(
    x: Tensor,
    probe: Tensor,
    probes: int,
    weights: list[Tensor],
    biases: list[Tensor],
    gates: list[Tensor],
    activation: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = x.shape[0]
    kept = (1 + probes) * n * _kept_columns(weights) if flags & KEEP else 0
    return (
        x.new_empty(x.shape),
        x.new_empty(n) if flags & FLAT else x.new_empty(probes, n),
        x.new_empty(probes if flags & NORM else 0, n),
        x.new_empty(kept),
    )


def _field_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, probe, ctx.probes, weights, biases, gates, ctx.activation, ctx.flags = inputs
    ctx.layers = len(weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, probe, output[3], *weights, *biases, *gates)


def _lists(ctx: Any, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return weights, biases and gates of tensors that were saved one by one."""
    n = ctx.layers
    return parameters[:n], parameters[n : 2 * n], parameters[2 * n :]


def _field_inputs(ctx: Any) -> tuple[Any, ...]:
    x, probe, _, *parameters = ctx.saved_tensors
    return x, probe, ctx.probes, *_lists(ctx, parameters), ctx.activation, ctx.flags


def _field_reference(
    x: Tensor,
    probe: Tensor,
    probes: int,
    weights: list[Tensor],
    biases: list[Tensor],
    gates: list[Tensor],
    activation: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op in plain PyTorch, but for what it keeps."""
    field = weights, biases, gates, ACTIVATIONS[activation]
    y, trace, norm = stacked_reference(x, probe, probes, *field, bool(flags & NORM))
    return y, trace.view(-1) if flags & FLAT else trace, norm


def _field_backward(
    ctx: Any,
    grad_y: Tensor | None,
    grad_trace: Tensor | None,
    grad_norm: Tensor | None,
    _: Tensor | None,
) -> tuple[Any, ...]:
    x, probe, kept, *parameters = ctx.saved_tensors
    if not ctx.flags & NORM:
        grad_norm = None
    grads = grad_y, grad_trace, grad_norm
    grad_x, *lists = _field_backward_op(
        *grads, x, probe, ctx.probes, *_lists(ctx, parameters), kept, ctx.activation, ctx.flags
    )
    return (grad_x, None, None, *lists, None, None)


def _gradients_like(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], gates: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Return new tensors for the gradients of a field's arguments."""
    w, b, g = ([t.new_empty(t.shape) for t in part] for part in (weights, biases, gates))
    return x.new_empty(x.shape), w, b, g


def _field_flops(
    x: torch.Size, probe: torch.Size, probes: int, weights: list[torch.Size], *_: Any
) -> int:
    return 2 * (1 + probes) * x[0] * sum(w.numel() for w in weights)


def _field_backward_flops(
    grad_y: torch.Size | None,
    grad_trace: torch.Size | None,
    grad_norm: torch.Size | None,
    x: torch.Size,
    probe: torch.Size,
    probes: int,
    weights: list[torch.Size],
    *_: Any,
) -> int:
    tangents = 0 if grad_trace is None and grad_norm is None else probes
    of_probes = 2 * tangents * x[0] * weights[0].numel()  # which have no gradient
    return 2 * _field_flops(x, probe, tangents, weights) - of_probes


# probe: [probes, N or 1, D], or the seed of signs; the last result is what is kept for the backward
# pass, which computes the rest again
field_op = register(
    "field_divergence(Tensor x, Tensor probe, SymInt probes, Tensor[] weights, Tensor[] biases, "
    "Tensor[] gates, int activation, int flags) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_field_fake,
    setup_context=_field_setup,
    backward=_field_backward,
    reference=_field_reference,
    inputs=_field_inputs,
    flops=_field_flops,
)
_field_backward_op = register(
    "field_divergence_backward(Tensor? grad_y, Tensor? grad_trace, Tensor? grad_norm, Tensor x, "
    "Tensor probe, SymInt probes, Tensor[] weights, Tensor[] biases, Tensor[] gates, Tensor kept, "
    "int activation, int flags) -> (Tensor, Tensor[], Tensor[], Tensor[])",
    fake=lambda gy, gt, gn, x, probe, probes, *rest: _gradients_like(x, *rest[:3]),
    flops=_field_backward_flops,
)


def _exact_fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    gates: list[Tensor],
    activation: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [w.shape[0] for w in weights[:-1]]
    kept = x.shape[0] * (sum(sizes) + sum(sizes[1:])) if flags & KEEP else 0
    return x.new_empty(x.shape), x.new_empty(x.shape[0]), x.new_empty(kept)


def _exact_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, biases, gates, ctx.activation, ctx.flags = inputs
    ctx.layers = len(weights)
    ctx.save_for_backward(x, output[2], *weights, *biases, *gates)
    ctx.set_materialize_grads(False)


def _exact_inputs(ctx: Any) -> tuple[Any, ...]:
    x, _, *parameters = ctx.saved_tensors
    return x, *_lists(ctx, parameters), ctx.activation, ctx.flags


def _exact_reference(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    gates: list[Tensor],
    activation: int,
    flags: int,
) -> tuple[Tensor, Tensor]:
    """Compute the op in plain PyTorch, but for what it keeps."""
    return exact_reference(x, weights, biases, gates, ACTIVATIONS[activation])


def _exact_backward(
    ctx: Any, grad_y: Tensor | None, grad_trace: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    x, kept, *parameters = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_trace = x.new_zeros(x.shape[0]) if grad_trace is None else grad_trace
    lists = _lists(ctx, parameters)
    grad_x, *grad_lists = _exact_backward_op(
        grad_y, grad_trace, x, *lists, kept, ctx.activation, ctx.flags
    )
    return grad_x, *grad_lists, None, None


def _exact_flops(x: torch.Size, weights: list[torch.Size], *_: Any) -> int:
    flops = 2 * x[0] * sum(w.numel() for w in weights)
    if len(weights) == 2:
        return flops
    between = weights[
        1
    ].numel()  # the trace needs a product of this size for each feature and each sample
    return flops + 2 * (x[1] + x[0]) * between


exact_op = register(
    "field_exact(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] gates, int activation, "
    "int flags) -> (Tensor, Tensor, Tensor)",
    fake=_exact_fake,
    setup_context=_exact_setup,
    backward=_exact_backward,
    reference=_exact_reference,
    inputs=_exact_inputs,
    flops=_exact_flops,
)
_exact_backward_op = register(
    "field_exact_backward(Tensor grad_y, Tensor grad_trace, Tensor x, Tensor[] weights, "
    "Tensor[] biases, Tensor[] gates, Tensor kept, int activation, int flags)"
    " -> (Tensor, Tensor[], Tensor[], Tensor[])",
    fake=lambda grad_y, grad_trace, x, *rest: _gradients_like(x, *rest[:3]),
    flops=lambda grad_y, grad_trace, x, weights, *_: 2 * _exact_flops(x, weights),
)


def _trace_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _trace_backward(
    ctx: Any, grad_trace: Tensor | None, grad_norm: Tensor | None
) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor, Tensor] = _trace_backward_op(grad_trace, grad_norm, *ctx.saved_tensors)
    return grads


trace_op = register(
    "hutchinson_trace(Tensor e, Tensor je) -> (Tensor, Tensor)",
    fake=lambda e, je: (e.new_empty(e.shape[0]), e.new_empty(e.shape[0])),
    setup_context=_trace_setup,
    backward=_trace_backward,
    reference=hutchinson_trace_reference,
    inputs=lambda ctx: ctx.saved_tensors,
)
_trace_backward_op = register(
    "hutchinson_trace_backward(Tensor? grad_trace, Tensor? grad_norm, Tensor e, Tensor je)"
    " -> (Tensor, Tensor)",
    fake=lambda t, n, e, je: (torch.empty_like(e), torch.empty_like(je)),
)
