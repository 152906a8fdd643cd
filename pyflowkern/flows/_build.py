"""What the builders of flows share: checks of their arguments and the shapes of levels."""

from __future__ import annotations

from collections.abc import Sequence

from pyflowkern.nn._base import check_count

__all__ = ["check_positive", "check_space", "parse_event", "parse_shape", "squeezed"]


def parse_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return ``(D,)`` of a dimension, or the shape as a tuple; raise unless all is positive."""
    event = (shape,) if isinstance(shape, int) else tuple(shape)
    if not event or not all(isinstance(size, int) and size >= 1 for size in event):
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
