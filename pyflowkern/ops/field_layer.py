r"""What follows the product of a field's layer: bias, gate and activation of a primal and its tangents.

For layers whose products come from elsewhere, such as convolutions.  With the product ``p`` and, for
tangents, :math:`\dot p`,

.. math:: h = f(a),\quad \dot h = f'(a) \odot g \odot \dot p, \qquad a = g \odot p + b,

and with cotangents :math:`q, \dot q` of :math:`h, \dot h` the VJP is
:math:`\dot A = f'(a) \dot q,\; A = f'(a) q + f''(a) \sum g \dot p\, \dot q`: cotangents of :math:`p, \dot p` are
:math:`g A, g \dot A`, of ``b`` it is :math:`A`, of ``g`` it is :math:`A p + \sum \dot A \dot p`.  Of tanh and softplus
:math:`f'` and :math:`f''/f'` follow from :math:`h`; without a gate these keep for the backward pass the output
alone, which the next layer's product keeps anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.activations import activation_and_slope
from pyflowkern.core.checks import check_batched, check_choice, check_floating, check_same_device
from pyflowkern.core.dtypes import accumulation_dtype, cast, empty_canonical
from pyflowkern.core.register import register
from pyflowkern.core.second_derivatives import gradient_of_reference, is_batched
from pyflowkern.ops._field_reference import ACTIVATIONS

__all__ = ["field_layer", "field_layer_reference"]

_DTYPES = (torch.float32, torch.float64)


# --- public functions ----------------------------------------------------------------------------


def field_layer(
    p: Tensor,
    bias: Tensor,
    gate: Tensor | None = None,
    *,
    tangents: int = 0,
    activation: str = "tanh",
) -> Tensor:
    r"""Activate a layer's product and carry tangents through: :math:`f(g p + b)` and :math:`f'(g p + b)\, g\, \dot p`.

    One pass over memory forward and one backward, in the layout of ``p``: contiguous or channels_last.

    Args:
        p: products ``[(1 + K) N, C, *space]``: of the primal of all samples, then of each tangent.
        bias: ``[C]``, ``[N, C]``, or maps ``[1, C, *space]`` or ``[N, C, *space]``.
        gate: factors on the product, shaped as a bias may be; None for none.
        tangents: ``K``; 0 for the velocity alone.
        activation: "tanh", "softplus", "silu" or "gelu".

    Returns:
        ``h`` and its tangents, stacked like ``p``, in its dtype; half types are computed in float32.

    Raises:
        TypeError: for tensors that are not floating-point.
        ValueError: for shapes that do not fit, or an unknown activation.

    Source: the tangents of Grathwohl et al. 2019, *FFJORD*, in forward mode.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import field_layer
        >>> p = torch.tensor([[[0.0, 1.0]], [[3.0, 3.0]]])  # one sample, one channel, one tangent
        >>> field_layer(p, torch.zeros(1), tangents=1)
        tensor([[[0.0000, 0.7616]],
        <BLANKLINE>
                [[3.0000, 1.2599]]])
    """
    _check(p, bias, gate, tangents, activation)
    work = accumulation_dtype(p.dtype)
    out = activate_layer(
        cast(p, work),
        cast(bias, work),
        None if gate is None else cast(gate, work),
        tangents,
        activation,
    )
    return cast(out, p.dtype)


def activate_layer(
    p: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    tangents: int,
    activation: str,
    *,
    in_place: bool = False,
) -> Tensor:
    """Do what :func:`field_layer` does, with arguments that have been checked.

    ``in_place``: nobody else reads the product, and the gradient of the result is made for this function: both may be
    overwritten.  Fresh memory would cost more time than the work done in it.
    """
    if not kernel_serves("field_layer", p, bias, gate, dtypes=_DTYPES):
        return _reference(p, bias, gate, tangents, activation)
    if gate is not None and _is_map(bias, p) != _is_map(gate, p):
        bias, gate = _as_map(bias, p), _as_map(gate, p)
    kind = ACTIVATIONS.index(activation)
    if not in_place or torch.compiler.is_compiling() or not _is_canonical(p):
        out: Tensor = _op(p, bias, gate, tangents, kind)
    elif torch.is_grad_enabled() and torch._C._any_requires_grad(p, bias, gate):
        out = _InPlace.apply(p, bias, gate, tangents, kind)  # type: ignore[no-untyped-call]
    else:
        out = p
        _op_in_place(p, bias, gate, tangents, kind)
    return out


# --- reference -----------------------------------------------------------------------------------


def field_layer_reference(
    p: Tensor,
    bias: Tensor,
    gate: Tensor | None = None,
    *,
    tangents: int = 0,
    activation: str = "tanh",
) -> Tensor:
    """Compute :func:`field_layer` in plain PyTorch, differentiable to any order."""
    _check(p, bias, gate, tangents, activation)
    work = accumulation_dtype(p.dtype)
    factor = None if gate is None else cast(gate, work)
    return cast(_reference(cast(p, work), cast(bias, work), factor, tangents, activation), p.dtype)


def _reference(
    p: Tensor, bias: Tensor, gate: Tensor | None, tangents: int, activation: str
) -> Tensor:
    n = p.shape[0] // (1 + tangents)
    primal, moved = p[:n], p[n:]
    a = primal
    if gate is not None:
        factor = spread(gate, p)
        a = a * factor
        moved = (moved.reshape(tangents, n, *p.shape[1:]) * factor).flatten(0, 1)
    h, slope = activation_and_slope(a + spread(bias, p), activation)
    if not tangents:
        return h
    moved = slope * moved.reshape(tangents, n, *p.shape[1:])
    return torch.cat([h, moved.flatten(0, 1)])


def _vjp_of_output(h: Tensor, q: Tensor, tangents: int, activation: int) -> tuple[Tensor, Tensor]:
    """Return the cotangents of ``p`` and, unreduced, of the bias; from the output, without a gate."""
    n = h.shape[0] // (1 + tangents)
    value, moved = h[:n], h[n:].reshape(tangents, n, *h.shape[1:])
    first, rest = q[:n], q[n:].reshape(tangents, n, *h.shape[1:])
    if ACTIVATIONS[activation] == "tanh":
        slope, ratio = 1 - value * value, -2 * value
    else:
        slope, ratio = -torch.expm1(-value), torch.exp(-value)
    primal = slope * first
    if not tangents:
        return primal, primal
    primal = primal + ratio * (moved * rest).sum(0)
    return torch.cat([primal, (slope * rest).flatten(0, 1)]), primal


# --- shapes of parameters ------------------------------------------------------------------------


def _is_map(values: Tensor, p: Tensor) -> bool:
    return p.dim() > 2 and values.dim() == p.dim()


def spread(values: Tensor, p: Tensor) -> Tensor:
    """Return a parameter with as many axes as ``p``, to be broadcast with its samples."""
    if _is_map(values, p):
        return values
    return values.reshape(*values.shape, *[1] * (p.dim() - 2))


def _as_map(values: Tensor, p: Tensor) -> Tensor:
    samples = values.shape[0] if values.dim() > 1 else 1
    return spread(values, p).expand(samples, *p.shape[1:])


def _reduced(grad: Tensor, values: Tensor) -> Tensor:
    """Sum a gradient ``[N, C, *space]`` to the shape of a parameter."""
    axes = [] if values.dim() > 1 and values.shape[0] == grad.shape[0] else [0]
    if values.dim() < grad.dim() or grad.dim() == 2:
        axes += range(2, grad.dim())
    return (grad.sum(axes) if axes else grad).reshape(values.shape)


def _is_canonical(p: Tensor) -> bool:
    return p.is_contiguous() or (
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
    )


# --- argument checks -----------------------------------------------------------------------------


def _check(p: Tensor, bias: Tensor, gate: Tensor | None, tangents: int, activation: str) -> None:
    check_batched("p", p)
    if isinstance(tangents, bool) or not isinstance(tangents, int) or tangents < 0:
        raise ValueError(f"tangents must be an int of at least 0, got {tangents!r}")
    check_choice("activation", activation, ACTIVATIONS)
    if p.shape[0] % (1 + tangents):
        raise ValueError(
            f"p must stack 1 + {tangents} times as many rows as samples, got {p.shape[0]}"
        )
    n, c, space = p.shape[0] // (1 + tangents), p.shape[1], tuple(p.shape[2:])
    parameters = [("bias", bias), *([] if gate is None else [("gate", gate)])]
    for name, values in parameters:
        check_floating(name, values)
        shape = tuple(values.shape)
        if shape not in ((c,), (n, c), (1, c, *space), (n, c, *space)):
            raise ValueError(
                f"{name} must have shape ({c},), {(n, c)}, {(1, c, *space)} or {(n, c, *space)}, "
                f"got {shape}"
            )
    check_same_device(p=p, bias=bias, gate=gate)


# --- ops -----------------------------------------------------------------------------------------


def _from_output(gate: Tensor | None, activation: int) -> bool:
    return gate is None and ACTIVATIONS[activation] in ("tanh", "softplus")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    p, bias, gate, ctx.tangents, ctx.activation = inputs
    ctx.save_for_backward(output if _from_output(gate, ctx.activation) else p, bias, gate)


def _backward(ctx: Any, grad: Tensor, in_place: bool = False) -> tuple[Any, ...]:
    kept, bias, gate = ctx.saved_tensors  # once: a checkpoint computes them again at each look
    tangents, activation = ctx.tangents, ctx.activation
    if not torch.is_grad_enabled():
        if in_place and grad.stride() == kept.stride() and not is_batched(grad):
            grads = grad, *_backward_op_in_place(grad, kept, bias, gate, tangents, activation)
        else:
            grads = _backward_op(grad, kept, bias, gate, tangents, activation)
        return grads[0], grads[1], None if gate is None else grads[2], None, None
    if _from_output(gate, activation):
        grad_p, primal = _vjp_of_output(kept, grad, tangents, activation)
        return grad_p, _reduced(primal, bias), None, None, None

    def forward(p: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
        return _reference(p, bias, gate, tangents, ACTIVATIONS[activation])

    return *gradient_of_reference(forward, (kept, bias, gate), (grad,)), None, None


def _backward_fake(
    grad: Tensor, kept: Tensor, bias: Tensor, gate: Tensor | None, tangents: int, activation: int
) -> tuple[Tensor, Tensor, Tensor]:
    def like(values: Tensor) -> Tensor:
        form = torch.contiguous_format
        if _is_map(values, kept) and not kept.is_contiguous():
            form = torch.channels_last if kept.dim() == 4 else torch.channels_last_3d
        return torch.empty_like(values, memory_format=form)

    return (
        empty_canonical(kept),
        like(bias),
        kept.new_empty(0, kept.shape[1]) if gate is None else like(gate),
    )


# bias and gate are of channels, [C] or [N, C], or else both maps
_op = register(
    "field_layer(Tensor p, Tensor bias, Tensor? gate, SymInt tangents, int activation) -> Tensor",
    fake=lambda p, bias, gate, tangents, activation: empty_canonical(p),
    backward=_backward,
    setup_context=_setup,
)
_op_in_place = register(
    "field_layer_(Tensor(a!) p, Tensor bias, Tensor? gate, SymInt tangents, int activation) -> ()",
    fake=lambda p, bias, gate, tangents, activation: None,
)
# kept: the output for tanh and softplus without a gate, else p
_backward_op_in_place = register(
    "field_layer_backward_(Tensor(a!) grad, Tensor kept, Tensor bias, Tensor? gate, "
    "SymInt tangents, int activation) -> (Tensor, Tensor)",
    fake=lambda *inputs: _backward_fake(*inputs)[1:],
)
_backward_op = register(
    "field_layer_backward(Tensor grad, Tensor kept, Tensor bias, Tensor? gate, SymInt tangents, "
    "int activation) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)


class _InPlace(torch.autograd.Function):
    """The layer in place of its product where that is not kept, and backward in place of the gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        p, _, gate, _, activation = inputs
        if _from_output(gate, activation):
            _op_in_place(*inputs)
            ctx.mark_dirty(p)
            output: Tensor = p
        else:
            output = _op(*inputs)
        _setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _backward(ctx, grad, in_place=True)
