"""Networks of convolutions as one op: values and derivatives agree with the modules, changes to them are seen."""

import copy
import sys

import pytest
import torch
from laws import normal, randomize

from pyflowkern import nn

OP = sys.modules["pyflowkern.ops.conv_network"]


def make(dtype=torch.float64, hidden=6):
    torch.manual_seed(0)
    net = nn.ConvNet(3, 4, hidden=hidden, context_features=2)
    return (
        randomize(net, 0.5).to(dtype),
        normal(7, 3, 4, 5, dtype=dtype),
        normal(7, 2, dtype=dtype),
    )


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of the op."""
    found = []
    inner = OP.evaluate_convolutions

    def counted(*args):
        found.append(args)
        return inner(*args)

    monkeypatch.setattr("pyflowkern.nn.conditioners.evaluate_convolutions", counted)
    return found


def plain(monkeypatch):
    """Make the conditioners call their modules one after another."""
    monkeypatch.setattr("pyflowkern.nn.conditioners.convolutions", lambda *_: None)


def results(net, x, context):
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    out = net(x, context)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    leaves = [x, context, *net.parameters()]
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves, allow_unused=True)
    return [out, *first, *second]


def test_values_and_derivatives_are_those_of_the_modules(monkeypatch, calls):
    net, x, context = make()
    found = results(net, x, context)
    assert len(calls) == 1
    with monkeypatch.context() as patch:
        plain(patch)
        expected = results(net, x, context)
    assert len(calls) == 1
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:  # the second derivatives do not depend on some biases
            assert (a if b is None else b) is None or (a if b is None else b).abs().max() == 0
        else:
            torch.testing.assert_close(a, b)


def test_the_first_derivative_is_not_that_of_the_reference(monkeypatch):
    """Without create_graph the backward pass of the op runs."""
    net, x, context = make()
    leaves = [x.requires_grad_(), context.requires_grad_(), *net.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(OP, "gradient_of_reference", None)
        found = torch.autograd.grad(net(x, context).pow(3).sum(), leaves)
    plain(monkeypatch)
    expected = torch.autograd.grad(net(x, context).pow(3).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_parameters_get_no_gradient():
    net, x, context = make()
    net.first.weight.requires_grad_(False)
    net.body[1].bias.requires_grad_(False)
    net(x, context).sum().backward()
    assert net.first.weight.grad is None
    assert net.body[1].bias.grad is None
    assert net.first.bias.grad is not None


def test_layers_that_were_changed_are_called(calls):
    net, x, context = make()
    expected = net(x, context)
    assert len(calls) == 1
    seen = []
    handle = net.first.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(net(x, context), expected)
    assert seen
    handle.remove()

    class Doubled(torch.nn.Conv2d):
        def forward(self, h):
            return 2 * super().forward(h)

    other = copy.deepcopy(net)
    other.first = Doubled(3, 6, 3, padding=1).double()
    other.first.load_state_dict(net.first.state_dict())
    assert not torch.allclose(other(x, context), expected)
    weighted = copy.deepcopy(net)
    torch.nn.utils.parametrizations.weight_norm(weighted.first)
    torch.testing.assert_close(weighted(x, context), expected)
    for layer in (
        torch.nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"),
        torch.nn.Conv2d(3, 6, 5, padding=2),
        torch.nn.Conv2d(3, 6, 3, padding=1, bias=False),
        torch.nn.Conv2d(3, 6, 3, padding=2, dilation=2),
        torch.nn.Conv2d(3, 6, 3, padding="same"),
    ):
        other.first = layer.double()
        hand = other.last(other.body(layer(x) + net.context(context)[:, :, None, None]))
        torch.testing.assert_close(other(x, context), hand)
    longer = copy.deepcopy(net)
    longer.body.append(torch.nn.Conv2d(6, 6, 1).double())
    hand = longer.last(longer.body(longer.first(x) + net.context(context)[:, :, None, None]))
    torch.testing.assert_close(longer(x, context), hand)
    smooth = nn.ConvNet(3, 4, hidden=6, activation=torch.nn.Tanh).double()
    smooth(x)
    assert len(calls) == 1


def test_what_torch_does_faster_it_does(calls):
    for hidden, space in ((129, (4, 4)), (257, (8, 8)), (513, (16, 16)), (6, (3, 5))):
        net = nn.ConvNet(3, 4, hidden=hidden)
        net(torch.zeros(2, 3, *space))
    assert not calls


def test_functional_transforms_and_autocast(calls):
    net, x, context = make(torch.float32)
    expected = net(x, context)
    rows = torch.func.vmap(lambda v, c: net(v[None], c[None])[0])(x, context)
    torch.testing.assert_close(rows, expected)
    tangent = torch.func.jvp(lambda v: net(v, context), (x,), (torch.ones_like(x),))[1]
    assert len(calls) == 1
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v, context), x)
    torch.testing.assert_close(tangent, jacobian.sum((4, 5, 6, 7)))
    before = len(calls)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x, context).dtype == torch.bfloat16
    assert len(calls) == before


def test_a_tracer_sees_the_convolutions():
    net, x, context = make(torch.float32)
    traced = torch.jit.trace(net, (x, context))  # compares two traces and their results
    assert "conv_network" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x[:3], context[:3]), net(x[:3], context[:3]))


def test_padding_is_that_of_the_layer_for_a_weight_of_another_filter():
    net, x, context = make()
    net.body[1].weight = torch.nn.Parameter(normal(6, 6, 3, 3))  # behind a padding for 1x1
    inner = net.first(x) + net.context(context)[:, :, None, None]
    torch.testing.assert_close(net(x, context), net.last(net.body(inner)))
