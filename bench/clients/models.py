"""Typical models of other libraries, as their users build them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["MODELS", "Foreign"]

Pair = tuple[Tensor, ...]


@dataclass(frozen=True)
class Foreign:
    """A model of another library, and how its users call it.

    Args:
        name: library, flow and sizes.
        build: makes it.
        log_prob: ``(model, x, context)`` to the log-density ``[N]``.
        sample: ``(model, n, context)`` to samples; the context has n rows.
        shape: of an event.
        batch: samples of a training step.
        context: size of the context; 0 for none.
        samples: how many are drawn.
        goals: the wanted ratio of times, by ``"log_prob"``, ``"step"`` or ``"sample"``.
    """

    name: str
    build: Callable[[], Any]
    log_prob: Callable[[Any, Tensor, Tensor | None], Tensor]
    sample: Callable[[Any, int, Tensor | None], Any]
    shape: tuple[int, ...]
    batch: int
    context: int = 0
    samples: int = 1000
    goals: Mapping[str, float] = field(default_factory=dict)


# --- nflows ---------------------------------------------------------------------------------------


def nflows_log_prob(model: Any, x: Tensor, c: Tensor | None) -> Tensor:
    found: Tensor = model.log_prob(x, c)
    return found


def nflows_sample(model: Any, n: int, c: Tensor | None) -> Any:
    return model.sample(n) if c is None else model.sample(1, c)


def nflows_nsf(
    dims: int, transforms: int, hidden: int, bins: int, context: int | None = None
) -> Any:
    """Couplings with residual networks, and LU linears between them: bayesiains' and sbi's NSF."""
    from nflows import transforms as t
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet

    steps: list[Any] = []
    for i in range(transforms):
        steps += [
            t.PiecewiseRationalQuadraticCouplingTransform(
                torch.arange(dims) % 2 == i % 2,
                lambda a, b: ResidualNet(a, b, hidden, context_features=context, num_blocks=2),
                num_bins=bins,
                tails="linear",
                tail_bound=3.0,
            ),
            t.LULinear(dims, identity_init=True),
        ]
    return Flow(t.CompositeTransform(steps), StandardNormal([dims]))


def nflows_maf(dims: int, hidden: int, context: int | None = None, residual: bool = True) -> Any:
    from nflows import transforms as t
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow

    steps: list[Any] = []
    for _ in range(5):
        steps += [
            t.MaskedAffineAutoregressiveTransform(
                dims,
                hidden,
                context_features=context,
                num_blocks=2,
                use_residual_blocks=residual,
                activation=torch.nn.functional.relu if residual else torch.tanh,
            ),
            t.RandomPermutation(dims),
        ]
    return Flow(t.CompositeTransform(steps), StandardNormal([dims]))


def nflows_realnvp(dims: int, hidden: int) -> Any:
    from nflows.flows import SimpleRealNVP

    return SimpleRealNVP(dims, hidden, num_layers=5, num_blocks_per_layer=2)


# --- zuko -----------------------------------------------------------------------------------------


def zuko_log_prob(model: Any, x: Tensor, c: Tensor | None) -> Tensor:
    found: Tensor = model(c).log_prob(x)
    return found


def zuko_sample(model: Any, n: int, c: Tensor | None) -> Any:
    return model().sample((n,)) if c is None else model(c).sample()


def zuko_flow(
    kind: str, dims: int, hidden: tuple[int, ...], context: int = 0, **others: Any
) -> Any:
    import zuko

    build = getattr(zuko.flows, kind)
    return build(dims, context, transforms=5, hidden_features=hidden, **others)


# --- normflows ------------------------------------------------------------------------------------


def normflows_log_prob(model: Any, x: Tensor, c: Tensor | None) -> Tensor:
    found: Tensor = model.log_prob(x, None) if x.dim() > 2 else model.log_prob(x)
    return found


def normflows_sample(model: Any, n: int, c: Tensor | None) -> Any:
    return model.sample(n)


def normflows_flow(kind: str, dims: int, transforms: int, hidden: int) -> Any:
    import normflows as nf

    steps: list[Any] = []
    for i in range(transforms):
        if kind == "RealNVP":
            net = nf.nets.MLP([dims // 2, hidden, hidden, dims], init_zeros=False)
            steps += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(dims, mode="swap")]
        elif kind == "MAF":
            steps += [nf.flows.MaskedAffineAutoregressive(dims, hidden, num_blocks=2)]
            steps += [nf.flows.LULinearPermute(dims)]
        elif kind == "NSF (AR)":
            steps += [nf.flows.AutoregressiveRationalQuadraticSpline(dims, 2, hidden)]
            steps += [nf.flows.LULinearPermute(dims)]
        else:
            steps += [
                nf.flows.CoupledRationalQuadraticSpline(dims, 2, hidden, reverse_mask=bool(i % 2)),
                nf.flows.LULinearPermute(dims),
            ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(dims, trainable=False), steps)


def normflows_glow(levels: int, blocks: int, hidden: int, side: int) -> Any:
    """Return the Glow of the tutorial, started by a first batch."""
    import normflows as nf

    bases, merges, flows = [], [], []
    for i in range(levels):
        channels = 3 * 2 ** (levels + 1 - i)
        level = [nf.flows.GlowBlock(channels, hidden, scale=True) for _ in range(blocks)]
        flows.append([*level, nf.flows.Squeeze()])
        small = side // 2 ** (levels - i)
        if i > 0:
            merges.append(nf.flows.Merge())
        bases.append(
            nf.distributions.DiagGaussian((3 * 2 ** (levels - i + (i == 0)), small, small))
        )
    model = nf.MultiscaleFlow(bases, flows, merges)
    with torch.no_grad():
        model.log_prob(torch.randn(16, 3, side, side), None)
    return model


# --- FrEIA ----------------------------------------------------------------------------------------


def freia_log_prob(model: Any, x: Tensor, c: Tensor | None) -> Tensor:
    z, log_det = model(x) if c is None else model(x, c=[c])
    found: Tensor = log_det - 0.5 * z.square().flatten(1).sum(1)
    return found


def freia_sample(shape: tuple[int, ...], model: Any, n: int, c: Tensor | None) -> Any:
    z = torch.randn(n, *shape, dtype=next(model.parameters()).dtype)
    return model(z, rev=True)[0] if c is None else model(z, c=[c], rev=True)[0]


def freia_subnet(hidden: int, inputs: int, outputs: int) -> torch.nn.Module:
    layers = [torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, hidden)]
    return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(hidden, outputs))


def freia_conv(hidden: int, inputs: int, outputs: int) -> torch.nn.Module:
    first = torch.nn.Conv2d(inputs, hidden, 3, padding=1)
    last = torch.nn.Conv2d(hidden, outputs, 3, padding=1)
    return torch.nn.Sequential(first, torch.nn.ReLU(), last)


def freia_inn(
    block: str, shape: tuple[int, ...], blocks: int, subnet: Any, context: int = 0
) -> Any:
    import FrEIA.framework as ff
    import FrEIA.modules as fm

    model = ff.SequenceINN(*shape)
    condition = {"cond": 0, "cond_shape": (context,)} if context else {}
    for _ in range(blocks):
        model.append(getattr(fm, block), subnet_constructor=subnet, **condition)
        if block != "AllInOneBlock":
            model.append(fm.PermuteRandom)
    return model


def _nflows(name: str, build: Any, dims: int, batch: int, **others: Any) -> Foreign:
    return Foreign(
        f"nflows {name}", build, nflows_log_prob, nflows_sample, (dims,), batch, **others
    )


def _zuko(name: str, build: Any, dims: int, batch: int, **others: Any) -> Foreign:
    return Foreign(f"zuko {name}", build, zuko_log_prob, zuko_sample, (dims,), batch, **others)


def _normflows(
    name: str, build: Any, shape: tuple[int, ...], batch: int, **others: Any
) -> Foreign:
    each = normflows_log_prob, normflows_sample
    return Foreign(f"normflows {name}", build, *each, shape, batch, **others)


def _freia(name: str, build: Any, shape: tuple[int, ...], batch: int, **others: Any) -> Foreign:
    sample = partial(freia_sample, shape)
    return Foreign(f"FrEIA {name}", build, freia_log_prob, sample, shape, batch, **others)


MODELS = [
    _nflows(
        "NSF D=6, 5 x 50, K=10", partial(nflows_nsf, 6, 5, 50, 10), 6, 200, goals={"step": 8.0}
    ),
    _nflows(
        "NSF D=20, 8 x 64, K=8", partial(nflows_nsf, 20, 8, 64, 8), 20, 4096, goals={"step": 5.0}
    ),
    _nflows(
        "NSF D=5 given 8, 5 x 50, K=10", partial(nflows_nsf, 5, 5, 50, 10, 8), 5, 200, context=8
    ),
    _nflows("MAF D=20, 5 x 64", partial(nflows_maf, 20, 64), 20, 512, goals={"sample": 40.0}),
    _nflows(
        "MAF D=5 given 8, 5 x 50, tanh", partial(nflows_maf, 5, 50, 8, False), 5, 200, context=8
    ),
    _nflows("RealNVP D=10, 5 x 64", partial(nflows_realnvp, 10, 64), 10, 1000),
    _zuko(
        "MAF D=6, 5 x (50, 50)",
        partial(zuko_flow, "MAF", 6, (50, 50)),
        6,
        200,
        goals={"step": 5.0},
    ),
    _zuko(
        "MAF D=5 given 8, 5 x (64, 64)",
        partial(zuko_flow, "MAF", 5, (64, 64), 8),
        5,
        256,
        context=8,
    ),
    _zuko("NICE D=6, 5 x (50, 50)", partial(zuko_flow, "NICE", 6, (50, 50)), 6, 200),
    _zuko("NICE D=2, 5 x (130, 130)", partial(zuko_flow, "NICE", 2, (130, 130)), 2, 64),
    _zuko("NICE D=6, 5 x (256, 256)", partial(zuko_flow, "NICE", 6, (256, 256)), 6, 1000),
    _zuko(
        "NSF couplings D=6, 5 x (50, 50)", partial(zuko_flow, "NSF", 6, (50, 50), passes=2), 6, 200
    ),
    _zuko(
        "NSF (AR) D=20, 5 x (64, 64)",
        partial(zuko_flow, "NSF", 20, (64, 64)),
        20,
        512,
        goals={"sample": 50.0},
    ),
    _zuko(
        "MAF, residual D=6, 5 x (64, 64)",
        partial(zuko_flow, "MAF", 6, (64, 64), residual=True),
        6,
        200,
    ),
    _zuko("NCSF D=6, 5 x (64, 64)", partial(zuko_flow, "NCSF", 6, (64, 64)), 6, 200),
    _normflows("RealNVP D=2, 16 x 64", partial(normflows_flow, "RealNVP", 2, 16, 64), (2,), 512),
    _normflows("MAF D=10, 5 x 64", partial(normflows_flow, "MAF", 10, 5, 64), (10,), 512),
    _normflows("NSF D=10, 5 x 64", partial(normflows_flow, "NSF", 10, 5, 64), (10,), 512),
    _normflows("NSF (AR) D=2, 10 x 64", partial(normflows_flow, "NSF (AR)", 2, 10, 64), (2,), 512),
    _normflows(
        "Glow 3x32x32, L=3, K=4, hidden 64",
        partial(normflows_glow, 3, 4, 64, 32),
        (3, 32, 32),
        32,
        samples=32,
        goals={"step": 1.5},
    ),
    _freia(
        "GLOW blocks D=2, 8 x 128",
        partial(freia_inn, "GLOWCouplingBlock", (2,), 8, partial(freia_subnet, 128)),
        (2,),
        500,
    ),
    _freia(
        "AllInOne D=6 given 10, 8 x 128",
        partial(freia_inn, "AllInOneBlock", (6,), 8, partial(freia_subnet, 128), 10),
        (6,),
        256,
        context=10,
    ),
    _freia(
        "AllInOne 12x16x16, 6 x 64, convolutions",
        partial(freia_inn, "AllInOneBlock", (12, 16, 16), 6, partial(freia_conv, 64)),
        (12, 16, 16),
        32,
        samples=32,
    ),
]
