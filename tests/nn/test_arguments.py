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
    ],
)
def test_layers(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_context_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"context must be a torch.Tensor, got list"):
        nn.MLP(3, 3, hidden=4, context_features=2)(torch.zeros(1, 3), [1, 2])
