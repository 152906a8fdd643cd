"""Both directions of a bijection, called in the manner of its library."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

__all__ = ["Map", "directions"]

#: A direction: ``(x, context) -> (z, log_det)``.
Map = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def directions(bijection: Any) -> tuple[Map, Map]:
    if isinstance(bijection, tuple) and len(bijection) == 2 and all(map(callable, bijection)):
        return _of_function(bijection[0]), _of_function(bijection[1])
    if isinstance(bijection, Transform):
        return _of_transform(bijection), _of_transform(bijection.inv)
    if isinstance(bijection, torch.nn.Module):
        if "rev" in inspect.signature(bijection.forward).parameters:
            return _of_freia(bijection, rev=False), _of_freia(bijection, rev=True)
        inverse = getattr(bijection, "inverse", None)
        if callable(inverse):
            return _with_context(bijection), _with_context(inverse)
    raise TypeError(
        "bijection must be a module with forward and inverse, a torch.distributions.Transform, a module of FrEIA or "
        f"two functions (forward, inverse), got {type(bijection).__name__}"
    )


def _with_context(call: Callable[..., tuple[Tensor, Tensor]]) -> Map:
    def run(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return _pair(call(x) if context is None else call(x, context))

    return run


def _pair(results: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(results, tuple | list) or len(results) != 2:
        what = (
            f"{len(results)} of them"
            if isinstance(results, tuple | list)
            else type(results).__name__
        )
        raise TypeError(f"wants two results, the value and its log_det, got {what}")
    return results[0], results[1]


def _of_function(call: Map) -> Map:
    return lambda x, context: _pair(call(x, context))


def _of_transform(transform: Transform) -> Map:
    def run(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        value = transform(x)
        log_det = transform.log_abs_det_jacobian(x, value)
        return value, log_det.flatten(1).sum(1) if log_det.dim() > 1 else log_det

    return run


def _of_freia(module: torch.nn.Module, rev: bool) -> Map:
    bare = any(kind.__name__ == "SequenceINN" for kind in type(module).__mro__)  # takes no tuple

    def run(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        given = {} if context is None else {"c": (context,)}
        value, log_det = _pair(module(x if bare else (x,), **given, rev=rev, jac=True))
        return (value[0] if isinstance(value, tuple | list) else value), log_det

    return run
