"""Squeezing and permutations move elements and change none."""

import pytest
import torch

from pyflowkern import nn


def test_a_block_of_pixels_becomes_channels():
    x = torch.arange(2 * 4 * 4).view(1, 2, 4, 4).float()
    z, log_det = nn.Squeeze()(x)
    assert z.shape == (1, 8, 2, 2)
    # the block at the top left: its two channels for each of the four pixels
    assert z[0, :, 0, 0].tolist() == [0, 16, 1, 17, 4, 20, 5, 21]
    assert torch.equal(log_det, torch.zeros(1))


@pytest.mark.parametrize("shape", [(2, 8), (3, 4, 6), (1, 2, 4, 2)], ids=str)
def test_squeezing_keeps_every_element(shape):
    x = torch.randn(2, *shape)
    z, _ = nn.Squeeze()(x)
    assert torch.equal(z.flatten(1).sort().values, x.flatten(1).sort().values)


def test_squeezing_keeps_channels_last():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    z, _ = nn.Squeeze()(x)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(z, nn.Squeeze()(x.contiguous())[0])
    back, _ = nn.Squeeze().inverse(z)
    assert back.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(back, x)


def test_a_permutation_orders_the_channels():
    x = torch.randn(2, 3, 4)
    z, log_det = nn.Permutation([2, 0, 1])(x)
    assert torch.equal(z, x[:, [2, 0, 1]])
    assert torch.equal(log_det, torch.zeros(2))
    assert torch.equal(nn.Reverse(3)(x)[0], x.flip(1))


def test_a_random_permutation_is_kept_in_the_state():
    first, second = nn.Permutation(16), nn.Permutation(16)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.permutation, second.permutation)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"permutation must order 0 ... C - 1, got \[0, 2\]"):
        nn.Permutation([0, 2])
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        nn.Squeeze(0)
    with pytest.raises(
        ValueError, match=r"x must have .* space divisible by 2 for Squeeze, got \(3, 4, 5\)"
    ):
        nn.Squeeze()(torch.zeros(1, 3, 4, 5))
    with pytest.raises(
        ValueError, match=r"z must have .* C divisible by 4 for .*, got \(3, 4, 5\)"
    ):
        nn.Squeeze().inverse(torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"got shape \(2, 3\)"):
        nn.Squeeze()(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="splits must be one fewer than levels, got 0 and 2"):
        nn.MultiScale((1, 4, 4), [nn.Squeeze(), nn.Squeeze()], [])
