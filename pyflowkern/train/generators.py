"""The generators of random numbers that training and evaluation draw from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["forked_generators", "seed_generators"]


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what a step draws from: ``torch.manual_seed``, which visits every kind of device, costs more than a step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def forked_generators(device: torch.device) -> Iterator[None]:
    """Give the generators of the CPU and of the device their states back after the block.

    ``torch.random.fork_rng`` alone visits every GPU of the machine, also those of other processes, and warns.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
