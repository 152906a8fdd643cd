"""Flow matching: a training step with its optimizer, by how a batch is paired, and a plan of many samples.

"ours" pairs each batch by an entropic plan with ``epsilon`` of a hundredth of the batches' spread; "ahead" takes the
same pairs from ``PairedBatches``, whose thread solves a plan while the step before runs; "exact" is our step with the
exact plan by SciPy.  "independent" is our step without transport, "eager" the same by the references in plain PyTorch.
"torchcfm" is the step as one writes it with that library: torch's layers, and POT's exact plan on the CPU;
"torchcfm independent" is that step without a plan.  Pairs are drawn at random: gradients are not compared.

The target, 1.15 times the step without transport, cannot be reached on two cores, both of which a step uses: the plan
alone takes longer than such a step, also in a thread of its own.  Potentials of the last batch are no better start of
the next plan than none: at this epsilon they follow the samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pyflowkern
from bench._case import Case, Inputs, Lazy, Provider, random_inputs
from pyflowkern import flows, transport

__all__ = ["CASES"]

BATCH, HIDDEN = 512, (64, 64, 64)


# --- training steps ------------------------------------------------------------------------------


def step(loss: Callable[[Tensor], Tensor], model: nn.Module) -> Provider:
    """Return a training step by Adam; its result is the loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def run(x1: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = loss(x1)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return value.detach()

    return run


def flow(coupling: str, inputs: Inputs) -> flows.FlowMatching:
    x1 = inputs["x1"]
    torch.manual_seed(0)
    return flows.FlowMatching(x1.shape[1], hidden=HIDDEN, coupling=coupling).to(x1.device)


def ours(coupling: str, inputs: Inputs) -> Provider:
    model = flow(coupling, inputs)
    return step(model.loss, model)


def reference(inputs: Inputs) -> Provider:
    run = ours("independent", inputs)

    def plain(x1: Tensor) -> Any:
        with pyflowkern.use_reference():
            return run(x1)

    return plain


def ahead(inputs: Inputs) -> Provider:
    """Return a step that takes its batches from an iterator, as a loop over them does."""
    model, x1 = flow("independent", inputs), inputs["x1"]
    latest = [x1]
    pairs = transport.PairedBatches(
        lambda n: torch.randn(n, x1.shape[1], device=x1.device),
        lambda n: latest[0],
        plan_size=BATCH,
        batch_size=BATCH,
        ahead=True,
    )
    stream: Iterator[tuple[Tensor, Tensor]] = iter(pairs)

    def loss(x1: Tensor) -> Tensor:
        latest[0] = x1
        x0, x1 = next(stream)
        return model.loss(x1, x0=x0)

    return step(loss, model)


def torchcfm(exact: bool, inputs: Inputs, compiled: bool = False) -> Provider:
    """Return a step as it is written with torchcfm; pairs are drawn from POT's exact plan if ``exact``."""
    d, device = inputs["x1"].shape[1], inputs["x1"].device
    widths = (d + 1, *HIDDEN)
    layers: list[nn.Module] = []
    for a, b in zip(widths, HIDDEN, strict=False):
        layers += [nn.Linear(a, b), nn.SELU()]
    model = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], d)).to(device)
    network: Any = torch.compile(model) if compiled else model

    def loss(x1: Tensor) -> Tensor:
        x0 = torch.randn_like(x1)
        if exact:
            import ot

            masses = ot.unif(BATCH)
            cost = torch.cdist(x0, x1).square().cpu().numpy()
            plan = torch.as_tensor(ot.emd(masses, masses, cost)).flatten()
            cells = torch.multinomial(plan, BATCH, replacement=True)
            x0, x1 = x0[(cells // BATCH).to(device)], x1[(cells % BATCH).to(device)]
        t = torch.rand(len(x1), 1, device=device)
        xt = (1 - t) * x0 + t * x1
        error: Tensor = network(torch.cat([xt, t], 1)) - (x1 - x0)
        return error.square().mean()

    return step(loss, model)


def training(d: int) -> Case:
    """Return a training step in ``d`` dimensions; with transport it is to take 1.15 times as long at most."""
    return Case(
        name=f"training step d={d} batch {BATCH}",
        make_inputs=random_inputs(x1=(BATCH, d)),
        providers={
            "eager": Lazy(reference, comparable=False),
            "ours": Lazy(partial(ours, "sinkhorn"), comparable=False),
            "ahead": Lazy(ahead, comparable=False),
            "independent": Lazy(partial(ours, "independent"), comparable=False),
            "exact": Lazy(partial(ours, "ot"), comparable=False),
            "torchcfm": Lazy(partial(torchcfm, True), comparable=False),
            "torchcfm independent": Lazy(partial(torchcfm, False), comparable=False),
        },
        passes=("call",),
        constants=("x1",),
        compiles=False,
        targets={"call vs independent": 1 / 1.15},
    )


def matching(d: int, batch: int) -> Case:
    """Return a training step without transport, ours and as it is written with torchcfm, also compiled."""
    return Case(
        name=f"step without transport d={d} batch {batch}",
        make_inputs=random_inputs(x1=(batch, d)),
        providers={
            "eager": Lazy(reference, comparable=False),
            "ours": Lazy(partial(ours, "independent"), comparable=False),
            "torchcfm": Lazy(partial(torchcfm, False), comparable=False),
            "torchcfm compiled": Lazy(partial(torchcfm, False, compiled=True), comparable=False),
        },
        passes=("call",),
        constants=("x1",),
        compiles=False,
        targets={"call vs torchcfm": 1.5, "call vs torchcfm compiled": 1.0},
    )


# --- a plan of many samples ----------------------------------------------------------------------


def entropic_plan(x0: Tensor, x1: Tensor) -> Tensor:
    """Solve a plan to the tolerance of the samplers."""
    sampler = transport.OTPlanSampler("sinkhorn", 0.01, normalize_cost="spread")
    return sampler.solve(x0, x1).error


def plain_plan(x0: Tensor, x1: Tensor) -> Tensor:
    """Do so by the references, which hold the matrix of all pairs."""
    with pyflowkern.use_reference():
        return entropic_plan(x0, x1)


def pot_plan(iterations: int, lazy: bool = False) -> Callable[[Inputs], Provider]:
    """Return so many of POT's iterations in the logarithmic domain, in float32, with the same epsilon.

    ``lazy`` ones never hold the matrix of costs, but are a loop over blocks of rows.
    """

    def build(_: Inputs) -> Provider:
        import ot

        def run(x0: Tensor, x1: Tensor) -> Any:
            epsilon = 0.01 * float(x0.var(0).sum() + x1.var(0).sum())
            options = {"stopThr": 0.0, "warn": False}
            if lazy:
                blocks = {"isLazy": True, "batchSize": 1024, "numIterMax": iterations}
                return ot.bregman.empirical_sinkhorn(x0, x1, epsilon, **options, **blocks)
            mass = x0.new_full((len(x0),), 1 / len(x0))
            cost = torch.cdist(x0, x1).square()
            options |= {"numItermax": iterations, "method": "sinkhorn_log"}
            return ot.sinkhorn(mass, mass, cost, epsilon, **options)

        return run

    return build


def plan(n: int, d: int, iterations: int) -> Case:
    """Return the case of a plan of ``n`` samples: of POT a few iterations alone, as a whole plan takes minutes."""
    peers = {f"POT, {iterations} iterations": pot_plan(iterations)}
    if n > 4096:  # whose matrices in plain PyTorch, in float64, would fill the memory
        peers[f"POT lazy, {iterations} iterations"] = pot_plan(iterations, lazy=True)
    return Case(
        name=f"plan of {n} samples, d={d}",
        make_inputs=random_inputs(x0=(n, d), x1=(n, d)),
        providers={
            "eager": entropic_plan if n > 4096 else plain_plan,
            "ours": entropic_plan,
            **{name: Lazy(build, comparable=False) for name, build in peers.items()},
        },
        passes=("call",),
        constants=("x0", "x1"),
        compiles=False,
        extra=True,
    )


CASES = [
    *(matching(d, batch) for d, batch in ((2, 256), (50, 512))),
    *(training(d) for d in (2, 10, 50)),
    *(plan(2_048, d, 10) for d in (2, 50)),
    plan(16_384, 2, 1),
]
