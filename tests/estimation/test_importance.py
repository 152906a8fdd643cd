"""Importance sampling against closed forms, and the fit of a tail against weights of a known shape."""

import math

import pytest
import torch

from pyflowkern import flows
from pyflowkern.estimation import (
    importance_estimate,
    importance_sampling,
    mean_with_error,
    pareto_smoothed,
)


class Normal:
    """Draws from N(0, spread^2) in D dimensions, float64."""

    def __init__(self, spread, dims):
        self.spread, self.dims = spread, dims

    def log_prob(self, x):
        scaled = x / self.spread
        return (-0.5 * (scaled.square() + math.log(2 * math.pi)) - math.log(self.spread)).sum(1)

    def sample_and_log_prob(self, n, *, generator=None):
        x = self.spread * torch.randn(n, self.dims, generator=generator, dtype=torch.float64)
        return x, self.log_prob(x)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_normalizer_mean_and_size_of_a_known_ratio():
    """N(0, 1) drawn from N(0, s^2): N / ESS tends to E[w^2] = s^2 / sqrt(2 s^2 - 1)."""
    spread, n = 1.5, 40_000
    found = importance_sampling(
        lambda x: Normal(1, 1).log_prob(x) + 2,
        Normal(spread, 1),
        n,
        values=lambda x: torch.cat([x, x.square()], 1),
        generator=seeded(),
    )
    share = math.sqrt(2 * spread**2 - 1) / spread**2
    assert found.draws == n
    assert found.efficiency == pytest.approx(share, rel=0.02)
    assert abs(found.log_normalizer - 2) < 4 * found.standard_error
    assert found.standard_error == pytest.approx(math.sqrt((1 / share - 1) / n), rel=0.05)
    assert bool(((found.mean - torch.tensor([0.0, 1.0])).abs() < 4 * found.mean_error).all())
    assert found.pareto_k < 0.5  # bounded weights


def test_errors_are_the_spread_of_repetitions():
    """Over 200 repetitions the spread of an estimate is known to a twentieth: 4 of those are allowed."""
    runs = [
        importance_sampling(
            Normal(1, 2).log_prob,
            Normal(1.4, 2),
            500,
            values=lambda x: x[:, :1] + 1,
            generator=seeded(i),
        )
        for i in range(200)
    ]
    logs = torch.tensor([run.log_normalizer for run in runs])
    means = torch.stack([run.mean[0] for run in runs])
    errors = torch.tensor([run.standard_error for run in runs])
    mean_errors = torch.stack([run.mean_error[0] for run in runs])
    assert float(logs.std() / errors.mean()) == pytest.approx(1, abs=0.2)
    assert float(means.std() / mean_errors.mean()) == pytest.approx(1, abs=0.2)


def test_chunks_and_generator_of_a_flow():
    flow = flows.NSF(2, transforms=1, hidden=(8,)).eval()

    def target(x):
        return flow.log_prob(x) + 0.3 * x[:, 0].sin()

    one = importance_sampling(target, flow, 100, generator=seeded())
    assert one == importance_sampling(target, flow, 100, generator=seeded())
    parts = importance_sampling(target, flow, 100, generator=seeded(), chunk=7)
    assert parts.draws == 100
    assert abs(parts.log_normalizer - one.log_normalizer) < 5 * one.standard_error


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_tail_of_known_shape(shape):
    """Weights u^-k have a tail of shape k; M = 3 sqrt(N) = 670 of them tell k to (1 + k) / sqrt(M) = 0.07."""
    weights = -shape * torch.rand(50_000, generator=seeded(), dtype=torch.float64).log()
    smoothed, k = pareto_smoothed(weights)
    assert k == pytest.approx(shape, abs=3 * (1 + shape) / math.sqrt(3 * math.sqrt(50_000)))
    assert float(smoothed.max()) <= float(weights.max())
    changed = smoothed != weights
    tail = int(3 * math.sqrt(50_000))
    assert 0.9 * tail < int(changed.sum()) <= tail  # some may be cut at the largest
    assert float(weights[changed].min()) >= float(weights.sort()[0][-tail])


def test_a_proposal_that_is_too_narrow_is_told():
    wide = importance_sampling(Normal(1, 3).log_prob, Normal(0.5, 3), 20_000, generator=seeded())
    assert wide.pareto_k > 0.7


def test_weights_of_nought_and_few_weights():
    logs = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    found = importance_estimate(logs, torch.tensor([[1.0], [math.inf], [3.0], [math.nan]]))
    assert found.log_normalizer == pytest.approx(-math.log(2))
    assert (found.effective_sample_size, float(found.mean)) == (pytest.approx(2), 2)
    none = importance_estimate(torch.full((30,), -math.inf))
    assert none.log_normalizer == -math.inf
    assert math.isnan(none.effective_sample_size)
    assert pareto_smoothed(torch.zeros(1000))[1] == -math.inf
    assert math.isnan(pareto_smoothed(torch.zeros(10))[1])


def test_mean_with_error():
    assert mean_with_error(torch.tensor([1.0, 2.0, 6.0])) == (3, pytest.approx(math.sqrt(7 / 3)))
    assert math.isnan(mean_with_error(torch.tensor([1.0])).standard_error)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: importance_estimate(torch.zeros(0)), ValueError, "N at least 1"),
        (lambda: importance_estimate([0.0]), TypeError, "got list"),
        (lambda: importance_estimate(torch.tensor([math.nan])), ValueError, "NaN"),
        (lambda: importance_estimate(torch.zeros(2), torch.zeros(3, 1)), ValueError, "2 rows"),
        (lambda: importance_sampling(torch.sum, Normal(1, 1), 0), ValueError, "n must"),
        (
            lambda: importance_sampling(lambda x: x, Normal(1, 1), 5),
            ValueError,
            r"log_target\(x\) must have shape \[N\]",
        ),
        (lambda: mean_with_error(torch.zeros(3, dtype=torch.int64)), TypeError, "int64"),
    ],
)
def test_errors(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
