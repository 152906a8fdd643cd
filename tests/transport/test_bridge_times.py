"""Bridges between inner times, against Gaussian ones in closed form."""

from functools import partial

import pytest
import torch
from laws.gaussian_bridges import F64, ONE, exact, generator, normal, oracle

METHODS = ("sf2m", "dsbm_imf", "dsbm_ipf", "dsb")


def covariance(path, s, t):
    """Return Cov(x_s, x_t) of a Gaussian bridge for s <= t: its ends are joined by Brownian bridges."""
    a, b, c = path.cov0, path.cov1, path.coupling_covariance
    of_ends = (1 - s) * (1 - t) * a + s * t * b + (1 - s) * t * c + s * (1 - t) * c.mT
    return of_ends + path.sigma**2 * s * (1 - t) * ONE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backward", [False, True])
def test_paths_between_inner_times_have_the_law_of_the_bridge(method, backward):
    path, n = oracle(), 40_000
    early, late = 0.2, 0.7
    first, last = (late, early) if backward else (early, late)
    start = normal(n, *path.marginal(first), seed=1)
    run = exact(method, path).sample(
        start,
        20,
        backward=backward,
        heun=True,
        start=first,
        end=last,
        generator=generator(2),
    )
    for k in (0, 10, 20):
        mean, cov = path.marginal(first + (last - first) * k / 20)
        assert float((run[k].mean(0) - mean).abs().max()) < 4.5 / n**0.5 + 0.002
        assert float((run[k].T.cov() - cov).abs().max()) < 4.5 * 2**0.5 * 1.3 / n**0.5 + 0.002
    joint = torch.cat([run[0], run[-1]], 1).T.cov()[:2, 2:]
    wanted = covariance(path, early, late)
    assert float((joint - (wanted if not backward else wanted.mT)).abs().max()) < 0.03


@pytest.mark.parametrize("method", METHODS)
def test_the_flow_between_inner_times_is_that_of_the_bridge(method):
    """Covariances that commute: the flow scales by the ratio of standard deviations."""
    path = oracle()
    bridge, x = exact(method, path), normal(6, *path.marginal(0.2), 3)
    (early, spread), (late, wide) = path.marginal(0.2), path.marginal(0.7)
    wanted = late + (x - early) * (wide[0, 0] / spread[0, 0]).sqrt()
    solver = {"rtol": 1e-9, "atol": 1e-9}
    there = bridge.flow_map(x, start=0.2, end=0.7, **solver)
    torch.testing.assert_close(there, wanted, rtol=1e-6, atol=1e-6)
    back = bridge.flow_map(there, backward=True, start=0.7, end=0.2, **solver)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    for first, last, points in ((0.2, 0.7, there), (0.7, 0.2, x), (None, 0.7, there)):
        found = bridge.log_prob(
            points, partial(path.log_prob, first or 0.0), start=first, end=last, **solver
        )
        torch.testing.assert_close(found, path.log_prob(last, points), rtol=1e-6, atol=1e-6)


def test_a_run_may_begin_or_end_at_a_snapshot():
    """Step k of a run depends on its time and its number alone."""
    bridge = exact("dsb", oracle(), times=(0.0, 0.5, 1.0))
    x = torch.randn(5, 2, generator=generator(), dtype=F64)
    whole = bridge.sample(x, 8, generator=generator(1))
    half = bridge.sample(x, 4, end=0.5, generator=generator(1))
    assert torch.equal(whole[:5], half)
    back = bridge.sample(x, 8, backward=True, generator=generator(1))
    assert torch.equal(
        back[:5], bridge.sample(x, 4, backward=True, end=0.5, generator=generator(1))
    )
    assert torch.equal(whole, bridge.sample(x, 8, start=0, end=1.0, generator=generator(1)))
