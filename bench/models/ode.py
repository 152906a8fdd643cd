"""Solves of a small vector field, against torchdiffeq with the same tolerances and evaluations.

"eager" is torchdiffeq with torch's layers.  "ours" is our solver with the same weights in our ``VectorFieldMLP``; "our
solver" is our solver with torch's layers.  "field alone" calls the field of "ours" as often as a solve does, which no
solver can beat.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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
    """The same function with the same parameters, as a ``VectorFieldMLP``; counts its evaluations."""

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


class Decay(nn.Module):
    """The velocity ``-y``, which costs almost nothing beside the solver's own arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluations = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the velocity, and count."""
        self.evaluations += 1
        return -y


@cache
def decay(device: torch.device) -> Decay:
    return Decay()


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


def evaluations(f: OwnField | Decay, x: Tensor, settings: dict[str, Any]) -> int:
    """Return the number of evaluations in one solve of ours; torchdiffeq needs as many (tests/ode)."""
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


def evaluate(count: int, f: nn.Module, x: Tensor) -> Tensor:
    """Evaluate a field ``count`` times."""
    with torch.no_grad():
        for _ in range(count):
            x = f(torch.zeros(()), x)
    return x


def _providers(
    work: Callable[..., Any],
    settings: dict[str, Any],
    make: Callable[..., nn.Module] = field,
    make_own: Callable[..., Any] = own_field,
    **own: Any,
) -> dict[str, Lazy]:
    def eager(inputs: Inputs) -> Provider:
        return partial(work, torchdiffeq_solver(inputs), make(inputs["x"].device), settings)

    def our_solver_and_field(inputs: Inputs) -> Provider:
        return partial(work, ours, make_own(inputs["x"].device), settings | own)

    def our_solver(inputs: Inputs) -> Provider:
        return partial(work, ours, make(inputs["x"].device), settings | own)

    def field_alone(inputs: Inputs) -> Provider:
        f = make_own(inputs["x"].device)
        return partial(evaluate, evaluations(f, inputs["x"], settings), f)

    found = {"eager": Lazy(eager), "ours": Lazy(our_solver_and_field)}
    if make is not make_own:
        found["our solver"] = Lazy(our_solver)
    if work is solve:
        found["field alone"] = Lazy(field_alone, comparable=False)
    return found


def _case(name: str, providers: dict[str, Lazy], shape: Sequence[int], target: float = 0) -> Case:
    return Case(
        name=name,
        make_inputs=random_inputs(x=tuple(shape)),
        providers=providers,
        passes=("call",),
        constants=("x",),
        compiles=False,
        targets={"call vs eager": target} if target else {},
    )


def _network(name: str, providers: dict[str, Lazy], target: float = 0) -> Case:
    return _case(f"{name} 2-64x3-2, B={BATCH}", providers, (BATCH, 2), target)


DOPRI5: dict[str, Any] = {"method": "dopri5"}
CASES = [
    _network("dopri5", _providers(solve, DOPRI5), 1.5),
    _network("dopri8", _providers(solve, {"method": "dopri8"})),
    _network("dopri5 and gradient, checkpointed", _providers(train, DOPRI5)),
    _network("dopri5 and gradient, graphs kept", _providers(train, DOPRI5, checkpoint=False)),
    _network("dopri5 and gradient, reversible", _providers(train, DOPRI5, adjoint="reversible")),
    _case(
        "dopri5 of 1000000 numbers, dy/dt = -y",
        _providers(solve, DOPRI5, decay, decay),
        (1_000_000,),
        2.0,
    ),
]
