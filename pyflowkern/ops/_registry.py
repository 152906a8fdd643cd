"""What every op file shares: registration, argument checks, memory formats and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import FLOATS, LIBRARY, OPS, transformed
from pyflowkern.ops._lists import differentiable_lists

__all__ = [
    "accumulation_dtype",
    "autocasts",
    "cast",
    "check_batched",
    "check_floating",
    "check_same_device",
    "check_shape",
    "empty_canonical",
    "full_precision",
    "gradient_of_reference",
    "is_batched",
    "register",
    "sum_per_sample",
    "wants_reference",
]


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


def wants_reference(*grads: Tensor | None) -> bool:
    """Whether a backward pass is itself recorded, or of several gradients at once: no kernel with lists takes them."""
    return torch.is_grad_enabled() or is_batched(*grads)


def is_batched(*grads: Tensor | None) -> bool:
    """Whether a gradient stands for several (``vmap``, ``is_grads_batched``)."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return transformed() or any(g is not None and legacy(g) for g in grads)


def gradient_of_reference(
    reference: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor],
) -> list[Tensor | None]:
    """Return the VJP of ``reference`` at ``inputs`` as a differentiable expression.

    A backward kernel has no derivative of its own.  When a backward pass is itself recorded
    (``create_graph=True``), or batched, the op's backward calls this instead.  The inputs are aliased first: one
    of them is often computed from another (a coupling's parameters from its input), and partial derivatives are
    wanted.
    """
    with torch.enable_grad():
        aliases = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
        wanted = [t for t in aliases if t is not None and t.requires_grad]
        outputs = reference(*aliases)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if t is not None and t.requires_grad else None for t in aliases]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of log-dets and parameter sums: float32 at least, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_per_sample(t: Tensor) -> Tensor:
    """Sum everything but the batch axis, ``[N, ...] -> [N]``, in the accumulation dtype."""
    return t.to(accumulation_dtype(t.dtype)).flatten(1).sum(1) if t.dim() > 1 else t


def empty_canonical(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty tensor as a kernel would: channels_last if ``t`` is, else contiguous."""
    if not t.is_contiguous():
        for rank, fmt in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if t.dim() == rank and t.is_contiguous(memory_format=fmt):
                return torch.empty_like(t, dtype=dtype, memory_format=fmt)
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def autocasts(t: Tensor) -> bool:
    """Whether autocast is on where ``t`` is; there is none on the meta device, and asking is an error."""
    return not t.is_meta and torch.is_autocast_enabled(t.device.type)


def full_precision(t: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off where it is on: a matrix product would round to half behind our back."""
    if autocasts(t):
        return torch.autocast(t.device.type, enabled=False)
    return nullcontext()


def check_floating(name: str, t: Tensor) -> None:
    """Raise TypeError unless ``t`` is a dense tensor of a floating-point type that the ops compute with."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be a floating-point tensor of 16, 32 or 64 bits, got {t.dtype}"
        )
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}")


def check_batched(name: str, t: Tensor, min_dim: int = 2) -> None:
    """Raise unless ``t`` is a floating tensor ``[N, C, *space]`` of at least ``min_dim`` axes."""
    check_floating(name, t)
    if t.dim() < min_dim:
        raise ValueError(
            f"{name} must have a batch axis, channels second, then space ([N, C, *space]), "
            f"got shape {tuple(t.shape)}"
        )


def check_shape(name: str, t: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless ``t`` has exactly this shape."""
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors lie on one device."""
    device = None
    for t in tensors.values():
        if t is None:
            continue
        if device is None:
            device = t.device
        elif t.device != device:
            devices = {name: t.device for name, t in tensors.items() if t is not None}
            raise ValueError(f"all tensors must be on one device, got {devices}")


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``t.to(dtype)``, without the call where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)
