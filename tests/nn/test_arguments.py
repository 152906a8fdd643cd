"""Wrong arguments of layers are refused by name: what was wanted, what was given."""

import pytest
import torch

from pyflowkern import nn


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.ActNorm(2.5), TypeError, "channels must be an int, got float"),
        (lambda: nn.InvertibleLinear(2.0), TypeError, "channels must be an int, got float"),
        (lambda: nn.AffineCoupling(4.0, nn.MLP), TypeError, "channels must be an int"),
        (lambda: nn.Permutation(-1), ValueError, "permutation must be at least 1, got -1"),
        (lambda: nn.Permutation([0.0, 1.0]), ValueError, "permutation must order"),
        (lambda: nn.Squeeze(2.5), TypeError, "factor must be an int, got float"),
        (lambda: nn.Dequantize(2.5), TypeError, "bits must be an int, got float"),
        (lambda: nn.Dequantize(0), ValueError, "bits must be at least 1, got 0"),
        (lambda: nn.ResidualMLP(2, 2, blocks=-1), ValueError, "blocks must be at least 0"),
        (lambda: nn.ResidualConvNet(2, 2, blocks=-1), ValueError, "blocks must be at least 0"),
        (lambda: nn.channel_mask(-1), ValueError, "channels must be at least 1, got -1"),
        (lambda: nn.CircularShift(2.0), TypeError, "channels must be an int, got float"),
        (
            lambda: nn.CircularShift(2, shift=torch.zeros(3)),
            ValueError,
            r"shift must be a number or have shape \(2,\), got \(3,\)",
        ),
        (lambda: nn.MaskedMLP(3.0, 2), TypeError, "features must be an int, got float"),
        (lambda: nn.MaskedMLP(3, 2, hidden=8), TypeError, "hidden must be a sequence .* got int"),
        (lambda: nn.MaskedMLP(3, 2, (1.5,)), TypeError, "hidden widths must be an int, got float"),
        (lambda: nn.MaskedMLP(3, 2, order=[0.5, 1, 2]), ValueError, "order must be a permutation"),
        (lambda: nn.MaskedMLP(3, 2)([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (
            lambda: nn.MaskedMLP(3, 2)(torch.ones(2, 3, dtype=torch.int64)),
            TypeError,
            "x must be a floating-point tensor .* got torch.int64",
        ),
        (
            lambda: nn.MaskedMLP(3, 2, context_features=1)(torch.zeros(1, 3), [1.0]),
            TypeError,
            "context must be a torch.Tensor, got list",
        ),
        (lambda: nn.MaskedAutoregressive(3.0), TypeError, "features must be an int, got float"),
        (
            lambda: nn.MaskedAutoregressive(3, conditioner=3),
            TypeError,
            "conditioner must be a torch.nn.Module, got int",
        ),
        (
            lambda: nn.jacobi_inverse(nn.MaskedMLP(3, 2), torch.zeros(3)),
            ValueError,
            r"z must have shape \[N, D\], got \(3,\)",
        ),
    ],
)
def test_layers(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_context_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"context must be a torch.Tensor, got list"):
        nn.MLP(3, 3, hidden=4, context_features=2)(torch.zeros(1, 3), [1, 2])
