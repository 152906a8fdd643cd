"""The state of the random numbers that a layer draws, to draw the same ones again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["RandomState", "drawing_again", "random_state", "same_state"]

#: Of the host's generator, and of that of the device.
RandomState = list[Tensor]


def random_state(device: torch.device) -> RandomState:
    """Return the states of the generators that a layer on this device draws from; does not wait for the device."""
    states = [torch.default_generator.get_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def same_state(a: RandomState, b: RandomState) -> bool:
    """Whether nothing was drawn between the two."""
    return all(map(torch.equal, a, b))


def drawing_again(state: RandomState | None, device: torch.device) -> AbstractContextManager[None]:
    """Draw from this state in a block; afterwards the generators go on where they were.  None changes nothing."""
    return nullcontext() if state is None else _drawing(state, device)


@contextmanager
def _drawing(state: RandomState, device: torch.device) -> Iterator[None]:
    now = random_state(device)
    _set(state, device)
    try:
        yield
    finally:
        _set(now, device)


def _set(state: RandomState, device: torch.device) -> None:
    torch.default_generator.set_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
