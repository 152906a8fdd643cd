"""A step of Euler and Maruyama with its noise, and a step of Heun; each of a run, which draws one seed.

Eager is torch's own generator of normal numbers and two sums: the reference, whose Philox generator runs in int64,
would be no fair baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Lazy, Provider, random_inputs
from pyflowkern import ops

STEP, SIGMA = 0.01, 0.7


def plain(x: Tensor, drift: Tensor, other: Tensor | None = None) -> Tensor:
    """Step with torch's noise."""
    moved = torch.add(x, torch.randn_like(x), alpha=SIGMA * STEP**0.5)
    if other is None:
        return torch.add(moved, drift, alpha=STEP)
    return torch.add(moved, drift + other, alpha=0.5 * STEP)


def _case(name: str, shape: Sequence[int], drifts: int = 1, **case: Any) -> Case:
    given = {"x": shape, "drift": shape} | ({"other": shape} if drifts == 2 else {})

    def ours(inputs: Inputs) -> Provider:
        seed = torch.tensor(7, device=inputs["x"].device)
        return partial(ops.euler_maruyama, step=STEP, sigma=SIGMA, index=1, seed=seed)

    return Case(
        name=name,
        make_inputs=random_inputs(**given),
        # the noise differs from eager's; tests compare it with the reference
        providers={"eager": plain, "ours": Lazy(ours, comparable=False)},
        passes=("forward",),
        constants=tuple(given),
        **case,
    )


FLOOR = {"forward vs eager": 3.0}
CASES = [
    _case("euler_maruyama 10000x50", (10_000, 50), targets=FLOOR),
    _case("euler_maruyama 1000x2", (1000, 2), targets={"forward vs eager": 1.0}),
    _case("heun 10000x50", (10_000, 50), 2, targets=FLOOR),
    _case("float64 10000x50", (10_000, 50), dtype=torch.float64, extra=True),
]
