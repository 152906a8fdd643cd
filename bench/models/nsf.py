"""Neural spline flows at the sizes of simulation-based inference: a training step, log-density, samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import pyflowkern
from bench._case import Case, Inputs, Lazy, Provider, random_inputs
from pyflowkern import flows

__all__ = ["CASES"]


@dataclass(frozen=True)
class Size:
    """A spline flow: ``steps`` pairs of a coupling, whose network has two residual blocks, and an LU matrix."""

    dims: int
    batch: int
    steps: int
    hidden: int
    bins: int
    target: float  #: wanted speedup of a training step over nflows

    @property
    def name(self) -> str:
        return f"D={self.dims} batch {self.batch}, {self.steps} x {self.hidden}, {self.bins} bins"


SIZES = (
    Size(6, 200, 5, 50, 10, 2.0),
    Size(10, 1000, 5, 50, 10, 2.0),
    Size(6, 512, 10, 256, 8, 1.7),
    Size(20, 4096, 8, 64, 8, 3.3),
)


@cache
def ours(size: Size, device: torch.device) -> flows.NSF:
    """Return a flow with weights moved away from their initial values: an identity would hide mistakes."""
    torch.manual_seed(0)
    flow = flows.NSF(
        size.dims,
        transforms=size.steps,
        hidden=(size.hidden, size.hidden),
        bins=size.bins,
        bound=3.0,
    )
    with torch.no_grad():
        # nflows' LU has neither a permutation nor negative pivots
        for layer in flow.bijection[1::2]:
            layer.permutation.copy_(torch.arange(size.dims))
        for p in flow.parameters():
            p.add_(0.3 * p.shape[-1] ** -0.5 * torch.randn_like(p) if p.dim() > 1 else 0.0)
    return flow.to(device)


@cache
def nflows(size: Size, device: torch.device) -> Any:
    """Return the same function in nflows, with the same weights."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import (
        CompositeTransform,
        LULinear,
        PiecewiseRationalQuadraticCouplingTransform,
    )

    transforms = []
    for i, layer in enumerate(ours(size, device).bijection):
        if i % 2:
            transforms.append(_lu(LULinear(size.dims), layer))
            continue
        mask = torch.ones(size.dims)
        mask[layer._slice] = 0
        coupling = PiecewiseRationalQuadraticCouplingTransform(
            mask,
            partial(_network, ResidualNet, size.hidden),
            num_bins=size.bins,
            tails="linear",
            tail_bound=3.0,
        )
        _copy_network(coupling.transform_net, layer.conditioner, size)
        transforms.append(coupling)
    return Flow(CompositeTransform(transforms), StandardNormal([size.dims])).to(device)


def _network(make: Callable[..., Any], hidden: int, inputs: int, outputs: int) -> Any:
    return make(inputs, outputs, hidden, num_blocks=2)


@torch.no_grad()
def _copy_network(theirs: Any, mine: Any, size: Size) -> None:
    pairs = [(theirs.initial_layer, mine.first), (theirs.final_layer, mine.last[1])]
    for a, b in zip(theirs.blocks, mine.blocks, strict=True):
        pairs += [(a.linear_layers[0], b[1]), (a.linear_layers[1], b[3])]
    for to, source in pairs:
        to.load_state_dict(source.state_dict())
    # nflows divides raw widths and heights by the root of the hidden width
    widths_and_heights = torch.ones(theirs.final_layer.out_features).view(-1, 3 * size.bins - 1)
    widths_and_heights[:, : 2 * size.bins] = size.hidden**0.5
    scale = widths_and_heights.flatten().to(theirs.final_layer.weight.device)
    theirs.final_layer.weight.mul_(scale[:, None])
    theirs.final_layer.bias.mul_(scale)


@torch.no_grad()
def _lu(theirs: Any, mine: Any) -> Any:
    rows, columns = theirs.lower_indices
    theirs.lower_entries.copy_(mine.lower[rows, columns])
    rows, columns = theirs.upper_indices
    theirs.upper_entries.copy_(mine.upper[rows, columns])
    diagonal = mine.log_diag.exp() - theirs.eps
    theirs.unconstrained_upper_diag.copy_(torch.log(torch.expm1(diagonal)))
    theirs.bias.zero_()
    return theirs


# --- what is timed, for either -------------------------------------------------------------------


def train_step(model: Any, x: Tensor) -> list[Tensor]:
    """Run a step without the optimizer; return the loss and gradients that both parameterize alike."""
    model.zero_grad(set_to_none=True)
    loss = -model.log_prob(x).mean()
    loss.backward()
    if isinstance(model, flows.Flow):
        first, last = model.bijection[0].conditioner, model.bijection[-1]
        return [loss.detach(), first.first.weight.grad, first.blocks[1][3].bias.grad, _below(last)]
    first, last = model._transform._transforms[0].transform_net, model._transform._transforms[-1]
    lower = last.lower_entries.grad
    return [
        loss.detach(),
        first.initial_layer.weight.grad,
        first.blocks[1].linear_layers[1].bias.grad,
        lower,
    ]


def _below(layer: Any) -> Tensor:
    """Return the gradient of a matrix's lower triangle, row by row as nflows stores it."""
    size = layer.channels
    rows, columns = torch.tril_indices(size, size, -1)
    return layer.lower.grad[rows, columns]


@torch.no_grad()
def log_prob(model: Any, x: Tensor) -> Tensor:
    return model.log_prob(x)


@torch.no_grad()
def sample(model: Any, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model.sample(len(x))


def timed(work: Callable[..., Any], size: Size) -> dict[str, Lazy]:
    """Return the providers of one kind of work."""

    def reference(inputs: Inputs) -> Provider:
        model = ours(size, inputs["x"].device)

        def run(x: Tensor) -> Any:
            with pyflowkern.use_reference():
                return work(model, x)

        return run

    return {
        "eager": Lazy(reference),
        "ours": Lazy(lambda inputs: partial(work, ours(size, inputs["x"].device))),
        "nflows": Lazy(lambda inputs: partial(work, nflows(size, inputs["x"].device))),
    }


CASES = [
    Case(
        name=f"{name} {size.name}",
        make_inputs=random_inputs(x=(size.batch, size.dims)),
        providers=timed(work, size),
        passes=("call",),
        constants=("x",),
        compiles=False,
        targets={"call vs nflows": size.target} if work is train_step else {},
        extra=work is not train_step,
    )
    for size in SIZES
    for name, work in (("training step", train_step), ("log_prob", log_prob), ("sample", sample))
]
