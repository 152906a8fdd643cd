"""Models of normflows, as they are and accelerated."""

import copy

import normflows as nf
import torch

import pyflowkern
from laws.draws import normal

D = 4
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def coupling(sizes=(2, 16, 16, 4), **options):
    return nf.flows.AffineCouplingBlock(nf.nets.MLP(list(sizes)), **options)


def flow(*flows, base=None):
    return nf.NormalizingFlow(base or nf.distributions.DiagGaussian(D), list(flows))


def masked(mask, **options):
    nets = {name: nf.nets.MLP([D, 8, D]) for name in "st"}
    return nf.flows.MaskedAffineFlow(torch.tensor(mask), **{**nets, **options})


def made(**options):
    return nf.flows.MaskedAffineAutoregressive(D, 16, **options)


def nsf(layer, **options):
    flows = [layer(D, 2, 16, **options), nf.flows.LULinearPermute(D), layer(D, 1, 16, **options)]
    return flow(*flows, base=nf.distributions.DiagGaussian(D, trainable=False))


def conditional(*flows):
    return nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(D), [*flows])


K = 3
Coupled, Autoregressive = (
    nf.flows.CoupledRationalQuadraticSpline,
    nf.flows.AutoregressiveRationalQuadraticSpline,
)
#: Flows of vectors, each of which is one op with its base.
VECTORS = {
    "RealNVP": lambda: flow(
        coupling(), nf.flows.Permute(D), coupling(), nf.flows.Permute(D, "swap")
    ),
    "sigmoid": lambda: flow(coupling(scale_map="sigmoid"), coupling(scale_map="sigmoid_inv")),
    "NICE": lambda: flow(coupling((2, 8, 2), scale=False), coupling(split_mode="channel_inv")),
    "ActNorm": lambda: flow(nf.flows.ActNorm(D), coupling(), nf.flows.AffineConstFlow((D,))),
    "matrices": lambda: flow(
        nf.flows.InvertibleAffine(D), coupling(), nf.flows.InvertibleAffine(D, use_lu=False)
    ),
    "fixed base": lambda: flow(coupling(), base=nf.distributions.DiagGaussian(D, trainable=False)),
    "masks": lambda: flow(
        masked([1.0, 0, 1, 0]),
        nf.flows.ActNorm(D),
        masked([0, 1, 1, 1]),
        masked([1, 0, 0, 0], s=None),
    ),
    "NSF": lambda: nsf(Coupled),
    "NSF with reversed masks": lambda: nsf(Coupled, reverse_mask=True, activation=torch.nn.SiLU),
    "autoregressive NSF": lambda: nsf(Autoregressive),
    "permuted degrees": lambda: nsf(Autoregressive, permute_mask=True, num_bins=5, tail_bound=2),
    "MAF": lambda: flow(
        made(), nf.flows.Permute(D), nf.flows.ActNorm(D), made(activation=torch.tanh)
    ),
    "MAF with matrices": lambda: flow(
        made(), nf.flows.LULinearPermute(D), nf.flows.InvertibleAffine(D), made(num_blocks=1)
    ),
    "MAF turned round": lambda: flow(
        nf.flows.Reverse(made()), nf.flows.LULinearPermute(D), nf.flows.Reverse(made())
    ),
    "LU alone": lambda: flow(nf.flows.LULinearPermute(D)),
    "conditional MAF": lambda: conditional(
        made(context_features=K), nf.flows.LULinearPermute(D), made(context_features=K)
    ),
    "conditional NSF": lambda: conditional(
        Coupled(D, 2, 16, K), nf.flows.LULinearPermute(D), Coupled(D, 1, 16, K)
    ),
    "conditional autoregressive NSF": lambda: conditional(
        Autoregressive(D, 2, 16, K), nf.flows.LULinearPermute(D), Autoregressive(D, 1, 16, K)
    ),
}


def glow(levels=2, steps=2, hidden=8, side=8, **options):
    bases, flows, merges = [], [], []
    for i in range(levels):
        channels = 3 * 2 ** (levels + 1 - i)
        blocks = [nf.flows.GlowBlock(channels, hidden, **options) for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        if i:
            merges.append(nf.flows.Merge())
        shape = (
            3 * 2 ** (levels - i + (i == 0)),
            side // 2 ** (levels - i),
            side // 2 ** (levels - i),
        )
        bases.append(nf.distributions.GlowBase(shape))
    return nf.MultiscaleFlow(bases, flows, merges, class_cond=False)


IMAGES = {
    "Glow": glow,
    "dense": lambda: glow(use_lu=False),
    "exp": lambda: glow(scale_map="exp", split_mode="channel_inv"),
    "additive": lambda: glow(scale=False, leaky=0.1),
    "ActNorm in the network": lambda: glow(net_actnorm=True),
}


def context_of(model, count=6):
    """Return the context that a model needs, as a list of none or one."""
    if not isinstance(model, nf.ConditionalNormalizingFlow):
        return []
    return [normal(count, K, seed=2).to(next(model.parameters()))]


def log_prob(model, x):
    if isinstance(model, nf.MultiscaleFlow):
        return model.log_prob(x, None)
    return model.log_prob(x, *context_of(model))


def data(model, dtype=torch.float64):
    shape = (6, 3, 8, 8) if isinstance(model, nf.MultiscaleFlow) else (6, D)
    return normal(*shape, dtype=dtype)


def make(name, dtype=torch.float64):
    """Return a model whose parameters are not those it starts with."""
    torch.manual_seed(0)
    model = {**VECTORS, **IMAGES}[name]().to(dtype)
    log_prob(model, data(model, dtype))  # ActNorms start here
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1 if name in VECTORS else 0.01)
    return model


def pair(name, dtype=torch.float64):
    """Return a model as it is, and an accelerated copy."""
    model = make(name, dtype)
    twin = copy.deepcopy(model)
    report = pyflowkern.accelerate(twin)
    assert report.accelerated
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    return model, twin


def derivatives(model, x):
    x = x.detach().clone().requires_grad_()
    found = log_prob(model, x)
    loss = (found * torch.arange(1, 1 + len(x))).sum()
    wanted = [x, *model.parameters()]
    return [found, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]
