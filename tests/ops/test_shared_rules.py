"""Rules that the kernels and Python both state: sizes of what is kept, and the edges of dequantization."""

import itertools

import pytest
import torch
from laws import normal
from torch._subclasses.fake_tensor import FakeTensorMode

from pyflowkern import ops, use_reference
from pyflowkern.ops._field_autograd import KEEP

WIDTHS = (1, 15, 16, 17, 47, 48, 49, 64, 128, 200)


def check_sizes(op, *arguments):
    """Compare the sizes that the op returns with those that its fake says, to compilers among others."""

    def in_mode(mode, value):
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value)
        return [in_mode(mode, v) for v in value] if isinstance(value, list) else value

    found = op(*arguments)
    with FakeTensorMode() as mode:
        expected = op(*(in_mode(mode, a) for a in arguments))
    assert [t.shape for t in found] == [t.shape for t in expected]


def parameters(sizes):
    weights = [normal(b, a, dtype=torch.float32) for a, b in itertools.pairwise(sizes)]
    return weights, [w[:, 0].clone() for w in weights]


def test_kept_inputs_of_relu_networks():
    """Rows of what is kept are padded, by the same rule in both languages."""
    op = torch.ops.pyflowkern.relu_network.default
    for width in WIDTHS:
        weights, biases = parameters((3, width, width, 2))
        check_sizes(
            op, normal(5, 3, dtype=torch.float32), None, weights, biases, False, True, True
        )


def test_kept_inputs_of_networks_of_convolutions():
    """How many images make a group, and how far their channels lie apart, is one rule in both languages."""
    op = torch.ops.pyflowkern.conv_network.default
    for space in ((1, 1), (3, 5), (4, 4), (7, 7), (8, 8), (12, 12), (16, 16), (15, 16), (3, 100)):
        x = normal(9, 2, *space, dtype=torch.float32)
        for width in (1, 17):
            weights, biases = parameters((2, width, width, 3))
            weights = [w[:, :, None, None] for w in weights]
            for last in (False, True):
                check_sizes(op, x, None, weights, biases, False, True, last, True)


@pytest.mark.parametrize("method", ["field_divergence", "field_exact"])
def test_kept_products_of_fields(backend, method):
    """Which layers are kept follows from their number and widths, by the same rule in both languages."""
    x = normal(5, 3, dtype=torch.float32)
    exact = method == "field_exact"
    for layers in (1, 2) if exact else (1, 2, 3, 4):
        for hidden in itertools.product((2, 3, 20), repeat=layers):
            weights, biases = parameters((3, *hidden, 3))
            op = getattr(torch.ops.pyflowkern, method).default
            if exact:
                check_sizes(op, x, weights, biases, [], 0, KEEP)
            else:
                check_sizes(op, x, x[None], 1, weights, biases, [], 0, KEEP)


@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.05, 0.3, 0.49, 0.4999])
def test_edges_of_levels(backend, bits, alpha):
    """How far noise stays from the edges of a level before a logit."""
    levels = torch.tensor([0, 2**bits - 1], dtype=torch.uint8).repeat(1, 1 << 14)
    y, log_det = ops.dequantize(levels, bits=bits, alpha=alpha, seed=3)
    with use_reference():
        expected, expected_log_det = ops.dequantize(levels, bits=bits, alpha=alpha, seed=3)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_det, expected_log_det, rtol=1e-4, atol=1e-4)
