"""Solves of a small vector field, against torchdiffeq with the same tolerances and evaluations.

"eager" is torchdiffeq with torch's layers.  "ours" has the same weights in a field of ours, "our solver" torch's layers
as eager has, and "field alone" calls the field of "ours" as often as a solve does: no solver can be faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bench._case import Case, Inputs, Lazy, Provider, random_inputs
from pyflowkern import nn as pnn
from pyflowkern import ode

BATCH, SPAN, TOLERANCE = 512, (0.0, 1.0), 1e-5


class Field(nn.Module):
    """A network 2-64-64-64-2 of tanh layers, its weights scaled up so that a solve takes several steps."""

    def __init__(self) -> None:
        super().__init__()
        widths = (2, 64, 64, 64, 2)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1])
        self.evaluations = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the velocity, and count."""
        self.evaluations += 1
        out: Tensor = self.net(y)
        return out


@cache
def field(device: torch.device) -> Field:
    torch.manual_seed(0)
    made = Field().to(device)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(2.0)
    return made


class OwnField(pnn.VectorFieldMLP):
    """The same function of the same parameters, counting its evaluations."""

    def __init__(self, like: Field) -> None:
        super().__init__(2, (64, 64, 64))
        linear = [layer for layer in like.net if isinstance(layer, nn.Linear)]
        self.layers = nn.ModuleList(linear)
        self.evaluations = 0

    def forward(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity, and count."""
        self.evaluations += 1
        return super().forward(t, x, context)


@cache
def own_field(device: torch.device) -> OwnField:
    return OwnField(field(device))


def torchdiffeq_solver(inputs: Inputs) -> Callable[..., Tensor]:
    import torchdiffeq

    span = torch.tensor(SPAN, device=inputs["x"].device)
    return partial(_theirs, torchdiffeq.odeint, span)


def _theirs(odeint: Any, span: Tensor, f: nn.Module, x: Tensor, **settings: Any) -> Tensor:
    settings.pop("adjoint", None)
    out: Tensor = odeint(f, x, span, rtol=TOLERANCE, atol=TOLERANCE, **settings)
    return out[-1]


def ours(f: nn.Module, x: Tensor, **settings: Any) -> Tensor:
    out: Tensor = ode.odeint(f, x, SPAN, rtol=TOLERANCE, atol=TOLERANCE, **settings)
    return out[-1]


def evaluations(device: torch.device, x: Tensor, **settings: Any) -> int:
    """Return the evaluations of one solve of ours; those of torchdiffeq are the same (tests/ode)."""
    f = own_field(device)
    f.evaluations = 0
    solve(ours, f, settings, x)
    return f.evaluations


def solve(
    solver: Callable[..., Tensor], f: nn.Module, settings: dict[str, Any], x: Tensor
) -> Tensor:
    with torch.no_grad():
        return solver(f, x, **settings)


def train(
    solver: Callable[..., Tensor], f: nn.Module, settings: dict[str, Any], x: Tensor
) -> list[Tensor]:
    """Solve and differentiate a loss, as a training step does."""
    f.zero_grad(set_to_none=True)
    loss = solver(f, x, **settings).square().mean()
    loss.backward()
    return [loss.detach(), next(f.parameters()).grad]  # type: ignore[list-item]


def alone(count: int, f: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        for _ in range(count):
            x = f(torch.zeros(()), x)
    return x


def _providers(work: Callable[..., Any], settings: dict[str, Any], **own: Any) -> dict[str, Lazy]:
    def theirs(inputs: Inputs) -> Provider:
        return partial(work, torchdiffeq_solver(inputs), field(inputs["x"].device), settings)

    def mine(inputs: Inputs) -> Provider:
        return partial(work, ours, own_field(inputs["x"].device), settings | own)

    def half(inputs: Inputs) -> Provider:
        return partial(work, ours, field(inputs["x"].device), settings | own)

    def bare(inputs: Inputs) -> Provider:
        x = inputs["x"]
        return partial(alone, evaluations(x.device, x, **settings), own_field(x.device))

    found = {"eager": Lazy(theirs), "ours": Lazy(mine), "our solver": Lazy(half)}
    if work is solve:
        found["field alone"] = Lazy(bare, comparable=False)
    return found


def _case(name: str, work: Callable[..., Any], settings: dict[str, Any], **own: Any) -> Case:
    return Case(
        name=f"{name} 2-64x3-2, B={BATCH}",
        make_inputs=random_inputs(x=(BATCH, 2)),
        providers=_providers(work, settings, **own),
        passes=("call",),
        constants=("x",),
        compiles=False,
        targets={"call vs eager": 1.5} if work is solve and settings is DOPRI5 else {},
    )


DOPRI5: dict[str, Any] = {"method": "dopri5"}
CASES = [
    _case("dopri5", solve, DOPRI5),
    _case("dopri8", solve, {"method": "dopri8"}),
    _case("dopri5 and gradient, checkpointed", train, DOPRI5),
    _case("dopri5 and gradient, graphs kept", train, DOPRI5, checkpoint=False),
    _case("dopri5 and gradient, reversible", train, DOPRI5, adjoint="reversible"),
]
