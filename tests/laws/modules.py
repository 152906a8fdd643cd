"""What the laws need to know of a layer or a flow."""

import dataclasses
from collections.abc import Callable

import torch

from laws.draws import normal
from pyflowkern import nn


def randomize(module, scale=0.3, seed=0):
    """Move every parameter from its start: no law shall hold because a layer is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan = max(p.shape[-1], 1) ** 0.5 if p.dim() > 1 else 1.0
            p += scale / fan * torch.randn(p.shape, generator=generator, device="cpu").to(p)
    return module


@dataclasses.dataclass(frozen=True)
class ModuleCase:
    """A layer or a flow.

    Attributes:
        name: in the names of tests.
        build: makes a new one, with the same shapes and structure each time.
        shape: of one event.
        unit: whether data lie in the unit interval; of flows with a domain they lie there.
        atol: of ``f^-1(f(x)) = x`` in float64: 1e-9, that of quantities of order one after some hundred operations, or
            the error of the solver.
        idle: parameters that nothing depends on.
        no_graph: the error where both directions are to be one graph; empty where they can be.
        no_transforms: the error of gradients inside transforms of ``torch.func``, likewise.
        ode: whether an ODE is solved, which is many evaluations of a network, and the start is no identity.
    """

    name: str
    build: Callable[[], nn.Bijection]
    shape: tuple[int, ...]
    unit: bool = False
    atol: float = 1e-9
    idle: tuple[str, ...] = ()
    no_graph: str = ""
    no_transforms: str = ""
    ode: bool = False

    def __str__(self):
        return self.name

    def make(self, n=3, dtype=torch.float64):
        """Return a module in eval mode with changed parameters, data, and a context if it takes one."""
        torch.manual_seed(0)
        module = randomize(self.build()).to(dtype).eval()
        x = normal(n, *self.shape, dtype=dtype)
        if self.unit or getattr(module, "preprocess", None) is not None:
            x = torch.sigmoid(x)
        elif getattr(module, "domain", None) is not None:
            low, high = module.domain
            x = low + (high - low) * torch.sigmoid(x)
        sizes = {getattr(m, "context_features", 0) for m in module.modules()}
        return module, x, normal(n, max(sizes), seed=4, dtype=dtype) if max(sizes) else None


#: What solves an ODE with adaptive steps: no graph holds them, as their number depends on the data.
ADAPTIVE = {
    "ode": True,
    "no_graph": "the ODE of a continuous flow is part of a graph where its steps are fixed",
    "no_transforms": "ode.solve runs inside transforms of torch.func with fixed steps",
}


def directions(module, x, context):
    """Yield both directions: the name of the argument, a bijection that goes so, and where it starts."""
    yield "x", module, x
    backwards = nn.Inverse(module).train(module.training)
    yield "z", backwards, module(x, context)[0].detach()


def run(module, x, context):
    """Return results and the gradients of input, context and parameters, for a loss that weights each result."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, context)]
    results = module(*leaves)
    wanted = [t for t in (*leaves, *module.parameters()) if t is not None]
    loss = sum((normal(*t.shape, seed=7 + i).to(t) * t).sum() for i, t in enumerate(results))
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [*(t.detach() for t in results), *found]
