"""Every layer obeys the laws of a bijection."""

from functools import partial

import pytest
import torch
from laws import (
    check_copies,
    check_gradients,
    check_inverse,
    check_log_det,
    check_samples_are_independent,
    normal,
    randomize,
)
from torch.distributions import Independent, Normal, TransformedDistribution

from pyflowkern import nn

K = 3
MLP = partial(nn.MLP, hidden=8, context_features=K)
RESIDUAL = partial(nn.ResidualMLP, hidden=8, blocks=1, context_features=K)
CONV = partial(nn.ConvNet, hidden=4, context_features=K)
CONV1D = partial(nn.ResidualConvNet, hidden=4, blocks=1, context_features=K, spatial_dims=1)
CONV3D = partial(nn.ConvNet, hidden=4, context_features=K, spatial_dims=3)
PERIODIC = partial(nn.PeriodicInput, conditioner=MLP, bound=5.0)
IRREGULAR = torch.tensor([True, False, False, True, False])
MASK = torch.tensor([[[True, False]], [[True, True]], [[False, False]]])

#: name: (layer, event shape)
LAYERS = {
    "affine vector": (lambda: nn.AffineCoupling(5, MLP), (5,)),
    "affine swap": (lambda: nn.AffineCoupling(5, RESIDUAL, swap=True), (5,)),
    "affine channel mask": (
        lambda: nn.AffineCoupling(5, MLP, split=nn.channel_mask(5, interleaved=True)),
        (5,),
    ),
    "affine image": (lambda: nn.AffineCoupling(3, CONV, scale_map="sigmoid"), (3, 2, 3)),
    "affine checkerboard": (lambda: nn.AffineCoupling(2, CONV, split="checkerboard"), (2, 3, 2)),
    "affine mask": (lambda: nn.AffineCoupling(3, CONV, split=MASK, swap=True), (3, 1, 2)),
    "affine sequence": (lambda: nn.AffineCoupling(3, CONV1D, scale_map="softplus"), (3, 4)),
    "affine volume": (lambda: nn.AffineCoupling(2, CONV3D, scale_map="atan"), (2, 1, 2, 2)),
    "additive": (lambda: nn.AdditiveCoupling(4, MLP), (4,)),
    "additive checkerboard": (
        lambda: nn.AdditiveCoupling(1, CONV, split="checkerboard", swap=True),
        (1, 3, 3),
    ),
    "spline vector": (lambda: nn.SplineCoupling(5, MLP, bins=4), (5,)),
    "spline swap": (lambda: nn.SplineCoupling(5, RESIDUAL, swap=True, bins=3), (5,)),
    "spline channel mask": (
        lambda: nn.SplineCoupling(
            5, MLP, split=nn.channel_mask(5, interleaved=True), unconditional=True, bins=4
        ),
        (5,),
    ),
    "spline irregular mask": (
        lambda: nn.SplineCoupling(5, MLP, split=IRREGULAR, swap=True, unconditional=True, bins=4),
        (5,),
    ),
    "spline image": (
        lambda: nn.SplineCoupling(3, CONV, unconditional=True, bins=3, tails="affine"),
        (3, 2, 3),
    ),
    "spline checkerboard": (
        lambda: nn.SplineCoupling(2, CONV, split="checkerboard", swap=True, bins=3),
        (2, 3, 2),
    ),
    "spline mask": (
        lambda: nn.SplineCoupling(3, CONV, split=MASK, unconditional=True, bins=3),
        (3, 1, 2),
    ),
    "spline sequence": (lambda: nn.SplineCoupling(3, CONV1D, kind="quadratic", bins=3), (3, 4)),
    "spline of a circle": (
        lambda: nn.SplineCoupling(5, PERIODIC, tails="circular", bound=5.0, bins=4),
        (5,),
    ),
    "circular shift": (lambda: nn.CircularShift(4, bound=6.0, shift=0.5), (4, 2)),
    "split": (lambda: nn.Split(3, CONV), (3, 2, 2)),
    "split without prior": (lambda: nn.Split(3), (3, 2, 2)),
    "actnorm vector": (lambda: nn.ActNorm(4), (4,)),
    "actnorm image": (lambda: nn.ActNorm(2), (2, 3, 2)),
    "linear plu": (lambda: nn.InvertibleLinear(5), (5,)),
    "linear dense": (lambda: nn.InvertibleLinear(5, parameterization="dense"), (5,)),
    "linear householder": (lambda: nn.InvertibleLinear(5, parameterization="householder"), (5,)),
    "linear of one channel": (lambda: nn.InvertibleLinear(1), (1,)),
    "conv1x1": (lambda: nn.InvertibleConv1x1(3), (3, 2, 2)),
    "conv1x1 dense": (lambda: nn.InvertibleConv1x1(3, parameterization="dense"), (3, 2, 2)),
    "glow step": (lambda: nn.GlowStep(3), (3, 2, 2)),
    "glow step householder": (lambda: nn.GlowStep(4, parameterization="householder"), (4,)),
    "squeeze sequence": (nn.Squeeze, (2, 6)),
    "squeeze image": (nn.Squeeze, (3, 4, 2)),
    "squeeze by three": (lambda: nn.Squeeze(3), (1, 3, 6)),
    "squeeze volume": (nn.Squeeze, (1, 2, 2, 4)),
    "permutation": (lambda: nn.Permutation([2, 0, 3, 1]), (4, 2)),
    "reverse": (lambda: nn.Reverse(4), (4,)),
    "logit": (lambda: nn.Logit(0.05), (2, 3)),
    "dequantize of floats": (lambda: nn.Dequantize(5), (2, 3)),
    "sequential": (
        lambda: nn.Sequential(nn.GlowStep(4), nn.AffineCoupling(4, MLP), nn.Reverse(4)),
        (4,),
    ),
    "empty sequential": (nn.Sequential, (4,)),
    "multi-scale": (
        lambda: nn.MultiScale((1, 4, 4), [nn.Squeeze(), nn.ActNorm(2)], [nn.Split(4, CONV)]),
        (1, 4, 4),
    ),
}

layers = pytest.mark.parametrize("name", LAYERS)


def make(name, n=3, dtype=torch.float64):
    """Return a layer in eval mode with changed parameters, an input and a context."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = randomize(build()).to(dtype).eval()
    x = normal(n, *shape, dtype=dtype)
    return layer, torch.sigmoid(x) if isinstance(layer, nn.Logit) else x, normal(n, K, dtype=dtype)


@layers
def test_inverse_undoes_forward(name):
    check_inverse(*make(name))


@layers
def test_log_det_is_that_of_the_jacobian(name):
    check_log_det(*make(name, n=2))


@layers
def test_samples_are_independent(name):
    check_samples_are_independent(*make(name))


@layers
def test_copies_compute_the_same(name):
    layer, x, context = make(name)
    check_copies(layer, LAYERS[name][0]().double(), x, context)


@layers
def test_every_parameter_has_a_gradient(name):
    layer, x, context = make(name)
    z, log_det = layer.train()(x, context)
    # which has no triangular entries
    if list(layer.parameters()) and name != "linear of one channel":
        check_gradients(layer, (z**3).sum() + (log_det**2).sum())


@layers
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_an_empty_batch_is_a_batch(name, direction):
    layer, x, context = make(name)
    start = x if direction == "forward" else layer(x, context)[0]
    y, log_det = getattr(layer, direction)(start[:0], context[:0])
    assert y.shape == (0, *getattr(layer, direction)(start, context)[0].shape[1:])
    assert log_det.shape == (0,)


@layers
def test_output_shape_and_input_shape(name):
    layer, x, context = make(name)
    z, _ = layer(x, context)
    assert layer.output_shape(tuple(x.shape[1:])) == z.shape[1:]
    assert layer.input_shape(tuple(z.shape[1:])) == x.shape[1:]


@layers
def test_log_det_is_float32_at_least(name):
    layer, x, context = make(name, dtype=torch.bfloat16)
    z, log_det = layer(x, context)
    assert z.dtype == torch.bfloat16
    assert log_det.dtype == torch.float32
    assert layer.inverse(z, context)[1].dtype == torch.float32


@layers
def test_autocast_keeps_the_log_det_and_the_dtype(name):
    layer, x, context = make(name, dtype=torch.float32)
    _, expected = layer(x, context)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = layer(x, context)
    assert (z.dtype, log_det.dtype) == (torch.float32, torch.float32)
    # conditioners run in bfloat16, with 8 bits
    torch.testing.assert_close(log_det, expected, atol=0.05 * x[0].numel(), rtol=0.05)


@layers
def test_transform_is_a_torch_transform(name):
    layer, x, context = make(name, n=6)
    event_dim = x.dim() - 1
    transform = layer.transform(context.view(2, 3, K), event_dim=event_dim, cache_size=1)
    batched = x.view(2, 3, *x.shape[1:])
    y = transform(batched)
    z, log_det = layer(x, context)
    torch.testing.assert_close(y.flatten(0, 1), z)
    torch.testing.assert_close(transform.log_abs_det_jacobian(batched, y).flatten(), log_det)
    torch.testing.assert_close(transform.inv(y), batched)
    assert transform.forward_shape(batched.shape) == y.shape
    assert transform.inverse_shape(y.shape) == batched.shape


def test_transform_makes_a_density():
    layer, x, _ = make("linear plu")
    base = Independent(Normal(torch.zeros(5).double(), torch.ones(5).double()), 1)
    density = TransformedDistribution(base, [layer.transform().inv])
    z, log_det = layer(x)
    torch.testing.assert_close(density.log_prob(x), base.log_prob(z) + log_det)
    assert density.rsample((4,)).shape == (4, 5)


def test_sequential_holds_bijections_only():
    with pytest.raises(TypeError, match=r"layers\[1\] must be a Bijection, got ReLU"):
        nn.Sequential(nn.Reverse(2), torch.nn.ReLU())


@pytest.mark.parametrize("name", ["affine image", "actnorm image", "conv1x1", "glow step"])
def test_a_wrong_number_of_channels_is_named(name):
    layer, _, context = make(name)
    with pytest.raises(
        ValueError, match=r"x must have \d channels on axis 1 .* got shape \(3, 7, 2, 2\)"
    ):
        layer(normal(3, 7, 2, 2), context)
    with pytest.raises(ValueError, match=r"z must have \d channels"):
        layer.inverse(normal(3, 7, 2, 2), context)
    with pytest.raises(TypeError, match="floating-point"):
        layer(torch.zeros(3, 3, 2, 2, dtype=torch.int64), context)
