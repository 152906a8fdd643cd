"""Pixels to the real line: the discrete log-determinant, the inverse, bad arguments."""

import math

import pytest
import torch

from pyflowkern import nn


def pixels(bits, n=4):
    return torch.randint(0, 2**bits, (n, 3, 4, 4)).to(torch.uint8)


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_pixels_come_back(bits):
    layer = nn.Dequantize(bits)
    x = pixels(bits)
    z, _ = layer(x)
    assert torch.equal(layer.quantize(layer.inverse(z)[0]), x)


@pytest.mark.parametrize("bits", [5, 8])
def test_the_log_det_is_that_of_the_levels(bits):
    """For pixels it is the log-determinant for floats minus ``bits`` bits per dimension."""
    layer = nn.Dequantize(bits)
    z, log_det = layer(pixels(bits))
    points, inverse_log_det = layer.inverse(z)
    expected = -inverse_log_det - bits * math.log(2) * 48
    torch.testing.assert_close(log_det, expected, atol=1e-2, rtol=1e-4)
    assert (points >= -1e-6).all()
    assert (points <= 1 + 1e-6).all()


def test_noise_is_fresh_for_pixels_and_absent_for_floats():
    layer = nn.Dequantize()
    x = pixels(8)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    points = x / 256.0
    assert torch.equal(layer(points)[0], layer(points)[0])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 0.5\), got 0.5"):
        nn.Logit(0.5)
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        nn.Dequantize(9)
    with pytest.raises(TypeError, match="uint8"):
        nn.Dequantize()(torch.zeros(1, 2, dtype=torch.int64))
