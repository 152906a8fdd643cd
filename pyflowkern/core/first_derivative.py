"""Gradients that cannot be differentiated again: a second derivative of them is an error, never a wrong number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["first_derivative_only", "once_differentiable"]


def first_derivative_only(gradient: Tensor, causes: tuple[Tensor, ...], message: str) -> Tensor:
    """Return a gradient, from which no derivative reaches what it was computed from.

    A gradient computed without a graph is a constant to autograd: differentiating it would leave terms out in silence.
    Torch's own ``once_differentiable`` raises only where the upstream gradient requires one, and so lets a wrong number
    pass where that is a constant, as in ``grad(y.sum(), x, create_graph=True)``.

    Args:
        gradient: as a backward pass returns it.
        causes: tensors whose influence on ``gradient`` autograd does not see.
        message: what the error says and, best, what to do instead.

    Returns:
        The same values.  A backward pass through them raises RuntimeError if it goes on to one of ``causes``.

    Example:
        >>> import torch
        >>> from pyflowkern.core.first_derivative import first_derivative_only
        >>> x = torch.ones((), requires_grad=True)
        >>> g = first_derivative_only(3 * x.detach() ** 2, (x,), "x ** 3 has a first derivative only")
        >>> torch.autograd.grad(g, x)
        Traceback (most recent call last):
        RuntimeError: x ** 3 has a first derivative only
    """
    zero: Tensor = _Error.apply(message, *causes)  # type: ignore[no-untyped-call]
    return gradient + zero.to(gradient.device)


class _Error(torch.autograd.Function):
    """A zero whose derivative is an error."""

    @staticmethod
    def forward(ctx: Any, message: str, *causes: Tensor) -> Tensor:
        ctx.message = message
        return causes[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(ctx.message)


class _Once(torch.autograd.Function):
    """The identity, with a gradient that knows what it must not be differentiated by."""

    @staticmethod
    def forward(ctx: Any, message: str, x: Tensor, *causes: Tensor) -> Tensor:
        ctx.message = message
        ctx.save_for_backward(x, *causes)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        causes = tuple(t for t in ctx.saved_tensors if t.requires_grad)
        if torch.is_grad_enabled() and causes:
            grad = first_derivative_only(grad, causes, ctx.message)
        return (None, grad, *[None] * (len(ctx.saved_tensors) - 1))


def once_differentiable(x: Tensor, message: str, *causes: Tensor) -> Tensor:
    """Return ``x``, whose gradient is right once: a second derivative of it raises RuntimeError.

    Args:
        x: a value with a graph that holds for its first derivative only.
        message: what the error says.
        *causes: other tensors whose influence on that derivative autograd does not see.
    """
    out: Tensor = _Once.apply(message, x, *causes)  # type: ignore[no-untyped-call]
    return out
