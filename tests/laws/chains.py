"""Sequences of layers that one op runs, to compare with the layers themselves."""

from functools import partial

import pytest
import torch

from laws.draws import normal
from laws.modules import randomize
from pyflowkern import flows, nn, use_reference
from pyflowkern.nn import chain
from pyflowkern.ops import ScaleMap, SplineMap

D, K = 5, 2
INTERLEAVED = nn.channel_mask(D, interleaved=True)
IRREGULAR = torch.tensor([True, False, False, True, False])
mlp = partial(nn.MLP, hidden=(7, 6))
residual = partial(nn.ResidualMLP, hidden=6)
made = partial(nn.MaskedAutoregressive, D, (9, 8))
made_of_blocks = partial(nn.MaskedAutoregressive, D, (9, 9), residual=True)
of_angles = partial(nn.PeriodicInput, conditioner=mlp, bound=6.0)
#: Angles, and others in intervals of their own.
MIXED = [
    *(SplineMap(bins=4, tails="circular", bound=6.0), SplineMap(bins=4)),
    *(SplineMap(bins=4, bound=8.0), SplineMap("quadratic", bins=3, tails="affine")),
    SplineMap(bins=2, tails="circular", bound=5.0),
]
Affine, Spline = nn.AffineCoupling, nn.SplineCoupling
#: Of the modules, not subclasses of our own.
ACTIVATIONS = [
    *(torch.nn.ReLU, torch.nn.LeakyReLU, torch.nn.ELU, torch.nn.Tanh, torch.nn.Sigmoid),
    *(torch.nn.SiLU, torch.nn.GELU, torch.nn.Identity),
]
SEQUENCES = {
    "affine": lambda: [Affine(D, mlp), nn.Reverse(D), Affine(D, residual, swap=True)],
    "additive": lambda: [nn.AdditiveCoupling(D, mlp), nn.Permutation([2, 0, 4, 1, 3])],
    "scales": lambda: [
        Affine(D, mlp, scale_map=ScaleMap("softplus", eps=1e-3, divide=True)),
        Affine(D, mlp, scale_map=ScaleMap("sigmoid", offset=2.0, shift_first=True), swap=True),
    ],
    "splines": lambda: [
        Spline(D, partial(residual, activate_last=False), bins=4),
        nn.InvertibleLinear(D),
        Spline(D, partial(residual, blocks=0), swap=True, tails="affine", bins=3),
    ],
    "unconditional": lambda: [
        Spline(D, mlp, split=INTERLEAVED, unconditional=True, bins=4),
        Spline(D, mlp, split=IRREGULAR, swap=True, unconditional=True, kind="cubic", bins=3),
        Spline(D, mlp, swap=True, unconditional=True, bins=3),
    ],
    "matrices": lambda: [
        nn.InvertibleLinear(D, parameterization="dense"),
        Affine(D, mlp),
        nn.InvertibleConv1x1(D, parameterization="householder"),
        nn.ActNorm(D),
    ],
    "batch norm": lambda: [nn.BatchNorm(D), Affine(D, mlp), nn.BatchNorm(D, affine=False)],
    "standardize": lambda: [
        nn.Standardize(D).fit(3 * torch.randn(9, D) + 5),
        Affine(D, mlp),
        nn.Standardize(D),
    ],
    "glow": lambda: [nn.GlowStep(D), Affine(D, mlp), nn.GlowStep(D, parameterization="dense")],
    "circle": lambda: [
        nn.CircularShift(D, bound=6.0, shift=0.5),
        Spline(D, mlp, tails="circular", bound=6.0, bins=3),
        nn.CircularShift(D, bound=6.0, shift=0.5, learned=False),
        made(transform=SplineMap(bins=3, tails="circular", bound=6.0)),
    ],
    "angles": lambda: [
        Spline(D, of_angles, split=INTERLEAVED, tails="circular", bound=6.0, bins=3),
        nn.CircularShift(D, bound=6.0, shift=0.5),
        Spline(D, of_angles, swap=True, tails="circular", bound=6.0, bins=3),
        Affine(D, partial(of_angles, conditioner=residual)),
    ],
    "several splines": lambda: [
        nn.MixedSplineCoupling(D, mlp, MIXED),
        nn.MixedSplineCoupling(
            D, partial(nn.PeriodicInput, conditioner=residual), MIXED, swap=True
        ),
        nn.MixedSplineCoupling(D, mlp, [MIXED[1]] * D, split=IRREGULAR),
    ],
    "volume": lambda: [
        nn.GINCoupling(D, mlp),
        nn.GINCoupling(D, residual, swap=True, scale_map=ScaleMap("atan", gain=2.0, divide=True)),
        nn.GINCoupling(D, mlp, split=IRREGULAR, scale_map=ScaleMap("softplus", shift_first=True)),
    ],
    "context of angles": lambda: [
        nn.GINCoupling(D, partial(of_angles, conditioner=partial(mlp, context_features=K))),
        nn.MixedSplineCoupling(D, partial(mlp, context_features=K), MIXED),
    ],
    "autoregressive": lambda: [made(), made(order=[3, 1, 0, 2, 4]), made(transform="exp")],
    "residual": lambda: [
        nn.MaskedAutoregressive(D, (8, 8), residual=True, activation="silu"),
        nn.MaskedAutoregressive(D, (8,), transform=SplineMap(bins=3), order=[4, 3, 2, 1, 0]),
    ],
    "context of a coupling": lambda: [Affine(D, partial(mlp, context_features=K))],
    "context": lambda: [
        made(context_features=K, activation="gelu"),
        nn.ActNorm(D),
        Affine(D, partial(mlp, context_features=K)),
        Spline(D, partial(residual, context_features=K), bins=3),
    ],
    "masks": lambda: [
        Affine(D, mlp, split=INTERLEAVED),
        Affine(
            D, residual, split=IRREGULAR, swap=True, scale_map=ScaleMap("exp", shift_first=True)
        ),
        nn.AdditiveCoupling(D, mlp, split=IRREGULAR),
    ],
    "context of gates": lambda: [
        Affine(D, partial(residual, context_features=K, gated=True)),
        made_of_blocks(context_features=K, gated=True, activation="silu"),
    ],
    **{
        f"{activation.__name__}, residual" if kind is residual else activation.__name__: partial(
            lambda a, g: [Affine(D, partial(g, activation=a))], activation, kind
        )
        for activation in ACTIVATIONS
        for kind in (mlp, residual)
    },
    **{
        name: partial(lambda a: [made(activation=a)], name)
        for name in ("relu", "leaky_relu", "elu", "tanh", "sigmoid", "softplus")
    },
}
#: Of float64 sums of some hundred terms in another order.
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    flow = nn.Sequential(*SEQUENCES[name]())
    for layer in flow.modules():
        if isinstance(layer, nn.ActNorm):
            layer(torch.randn(50, D))
    context = normal(7, K, seed=1, dtype=dtype) if name.startswith("context") else None
    return randomize(flow, 0.5).to(dtype), normal(7, D, dtype=dtype), context


def by_layers(flow, x, context=None, inverse=False):
    """Call the layers one after the other."""
    total = 0.0
    for layer in reversed(list(flow)) if inverse else flow:
        x, log_det = layer.inverse(x, context) if inverse else layer(x, context)
        total = total + log_det
    return x, total


def agrees(flow, x, context=None):
    """Whether the sequence is what its layers are."""
    with torch.no_grad():
        torch.testing.assert_close(flow(x, context), by_layers(flow, x, context), **CLOSE)


def derivatives(function, flow, x, context):
    """Return results, and the gradients of x, context and all parameters."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, context)]
    found = function(*leaves)
    loss = sum((normal(*t.shape, seed=7 + i).to(t) * t).sum() for i, t in enumerate(found))
    wanted = [t for t in (*leaves, *flow.parameters()) if t is not None]
    return [*found, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


FLOWS = {
    "MAF": lambda: flows.MAF(D, transforms=2, hidden=(8, 8)),
    "conditional MAF": lambda: flows.MAF(D, transforms=2, hidden=(8,), context_features=K),
    "NSF": lambda: flows.NSF(D, transforms=2, hidden=(8, 8)),
    "NSF of masks": lambda: flows.NSF(D, transforms=2, hidden=(8, 8), mixing="permutation"),
    "autoregressive NSF": lambda: flows.NSF(D, transforms=2, hidden=(8,), autoregressive=True),
    "RealNVP": lambda: flows.RealNVP(D, steps=2, hidden=8),
    "Glow": lambda: flows.Glow(D, steps=2, hidden=8),
}


def trained(name, steps, dtype=torch.float32, layers=False):
    """Return a flow after some steps of Adam, and the losses."""
    torch.manual_seed(3)
    flow = FLOWS[name]().to(dtype)
    data = torch.randn(40, D).to(dtype) * 2 + 1
    context = torch.randn(40, K).to(dtype) if flow.context_features else None
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    losses = []
    with use_reference() if layers else torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss = -flow.log_prob(data, context).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return flow, losses


@pytest.fixture
def calls(monkeypatch):
    """The programs that ran as one op."""
    seen, run = [], chain.run_chain

    def spy(x, context, program, *others):
        seen.append(program)
        return run(x, context, program, *others)

    monkeypatch.setattr(chain, "run_chain", spy)
    return seen
