"""Define an op: its schema, its fake, its derivatives, and a fast path for eager calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pyflowkern._library import LIBRARY, OPS
from pyflowkern.core.lists import differentiable_lists, quick_apply
from pyflowkern.core.second_derivatives import gradient_of_reference, is_batched

__all__ = ["register"]


Backward = Callable[..., Any]


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., Any] | None = None,
    backward: Backward | None = None,
    reference: Callable[..., Any] | None = None,
    inputs: Callable[[Any], Sequence[Any]] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Define ``pyflowkern::<schema>``, its fake and, if given, its derivatives.

    Returns a function that calls the op.  Eager calls reach the same kernel and the same formula by a shorter path
    than the dispatcher's autograd key, which is Python in the general case: at batch 64 the call is most of the cost.

    Args:
        schema: name, arguments and results, in torch's notation.
        fake: the op on tensors without values: shapes, dtypes and layouts of the results.
        setup_context: ``(ctx, inputs, output)``, keeps what the backward pass needs.
        backward: ``(ctx, *grads)`` to a gradient for each argument, None for what has none.  With a reference it is
            called for first derivatives alone, and may call a kernel that has no derivative of its own.
        reference: the op in plain PyTorch, of the same arguments; its results may stop before those that exist for the
            backward pass alone.  A backward pass that is itself recorded differentiates it.
        inputs: ``ctx`` to the arguments of the op, from what ``setup_context`` kept.
        flops: the floating-point operations of the op's matrix products, for torch's ``FlopCounterMode``: called with
            the op's arguments, of tensors the shapes.  As torch has it, a product and its sum are two, what is not a
            matrix product counts nothing, and what a backward pass computes again does not count either.
    """
    op = schema.split("(", 1)[0]
    OPS.append(op)
    name = f"pyflowkern::{op}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(name, fake, lib=LIBRARY)
    packet = getattr(torch.ops.pyflowkern, op)
    if flops is not None:
        register_flop_formula(packet)(lambda *args, out_shape=None: flops(*args))
    overload: Callable[..., Any] = packet.default
    if backward is None or setup_context is None:
        return _without_derivative(overload)
    lists = "Tensor[]" in schema
    if (reference is None) != (inputs is None):
        raise TypeError(f"{op}: second derivatives need both reference and inputs")
    if reference is not None and inputs is not None:
        backward = _with_second_derivatives(backward, reference, inputs, lists)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)
    if lists:
        return differentiable_lists(
            lambda inputs: _below_autograd(overload, inputs), overload, setup_context, backward
        )
    return _differentiable(overload, setup_context, backward)


def _with_second_derivatives(
    backward: Backward,
    reference: Callable[..., Any],
    inputs: Callable[[Any], Sequence[Any]],
    lists: bool,
) -> Backward:
    """Return a backward pass that has derivatives itself where it is recorded.

    A kernel that takes lists of tensors is also spared gradients that stand for several (``is_grads_batched``).
    """

    def derivative(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() or (lists and is_batched(*grads)):
            return tuple(gradient_of_reference(reference, inputs(ctx), grads))
        return backward(ctx, *grads)

    return derivative


def _differentiable(
    overload: Callable[..., Any], setup_context: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = _below_autograd(overload, inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            try:
                return backward(ctx, *grads)
            except RuntimeError as error:
                _raise_named(error, overload, "backward of ", grads)

    apply = quick_apply(Eager)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return apply(*inputs)
        return _below_autograd(overload, inputs)

    return call


def _without_derivative(overload: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*inputs)
        if torch.is_grad_enabled():  # autograd says that there is no derivative if one is wanted
            return _named(overload, inputs)
        return _below_autograd(overload, inputs)  # as backward passes call it

    return call


def _below_autograd(overload: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return _named(overload, inputs)


def _named(overload: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    try:
        return overload(*inputs)
    except RuntimeError as error:
        _raise_named(error, overload, "", inputs)


def _raise_named(
    error: RuntimeError, overload: Any, prefix: str, inputs: Sequence[Any]
) -> NoReturn:
    """Raise an error of a kernel, such as a launch that fails, with the op and the shapes."""
    if type(error) is not RuntimeError:  # a subclass, as for memory, says what it is
        raise error
    shapes = [tuple(t.shape) for t in inputs if isinstance(t, Tensor)]
    what = f"{prefix}{overload.name()} of tensors of shapes {shapes}"
    raise RuntimeError(f"{what} failed: {error}") from error
