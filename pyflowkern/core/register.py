"""Define an op: its schema, its fake, its autograd formula, and a short eager way to its kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import LIBRARY, OPS
from pyflowkern.core.lists import differentiable_lists

__all__ = ["register"]


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``pyflowkern::<schema>``, its fake and, if given, its autograd formula.

    Returns a function that calls the op.  Eagerly it takes a shorter way to the same kernel and the same
    formula than the dispatcher's autograd key, which is Python in the general case: at batch 64 the call
    is most of the cost.
    """
    op = schema.split("(", 1)[0]
    OPS.append(op)
    name = f"pyflowkern::{op}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(name, fake, lib=LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.pyflowkern, op).default
    if backward is None or setup_context is None:
        return lambda *inputs: (
            overload(*inputs) if torch.compiler.is_compiling() else _named(overload, inputs)
        )
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)
    if "Tensor[]" in schema:
        return differentiable_lists(
            lambda inputs: _below_autograd(overload, inputs), overload, setup_context, backward
        )
    return _differentiable(overload, setup_context, backward)


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
            with _errors_named(overload, "backward of ", grads):
                return backward(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Eager.apply(*inputs)  # type: ignore[no-untyped-call]
        return _below_autograd(overload, inputs)

    return call


def _below_autograd(overload: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return _named(overload, inputs)


def _named(overload: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    with _errors_named(overload, "", inputs):
        return overload(*inputs)


class _errors_named:  # a class: it costs a third of what a generator does
    """Let an error of a kernel, such as a launch that fails, tell the op and the shapes."""

    __slots__ = ("inputs", "overload", "prefix")

    def __init__(self, overload: Any, prefix: str, inputs: Sequence[Any]) -> None:
        self.overload, self.prefix, self.inputs = overload, prefix, inputs

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: Any) -> None:
        if kind is RuntimeError:  # a subclass, as for memory, says what it is
            shapes = [tuple(t.shape) for t in self.inputs if isinstance(t, Tensor)]
            what = f"{self.prefix}{self.overload.name()} of tensors of shapes {shapes}"
            raise RuntimeError(f"{what} failed: {error}") from error
