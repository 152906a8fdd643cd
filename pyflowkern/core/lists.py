"""Ops that take lists of tensors, whose tensors an autograd function must be given one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["differentiable_lists", "flatten", "quick_apply", "unflatten"]

Shape = tuple[int | None, ...]  # the lengths of the lists, None for what is no list


def flatten(values: Sequence[Any]) -> tuple[Shape, list[Any]]:
    """Return the shape of ``values`` and its entries, those of lists one by one."""
    shape: list[int | None] = []
    flat: list[Any] = []
    for v in values:
        if isinstance(v, (list, tuple)):
            shape.append(len(v))
            flat += v
        else:
            shape.append(None)
            flat.append(v)
    return tuple(shape), flat


def unflatten(shape: Shape, flat: Sequence[Any]) -> list[Any]:
    """Undo :func:`flatten`."""
    values: list[Any] = []
    at = 0
    for count in shape:
        values.append(flat[at] if count is None else list(flat[at : at + count]))
        at += 1 if count is None else count
    return values


def quick_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` by a shorter path, for functions that need no ``torch.func``.

    With thirty tensors torch's own path takes twice as long, most of it in one Python call for each argument.
    """
    plain = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    unwrap, transformed = (
        torch._C._functorch.unwrap_if_dead,
        torch._C._are_functorch_transforms_active,
    )
    tensor = torch.Tensor

    def apply(*args: Any) -> Any:
        if transformed():  # says why it cannot be
            return function.apply(*args)
        return plain(*[unwrap(a) if isinstance(a, tensor) else a for a in args])

    return apply


def differentiable_lists(
    below_autograd: Callable[[Sequence[Any]], Any],
    overload: Callable[..., Any],
    setup_context: Callable[..., Any],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Return a function that calls the op with the formula, as the dispatcher would but faster."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, shape: Shape, *flat: Any) -> Any:
            ctx.shape, inputs = shape, unflatten(shape, flat)
            output = below_autograd(inputs)
            setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            flat: list[Any] = [None]  # of the shape
            for count, grad in zip(ctx.shape, backward(ctx, *grads), strict=True):
                if count is None:
                    flat.append(grad)
                else:
                    flat += [None] * count if grad is None else grad
            return tuple(flat)

    apply = quick_apply(Eager)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*inputs)
        if torch.is_grad_enabled():
            shape, flat = flatten(inputs)
            if torch._C._any_requires_grad(*flat):
                return apply(shape, *flat)
        return below_autograd(inputs)

    return call
