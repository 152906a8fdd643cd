"""Wrong arguments of the ops are refused by name: what was wanted, what was given."""

import math

import pytest
import torch

from pyflowkern import ops, use_reference

X, BYTES = torch.randn(4, 6), torch.zeros(2, 3, dtype=torch.uint8)
EYE, ZEROS = torch.eye(3), torch.zeros(3)


def plu(*permutation):
    return ops.plu_matrix(torch.tensor(permutation), EYE, EYE, ZEROS, torch.ones(3))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.affine(X, X, None), TypeError, "shift must be a torch.Tensor, got NoneType"),
        (lambda: ops.affine(X.to_sparse(), X, X), TypeError, "x must be a dense tensor"),
        (lambda: ops.affine(X.to(torch.float8_e4m3fn), X, X), TypeError, "x must .*float8"),
        (lambda: ops.affine(X, X, X, scale_map=None), ValueError, "scale_map must be .*None"),
        (lambda: ops.affine_coupling(X, X, params_layout=3), ValueError, "params_layout .* 3"),
        (lambda: ops.affine_coupling(X, X, split=None), TypeError, "split must .*NoneType"),
        (lambda: ops.affine_coupling(X, X, split=[True] * 6), TypeError, "split must .*list"),
        (lambda: plu(0, 1, 7), ValueError, r"permutation must hold indices of 0 ... 2.*7"),
        (lambda: plu(0, 1, -1), ValueError, "permutation must hold indices"),
        (
            lambda: ops.dequantize(BYTES + 40, bits=5),
            ValueError,
            r"x must hold values below 2\^bits = 32, got 40",
        ),
    ],
)
def test_ops(call, error, message, reference):
    with use_reference(reference), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clamp": math.inf}, ValueError, "clamp must be finite, got inf"),
        ({"gain": math.nan}, ValueError, "gain must be finite, got nan"),
        ({"eps": math.nan}, ValueError, "eps must be finite, got nan"),
        ({"gain": "2"}, TypeError, "gain must be a number, got str"),
        ({"clamp": torch.tensor(2.0)}, TypeError, "clamp must be a number, got Tensor"),
        ({"max_scale": -1.0}, ValueError, "max_scale must be above eps"),
        ({"max_scale": math.nan}, ValueError, "max_scale must be finite"),
    ],
)
def test_scale_maps(options, error, message):
    with pytest.raises(error, match=message):
        ops.ScaleMap("softplus", **options)


def test_a_true_number_is_true():
    """The flags of a kernel are bits: a 2 must not set another one."""
    y, _ = ops.affine(X, X, X, inverse=2)
    torch.testing.assert_close(y, ops.affine(X, X, X, inverse=True)[0], rtol=0, atol=0)
