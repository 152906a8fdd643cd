"""Flows of the size that most people train: steps without and with an optimizer, and densities of few samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import pyflowkern
from bench._case import Case, Inputs, Lazy, Provider, random_inputs
from pyflowkern import flows, nn

__all__ = ["CASES"]

BINS = 8


@dataclass(frozen=True)
class Model:
    """A flow of ``transforms`` transforms, whose networks have these hidden layers, and how others build it."""

    name: str
    dims: int
    hidden: tuple[int, ...]
    transforms: int = 5

    def __str__(self) -> str:
        return f"{self.name} D={self.dims} {self.transforms} x {self.hidden}"

    def ours(self) -> flows.Flow:
        plain: dict[str, Any] = {"transforms": self.transforms, "hidden": self.hidden}
        if self.name == "MAF":
            return flows.MAF(self.dims, **plain)
        if self.name == "RealNVP":
            mlp = partial(nn.MLP, hidden=self.hidden)
            return flows.RealNVP(self.dims, steps=self.transforms, conditioner=mlp)
        plain |= {"bins": BINS, "residual": False}
        if self.name == "NSF (AR)":
            return flows.NSF(self.dims, autoregressive=True, **plain)
        return flows.NSF(self.dims, mixing="permutation", **plain)

    def zuko(self) -> Any:
        import zuko

        plain: dict[str, Any] = {"transforms": self.transforms, "hidden_features": self.hidden}
        if self.name == "MAF":
            return zuko.flows.MAF(self.dims, **plain)
        if self.name == "RealNVP":
            return zuko.flows.RealNVP(self.dims, **plain)
        passes = {"passes": 2, "randperm": True} if self.name == "NSF" else {}  # 2: couplings
        return zuko.flows.NSF(self.dims, bins=BINS, **plain, **passes)

    def nflows(self) -> Any:
        from nflows import transforms as t
        from nflows.distributions import StandardNormal
        from nflows.flows import Flow
        from nflows.nn.nets import MLP

        width, steps = self.hidden[0], []
        for i in range(self.transforms):
            if self.name == "MAF":
                steps.append(
                    t.MaskedAffineAutoregressiveTransform(
                        self.dims, width, num_blocks=1, use_residual_blocks=False
                    )
                )
            else:
                mask = torch.arange(self.dims) % 2 == i % 2
                steps.append(
                    t.PiecewiseRationalQuadraticCouplingTransform(
                        mask,
                        lambda a, b: _Vectors(MLP([a], [b], list(self.hidden))),
                        num_bins=BINS,
                        tails="linear",
                        tail_bound=5.0,
                    )
                )
            steps.append(t.ReversePermutation(self.dims))
        return Flow(t.CompositeTransform(steps), StandardNormal([self.dims]))


class _Vectors(torch.nn.Module):
    """A network as nflows' couplings call it."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(x)
        return out


@cache
def built(model: Model, library: str, device: torch.device) -> Any:
    """Return the flow with weights moved away from their initial values, as after some training."""
    torch.manual_seed(0)
    flow = getattr(model, library)().to(device)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * p.shape[-1] ** -0.5 * torch.randn_like(p) if p.dim() > 1 else 0.0)
    return flow


class Compiled:
    """A flow whose density torch compiles."""

    def __init__(self, flow: Any) -> None:
        self.parameters = flow.parameters
        self.log_prob = torch.compile(partial(log_density, flow), dynamic=False)


# --- what is timed -------------------------------------------------------------------------------


def log_density(flow: Any, x: Tensor) -> Tensor:
    value: Tensor = flow.log_prob(x) if hasattr(flow, "log_prob") else flow().log_prob(x)
    return value


@cache
def parameters(flow: Any) -> list[Tensor]:
    return list(flow.parameters())


def gradients(flow: Any, x: Tensor) -> Tensor:
    """Run a training step without the optimizer."""
    for p in parameters(
        flow
    ):  # as an optimizer does: a module would first look for its parameters
        p.grad = None
    loss = -log_density(flow, x).mean()
    loss.backward()
    return loss.detach()


@cache
def optimizer(flow: Any) -> torch.optim.Optimizer:
    found = parameters(flow)
    # no rate, so that weights stay; graphs capture steps whose count is on the device
    return torch.optim.AdamW(found, lr=0.0, fused=True, capturable=found[0].is_cuda)


def whole_step(flow: Any, x: Tensor) -> Tensor:
    """Run a training step with its optimizer."""
    loss = gradients(flow, x)
    optimizer(flow).step()
    return loss


@torch.no_grad()
def log_prob(flow: Any, x: Tensor) -> Tensor:
    return log_density(flow, x)


WORK = {"step without optimizer": gradients, "step": whole_step, "log_prob": log_prob}


def case(
    model: Model,
    work: str,
    samples: int,
    zuko: float | None = None,
    nflows: float | None = None,
    device: str = "",
) -> Case:
    """Return a case; ``zuko`` and ``nflows`` are the wanted speedups, nflows None where it has no such flow.

    Where it is for ``device`` cuda alone, zuko is compiled, too.
    """

    def provider(
        library: str, reference: bool = False, compiles: bool = False
    ) -> Callable[[Inputs], Provider]:
        def build(inputs: Inputs) -> Provider:
            flow = built(model, library, inputs["x"].device)
            if compiles:
                flow = Compiled(flow)

            def run(x: Tensor) -> Any:
                with pyflowkern.use_reference(reference):
                    return WORK[work](flow, x)

            return run if reference else partial(WORK[work], flow)

        return build

    providers = {
        "eager": Lazy(provider("ours", reference=True)),
        "ours": Lazy(provider("ours")),
        "zuko": Lazy(provider("zuko"), comparable=False),
    }
    targets = {} if zuko is None else {"call vs zuko": zuko}
    if device == "cuda":
        providers["zuko compile"] = Lazy(provider("zuko", compiles=True), comparable=False)
    if nflows is not None:
        providers["nflows"] = Lazy(provider("nflows"), comparable=False)
        targets["call vs nflows"] = nflows
    return Case(
        name=f"{work} {model}, batch {samples}",
        make_inputs=random_inputs(x=(samples, model.dims)),
        providers=providers,
        passes=("call",),
        constants=("x",),
        compiles=False,
        targets=targets,
        extra=work == "log_prob" and samples == 64,
        devices=(device,) if device else ("cpu", "cuda"),
    )


MAF, NSF = Model("MAF", 6, (50, 50)), Model("NSF", 6, (50, 50))
REALNVP, NSF_AR = Model("RealNVP", 6, (50, 50)), Model("NSF (AR)", 6, (64, 64))
WIDE = Model("MAF", 43, (512, 512))
CASES = [
    case(MAF, "step without optimizer", 200, 6.0, 6.0),
    case(MAF, "step", 200, 3.0, 3.0, "cpu"),
    case(NSF, "step without optimizer", 200, 10.0, 12.0),
    case(NSF, "step", 200, 6.0, 6.0, "cpu"),
    case(REALNVP, "step without optimizer", 200, 6.0),
    case(REALNVP, "step", 200, 3.0, device="cpu"),
    case(NSF_AR, "step without optimizer", 512, 8.0),
    case(NSF_AR, "step", 512, 8.0),
    case(WIDE, "step without optimizer", 1000, 1.7),
    case(WIDE, "log_prob", 1000, 1.6),
    *(case(model, "log_prob", n, 10.0) for model in (MAF, NSF) for n in (1, 64)),
    *(case(model, "step", n, device="cuda") for model in (MAF, NSF, REALNVP) for n in (200, 4096)),
]
