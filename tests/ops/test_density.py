"""normal_log_prob and bits_per_dim: values, gradients, layouts, determinism, bad input."""

import math

import pytest
import torch
from cases.density import sample
from laws import normal

from pyflowkern.ops import bits_per_dim, normal_log_prob, normal_log_prob_reference

# --- values --------------------------------------------------------------------------------------


def test_matches_torch_distributions(backend):
    z, mean, log_std, _ = sample((5, 3, 4), "event", "element", torch.float32).tensors.values()
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(z).sum((1, 2))
    torch.testing.assert_close(normal_log_prob(z, mean, log_std), expected)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2))
    torch.testing.assert_close(normal_log_prob(z), standard)


def test_long_sums_keep_their_digits(backend):
    """A million terms: float32 partial sums over short runs, then float64."""
    z = normal(2, 1_000_000, dtype=torch.float32)
    exact = normal_log_prob_reference(z.double())
    assert ((normal_log_prob(z).double() - exact) / exact).abs().max() < 3e-7


def test_broadcast_parameters(backend):
    z = normal(4, 3, 5, 2, dtype=torch.float32)
    for shape in ((), (1,), (3, 1, 1), (5, 2), (1, 3, 1, 1), (4, 1, 1, 1), (4, 3, 1, 1)):
        p = normal(*shape, dtype=torch.float32, seed=1)
        torch.testing.assert_close(
            normal_log_prob(z, p, p), normal_log_prob_reference(z, p, p), rtol=1e-5, atol=1e-5
        )


# --- gradients -----------------------------------------------------------------------------------


# --- bits per dimension --------------------------------------------------------------------------


def test_bits_per_dim(backend):
    log_prob = torch.tensor([-3072 * math.log(2), 0.0], requires_grad=True)
    value = bits_per_dim(log_prob, 3072)
    torch.testing.assert_close(value, torch.tensor([1.0, 0.0]))
    value.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.full((2,), -1 / (3072 * math.log(2))))


# --- torch's own checks, bad input ---------------------------------------------------------------


def zeros():
    return torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: normal_log_prob(torch.zeros(4, 3, dtype=torch.int64)), TypeError, "floating"),
        (lambda: normal_log_prob(torch.tensor(1.0)), ValueError, "batch"),
        (
            lambda: normal_log_prob(zeros(), torch.zeros(4)),
            ValueError,
            "mean must be broadcastable",
        ),
        (
            lambda: normal_log_prob(zeros(), torch.zeros(5, 3)),
            ValueError,
            "mean must be broadcastable",
        ),
        (
            lambda: normal_log_prob(zeros(), torch.zeros(1, 4, 3)),
            ValueError,
            "mean must be broadcast",
        ),
        (lambda: normal_log_prob(zeros(), None, torch.zeros(2)), ValueError, "log_std must be"),
        (lambda: normal_log_prob(zeros(), 1.0), TypeError, "mean must be a torch.Tensor"),
        (
            lambda: normal_log_prob(zeros(), log_det=torch.zeros(3)),
            ValueError,
            "log_det must have",
        ),
        (lambda: bits_per_dim(torch.zeros(3), 0), ValueError, "dims"),
        (lambda: bits_per_dim(torch.zeros(3), 2.0), TypeError, "dims"),
        (lambda: bits_per_dim(3.0, 2), TypeError, "log_prob"),
    ],
)
def test_bad_input(backend, call, error, match):
    with pytest.raises(error, match=match):
        call()
