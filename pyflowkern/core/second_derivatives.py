"""Backward passes that are themselves recorded or batched go through the reference, which has every derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import transformed

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
