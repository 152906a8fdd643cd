"""start_as_identity: couplings and autoregressive layers that change nothing."""

from functools import partial

import pytest
import torch
from laws import normal, randomize

from pyflowkern import flows, nn
from pyflowkern.ops import ScaleMap, SplineMap

MLP = partial(nn.MLP, hidden=8)
CONV = partial(nn.ConvNet, hidden=4)
SIGMOID = ScaleMap("sigmoid", offset=2.0, eps=1e-3)
LAYERS = {
    "softplus coupling": (lambda: nn.AffineCoupling(4, MLP, scale_map="softplus"), (4,)),
    "sigmoid coupling": (lambda: nn.AffineCoupling(4, MLP, scale_map=SIGMOID, swap=True), (4,)),
    "additive coupling": (lambda: nn.AdditiveCoupling(5, partial(nn.ResidualMLP, hidden=8)), (5,)),
    "mask": (
        lambda: nn.AffineCoupling(3, MLP, split=nn.channel_mask(3), scale_map="softplus"),
        (3,),
    ),
    "image": (
        lambda: nn.AffineCoupling(2, CONV, split="checkerboard", scale_map="softplus"),
        (2, 4, 4),
    ),
    "spline": (lambda: nn.SplineCoupling(4, MLP, bins=4, unconditional=True), (4,)),
    "spline image": (lambda: nn.SplineCoupling(3, CONV, bins=3), (3, 2, 2)),
    "angles": (
        lambda: nn.SplineCoupling(
            4, partial(nn.PeriodicInput, conditioner=MLP), bins=4, tails="circular"
        ),
        (4,),
    ),
    "splines of their own": (
        lambda: nn.MixedSplineCoupling(
            4, MLP, [SplineMap(bins=3), SplineMap("cubic", bins=3)] * 2
        ),
        (4,),
    ),
    "one channel": (lambda: nn.AffineCoupling(1, MLP, scale_map="softplus"), (1,)),
    "autoregressive": (lambda: nn.MaskedAutoregressive(4, (8,), transform="softplus"), (4,)),
    "autoregressive additive": (
        lambda: nn.MaskedAutoregressive(4, (8,), transform="additive"),
        (4,),
    ),
    "autoregressive spline": (
        lambda: nn.MaskedAutoregressive(4, (8,), transform=SplineMap("cubic", bins=4)),
        (4,),
    ),
    "inverse": (lambda: nn.Inverse(nn.MaskedAutoregressive(4, (8,), transform=SIGMOID)), (4,)),
    "MAF": (lambda: flows.MAF(4, transforms=2, hidden=8, scale_map="softplus"), (4,)),
    "RealNVP": (lambda: flows.RealNVP(4, steps=2, hidden=8, scale_map=SIGMOID), (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_change_nothing(name):
    build, shape = LAYERS[name]
    layer = randomize(build()).double().eval()
    for module in layer.modules():
        if isinstance(module, nn.ActNorm):
            module.reset_parameters()
    x = normal(6, *shape).double()
    assert not torch.allclose(layer(x)[0], x.flatten(1) if hasattr(layer, "log_prob") else x)
    assert nn.start_as_identity(layer) is layer
    z, log_det = layer(x)
    # parameters were rounded to float32 on their way
    torch.testing.assert_close(z.view_as(x), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det, torch.zeros(6).double(), rtol=0, atol=1e-4)


def test_other_layers_stay_as_they_are():
    flow = randomize(
        nn.Sequential(nn.InvertibleLinear(3), nn.AffineCoupling(3, MLP), nn.ActNorm(3))
    )
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    nn.start_as_identity(flow)
    changed = {k for k, v in flow.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"layers.1.conditioner.last.weight", "layers.1.conditioner.last.bias"}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, "module must be a torch.nn.Module, got int"),
        (
            nn.Sequential(nn.AffineCoupling(2, torch.nn.Linear(1, 2))),
            ValueError,
            "the network of layers.0 must be one of this package, got a Linear",
        ),
        (
            nn.AffineCoupling(2, MLP, scale_map="sigmoid"),
            ValueError,
            "must have a scale of 1 somewhere",
        ),
    ],
)
def test_wrong_arguments(given, error, message):
    with pytest.raises(error, match=message):
        nn.start_as_identity(given)
