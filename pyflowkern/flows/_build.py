"""What the builders of flows share: orders of features, and the levels of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyflowkern.flows._arguments import ConditionerFactory
from pyflowkern.nn import Bijection, MultiScale, Sequential, Split, Squeeze

__all__ = [
    "check_space",
    "feature_order",
    "layer_permutation",
    "squeeze_levels",
    "squeezed",
]


def feature_order(order: str, features: int, layer: int) -> list[int] | None:
    """Return the order of the features in an autoregressive layer; None for 0, 1, ..."""
    if order == "random":
        return layer_permutation(features, layer).tolist()
    if order != "reverse":
        raise ValueError(f"order must be 'reverse' or 'random', got {order!r}")
    return list(range(features))[::-1] if layer % 2 else None


def layer_permutation(features: int, layer: int) -> Tensor:
    """Return a random permutation that depends on the layer alone.

    Masks are structure and not state: a new flow must have the same masks as the one whose weights it
    loads.
    """
    return torch.randperm(features, generator=torch.Generator().manual_seed(layer), device="cpu")


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
    memory: str,
) -> MultiScale:
    """Return the levels: a squeeze, ``level(channels)``, and after all but the last a split of the channels."""
    stack: list[Bijection] = []
    splits: list[Split] = []
    event = shape
    for i in range(levels):
        event = squeezed(event)
        stack.append(Sequential(Squeeze(), *level(event[0]), memory=memory))
        if i < levels - 1:
            split = Split(event[0], prior)
            splits.append(split)
            event = (split.kept, *event[1:])
    return MultiScale(shape, stack, splits)
