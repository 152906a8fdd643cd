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


def test_gated_blocks_are_gated_linear_units():
    """As Durkan et al. (2019) have them; networks without gates keep their parameters."""
    net = nn.ResidualMLP(3, 7, hidden=4, context_features=2, gated=True, activate_last=False)
    plain = nn.ResidualMLP(3, 7, hidden=4, context_features=2, activate_last=False)
    assert {*net.state_dict()} - {*plain.state_dict()} == {
        f"gates.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")
    }
    randomize(net)
    x, c = normal(5, 3, dtype=torch.float32), normal(5, 2, dtype=torch.float32)
    h = net.first(x) + net.context(c)
    for block, gate in zip(net.blocks, net.gates, strict=True):
        h = h + torch.nn.functional.glu(torch.cat([block(h), gate(c)], 1), 1)
    torch.testing.assert_close(net(x, c), net.last(h))
    check_gradients(net, net(x, c).square().sum())


def test_gates_need_a_context_and_blocks():
    for make in (
        partial(nn.ResidualMLP, 3, 7),
        partial(nn.MaskedMLP, 3, 2, (4, 4), residual=True),
        partial(nn.MaskedAutoregressive, 3, (4, 4), residual=True),
    ):
        with pytest.raises(ValueError, match="gated=True needs context_features"):
            make(gated=True)
        with pytest.raises(TypeError, match="gated must be True or False"):
            make(gated=1, context_features=2)
    with pytest.raises(ValueError, match="gated=True needs residual=True"):
        nn.MaskedMLP(3, 2, (4,), context_features=2, gated=True)
