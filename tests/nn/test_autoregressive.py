"""Masked autoregressive layers, their networks, and inverted layers."""

import itertools

import pytest
import torch
from cases.nn import AUTOREGRESSIVE
from laws import normal, randomize

from pyflowkern import nn
from pyflowkern.ops import SplineMap

K = 3


def conditioned():
    """Return a layer with residual blocks and a context, and data."""
    layer = nn.MaskedAutoregressive(
        5, (12, 12), residual=True, context_features=K, activation="silu"
    )
    return randomize(layer).double(), normal(3, 5), normal(3, K, seed=4)


@pytest.mark.parametrize("case", [c for c in AUTOREGRESSIVE if not c.no_graph], ids=str)
def test_starts_as_the_identity(case):
    layer, x, context = case.build(), *case.make(dtype=torch.float32)[1:]
    z, log_det = layer(x, context)
    torch.testing.assert_close(z, x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(3), atol=1e-5, rtol=0)


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("random_degrees", [False, True])
def test_outputs_see_the_features_before_them_and_the_context(residual, random_degrees):
    order = [2, 0, 3, 1]
    net = nn.MaskedMLP(
        4,
        3,
        (32, 32),
        context_features=K,
        order=order,
        residual=residual,
        random_degrees=random_degrees,
        activation="tanh",
    )
    net = randomize(net).double()
    x, context = normal(1, 4), normal(1, K, seed=1)
    by_x, by_context = torch.autograd.functional.jacobian(net, (x, context))
    seen = by_x[0, :, :, 0].abs().sum(1)[order][:, order]
    assert torch.equal(seen > 0, torch.ones(4, 4).tril(-1).bool())
    assert (by_context[0, :, :, 0].abs().sum(-1) > 0).all()


def test_network_is_the_sum_of_its_layers():
    """The residual network, against its formula."""
    net = randomize(nn.MaskedMLP(3, 2, (8, 8), residual=True, activation="elu")).double()
    x = normal(4, 3)
    masked = [
        lambda v, m=m.mask, w=w: torch.nn.functional.linear(v, w.weight * m, w.bias)
        for m, w in zip(net.plan.layers, net.layers, strict=True)
    ]
    act = torch.nn.functional.elu
    h = masked[0](x)
    h = h + masked[2](act(masked[1](act(h))))
    h = h + masked[4](act(masked[3](act(h))))
    torch.testing.assert_close(net(x), masked[5](act(h)).view(4, 3, 2))


def test_degrees_are_spread_evenly():
    net = nn.MaskedMLP(5, 1, (8,))
    assert net.plan.layers[0].mask.sum(1).tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": 0}, "features must be at least 1"),
        ({"outputs": 0}, "outputs must be at least 1"),
        ({"hidden": ()}, "number of hidden layers"),
        ({"hidden": (4, 0)}, "hidden widths"),
        ({"hidden": (4, 5), "residual": True}, "one width"),
        ({"order": [0, 0, 1]}, "permutation"),
        ({"activation": "cosine"}, "activation must be one of"),
        ({"context_features": -1}, "context_features"),
    ],
)
def test_bad_networks(change, words):
    with pytest.raises(ValueError, match=words):
        nn.MaskedMLP(**({"features": 3, "outputs": 2} | change))


def test_bad_calls():
    layer = nn.MaskedAutoregressive(3, (4,))
    with pytest.raises(ValueError, match="x must have 3 channels"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="context was given"):
        layer.inverse(torch.zeros(2, 3), torch.zeros(2, K))
    with pytest.raises(ValueError, match=r"context must have shape \(2, 3\), got None"):
        nn.MaskedAutoregressive(3, (4,), context_features=K)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="3 features and 2 outputs"):
        nn.MaskedAutoregressive(3, conditioner=nn.MaskedMLP(3, 1))
    with pytest.raises(ValueError, match="transform must be"):
        nn.MaskedAutoregressive(3, transform="cosine")


# --- any network ---------------------------------------------------------------------------------


class Cumulative(torch.nn.Module):
    """An autoregressive network without masks: parameters from means of the features before."""

    def __init__(self, outputs):
        super().__init__()
        self.weight = torch.nn.Parameter(normal(outputs, seed=5) / 2)

    def forward(self, x, context=None):
        before = x.cumsum(1) - x
        before = before / (1 + torch.arange(x.shape[1]).to(x))
        if context is not None:
            before = before + context[:, :1]
        return torch.sin(before)[..., None] * self.weight


def test_jacobi_agrees_with_the_sampler():
    layer, x, context = conditioned()
    leaves = [x.requires_grad_(), *layer.parameters()]
    results = []
    for y, log_det in (
        layer.inverse(x, context),
        nn.jacobi_inverse(lambda v: layer.conditioner(v, context), x),
    ):
        results.append((y, log_det, *torch.autograd.grad((y**3).sum() + log_det.sum(), leaves)))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)


def test_jacobi_stops_at_the_tolerance():
    net, calls = randomize(nn.MaskedMLP(64, 2)), []

    def counted(v):
        calls.append(1)
        return net(v)

    z = normal(5, 64, dtype=torch.float32)
    with torch.no_grad():
        exact, _ = nn.jacobi_inverse(counted, z)
        full = len(calls)
        rough, _ = nn.jacobi_inverse(counted, z, tolerance=1e-3)
    assert len(calls) - full < full < 64
    # the last iteration changed x by less than 1e-3, and later ones change it less
    torch.testing.assert_close(rough, exact, atol=2e-3, rtol=2e-3)
    for bad in ({"tolerance": -1.0}, {"max_steps": 0}):
        with pytest.raises(ValueError, match="tolerance must be"):
            nn.jacobi_inverse(net, z, **bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", ["affine", SplineMap(bins=3)], ids=["affine", "spline"])
def test_jacobi_returns_its_residual(transform, dtype):
    outputs = 2 if transform == "affine" else transform.params
    net = randomize(nn.MaskedMLP(16, outputs), 1.0).to(dtype)
    z = normal(6, 16, dtype=dtype)
    layer = nn.MaskedAutoregressive(16, transform=transform, conditioner=net)
    for steps in (None, 16, 2, 1):
        x, log_det, residual = nn.jacobi_inverse(
            net, z, transform=transform, max_steps=steps, return_residual=True
        )
        assert (residual.shape, residual.dtype) == (log_det.shape, log_det.dtype)
        assert not residual.requires_grad
        expected = ((z - layer(x)[0]).abs() / (1 + z.abs())).amax(1)
        torch.testing.assert_close(residual, expected)
        if steps is None or steps == 16:  # the rounding of x, multiplied by slopes of 1 to 10
            assert residual.max() < 16 * torch.finfo(dtype).eps
        else:
            assert residual.min() > 1e-3
            assert (residual > 0.01).double().mean() > 0.5


def test_the_residual_of_jacobi_is_that_of_each_sample():
    net, z = randomize(nn.MaskedMLP(8, 2)).double(), normal(5, 8)
    z[1, 3], z[2, 0] = torch.nan, torch.inf
    with torch.no_grad():
        *_, residual = nn.jacobi_inverse(net, z, return_residual=True)
        *_, none = nn.jacobi_inverse(net, z[:0], return_residual=True)
    assert residual.isnan().tolist() == [False, True, True, False, False]
    assert residual[[0, 3, 4]].max() < 1e-14
    assert none.shape == (0,)
    *_, half = nn.jacobi_inverse(net.bfloat16(), z.bfloat16(), return_residual=True)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("of", ["z", "parameters"])
@pytest.mark.parametrize("power", [1, 3])
def test_second_derivatives_of_jacobi_are_refused(of, power):
    """Also where the upstream gradient is a constant and autograd alone would give a wrong number."""
    layer = nn.MaskedAutoregressive(4, conditioner=Cumulative(2))
    z = normal(3, 4).requires_grad_()
    leaves = [z] if of == "z" else list(layer.parameters())
    x, _ = layer.inverse(z)
    first = torch.autograd.grad((x**power).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="jacobi_inverse has only first derivatives"):
        torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
    plain = torch.autograd.grad((layer.inverse(z)[0] ** power).sum(), leaves)
    torch.testing.assert_close(first, plain)


# --- inverted round --------------------------------------------------------------------------------


def test_inverse_exchanges_the_directions():
    layer, x, context = conditioned()
    inverted = nn.Inverse(layer)
    for a, b in itertools.chain(
        zip(inverted(x, context), layer.inverse(x, context), strict=True),
        zip(inverted.inverse(x, context), layer(x, context), strict=True),
    ):
        assert torch.equal(a, b)
    squeeze = nn.Inverse(nn.Squeeze())
    assert squeeze.output_shape((4, 1, 1)) == (1, 2, 2)
    assert squeeze.input_shape((1, 2, 2)) == (4, 1, 1)
    with pytest.raises(TypeError, match="must be a Bijection, got ReLU"):
        nn.Inverse(torch.nn.ReLU())
