"""Conditioners: zero at first, with and without a context, of every shape."""

from functools import partial

import pytest
import torch
from laws import check_gradients, normal, randomize

from pyflowkern import nn

NETS = {
    "MLP": (nn.MLP, (3,)),
    "ResidualMLP": (nn.ResidualMLP, (3,)),
    "ConvNet": (nn.ConvNet, (3, 4, 5)),
    "ConvNet 1d": (partial(nn.ConvNet, spatial_dims=1), (3, 5)),
    "ResidualConvNet": (nn.ResidualConvNet, (3, 4, 5)),
    "ResidualConvNet 3d": (partial(nn.ResidualConvNet, spatial_dims=3), (3, 2, 3, 2)),
}
nets = pytest.mark.parametrize("name", NETS)


def make(name, **options):
    build, shape = NETS[name]
    return build(3, 7, hidden=4, **options), normal(2, *shape, dtype=torch.float32)


@nets
def test_a_new_conditioner_is_zero(name):
    net, x = make(name)
    assert torch.equal(net(x), torch.zeros(2, 7, *x.shape[2:]))


@nets
def test_every_parameter_learns(name):
    net, x = make(name, context_features=2, activation=torch.nn.Tanh)
    randomize(net)
    check_gradients(net, net(x, normal(2, 2, dtype=torch.float32)).square().sum())


@nets
def test_context_matters(name):
    net, x = make(name, context_features=2)
    randomize(net)
    context = normal(2, 2, dtype=torch.float32)
    assert (net(x, context) - net(x, context + 1)).abs().max() > 0


@nets
def test_contexts_that_do_not_fit_are_named(name):
    net, x = make(name, context_features=2)
    with pytest.raises(ValueError, match=r"context must have shape \(2, 2\), got None"):
        net(x)
    with pytest.raises(ValueError, match=r"context must have shape \(2, 2\), got \(2, 3\)"):
        net(x, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="context_features=0"):
        make(name)[0](x, torch.zeros(2, 2))


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        nn.MLP(2, 2, hidden=0)
    with pytest.raises(ValueError, match="context_features must be at least 0, got -1"):
        nn.ConvNet(2, 2, context_features=-1)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        nn.MLP(2, 2, layers=0)
    with pytest.raises(ValueError, match="spatial_dims must be 1, 2 or 3, got 4"):
        nn.ConvNet(2, 2, spatial_dims=4)
