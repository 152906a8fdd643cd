"""Learned bridges against Gaussian ones in closed form."""

import itertools
import math

import pytest
import torch
from laws.gaussian_bridges import F64, ONE, exact, generator, normal, oracle, with_fields

from pyflowkern import transport

METHODS = ("sf2m", "dsbm_imf", "dsbm_ipf", "dsb")
GOLDEN = (math.sqrt(5) - 1) / 2


# --- what is computed from the networks -------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_drifts_velocity_and_score_are_those_of_the_networks(method):
    path = oracle(0.7)
    bridge, x = exact(method, path), torch.randn(5, 2, generator=generator(), dtype=F64)
    for t in (0.25, torch.rand(5, generator=generator(), dtype=F64)):
        for found, wanted in (
            (bridge.drift(t, x), path.drift(t, x)),
            (bridge.drift(t, x, backward=True), path.backward_drift(t, x)),
            (bridge.velocity(t, x), path.probability_flow(t, x)),
            (bridge.score(t, x), path.score(t, x)),
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # t is float64 alone


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("heun", [False, True])
def test_paths_of_the_exact_drift_have_the_law_of_the_bridge(method, backward, heun):
    path, n = oracle(), 40_000
    start = normal(n, *path.marginal(float(backward)), seed=1)
    run = exact(method, path).sample(
        start, 50, backward=backward, heun=heun, generator=generator(2)
    )
    assert run.shape == (51, n, 2)
    assert torch.equal(run[0], start)
    bias = 0.002 if heun else 0.015  # Euler's steps of 1/50 are off by about 0.4 of a step
    for k in (25, 50):
        mean, cov = path.marginal(1 - k / 50 if backward else k / 50)
        assert float((run[k].mean(0) - mean).abs().max()) < 4.5 / n**0.5 + bias
        assert float((run[k].T.cov() - cov).abs().max()) < 4.5 * 2**0.5 * 1.3 / n**0.5 + bias
    joint = torch.cat([run[0], run[-1]], 1).T.cov()[:2, 2:]
    assert float((joint - GOLDEN * ONE).abs().max()) < 4.5 * 1.2 / n**0.5 + bias


@pytest.mark.parametrize("method", METHODS)
def test_the_density_along_the_exact_flow_is_the_marginal(method):
    path = transport.gaussian_bridge(
        torch.zeros(2), torch.tensor([[1.0, 0.3], [0.3, 0.5]]), torch.ones(2), 2 * ONE, sigma=0.8
    )
    bridge, x = exact(method, path), normal(6, path.mean1, path.cov1, 3)
    for base in (lambda x: path.log_prob(0.0, x), _Normal(path)):
        found = bridge.log_prob(x, base, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, path.log_prob(1.0, x), rtol=1e-6, atol=1e-6)
    there = bridge.flow_map(x, rtol=1e-9, atol=1e-9)
    back = bridge.flow_map(there, backward=True, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


class _Normal:
    def __init__(self, path):
        self.path = path

    def log_prob(self, x):
        return self.path.log_prob(0.0, x)


def test_beyond_64_dimensions_the_trace_is_estimated_with_a_fixed_probe():
    bridge = transport.SchrodingerBridge(65, hidden=(8,))
    x, base = torch.randn(3, 65, generator=generator()), _Standard()
    assert torch.equal(bridge.log_prob(x, base), bridge.log_prob(x, base))
    # networks begin at zero: the flow stands still, whatever the probe
    torch.testing.assert_close(bridge.log_prob(x, base), base.log_prob(x))
    exact_trace = bridge.log_prob(x, base, divergence="exact")
    torch.testing.assert_close(exact_trace, base.log_prob(x))


class _Standard:
    def log_prob(self, x):
        return -x.square().sum(1) / 2


# --- what the losses ask for ----------------------------------------------------------------------


def test_the_loss_for_given_draws():
    """On one bridge, with the formulas of Brownian bridges: (x1 - x) / (1 - t), (x - x0) / t and their mean."""
    sigma, (start, end) = 0.6, (1.0, 3.0)
    x0, x1 = (torch.randn(7, 2, generator=generator(s), dtype=F64) for s in (1, 2))
    zero = torch.zeros_like
    for method in ("sf2m", "dsbm_imf"):
        bridge = with_fields(
            method,
            lambda t, x: zero(x),
            lambda t, x: zero(x),
            sigma=sigma,
            plan="given",
            times=(start, end),
        )
        terms = bridge._regressions([x0, x1], generator(5))
        for term in terms:
            t, x = term.t[:, None], term.x
            forward, backward = (x1 - x) / (end - t), (x - x0) / (t - start)
            wanted = {
                "velocity": (forward + backward) / 2,
                "score": (forward - backward) / 2,  # sigma^2 / 2 times the score
                "backward": backward,
            }[term.network]
            torch.testing.assert_close(term.target / term.scale, wanted, rtol=1e-5, atol=1e-5)
        loss = sum((term.weight * term.target.square()).mean() for term in terms)
        torch.testing.assert_close(bridge.loss(x0, x1, generator=generator(5)), loss)


def affine(term, t, window=0.04):
    """Return offset and matrix of the affine function that minimises the loss of a term near a time."""
    near = (term.t - t).abs() < window
    x, target = term.x[near], (term.target / term.scale)[near]
    late = (term.t[near] - t)[:, None]
    rows = [torch.ones_like(late), x]
    if float(late.abs().max()) > 1e-6:  # else all are at this time
        rows += [late, late * x]
    rows = torch.cat(rows, 1)
    solved = torch.linalg.lstsq(rows, target).solution
    residual = (target - rows @ solved).std(0).max()
    error = residual * torch.linalg.inv(rows.T @ rows).diagonal()[:3].max().sqrt()
    return solved[0], solved[1:3].T, float(error)


def same_field(term, t, field, extra=0.0):
    offset, matrix, error = affine(term, t)
    points = torch.cat([torch.zeros(1, 2, dtype=F64), ONE])
    wanted = field(t, points)
    assert float((offset - wanted[0]).abs().max()) < 5 * error + extra
    assert float((matrix.T - (wanted[1:] - wanted[0])).abs().max()) < 7 * error + extra


def test_the_minimisers_are_the_fields_of_the_bridge():
    """Pairs of the exact coupling: affine regressions find velocity, score and both drifts."""
    path = transport.gaussian_bridge(
        torch.zeros(2), torch.tensor([[1.0, 0.3], [0.3, 0.5]]), torch.ones(2), 2 * ONE, sigma=0.8
    )
    pairs = path.sample(200_000, 1, generator=generator(4))
    sf2m = exact("sf2m", path, plan="given")._regressions(list(pairs), generator(5))
    imf = exact("dsbm_imf", path, plan="given")
    (backward,) = imf._regressions(list(pairs), generator(6))
    imf.next_iteration()
    (forward,) = imf._bridges("forward", 0, *pairs, generator(7))
    for t in (0.2, 0.5, 0.8):
        same_field(sf2m[0], t, path.probability_flow)
        same_field(sf2m[1], t, lambda t, x: 0.32 * path.score(t, x))
        same_field(backward, t, path.backward_drift)
        same_field(forward, t, path.drift)


@pytest.mark.parametrize("iteration", [0, 1, 2])
def test_the_minimisers_of_mean_matching(iteration):
    """A linear-Gaussian chain: the mean of the reversed step from a point is that of a regression of Gaussians."""
    n, steps, sigma = 40_000, 10, 1.0
    path = oracle(sigma)
    bridge = exact("dsb", path, steps=steps).eval()
    for _ in range(iteration):
        bridge.next_iteration()
    ends = [normal(n, *path.marginal(t), seed=8) for t in (0.0, 1.0)]
    (term,) = bridge._regressions(ends, generator(9))
    forward = iteration % 2 == 1
    assert term.network == ("forward" if forward else "backward")
    drift = path.backward_drift if forward else path.drift
    sign, (mean, cov) = (-1 if forward else 1), path.marginal(1.0 if forward else 0.0)
    for k in range(steps):
        t = (steps - k) / steps if forward else k / steps
        after = (steps - k - 1) / steps if forward else (k + 1) / steps
        offset, matrix = torch.zeros(2, dtype=F64), 0 * ONE
        if iteration:
            at = drift(t, torch.cat([torch.zeros(1, 2, dtype=F64), ONE]))
            offset, matrix = at[0], (at[1:] - at[0]).T
        step = ONE + sign * matrix / steps
        mean, cov = (
            step @ mean + sign * offset / steps,
            step @ cov @ step.T + sigma**2 / steps * ONE,
        )
        if k not in (0, 4, 9):
            continue
        found = affine(term, after, 1e-6)
        gain = torch.linalg.inv(cov) * sigma**2 * sign
        wanted = matrix + gain
        assert float((found[1] - wanted).abs().max()) < 6 * found[2]
        assert float((found[0] - (offset - gain @ mean)).abs().max()) < 6 * found[2]


@pytest.mark.parametrize("end", [1.0, 3.0])
def test_pairs_of_the_plan_have_the_coupling_of_the_bridge(end):
    """Over a time h the volatility is sigma sqrt(h), and epsilon 2 sigma^2 h."""
    path = oracle(0.7 * end**0.5)
    bridge = transport.SchrodingerBridge(2, sigma=0.7, times=(0.0, end), hidden=(4,))
    ends = [normal(4000, *path.marginal(t), seed=s) for s, t in ((20, 0.0), (21, 1.0))]
    x0, x1 = bridge._first(0, ends, generator(22))
    found = torch.cat([x0, x1], 1).T.cov()[:2, 2:]
    # the coupling is 0.78 or 0.52; with half of epsilon 0.88 or 0.70, with twice 0.63 or 0.31
    assert float((found - path.coupling_covariance).abs().max()) < 0.08


# --- several snapshots ----------------------------------------------------------------------------------


class Chain:
    """Gaussian bridges between three snapshots, one after the other, at times 0, 0.5 and 2."""

    times, sigma = (0.0, 0.5, 2.0), 0.8

    def __init__(self):
        skew = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F64)
        ends = (0 * ONE[0], skew), (ONE.sum(0), 2 * ONE), (ONE[0] - 1, ONE / 2)
        self.lengths = [b - a for a, b in itertools.pairwise(self.times)]
        self.paths = [
            transport.gaussian_bridge(*first, *second, sigma=self.sigma * h**0.5)
            for (first, second), h in zip(itertools.pairwise(ends), self.lengths, strict=True)
        ]

    def field(self, name):
        """Return a field of the whole time; at a snapshot a process run backward enters the earlier interval."""

        def at(t, x):
            middle, now = self.times[1], float(torch.as_tensor(t).flatten()[0])
            i = int(now > middle or (now == middle and name != "backward_drift"))
            h, path = self.lengths[i], self.paths[i]
            return getattr(path, name)((t - self.times[i]) / h, x) / h

        return at


@pytest.mark.parametrize("backward", [False, True])
def test_trajectories_pass_through_every_snapshot(backward):
    chain, n = Chain(), 20_000
    bridge = with_fields(
        "dsbm_imf",
        chain.field("drift"),
        chain.field("backward_drift"),
        sigma=chain.sigma,
        times=chain.times,
    )
    marginals = [chain.paths[0].marginal(0.0), *(p.marginal(1.0) for p in chain.paths)]
    marginals = marginals[::-1] if backward else marginals
    start = normal(n, *marginals[0], seed=1)
    run = bridge.sample(start, 200, backward=backward, heun=True, generator=generator(2))
    for k, (mean, cov) in zip((0, 150, 200) if backward else (0, 50, 200), marginals, strict=True):
        size = float(cov.diagonal().max())
        assert float((run[k].mean(0) - mean).abs().max()) < 4.5 * size**0.5 / n**0.5 + 0.015
        assert float((run[k].T.cov() - cov).abs().max()) < 4.5 * 2**0.5 * size / n**0.5 + 0.03


def test_the_minimisers_between_snapshots_are_those_of_each_interval():
    chain, n = Chain(), 60_000
    first = chain.paths[0].sample(n, 1, generator=generator(4))
    # the second pair begins where the first ends, and goes on by the conditional law of its coupling
    path = chain.paths[1]
    gain = torch.linalg.solve(path.cov0, path.coupling_covariance)
    rest = path.cov1 - gain.mT @ path.coupling_covariance
    noise = torch.randn(n, 2, generator=generator(5), dtype=F64)
    last = path.mean1 + (first[1] - path.mean0) @ gain + noise @ torch.linalg.cholesky(rest).mT
    zero = torch.zeros_like
    bridge = with_fields(
        "sf2m",
        lambda t, x: zero(x),
        lambda t, x: zero(x),
        sigma=chain.sigma,
        plan="given",
        times=chain.times,
    )
    terms = bridge._regressions([*first, last], generator(6))
    assert [term.network for term in terms] == ["velocity", "score"] * 2
    for (velocity, score), t in zip((terms[:2], terms[2:]), (0.2, 1.4), strict=True):
        same_field(velocity, t, chain.field("probability_flow"), 0.02)
        assert float((velocity.t - t).abs().max()) < 1.0  # times of the interval alone
        assert torch.equal(velocity.t, score.t)


# --- iterations in the Gaussian family ----------------------------------------------------------------


def kl(joint, other):
    """Return KL between centred Gaussians."""
    solved = torch.linalg.solve(other, joint)
    return float(solved.trace() - len(joint) - torch.logdet(solved)) / 2


def joint_of(a, b, c):
    return torch.cat([torch.cat([a, c], 1), torch.cat([c.mT, b], 1)])


def test_an_iteration_of_markovian_fitting_comes_closer():
    """Independent ends, their Markovian projection, and the coupling of its paths, by a linear ODE."""
    path = oracle()
    wanted = joint_of(ONE, ONE, GOLDEN * ONE)
    before = kl(joint_of(ONE, ONE, 0 * ONE), wanted)
    independent = transport.GaussianPath(
        path.mean0, ONE, path.mean1, ONE, torch.zeros_like(ONE), 1.0
    )
    n = 40_000
    ends = [normal(n, *path.marginal(t), seed=s) for s, t in ((10, 0.0), (11, 1.0))]
    bridge = exact("dsbm_imf", independent, steps=100).eval()
    (term,) = bridge._regressions(ends, generator(12))
    same_field(term, 0.4, independent.backward_drift)
    bridge.next_iteration()  # the forward drift is now trained on pairs of the backward process
    x0, x1, _ = bridge._draw(0, ends, 1, generator(13))
    # the forward drift is -(1 - t) (x - m) / (1 - t + t^2), whose integral from 0 to 1 is this
    c = math.exp(-math.pi / math.sqrt(27))
    found = torch.cat([x0, x1], 1).T.cov()
    assert float((found - joint_of(ONE, ONE, c * ONE)).abs().max()) < 0.03
    after = kl(joint_of(ONE, ONE, c * ONE), wanted)
    assert after < 0.2 * before
    assert kl(found, wanted) < 0.3 * before


def test_an_iteration_of_proportional_fitting_comes_closer():
    """Brownian motion, then its reversal from the other end."""
    path = oracle()
    reference = transport.GaussianPath(path.mean0, ONE, path.mean0, 2 * ONE, ONE, 1.0)
    wanted = joint_of(ONE, ONE, GOLDEN * ONE)
    n = 40_000
    ends = [normal(n, *path.marginal(t), seed=s) for s, t in ((14, 0.0), (15, 1.0))]
    bridge = exact("dsbm_ipf", reference, steps=100).eval()
    (term,) = bridge._regressions(ends, generator(16))
    same_field(term, 0.4, reference.backward_drift)
    bridge.next_iteration()
    x0, x1, _ = bridge._draw(0, ends, 1, generator(17))
    # x0 given x1 is that of Brownian motion: mean (x1 + m0) / 2, variance 1/2
    found = torch.cat([x0, x1], 1).T.cov()
    exact_joint = joint_of(0.75 * ONE, ONE, ONE / 2)
    assert float((found - exact_joint).abs().max()) < 0.03
    assert kl(exact_joint, wanted) < 0.5 * kl(joint_of(ONE, 2 * ONE, ONE), wanted)
