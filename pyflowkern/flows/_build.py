"""What the builders of flows share: checks of their arguments and the shapes of levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pyflowkern.nn import Bijection, MultiScale, Sequential, Split, Squeeze
from pyflowkern.nn._base import check_count

__all__ = [
    "ConditionerFactory",
    "check_positive",
    "check_space",
    "feature_order",
    "layer_permutation",
    "parse_event",
    "parse_shape",
    "parse_vector",
    "parse_widths",
    "squeeze_levels",
    "squeezed",
]

#: Makes a network of ``(in, out)`` channels.
ConditionerFactory = Callable[[int, int], torch.nn.Module]


def parse_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return ``(D,)`` of a dimension, or the shape as a tuple; raise unless all is positive."""
    event = (shape,) if isinstance(shape, int) else _as_tuple("event_shape", shape)
    if not event or not all(_is_int(size) and size >= 1 for size in event):
        raise ValueError(
            "event_shape must be a dimension D, (D,) or (C, *space) of positive ints, "
            f"got {shape!r}"
        )
    return event


def parse_event(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return the shape; raise below two dimensions or beyond three spatial axes."""
    event = parse_shape(shape)
    if len(event) > 4:
        raise ValueError(f"event_shape must have at most 3 spatial axes, got {shape!r}")
    if event == (1,):
        raise ValueError(
            f"event_shape must have at least 2 dimensions for a coupling, got {shape!r}"
        )
    return event


def parse_vector(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return ``(D,)``; raise for the shape of an image."""
    event = parse_shape(shape)
    if len(event) > 1:
        raise ValueError(f"event_shape must be a dimension D or (D,) for this flow, got {shape!r}")
    return event


def parse_widths(hidden: int | Sequence[int]) -> tuple[int, ...]:
    """Return the widths of hidden layers; one number stands for two layers."""
    widths = (hidden, hidden) if isinstance(hidden, int) else _as_tuple("hidden", hidden)
    if not widths or not all(_is_int(width) and width >= 1 for width in widths):
        raise ValueError(
            f"hidden must be at least 1, or a sequence of such widths, got {hidden!r}"
        )
    return widths


def _as_tuple(name: str, value: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {type(value).__name__}")
    return tuple(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def feature_order(order: str, features: int, layer: int) -> list[int] | None:
    """Return the order in which an autoregressive layer goes through the features; None for 0, 1, ..."""
    if order == "random":
        return layer_permutation(features, layer).tolist()
    if order != "reverse":
        raise ValueError(f"order must be 'reverse' or 'random', got {order!r}")
    return list(range(features))[::-1] if layer % 2 else None


def layer_permutation(features: int, layer: int) -> Tensor:
    """Return a random permutation that depends on the layer alone.

    Masks are structure and not state: a flow made anew must have those of the flow whose weights it
    is to load.
    """
    return torch.randperm(features, generator=torch.Generator().manual_seed(layer), device="cpu")


def check_positive(**counts: int) -> None:
    """Raise TypeError unless every count is an int, ValueError unless it is at least 1."""
    for name, count in counts.items():
        check_count(name, count)


def check_space(shape: tuple[int, ...], levels: int) -> None:
    """Raise ValueError unless every spatial size can be halved ``levels`` times."""
    if any(size % 2**levels for size in shape[1:]):
        raise ValueError(
            f"event_shape must have spatial sizes divisible by 2^levels = {2**levels} for "
            f"levels={levels}, got {shape}"
        )


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape after a Squeeze by 2."""
    channels, *space = shape
    return (channels * 2 ** len(space), *(size // 2 for size in space))


def squeeze_levels(
    shape: tuple[int, ...],
    levels: int,
    level: Callable[[int], list[Bijection]],
    prior: ConditionerFactory,
) -> MultiScale:
    """Return levels of a squeeze and ``level(channels)``, half of the channels leaving after each."""
    stack: list[Bijection] = []
    splits: list[Split] = []
    event = shape
    for i in range(levels):
        event = squeezed(event)
        stack.append(Sequential(Squeeze(), *level(event[0])))
        if i < levels - 1:
            split = Split(event[0], prior)
            splits.append(split)
            event = (split.kept, *event[1:])
    return MultiScale(shape, stack, splits)
