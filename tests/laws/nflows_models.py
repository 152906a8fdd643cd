"""Typical models of nflows: those of its own flows, of sbi, nessai and glasflow, and ones of every transform."""

import torch
from nflows import distributions, flows, transforms
from nflows.nn import nets
from torch.nn import functional

D, K = 5, 2
MASK = torch.tensor([1, -1, 1, -1, 1])


def resnet(**options):
    """What makes a ResidualNet."""
    return lambda inputs, outputs: nets.ResidualNet(inputs, outputs, 16, **options)


def flow(*parts, base=None, **options):
    base = base or distributions.StandardNormal([D])
    return flows.Flow(transforms.CompositeTransform(parts), base, **options)


def spline(kind="RationalQuadratic", mask=MASK, net=None, **options):
    cls = getattr(transforms, f"Piecewise{kind}CouplingTransform")
    options = {"num_bins": 4, "tails": "linear", "tail_bound": 2.0, **options}
    return cls(mask, net or resnet(), **options)


def masked(kind="Affine", context=None, **options):
    cls = getattr(transforms, f"Masked{kind}AutoregressiveTransform")
    form = {"num_blocks": 2, "context_features": context, **options}
    return cls(features=D, hidden_features=16, **form)


def standardizing():
    return transforms.PointwiseAffineTransform(torch.linspace(-1, 1, D), torch.linspace(0.5, 2, D))


def maf_rqs(context=None, **options):
    """sbi's ``build_maf_rqs``, and its ``build_maf`` where it is affine."""
    form = {"use_residual_blocks": False, "activation": torch.tanh, **options}
    return masked("PiecewiseRationalQuadratic", context, num_bins=4, tails="linear", **form)


def nessai_step(mask):
    """nessai's RealNVP: a permutation, a cached LU linear, an affine coupling, a batch norm."""
    lu = transforms.LULinear(D, using_cache=True)
    first = transforms.CompositeTransform([transforms.RandomPermutation(D), lu])
    return [first, transforms.AffineCouplingTransform(mask, resnet()), transforms.BatchNorm(D)]


#: Flows of vectors, each of which is one op with its base.
VECTORS = {
    "NSF": lambda: flow(
        spline(), transforms.LULinear(D), spline(mask=-MASK), transforms.LULinear(D)
    ),
    "NSF of sbi": lambda: flow(
        standardizing(),
        spline(net=resnet(context_features=K)),
        transforms.LULinear(D),
        spline(mask=-MASK, net=resnet(context_features=K, activation=functional.elu)),
    ),
    "MAF": lambda: flow(
        masked(), transforms.ReversePermutation(D), masked(), transforms.RandomPermutation(D)
    ),
    "MAF with a context": lambda: flow(
        masked(context=K), transforms.ReversePermutation(D), masked(context=K, num_blocks=1)
    ),
    "MAF of sbi": lambda: flow(
        standardizing(),
        masked(context=K, use_residual_blocks=False, activation=torch.tanh),
        transforms.RandomPermutation(D),
        masked(context=K, use_residual_blocks=False, activation=torch.tanh),
        embedding_net=torch.nn.Linear(K, K),
    ),
    "random masks": lambda: flow(
        masked(use_residual_blocks=False, random_mask=True, activation=torch.nn.SiLU()),
        masked(use_residual_blocks=False, random_mask=True, activation=torch.nn.SiLU()),
    ),
    "autoregressive NSF": lambda: flow(maf_rqs(K), transforms.ReversePermutation(D), maf_rqs(K)),
    "autoregressive quadratic": lambda: flow(
        masked("PiecewiseQuadratic", num_bins=4, tails="linear", tail_bound=2.0)
    ),
    "IAF": lambda: flow(
        transforms.InverseTransform(masked()),
        transforms.RandomPermutation(D),
        transforms.InverseTransform(masked()),
    ),
    "RealNVP": lambda: flow(
        transforms.ActNorm(D),
        transforms.AffineCouplingTransform(MASK, resnet()),
        transforms.ActNorm(D),
        transforms.AdditiveCouplingTransform(-MASK, resnet(num_blocks=1)),
        base=distributions.DiagonalNormal([D]),
    ),
    "RealNVP of nessai": lambda: flow(*nessai_step(MASK), *nessai_step(-MASK)),
    "other splines": lambda: flow(
        spline("Linear"), spline("Quadratic", -MASK), spline("Cubic"), transforms.LULinear(D)
    ),
    "unconditional": lambda: flow(
        spline(apply_unconditional_transform=True),
        spline("Quadratic", -MASK, apply_unconditional_transform=True),
        spline("Cubic", apply_unconditional_transform=True),
    ),
    "matrices": lambda: flow(
        transforms.SVDLinear(D, 4),
        spline(),
        transforms.QRLinear(D, 3),
        transforms.AffineCouplingTransform(-MASK, resnet()),
        transforms.IdentityTransform(),
        transforms.NaiveLinear(D),
    ),
    "one number for all": lambda: flow(transforms.PointwiseAffineTransform(0.5, 2.0), masked()),
    "its own RealNVP": lambda: flows.SimpleRealNVP(D, 16, 2, 2, batch_norm_between_layers=True),
    "its own MAF": lambda: flows.MaskedAutoregressiveFlow(
        D, 16, 2, 2, batch_norm_between_layers=True
    ),
}
#: Those whose inverse the library has no more, or solves only roughly.
WITHOUT_INVERSE = ("matrices", "other splines", "unconditional", "Linear on [0, 1]")
#: Flows of numbers between 0 and 1.
BOUNDED = {
    f"{kind} on [0, 1]": lambda kind=kind: flow(
        spline(kind, tails=None, tail_bound=1.0), masked(f"Piecewise{kind}", num_bins=4)
    )
    for kind in ("Linear", "Quadratic", "RationalQuadratic")
}


def conv(inputs, outputs):
    return nets.ConvResidualNet(inputs, outputs, 8)


def steps(channels):
    """A step of a flow of images."""
    mask = torch.arange(channels) % 2 * 2 - 1
    options = {"num_bins": 4, "tails": "linear", "tail_bound": 2.0}
    return transforms.CompositeTransform(
        [
            transforms.ActNorm(channels),
            transforms.OneByOneConvolution(channels),
            transforms.AffineCouplingTransform(mask, conv),
            transforms.PiecewiseRationalQuadraticCouplingTransform(-mask, conv, **options),
            transforms.AdditiveCouplingTransform(mask, conv),
        ]
    )


def multiscale():
    """Two scales of 4x4 and 2x2 pixels."""
    whole = transforms.MultiscaleCompositeTransform(2)
    inner = whole.add_transform(steps(4), (4, 4, 4))
    squeezed = transforms.CompositeTransform([transforms.SqueezeTransform(), steps(8)])
    whole.add_transform(squeezed, (8, 2, 2))
    assert inner == (2, 4, 4)
    return flows.Flow(whole, distributions.StandardNormal([64]))
