"""Runs of layers as one op: the same results, derivatives, training and files."""

import copy
import itertools
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from laws import normal, randomize
from laws.chains import (
    CLOSE,
    FLOWS,
    SEQUENCES,
    Affine,
    D,
    K,
    agrees,
    by_layers,
    calls,
    derivatives,
    make,
    mlp,
    trained,
)
from torch.utils.flop_counter import FlopCounterMode

from pyflowkern import _library, nn
from pyflowkern.nn.links import WIDE, WIDE_AND_DEEP, Watched, is_wide
from pyflowkern.ops import ChainLayer

__all__ = ["calls"]  # a fixture

every_sequence = pytest.mark.parametrize("name", SEQUENCES)


@pytest.fixture(autouse=True)
def _kernels():
    _library.require_kernels("cpu")


@every_sequence
@pytest.mark.parametrize("training", [False, True])
def test_one_op_does_what_the_layers_do(name, training, calls):
    flow, x, context = make(name)
    flow.train(training)
    expected = derivatives(partial(by_layers, flow), flow, x, context)
    assert not calls
    found = derivatives(flow, flow, x, context)
    assert len(calls) == 1
    torch.testing.assert_close(found, expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(flow(x, context), tuple(expected[:2]), **CLOSE)
    assert flow(x[:0], None if context is None else context[:0])[0].shape == (0, D)


@every_sequence
def test_backwards_too(name, calls):
    flow, x, context = make(name)
    backwards = partial(by_layers, flow, inverse=True)
    z = flow(x, context)[0].detach()
    expected = derivatives(backwards, flow, z, context)
    calls.clear()
    found = derivatives(flow.inverse, flow, z, context)
    assert len(calls) == 1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@every_sequence
def test_second_derivatives(name):
    flow, x, context = make(name)

    def twice(function):
        leaf = x.clone().requires_grad_()
        z, log_det = function(leaf, context)
        (first,) = torch.autograd.grad((z**2).sum() + log_det.sum(), leaf, create_graph=True)
        wanted = [leaf, *flow.parameters()]
        return torch.autograd.grad((first**2).sum(), wanted, allow_unused=True)

    for a, b in zip(twice(flow), twice(partial(by_layers, flow)), strict=True):
        if a is None or b is None:
            other = b if a is None else a
            assert other is None or not other.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


every_flow = pytest.mark.parametrize("name", FLOWS)


@every_flow
def test_flows_train_as_their_layers_do(name, calls):
    """From the first batch of ActNorm on; Adam divides a gradient of a rounding by 1e-8, which is its ``eps``."""
    flow, losses = trained(name, 8, torch.float64)
    assert all(program.base == "normal" for program in calls[-5:])
    assert len(calls) >= 7
    plain, expected = trained(name, 8, torch.float64, layers=True)
    torch.testing.assert_close(losses, expected, rtol=1e-7, atol=1e-7)
    for key, value in flow.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-6, atol=1e-6)


@every_flow
def test_copies_and_files_are_whole_flows(name, calls):
    flow, _ = trained(name, 2)
    x, context = torch.randn(9, D), torch.randn(9, K) if flow.context_features else None
    with torch.no_grad():
        expected = flow.log_prob(x, context)
        fresh = FLOWS[name]()
        fresh.log_prob(x, context)
        fresh.load_state_dict(flow.state_dict())
        wide = copy.deepcopy(flow).double()
        for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), fresh.eval()):
            calls.clear()
            torch.testing.assert_close(other.log_prob(x, context), expected)
            assert len(calls) == 1
        found = wide.log_prob(x.double(), None if context is None else context.double())
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
        copied = copy.deepcopy(flow)
        for p in copied.parameters():
            p.data.add_(0.1)
        assert not torch.allclose(copied.log_prob(x, context), expected)
        torch.testing.assert_close(flow.log_prob(x, context), expected)


@every_flow
def test_a_flow_that_was_loaded_goes_on_with_the_same_bits(name, calls):
    """From the first batch on, though nobody knows then whether an ActNorm has seen data before."""
    flow, _ = trained(name, 2)
    x, context = torch.randn(9, D), torch.randn(9, K) if flow.context_features else None
    fresh = FLOWS[name]()
    fresh.load_state_dict(flow.state_dict())
    assert flow.training
    assert fresh.training
    calls.clear()
    assert torch.equal(fresh.log_prob(x, context), flow.log_prob(x, context))
    assert len(calls) == 2


def test_flop_counters_count_the_products_of_the_layers():
    flow, x, _ = make("splines")
    counts = []
    for function in (flow, partial(by_layers, flow)):
        with FlopCounterMode(display=False) as counter:
            function(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_layer_may_stand_twice(calls):
    layer = randomize(Affine(D, mlp)).double()
    flow, x = nn.Sequential(layer, nn.Reverse(D), layer), normal(6, D)
    found = derivatives(flow, flow, x, None)
    assert len(calls) == 1
    torch.testing.assert_close(
        found, derivatives(partial(by_layers, flow), flow, x, None), **CLOSE
    )


@pytest.mark.parametrize(
    "name", ["autoregressive", "context", "glow", "matrices", "unconditional"]
)
def test_inverses_of_layers_run_the_other_way(name, calls):
    flow, x, context = make(name)
    turned = nn.Sequential(*(nn.Inverse(layer) for layer in flow))
    backwards = partial(by_layers, turned, inverse=True)
    expected = derivatives(backwards, turned, x, context)
    assert not calls
    torch.testing.assert_close(derivatives(turned.inverse, turned, x, context), expected, **CLOSE)
    assert len(calls) == 1
    calls.clear()
    z = expected[0].detach()
    found = derivatives(turned, turned, z, context)
    assert len(calls) == 1
    expected = derivatives(partial(by_layers, turned), turned, z, context)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_layers_of_both_directions_part_the_runs(calls):
    flow, x, _ = make("affine")
    flow.layers[2] = nn.Inverse(flow.layers[2])
    flow.layers.append(nn.Inverse(nn.Reverse(D)))
    agrees(flow, x)
    assert [len(program.steps) for program in calls] == [2, 2]
    z = flow(x)[0]
    torch.testing.assert_close(flow.inverse(z)[0], x)


def test_unknown_layers_part_the_runs(calls):
    flow, x, _ = make("affine")
    flow.layers.insert(1, nn.Inverse(nn.Inverse(nn.Reverse(D))))
    flow.layers.insert(0, nn.Reverse(D))
    agrees(flow, x)
    assert [len(program.steps) for program in calls] == [2, 2]
    torch.testing.assert_close(flow.inverse(flow(x)[0])[0], x)


def test_shallow_copies_have_their_own_layers(calls):
    flow, x, _ = make("affine")
    flow(x)
    other = copy.copy(flow)
    other._modules = dict(flow._modules)
    other.layers = torch.nn.ModuleList([make("affine")[0][2]])
    agrees(other, x)
    agrees(flow, x)


def layers_of(*sizes):
    return [ChainLayer(out, into) for into, out in itertools.pairwise(sizes)]


@pytest.mark.parametrize(
    ("sizes", "wide"),
    [
        ((3, 6), False),
        ((3, 2048, 6), False),  # no product of many inputs and many units
        ((400, 2048, 6), True),
        ((3, WIDE, WIDE, 6), False),
        ((3, WIDE + 1, WIDE + 1, 6), True),
        ((3, 2048, 16, 2048, 6), False),
        ((3, *[WIDE_AND_DEEP] * 5, 6), False),
        ((3, *[WIDE_AND_DEEP + 1] * 3, 6), True),
    ],
)
def test_how_wide_a_network_may_be_depends_on_its_depth(sizes, wide):
    assert is_wide(layers_of(*sizes)) == wide


@pytest.mark.parametrize(("layers", "ops"), [(1, 1), (2, 1), (3, 0)])
def test_networks_of_few_layers_are_one_op_though_they_are_wider(layers, ops, calls):
    flow, x = nn.Sequential(Affine(D, partial(nn.MLP, hidden=200, layers=layers))), normal(3, D)
    randomize(flow.double())
    flow(x)
    assert len(calls) == ops
    agrees(flow, x)


def test_wide_networks_are_one_op_without_gradients_alone(calls):
    flow, x = nn.Sequential(Affine(D, partial(nn.MLP, hidden=130, layers=3))), torch.randn(3, D)
    randomize(flow)
    flow(x)
    assert not calls
    agrees(flow.double(), x.double())  # which wants none
    assert len(calls) == 1


def test_wide_networks_are_looked_at_once_in_a_while_while_gradients_are_recorded(
    calls, monkeypatch
):
    looks, unchanged = [], Watched.unchanged
    monkeypatch.setattr(Watched, "unchanged", lambda self: looks.append(0) or unchanged(self))
    flow, x = nn.Sequential(Affine(D, partial(nn.MLP, hidden=130, layers=3))), torch.randn(3, D)
    randomize(flow)
    for _ in range(60):
        flow(x)
        flow.inverse(x)
    assert len(looks) == 1
    assert not calls
    with torch.no_grad():  # as at first
        flow(x)
        assert len(calls) == 1
    flow[0].conditioner = Affine(D, partial(nn.MLP, hidden=8)).conditioner  # not too wide any more
    for _ in range(130):
        flow(x)
    assert len(calls) > 50
    agrees(flow.double(), x.double())


def test_layers_that_are_too_wide_for_a_block_of_threads_are_called_on_cuda():
    for features, width, fits in (
        (D, 128, True),
        (D, 129, False),
        (128, 8, True),
        (129, 8, False),
    ):
        for layer in (
            Affine(features, partial(nn.MLP, hidden=width)),
            nn.MaskedAutoregressive(features, hidden=(8, width)),
        ):
            flow = nn.Sequential(layer)
            flow(torch.randn(2, features))
            (run,) = flow.__dict__["_chains"]._known[0].runs
            x = SimpleNamespace(is_cuda=True, shape=(2, features), dtype=torch.float32)
            assert run._takes(x, None) == fits


def test_vectors_alone(calls):
    flow = nn.Sequential(Affine(4, partial(nn.ConvNet, hidden=4)), nn.ActNorm(4))
    agrees(flow.double(), normal(2, 4, 3, 3))
    assert not calls


def test_networks_behind_a_mask_are_checked_as_those_of_the_layers(calls):
    """Parts of their weights are taken at each call: of one that no longer fits the layer itself complains."""
    flow, x, _ = make("masks")
    flow(x)
    assert len(calls) == 1
    first = flow[0].conditioner.first
    first.weight = torch.nn.Parameter(normal(first.weight.shape[0], D + 1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        flow(x)


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_first_called_in_inference_mode_trains(name):
    flow = trained(name, 1)[0]
    x = torch.randn(6, D)
    context = torch.randn(6, K) if flow.context_features else None
    fresh = copy.deepcopy(flow)  # has no programs yet
    with torch.inference_mode():
        fresh.log_prob(x, context)
    found, want = (
        derivatives(lambda *a, f=f: [f.log_prob(*a)], f, x, context) for f in (fresh, flow)
    )
    torch.testing.assert_close(found, want)
