"""Networks of linear layers and ReLUs as one op: values and derivatives agree with the modules."""

import copy
import sys
from functools import partial

import pytest
import torch
from laws import normal, randomize

from pyflowkern import nn

NETS = {
    "MLP": partial(nn.MLP, 3, 4, hidden=(6, 5), context_features=2),
    "one hidden layer": partial(nn.MLP, 3, 4, hidden=6, layers=1, context_features=2),
    "ResidualMLP": partial(nn.ResidualMLP, 3, 4, hidden=6, context_features=2),
    "not activated": partial(
        nn.ResidualMLP, 3, 4, hidden=6, activate_last=False, context_features=2
    ),
    "no blocks": partial(nn.ResidualMLP, 3, 4, hidden=6, blocks=0, context_features=2),
}
nets = pytest.mark.parametrize("name", NETS)


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    return (
        randomize(NETS[name](), 0.5).to(dtype),
        normal(7, 3, dtype=dtype),
        normal(7, 2, dtype=dtype),
    )


def plain(monkeypatch):
    """Make the conditioners call their modules one after another."""
    monkeypatch.setattr("pyflowkern.nn.conditioners.linear_layers", lambda *_: None)


def results(net, x, context):
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    out = net(x, context)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    leaves = [x, context, *net.parameters()]
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves, allow_unused=True)
    return [out, *first, *second]


@nets
def test_values_and_derivatives_are_those_of_the_modules(name, monkeypatch):
    net, x, context = make(name)
    found = results(net, x, context)
    with monkeypatch.context() as patch:
        plain(patch)
        expected = results(net, x, context)
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:  # the second derivatives do not depend on some biases
            assert (a if b is None else b) is None or (a if b is None else b).abs().max() == 0
        else:
            torch.testing.assert_close(a, b)


@nets
def test_the_first_derivative_is_not_that_of_the_reference(name, monkeypatch):
    """Without create_graph the backward pass of the op runs."""
    net, x, context = make(name)
    leaves = [x.requires_grad_(), context.requires_grad_(), *net.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["pyflowkern.ops.relu_network"], "gradient_of_reference", None)
        found = torch.autograd.grad(net(x, context).pow(3).sum(), leaves)
    plain(monkeypatch)
    expected = torch.autograd.grad(net(x, context).pow(3).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@nets
def test_without_gradients_and_for_empty_batches(name):
    net, x, context = make(name)
    with torch.no_grad():
        out = net(x, context)
    torch.testing.assert_close(out, net(x, context))
    assert net(x[:0], context[:0]).shape == (0, 4)
    net(x[:0], context[:0]).sum().backward()
    assert all(p.grad.abs().max() == 0 for p in net.parameters())


def test_inputs_stay_as_they_are_and_frozen_parameters_get_no_gradient():
    net, x, context = make("ResidualMLP")
    before = x.clone()
    net.first.weight.requires_grad_(False)
    net.blocks[0][3].bias.requires_grad_(False)
    net(x, context).sum().backward()
    assert torch.equal(x, before)
    assert net.first.weight.grad is None
    assert net.blocks[0][3].bias.grad is None
    assert net.first.bias.grad is not None


def test_nan_stays_in_its_sample():
    net, x, context = make("ResidualMLP")
    expected = net(x, context)
    x[2, 1] = torch.nan
    assert net(x, context).isnan().any(1).tolist() == [False, False, True, *[False] * 4]
    torch.testing.assert_close(net(x, context)[3:], expected[3:])


@pytest.mark.parametrize("name", ["MLP", "ResidualMLP"])
def test_changes_to_the_modules_are_seen(name):
    net, x, context = make(name)
    expected = net(x, context)
    calls = []
    handle = net.first.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(net(x, context), expected)
    assert calls
    handle.remove()
    net.first.weight.data.mul_(2.0)
    assert not torch.allclose(net(x, context), expected)

    class Doubled(torch.nn.Linear):
        def forward(self, h):
            return 2 * super().forward(h)

    other = copy.deepcopy(net)
    other.first = Doubled(3, 6).double()
    other.first.load_state_dict(net.first.state_dict())
    assert not torch.allclose(other(x, context), net(x, context))
    weighted = copy.deepcopy(net)
    torch.nn.utils.parametrizations.weight_norm(weighted.first)
    torch.testing.assert_close(weighted(x, context), net(x, context))


def test_a_layer_appended_without_an_activation_is_called():
    net = randomize(nn.MLP(3, 6, hidden=8), 0.5)
    net.body.append(torch.nn.Linear(8, 8))
    x = normal(7, 3, dtype=torch.float32)
    torch.testing.assert_close(net(x), net.last(net.body(net.first(x))))
    flow, x = nn.Sequential(nn.AffineCoupling(6, net), nn.ActNorm(6)), normal(7, 6).float()
    flow(x)  # the ActNorm has seen data now
    found = flow(x)
    net.first.register_forward_hook(lambda *_: None)  # so that the layers are called
    torch.testing.assert_close(found, flow(x))


def test_functional_transforms_and_autocast():
    net, x, context = make("ResidualMLP", torch.float32)
    rows = torch.func.vmap(lambda v, c: net(v[None], c[None])[0])(x, context)
    torch.testing.assert_close(rows, net(x, context))
    tangent = torch.func.jvp(lambda v: net(v, context), (x,), (torch.ones_like(x),))[1]
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v, context), x)
    torch.testing.assert_close(tangent, jacobian.sum((2, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x, context).dtype == torch.bfloat16
