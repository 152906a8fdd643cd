"""The sums over the stages of a dopri5 step: the state after it, and the norm of its error.

"addmv" is how a solver in plain PyTorch does it: one matrix-vector product with prepared weights, and for the norm six
more passes over memory that is allocated once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Lazy, Outputs, Provider, nbytes
from pyflowkern import ops
from pyflowkern.ode.norms import Rms, Scaling
from pyflowkern.ode.tableaus import tableau

DOPRI5, STEP, RTOL, ATOL = tableau("dopri5"), 0.1, 1e-5, 1e-5
LAST, ERROR = DOPRI5.a[-1], DOPRI5.error
assert ERROR is not None


def _inputs(*shape: int, states: Sequence[str]) -> Callable[..., Inputs]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device).to(dtype)

        return {name: draw(*shape) for name in states} | {"slopes": draw(7, *shape)}

    return make


def _bytes(weights: Sequence[float]) -> Callable[[Inputs, Outputs], int]:
    """Return the bytes that must move: states, the slopes whose weight is not zero, and the result."""

    def count(inputs: Inputs, outputs: Outputs) -> int:
        slopes = inputs["slopes"]
        read = sum(nbytes(k) for w, k in zip(weights, slopes, strict=False) if w != 0)
        return read + nbytes(*(t for name, t in inputs.items() if name != "slopes"), *outputs)

    return count


def _addmv(inputs: Inputs) -> Provider:
    weights = torch.tensor(LAST).to(inputs["y"])

    def run(y: Tensor, slopes: Tensor) -> Tensor:
        flat = slopes[: len(LAST)].view(len(LAST), -1).t()
        return torch.addmv(y.view(-1), flat, weights.to(y.dtype), alpha=STEP).view(y.shape)

    return run


def _norm_by_addmv(inputs: Inputs) -> Provider:
    weights, scaled = torch.tensor(ERROR).to(inputs["y"]), Scaling(inputs["y"], RTOL, ATOL)
    norm, kept = Rms([]), torch.zeros_like(inputs["y"])

    def run(y: Tensor, y1: Tensor, slopes: Tensor) -> Tensor:
        flat, out = slopes.view(slopes.shape[0], -1).t(), kept.view(-1)
        torch.addmv(out, flat, weights, beta=0, alpha=STEP, out=out)
        return norm(scaled(kept, y, y1)).double()

    return run


def _case(name: str, shape: Sequence[int], combine: bool, **case: Any) -> Case:
    if combine:
        providers: dict[str, Any] = {
            "eager": lambda y, slopes: ops.rk_combine_reference(y, slopes, LAST, STEP),
            "ours": lambda y, slopes: ops.rk_combine(y, slopes, LAST, STEP),
            "addmv": Lazy(_addmv),
        }
    else:
        allowed = {"rtol": RTOL, "atol": ATOL}
        providers = {
            "eager": lambda y, y1, slopes: ops.rk_error_reference(
                y, y1, slopes, ERROR, STEP, **allowed
            ),
            "ours": lambda y, y1, slopes: ops.rk_error(y, y1, slopes, ERROR, STEP, **allowed),
            "addmv": Lazy(_norm_by_addmv, comparable=False),
        }
    states = ("y",) if combine else ("y", "y1")
    return Case(
        name=name,
        make_inputs=_inputs(*shape, states=states),
        providers=providers,
        passes=("forward",),
        forward_bytes=_bytes(LAST if combine else ERROR),
        constants=(*states, "slopes"),
        **case,
    )


FLOOR = {"forward vs eager": 1.5, "forward vs floor": 2.0}
CASES = [
    _case("combine dopri5 1000000", (1_000_000,), True, targets=FLOOR),
    _case("error dopri5 1000000", (1_000_000,), False, targets=FLOOR),
    _case("combine dopri5 512x2", (512, 2), True),
    _case("error dopri5 512x2", (512, 2), False),
    _case("combine dopri5 100000", (100_000,), True, extra=True),
    _case("error dopri5 100000", (100_000,), False, extra=True),
]
