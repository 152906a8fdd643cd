"""Flows: ``tests/flows/test_laws.py`` holds every one of them to the laws of a density model."""

from functools import partial

import torch
from laws import ModuleCase

from pyflowkern import flows, nn

K = 2
Glow = partial(flows.Glow, steps=1, hidden=4, context_features=K)
RealNVP = partial(flows.RealNVP, steps=2, hidden=4, blocks=1, context_features=K)
MAF = partial(flows.MAF, transforms=2, hidden=(8, 8), context_features=K)
IAF = partial(flows.IAF, transforms=2, hidden=(8, 8), context_features=K)
NSF = partial(flows.NSF, transforms=2, steps=1, hidden=(4, 4), bins=4, context_features=K)
#: Fixed steps, so that samples do not share them, and the exact trace, which the Jacobian has, too.
SOLVER = {"divergence": "exact", "method": "rk4", "step_size": 0.25}
FIXED = SOLVER | {"context_features": K}
CNF, FFJORD = partial(flows.CNF, **FIXED), partial(flows.FFJORD, **FIXED)

#: Data of the mean and scale that the laws draw, nearly.
STANDARD = torch.linspace(-2, 2, 30).view(6, 5)[:, [1, 0, 3, 2, 4]]

case = partial(ModuleCase, atol=1e-8)  # of up to ten layers, one after another
#: There and back is the identity but for the error of RK4 in four steps, for each block.
ode = partial(ModuleCase, atol=1e-4, ode=True)

FLOWS = [
    case("Glow image", lambda: Glow((1, 4, 4), levels=2), (1, 4, 4)),
    case("Glow three levels", lambda: Glow((1, 8, 8), levels=3), (1, 8, 8)),
    case("Glow dense", lambda: Glow((2, 2, 4), levels=1, parameterization="dense"), (2, 2, 4)),
    case("Glow sequence", lambda: Glow((2, 8), levels=2), (2, 8)),
    case("Glow volume", lambda: Glow((1, 2, 2, 2), levels=1), (1, 2, 2, 2)),
    case("Glow vector", lambda: Glow(5), (5,)),
    case("Glow pixels", lambda: Glow((1, 4, 4), levels=1, bits=8), (1, 4, 4)),
    case("RealNVP image", lambda: RealNVP((1, 4, 4), levels=2), (1, 4, 4)),
    case("RealNVP sequence", lambda: RealNVP((2, 4), levels=1), (2, 4)),
    case("RealNVP volume", lambda: RealNVP((1, 4, 4, 4), levels=2, steps=1), (1, 4, 4, 4)),
    case("RealNVP vector", lambda: RealNVP((5,)), (5,)),
    case("RealNVP pixels", lambda: RealNVP((1, 4, 4), levels=1, bits=5), (1, 4, 4)),
    case("MAF", lambda: MAF(5), (5,)),
    case(
        "MAF residual",
        lambda: MAF(5, residual=True, gated=True, scale_map="tanh", order="random"),
        (5,),
    ),
    case("MAF on a mixture", lambda: MAF(5, base=flows.MixtureOfGaussians(5, 3)), (5,)),
    case("MAF of other scales", lambda: MAF(5).standardize(STANDARD), (5,)),
    case("MAF with batch norm", lambda: MAF(5, batch_norm=True), (5,)),
    case("IAF", lambda: IAF(5), (5,)),
    case("NSF", lambda: NSF(5, gated=True), (5,)),
    case(
        "NSF unconditional",
        lambda: NSF(5, unconditional=True, tails="affine", mixing="none", residual=False),
        (5,),
    ),
    case(
        "NSF of one dimension",
        lambda: NSF(1, mixing="none"),
        (1,),
        idle=tuple(f"bijection.layers.{i}.conditioner.first.weight" for i in range(2)),
    ),
    case(
        "RealNVP of one dimension",
        lambda: RealNVP(1),
        (1,),
        idle=tuple(f"bijection.layers.{i}.conditioner.first.weight" for i in (1, 3)),
    ),
    case("NSF autoregressive", lambda: NSF(5, autoregressive=True, gated=True), (5,)),
    case(
        "NSF autoregressive plu",
        lambda: NSF(5, autoregressive=True, mixing="plu", residual=False),
        (5,),
    ),
    case("NSF angles", lambda: NSF(5, circular=True, mixing="permutation"), (5,)),
    case("NSF angles autoregressive", lambda: NSF(4, circular=True, autoregressive=True), (4,)),
    case("NSF unit interval", lambda: NSF(5, tails="none"), (5,)),
    case("NSF image", lambda: NSF((1, 4, 4), levels=2), (1, 4, 4)),
    case("NSF sequence", lambda: NSF((2, 4), levels=1, residual=False), (2, 4)),
    case("NSF pixels", lambda: NSF((1, 4, 4), levels=1, bits=8), (1, 4, 4)),
    case(
        "own bijection",
        lambda: flows.Flow(nn.Sequential(nn.Squeeze(), nn.GlowStep(4)), (1, 4, 2)),
        (1, 4, 2),
    ),
    ode("CNF", lambda: CNF(3, (6, 5)), (3,)),
    ode("FlowMatching", lambda: flows.FlowMatching(3, (6, 5), **FIXED), (3,)),
    ode(
        "FlowMatching of classes",
        lambda: flows.FlowMatching(3, (6, 5), classes=K, context_dropout=0.0, **SOLVER),
        (3,),
    ),
    ode("FFJORD", lambda: FFJORD(3, (6,), blocks=2), (3,)),
    ode("FFJORD image", lambda: FFJORD((1, 2, 2), (4,), levels=2), (1, 2, 2)),
]
