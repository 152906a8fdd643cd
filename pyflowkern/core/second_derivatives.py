"""Backward passes that are themselves recorded or batched go through the reference, which has every derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import transformed
from pyflowkern.core.lists import flatten, unflatten

__all__ = ["gradient_of_reference", "is_batched", "wants_reference"]


def wants_reference(*grads: Tensor | None) -> bool:
    """Whether a backward pass is itself recorded, or of several gradients at once: no kernel with lists takes them."""
    return torch.is_grad_enabled() or is_batched(*grads)


def is_batched(*grads: Tensor | None) -> bool:
    """Whether a gradient stands for several (``vmap``, ``is_grads_batched``)."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return transformed() or any(g is not None and legacy(g) for g in grads)


def gradient_of_reference(
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    grad_outputs: Sequence[Tensor | None],
) -> list[Any]:
    """Return the VJP of ``reference`` at ``inputs`` as a differentiable expression.

    A backward kernel has no derivative of its own.  When a backward pass is itself recorded (``create_graph=True``), or
    batched, this runs in its place.  The inputs are aliased first: one of them is often computed from another (a
    coupling's parameters from its input), and partial derivatives are wanted.

    Args:
        reference: a function of ``inputs``, in plain PyTorch.
        inputs: tensors, lists of tensors, and whatever else the function takes.
        grad_outputs: of the outputs, None for none; outputs beyond those of ``reference`` have none.

    Returns:
        A gradient for each input, lists for lists of tensors, None where there is none.
    """
    shape, flat = flatten(inputs)
    with torch.enable_grad():
        aliases = [t.view_as(t) if _has_gradient(t) else t for t in flat]
        wanted = [t for t in aliases if _has_gradient(t)]
        outputs = reference(*unflatten(shape, aliases))
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    pairs = [
        (o, g)
        for o, g in zip(outputs, grad_outputs, strict=False)
        if g is not None and o.requires_grad
    ]
    grads = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
        if pairs
        else ()
    )
    each = [next(grads, None) if _has_gradient(t) else None for t in aliases]
    given = unflatten(shape, flat)
    return [
        g if not isinstance(g, list) or any(isinstance(t, Tensor) for t in v) else None
        for g, v in zip(unflatten(shape, each), given, strict=True)
    ]


def _has_gradient(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad
