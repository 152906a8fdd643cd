"""How the time of a training step grows with the number of transforms, of dimensions and of samples.

"ours" is a flow as one op; "layers" the same with an op for each layer, as the library ran it before: a hook that does
nothing keeps the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import pyflowkern
from bench._case import Case, Inputs, Lazy, Provider, random_inputs
from pyflowkern import flows

__all__ = ["CASES"]


@cache
def flow_of(kind: str, dims: int, transforms: int, layers: bool) -> flows.Flow:
    torch.manual_seed(0)
    make = flows.MAF if kind == "MAF" else flows.NSF
    flow: flows.Flow = make(dims, transforms=transforms, hidden=(64, 64))
    for layer in flow.bijection if layers else ():
        layer.register_forward_hook(lambda *_: None)
    return flow


def step(flow: flows.Flow, x: Tensor) -> Tensor:
    """Run a training step without the optimizer."""
    for p in flow.parameters():
        p.grad = None
    loss = -flow.log_prob(x).mean()
    loss.backward()
    return loss.detach()


def case(kind: str, dims: int, transforms: int, samples: int) -> Case:
    def provider(layers: bool = False, reference: bool = False) -> Callable[[Inputs], Provider]:
        def build(inputs: Inputs) -> Provider:
            flow = flow_of(kind, dims, transforms, layers)

            def run(x: Tensor) -> Any:
                with pyflowkern.use_reference(reference):
                    return step(flow, x)

            return run

        return build

    return Case(
        name=f"{kind} (64, 64) T={transforms} D={dims} N={samples}",
        make_inputs=random_inputs(x=(samples, dims)),
        providers={
            "eager": Lazy(provider(reference=True)),
            "ours": Lazy(provider()),
            "layers": Lazy(provider(layers=True)),
        },
        passes=("call",),
        constants=("x",),
        compiles=False,
        extra=(dims, transforms, samples) != (6, 5, 200),
    )


CASES = [
    case(kind, *sizes)
    for kind in ("MAF", "NSF")
    for sizes in (
        (6, 5, 200),
        *((6, t, 200) for t in (1, 16, 64)),
        *((d, 5, 200) for d in (2, 32, 256)),
        *((6, 5, n) for n in (1, 2_000, 20_000)),
    )
]
