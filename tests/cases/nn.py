"""Layers: ``tests/nn/test_laws.py`` holds every one of them to the laws of a bijection."""

from functools import partial

import torch
from laws import ModuleCase

from pyflowkern import flows, nn
from pyflowkern.ops import ScaleMap, SplineMap

K = 3
MLP = partial(nn.MLP, hidden=8, context_features=K)
RESIDUAL = partial(nn.ResidualMLP, hidden=8, blocks=1, context_features=K)
CONV = partial(nn.ConvNet, hidden=4, context_features=K)
CONV1D = partial(nn.ResidualConvNet, hidden=4, blocks=1, context_features=K, spatial_dims=1)
CONV3D = partial(nn.ConvNet, hidden=4, context_features=K, spatial_dims=3)
PERIODIC = partial(nn.PeriodicInput, conditioner=MLP, bound=5.0)
INTERLEAVED = nn.channel_mask(5, interleaved=True)
IRREGULAR = torch.tensor([True, False, False, True, False])
SHIFTED = ScaleMap("softplus", shift_first=True, divide=True, shift_gain=0.5)
MIXED = [
    *(SplineMap(bins=3, bound=b) for b in (2.0, 3.0)),
    SplineMap("quadratic", bins=4),
    SplineMap(bins=3, tails="circular", bound=4.0),
    SplineMap(bins=3, bound=5.0),
    SplineMap(bins=3, bound=2.5),
]
THREE_BINS = SplineMap(bins=3)
MASK = torch.tensor([[[True, False]], [[True, True]], [[False, False]]])

Affine, Spline, Made = nn.AffineCoupling, nn.SplineCoupling, nn.MaskedAutoregressive
made = partial(Made, 5, (12, 12))


class Wrapped(torch.nn.Module):
    """An autoregressive network of the user, whose inverse is found by iteration."""

    def __init__(self, outputs):
        super().__init__()
        self.net = nn.MaskedMLP(5, outputs, (7,), context_features=K)

    def forward(self, x, context=None):
        return torch.sin(self.net(x, context))


#: What the iteration cannot do.
JACOBI = {
    "no_graph": "gradients of jacobi_inverse",
    "no_transforms": "jacobi_inverse has no gradients inside transforms",
}
iterated = partial(ModuleCase, **JACOBI)


class Damped(torch.nn.Module):
    """A field of the user."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 3)

    def forward(self, t, x):
        return torch.tanh(self.net(x)) - x / 2


#: Data of some mean and scale.
MOVED = torch.tensor([[1.0, 3.0, 2.0], [2.0, -5.0, 2.5]])


def after_batches(layer):
    """Give a batch normalization statistics as of data."""
    with torch.no_grad():
        layer.running_mean.copy_(torch.arange(layer.channels) - 1.5)
        layer.running_var.copy_(torch.arange(layer.channels) / 2 + 0.25)
    return layer


COUPLINGS = [
    ModuleCase("affine", lambda: Affine(5, MLP), (5,)),
    ModuleCase("affine swap", lambda: Affine(5, RESIDUAL, swap=True), (5,)),
    ModuleCase("affine channel mask", lambda: Affine(5, MLP, split=INTERLEAVED), (5,)),
    ModuleCase(
        "affine of one channel", lambda: Affine(1, MLP), (1,), idle=("conditioner.first.weight",)
    ),
    ModuleCase(
        "spline of one channel",
        lambda: Spline(1, RESIDUAL, swap=True, bins=3, unconditional=True),
        (1,),
        idle=("conditioner.first.weight",),
    ),
    ModuleCase("affine image", lambda: Affine(3, CONV, scale_map="sigmoid"), (3, 2, 3)),
    ModuleCase("affine checkerboard", lambda: Affine(2, CONV, split="checkerboard"), (2, 3, 2)),
    ModuleCase("affine mask", lambda: Affine(3, CONV, split=MASK, swap=True), (3, 1, 2)),
    ModuleCase("affine sequence", lambda: Affine(3, CONV1D, scale_map="softplus"), (3, 4)),
    ModuleCase("affine volume", lambda: Affine(2, CONV3D, scale_map="atan"), (2, 1, 2, 2)),
    ModuleCase("gin", lambda: nn.GINCoupling(5, MLP, scale_map=SHIFTED, swap=True), (5,)),
    ModuleCase("gin channel mask", lambda: nn.GINCoupling(5, MLP, split=INTERLEAVED), (5,)),
    ModuleCase("gin image", lambda: nn.GINCoupling(4, CONV, scale_map="atan"), (4, 2, 3)),
    ModuleCase("additive", lambda: nn.AdditiveCoupling(4, MLP), (4,)),
    ModuleCase(
        "additive checkerboard",
        lambda: nn.AdditiveCoupling(1, CONV, split="checkerboard", swap=True),
        (1, 3, 3),
    ),
    ModuleCase("spline", lambda: Spline(5, MLP, bins=4), (5,)),
    ModuleCase("spline swap", lambda: Spline(5, RESIDUAL, swap=True, bins=3), (5,)),
    ModuleCase(
        "spline channel mask",
        lambda: Spline(5, MLP, split=INTERLEAVED, unconditional=True, bins=4),
        (5,),
    ),
    ModuleCase(
        "spline irregular mask",
        lambda: Spline(5, MLP, split=IRREGULAR, swap=True, unconditional=True, bins=4),
        (5,),
    ),
    ModuleCase(
        "spline image",
        lambda: Spline(3, CONV, unconditional=True, bins=3, tails="affine"),
        (3, 2, 3),
    ),
    ModuleCase(
        "spline checkerboard",
        lambda: Spline(2, CONV, split="checkerboard", swap=True, bins=3),
        (2, 3, 2),
    ),
    ModuleCase(
        "spline mask", lambda: Spline(3, CONV, split=MASK, unconditional=True, bins=3), (3, 1, 2)
    ),
    ModuleCase("spline sequence", lambda: Spline(3, CONV1D, kind="quadratic", bins=3), (3, 4)),
    ModuleCase(
        "spline of a circle",
        lambda: Spline(5, PERIODIC, tails="circular", bound=5.0, bins=4),
        (5,),
    ),
    ModuleCase("splines of their own", lambda: nn.MixedSplineCoupling(6, MLP, MIXED), (6,)),
    ModuleCase(
        "splines of their own, mask",
        lambda: nn.MixedSplineCoupling(
            6, RESIDUAL, MIXED, split=nn.channel_mask(6, interleaved=True), swap=True
        ),
        (6,),
    ),
    ModuleCase("split", lambda: nn.Split(3, CONV), (3, 2, 2)),
    ModuleCase("split without prior", lambda: nn.Split(3), (3, 2, 2)),
]

AUTOREGRESSIVE = [
    ModuleCase("autoregressive", made, (5,)),
    ModuleCase("autoregressive order", lambda: made(order=[3, 1, 0, 2, 4]), (5,)),
    ModuleCase("autoregressive context", lambda: made(context_features=K), (5,)),
    ModuleCase(
        "autoregressive residual",
        lambda: made(residual=True, context_features=K, activation="silu"),
        (5,),
    ),
    ModuleCase("autoregressive exp", lambda: made(transform="exp", activation="tanh"), (5,)),
    ModuleCase(
        "autoregressive additive", lambda: made(transform="additive", activation="elu"), (5,)
    ),
    ModuleCase("autoregressive spline", lambda: made(transform=SplineMap(bins=4)), (5,)),
    ModuleCase(
        "autoregressive softclip spline",
        lambda: made(
            transform=SplineMap(bins=3, bound=2.0, parameterization="softclip"),
            context_features=K,
            residual=True,
        ),
        (5,),
    ),
    ModuleCase(
        "autoregressive circular spline",
        lambda: made(transform=SplineMap(bins=4, tails="circular"), order=[1, 0, 2, 4, 3]),
        (5,),
    ),
    # of one feature, which nothing conditions: the network sees the context alone
    ModuleCase(
        "autoregressive single",
        lambda: Made(1, (7,), context_features=K),
        (1,),
        idle=("conditioner.layers.0.weight",),
    ),
    ModuleCase("autoregressive pair", lambda: Made(2, (7,), context_features=K), (2,)),
    iterated("own network", lambda: Made(5, conditioner=Wrapped(2)), (5,)),
    iterated(
        "own network of a spline",
        lambda: Made(5, transform=THREE_BINS, conditioner=Wrapped(THREE_BINS.params)),
        (5,),
    ),
    ModuleCase("inverse", lambda: nn.Inverse(made(context_features=K)), (5,)),
]

OTHERS = [
    ModuleCase("inverse squeeze", lambda: nn.Inverse(nn.Squeeze()), (4, 2, 1)),
    ModuleCase("circular shift", lambda: nn.CircularShift(4, bound=6.0, shift=0.5), (4, 2)),
    ModuleCase("actnorm", lambda: nn.ActNorm(4), (4,)),
    ModuleCase("actnorm image", lambda: nn.ActNorm(2), (2, 3, 2)),
    ModuleCase("batch norm", lambda: after_batches(nn.BatchNorm(4)), (4,)),
    ModuleCase("batch norm image", lambda: after_batches(nn.BatchNorm(2, eps=0.1)), (2, 3, 2)),
    ModuleCase(
        "batch norm of nothing learned", lambda: after_batches(nn.BatchNorm(3, affine=False)), (3,)
    ),
    ModuleCase("standardize", lambda: nn.Standardize(3).fit(MOVED), (3,)),
    ModuleCase("standardize image", lambda: nn.Standardize(3).fit(MOVED), (3, 2, 2)),
    ModuleCase("linear plu", lambda: nn.InvertibleLinear(5), (5,)),
    ModuleCase("linear dense", lambda: nn.InvertibleLinear(5, parameterization="dense"), (5,)),
    ModuleCase(
        "linear householder",
        lambda: nn.InvertibleLinear(5, parameterization="householder"),
        (5,),
    ),
    ModuleCase(  # which has no entries off the diagonal
        "linear of one channel", lambda: nn.InvertibleLinear(1), (1,), idle=("lower", "upper")
    ),
    ModuleCase("conv1x1", lambda: nn.InvertibleConv1x1(3), (3, 2, 2)),
    ModuleCase(
        "conv1x1 dense", lambda: nn.InvertibleConv1x1(3, parameterization="dense"), (3, 2, 2)
    ),
    ModuleCase("glow step", lambda: nn.GlowStep(3), (3, 2, 2)),
    ModuleCase(
        "glow step householder", lambda: nn.GlowStep(4, parameterization="householder"), (4,)
    ),
    ModuleCase("squeeze sequence", nn.Squeeze, (2, 6)),
    ModuleCase("squeeze image", nn.Squeeze, (3, 4, 2)),
    ModuleCase("squeeze by three", lambda: nn.Squeeze(3), (1, 3, 6)),
    ModuleCase("squeeze volume", nn.Squeeze, (1, 2, 2, 4)),
    ModuleCase("permutation", lambda: nn.Permutation([2, 0, 3, 1]), (4, 2)),
    ModuleCase("random permutation", lambda: nn.Permutation(6), (6,)),
    ModuleCase("reverse", lambda: nn.Reverse(4), (4,)),
    ModuleCase("logit", lambda: nn.Logit(0.05), (2, 3), unit=True),
    ModuleCase("dequantize of floats", lambda: nn.Dequantize(5), (2, 3), unit=True),
    ModuleCase(
        "sequential",
        lambda: nn.Sequential(nn.GlowStep(4), Affine(4, MLP), nn.Reverse(4)),
        (4,),
    ),
    ModuleCase("empty sequential", nn.Sequential, (4,)),
    ModuleCase(
        "multi-scale",
        lambda: nn.MultiScale((1, 4, 4), [nn.Squeeze(), nn.ActNorm(2)], [nn.Split(4, CONV)]),
        (1, 4, 4),
    ),
]

#: There and back is the identity but for the error of RK4 in four steps.
ode = partial(ModuleCase, atol=1e-4, ode=True)
continuous = partial(flows.ContinuousBijection, divergence="exact", method="rk4", step_size=0.25)

CONTINUOUS = [
    ode("continuous", lambda: continuous(nn.VectorFieldMLP(3, (6, 5), context_features=K)), (3,)),
    ode(
        "continuous of learned time",
        lambda: continuous(nn.VectorFieldMLP(3, (6,)), train_time=True),
        (3,),
    ),
    ode(
        "continuous image",
        lambda: continuous(nn.VectorFieldConv(2, (4,), context_features=K)),
        (2, 2, 2),
    ),
    ode(
        "continuous image of a U-Net",
        lambda: continuous(nn.VectorFieldUNet(1, (4, 4), context_features=K), duration=0.1),
        (1, 2, 3),
    ),
    ode("continuous of any network", lambda: continuous(nn.VectorField(Damped())), (3,)),
]

LAYERS = [*COUPLINGS, *AUTOREGRESSIVE, *OTHERS, *CONTINUOUS]
