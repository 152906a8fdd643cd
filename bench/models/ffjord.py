"""A training step of FFJORD at the size of POWER, against torchdiffeq and autograd: same weights, probes and loss.

"eager" does what FFJORD's authors do, with torchdiffeq: the divergence is a VJP with a graph, and the graphs of all
evaluations are kept.  "ours" takes the same steps and keeps graphs, too.  "checkpointed", the default of flows, keeps
only states and repeats each step in the backward pass.  "adjoint" is the continuous adjoint, which needs the memory of
one evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench._case import Case, Inputs, Lazy, Provider, random_inputs
from pyflowkern import flows, ops
from pyflowkern.ops.probe import as_probe, expand_probe

DIMS, BATCH, HIDDEN, BLOCKS, TOLERANCE = 6, 1000, (60, 60, 60), 5, 1e-5


@cache
def flow(device: torch.device) -> flows.FFJORD:
    """Return a flow whose fields are steep enough for a solve to take several steps."""
    torch.manual_seed(0)
    made = flows.FFJORD(DIMS, HIDDEN, blocks=BLOCKS, rtol=TOLERANCE, atol=TOLERANCE).to(device)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(1.5)
    return made


class Dynamics(nn.Module):
    """Velocity and divergence of concatsquash layers in plain PyTorch; parameters are those of ours."""

    def __init__(self, field: Any) -> None:
        super().__init__()
        # in a list, so that it is no submodule and its parameters are listed once
        self.field = [field]
        self.probe: Tensor | None = None

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity."""
        field = self.field[0]
        for i, (layer, p) in enumerate(zip(field.layers, field.times, strict=True)):
            x = layer(x) * torch.sigmoid(p[0] * t + p[1]) + p[2] * t
            x = torch.tanh(x) if i < len(HIDDEN) else x
        return x

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the velocity and Hutchinson's estimate."""
        x = state[0]
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            velocity = self.velocity(t, x)
            (product,) = torch.autograd.grad(velocity, x, self.probe, create_graph=True)
        return velocity, (product * self.probe).sum(1, keepdim=True)


def results(model: flows.FFJORD, loss: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [loss.detach(), *(p.grad for p in next(model.blocks()).parameters())]  # type: ignore[misc]


def theirs(inputs: Inputs) -> Provider:
    import torchdiffeq

    model = flow(inputs["x"].device)
    parts = [Dynamics(block.field) for block in model.blocks()]
    span = torch.tensor([0.0, 1.0], device=inputs["x"].device)
    settings = {"rtol": TOLERANCE, "atol": TOLERANCE, "method": "dopri5"}

    def run(x: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        z, log_det = x, torch.zeros(len(x), 1, dtype=x.dtype, device=x.device)
        for part in parts:
            part.probe = expand_probe(*as_probe(ops.draw_probe(z), 1, z, z.dtype), z)[0]
            start = (z, torch.zeros_like(log_det))
            z, change = (s[-1] for s in torchdiffeq.odeint(part, start, span, **settings))
            log_det = log_det + change
        normal = -0.5 * z.square().sum(1) - 0.5 * DIMS * math.log(2 * math.pi)
        return results(model, -(normal + log_det[:, 0]).mean())

    return run


def ours(settings: dict[str, Any]) -> Callable[[Inputs], Provider]:
    def build(inputs: Inputs) -> Provider:
        model = flow(inputs["x"].device)

        def run(x: Tensor) -> list[Tensor]:
            torch.manual_seed(0)
            for block in model.blocks():
                block.solver = {"rtol": TOLERANCE, "atol": TOLERANCE, **settings}
            return results(model, -model.log_prob(x).mean())

        return run

    return build


CASES = [
    Case(
        name=f"training step D={DIMS}, {BLOCKS} blocks of 3 x {HIDDEN[0]}, batch {BATCH}",
        make_inputs=random_inputs(x=(BATCH, DIMS)),
        providers={
            "eager": Lazy(theirs),
            "ours": Lazy(ours({"compat": "torchdiffeq", "checkpoint": False})),
            "checkpointed": Lazy(ours({"compat": "torchdiffeq"})),
            "adjoint": Lazy(ours({"adjoint": "continuous"}), comparable=False),
        },
        passes=("call",),
        constants=("x",),
        compiles=False,
        targets={"call vs eager": 2.0},
    )
]
