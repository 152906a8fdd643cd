"""Checks of what flows are given: counts, flags, shapes, contexts, base distributions' and networks' signatures."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pyflowkern.core.checks import check_count, check_flag, check_number, is_integer, takes_two

__all__ = [
    "ConditionerFactory",
    "check_counts",
    "check_flags",
    "check_temperature",
    "expand_context",
    "parse_event",
    "parse_shape",
    "parse_vector",
    "parse_widths",
    "plain_ints",
    "taking_context",
]

#: Makes a network of ``(in, out)`` channels.
ConditionerFactory = Callable[[int, int], torch.nn.Module]


def check_counts(**counts: int) -> tuple[int, ...]:
    """Return counts of at least 1 as ints, in the order in which they are given."""
    return tuple(check_count(name, value) for name, value in counts.items())


def check_flags(**flags: bool) -> None:
    """Raise TypeError unless every flag is True or False."""
    for name, value in flags.items():
        check_flag(name, value)


def parse_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return ``(D,)`` of a dimension, or the shape as a tuple; raise unless all is positive."""
    event = _as_tuple("event_shape", shape)
    if not event or not all(is_integer(size) and size >= 1 for size in event):
        raise ValueError(
            "event_shape must be a dimension D, (D,) or (C, *space) of positive ints, "
            f"got {shape!r}"
        )
    return tuple(int(size) for size in event)


def parse_event(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return the shape; raise beyond three spatial axes."""
    event = parse_shape(shape)
    if len(event) > 4:
        raise ValueError(f"event_shape must have at most 3 spatial axes, got {shape!r}")
    return event


def parse_vector(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return ``(D,)``; raise for the shape of an image."""
    event = parse_shape(shape)
    if len(event) > 1:
        raise ValueError(f"event_shape must be a dimension D or (D,) for this flow, got {shape!r}")
    return event


def parse_widths(hidden: int | Sequence[int]) -> tuple[int, ...]:
    """Return the widths of hidden layers; one number stands for two layers."""
    widths = _as_tuple("hidden", hidden)
    if not widths or not all(is_integer(width) and width >= 1 for width in widths):
        raise ValueError(
            f"hidden must be at least 1, or a sequence of such widths, got {hidden!r}"
        )
    return tuple(int(width) for width in widths) * (1 if isinstance(hidden, Iterable) else 2)


def plain_ints(values: Sequence[int]) -> Sequence[int]:
    """Return NumPy's integers of a sequence as ints, and what is no sequence of integers as it is."""
    if isinstance(values, Iterable) and all(is_integer(v) for v in values):
        return tuple(int(v) for v in values)
    return values


def check_temperature(temperature: float | Tensor) -> None:
    """Raise unless it is a finite number from 0 on, which may be in a tensor."""
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature)
    elif temperature.numel() != 1 or temperature.is_complex():
        kind = f"{tuple(temperature.shape)} of {temperature.dtype}"
        raise TypeError(f"temperature must be one real number, got {kind}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")


def expand_context(context: Tensor | None, n: int, features: int) -> Tensor | None:
    """Return the context of ``n`` samples, ``[n, K]``; one for all of them, ``[K]`` or ``[1, K]``, is expanded.

    Raises:
        TypeError: for a context that is no tensor.
        ValueError: for a context of another shape, one too many or one too few.
    """
    if not features:
        if context is not None:
            raise ValueError("context was given, but the flow was made with context_features=0")
        return None
    if context is not None and not isinstance(context, Tensor):
        raise TypeError(f"context must be a torch.Tensor, got {type(context).__name__}")
    if context is not None and context.shape == (n, features):
        return context
    if context is not None and context.shape in ((features,), (1, features)):
        return context.expand(n, features)
    got = None if context is None else tuple(context.shape)
    message = f"context must have shape {(n, features)}, got {got}"
    if context is not None and context.dim() == 2 and context.shape[1] == features:
        each = f"flow.distribution(context).sample(({n},))"
        message += f"; for each of the {len(context)} contexts {each} draws {n} samples"
    raise ValueError(message)


def taking_context(conditioner: ConditionerFactory, context_features: int) -> ConditionerFactory:
    """Return a factory that raises TypeError where a flow's context does not reach the network that it makes."""
    if not context_features or not callable(conditioner):
        return conditioner

    def make(inputs: int, outputs: int) -> torch.nn.Module:
        network = conditioner(inputs, outputs)
        if isinstance(network, torch.nn.Module) and not takes_two(network.forward):
            raise TypeError(
                f"conditioner must make networks that are called with (x, context), as the flow has "
                f"context_features={context_features}, got {type(network).__name__}, which takes x alone; "
                f"functools.partial(nn.MLP, context_features={context_features}) makes one that takes both"
            )
        return network

    return make


def _as_tuple(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(value, Iterable):
        return tuple(value)
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {type(value).__name__}")
    return (value,)
