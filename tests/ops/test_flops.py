"""Torch's FLOP counter counts the matrix products inside the ops: as many as the references make."""

import contextlib
import itertools

import pytest
import torch
from cases.field import layers
from laws import normal
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import pyflowkern
from pyflowkern import _library, flows, nn, ops
from pyflowkern._library import OPS


@pytest.fixture
def kernels():
    _library.require_kernels("cpu")


needs_kernels = pytest.mark.usefixtures("kernels")
#: Ops that multiply no matrices.  A factorization and a triangular system count nothing in torch either.
NO_PRODUCTS = {
    *("actnorm", "actnorm_backward", "channel_moments"),
    *("affine", "affine_backward", "affine_coupling", "affine_coupling_backward"),
    *("dequantize", "quantize", "logit", "logit_backward"),
    *("field_layer", "field_layer_", "field_layer_backward", "field_layer_backward_"),
    "diffusion_step",
    *("field_time", "field_time_backward"),
    *("hutchinson_trace", "hutchinson_trace_backward"),
    *("normal_log_prob", "normal_log_prob_backward"),
    *("rk_combine", "rk_error", "rk_last", "rk_stage"),
    *("sinkhorn", "plan_draw"),  # squared distances and sums of powers
    "slogdet_inverse",
    *("spline", "spline_backward"),
}


def test_every_op_with_products_has_a_formula():
    counted = {op for op in OPS if getattr(torch.ops.pyflowkern, op) in flop_registry}
    assert counted | NO_PRODUCTS == set(OPS), "give register() the op's flops, or name it above"
    assert not counted & NO_PRODUCTS


def flops(work, inputs=(), reference=False):
    """Count those of the forward pass, and those of the backward pass of all floating-point results."""
    found = []
    with pyflowkern.use_reference() if reference else contextlib.nullcontext():
        with FlopCounterMode(display=False) as counter:
            out = work(*inputs)
        found.append(counter.get_total_flops())
        out = [out] if isinstance(out, torch.Tensor) else out
        total = sum(t.double().sin().sum() for t in out)
        if total.requires_grad:
            with FlopCounterMode(display=False) as counter:
                total.backward()
            found.append(counter.get_total_flops())
    return found


def parameter(*shape):
    return normal(*shape, dtype=torch.float32).requires_grad_()


def network(sizes):
    pairs = list(itertools.pairwise(sizes))
    return [parameter(b, a) for a, b in pairs], [parameter(b) for _, b in pairs]


def convolutions(sizes, sides):
    layers = list(zip(itertools.pairwise(sizes), sides, strict=True))
    return [parameter(b, a, k, k) for (a, b), k in layers], [parameter(b) for b in sizes[1:]]


def glow_step(matrix):
    scale, bias = parameter(len(matrix)), parameter(len(matrix))
    return lambda x: ops.glow_step(x, scale, bias, matrix, torch.tensor(0.0))


def plu(inverse):
    factors = parameter(5, 5), parameter(5, 5), parameter(5)
    return lambda: ops.plu_matrix(torch.arange(5), *factors, torch.ones(5), inverse=inverse)


def field(hidden, gates=False, **options):
    parts = layers((5, *hidden, 5), torch.float32, None, gates)
    parts = [[t.detach().requires_grad_() for t in part] for part in parts]
    weights, biases, gates = parts
    return lambda x: ops.field_divergence(x, weights, biases, gates or None, **options)


PROBES = normal(3, 7, 5, dtype=torch.float32)
CASES = {
    "relu_network": (
        lambda x: ops.relu_network(x, *network((5, 8, 9, 4))),
        parameter(7, 5),
    ),
    "relu_network of data": (
        lambda x: ops.relu_network(x, *network((5, 8, 8, 8, 4)), residual=True),
        parameter(7, 5).detach(),
    ),
    "conv_network": (
        lambda x: ops.conv_network(x, *convolutions((5, 8, 9, 4), (3, 1, 3))),
        parameter(2, 5, 4, 3),
    ),
    "conv_network of data": (
        lambda x: ops.conv_network(x, *convolutions((5, 8, 8, 8, 4), (3, 3, 3, 1)), residual=True),
        parameter(2, 5, 4, 3).detach(),
    ),
    "invertible_linear": (
        lambda x: ops.invertible_linear(x, parameter(3, 3), torch.tensor(0.0)),
        parameter(2, 3, 4, 5),
    ),
    "glow_step": (glow_step(parameter(3, 3)), parameter(2, 3, 4)),
    "plu_matrix": (plu(False),),
    "inverse plu_matrix": (plu(True),),
    "field_divergence": (field((8, 9), probe=PROBES[0]), parameter(7, 5)),
    "field_divergence of probes": (field((8,), True, probe=PROBES), parameter(7, 5)),
    "exact divergence by probes": (field((6, 8, 9), method="exact"), parameter(7, 5)),
    "exact divergence of one layer": (field((8,), method="exact"), parameter(7, 5)),
    "exact divergence of two layers": (field((8, 9), True, method="exact"), parameter(7, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_as_many_as_the_reference(name):
    work, *inputs = CASES[name]
    assert flops(work, inputs) == flops(work, inputs, reference=True)


@needs_kernels
def test_a_glow_step_of_data_needs_no_second_product_for_its_scale():
    inputs = (parameter(2, 3, 4).detach(),)
    forward, backward = flops(glow_step(parameter(3, 3)), inputs)
    assert (forward, backward) == (2 * 2 * 3 * 3 * 4, 2 * 2 * 3 * 3 * 4)
    assert flops(glow_step(parameter(3, 3)), inputs, reference=True) == [forward, 2 * backward]


@needs_kernels
@pytest.mark.parametrize("residual", [False, True])
def test_the_inverse_of_a_masked_network_is_one_pass(residual):
    net = nn.MaskedMLP(5, 2, (8, 8), residual=residual)
    z = normal(7, 5, dtype=torch.float32)
    weights, biases = net.weights_and_biases(None, 7)
    one_pass = 2 * 7 * sum(w.numel() for w in weights)
    forward, backward = flops(lambda: ops.autoregressive_inverse(z, weights, biases, net.plan))
    assert forward == one_pass
    assert backward >= 3 * one_pass  # values, the triangular system, the weights' gradients


FLOWS = {
    "Glow of images": lambda: flows.Glow((2, 8, 8), levels=2, steps=2, hidden=8),
    "NSF": lambda: flows.NSF(5, transforms=2, hidden=(8, 8)),
    "RealNVP": lambda: flows.RealNVP(5, steps=2, hidden=8),
    "MAF": lambda: flows.MAF(5, transforms=2, hidden=(8, 8)),
    "FFJORD": lambda: flows.FFJORD(5, hidden=(8, 8), method="rk4", step_size=0.5),
}


@pytest.mark.parametrize("name", FLOWS)
def test_flows_count_as_many_as_their_reference(name):
    flow = FLOWS[name]()
    x = parameter(3, *flow.event_shape)
    flow.log_prob(x)  # starts the normalizations
    forward, backward = found = flops(flow.log_prob, (x,))
    assert found == flops(flow.log_prob, (x,), reference=True)
    assert backward > forward > 0


@needs_kernels
@pytest.mark.filterwarnings("error")
def test_counting_does_not_slow_a_masked_inverse():
    """The counter's hooks change nothing of what runs: one pass of each network, and no warning of many."""
    flow = FLOWS["MAF"]()
    products = sum(p.numel() for p in flow.parameters() if p.dim() == 2)
    with torch.no_grad():
        assert flops(lambda: flow.sample(7)) == [2 * 7 * products]
