"""Gaussian bridges in closed form against formulas that were not used to make them."""

import itertools
import math

import pytest
import torch

from pyflowkern import ode, transport

F64 = torch.float64


def gaussians(d, seed=0):
    g = torch.Generator().manual_seed(seed)
    ends = []
    for _ in range(2):
        factor = torch.randn(d, d, generator=g, dtype=F64)
        cov = factor @ factor.mT / d + 0.3 * torch.eye(d, dtype=F64)
        ends += [torch.randn(d, generator=g, dtype=F64), cov]
    return ends


def bridge_of(d=3, sigma=0.8):
    return transport.gaussian_bridge(*gaussians(d), sigma=sigma)


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.mT


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- the coupling ---------------------------------------------------------------------------------


def test_the_golden_ratio():
    bridge = transport.gaussian_bridge(
        -torch.ones(5) / 10, torch.eye(5), torch.ones(5) / 10, torch.eye(5), sigma=1.0
    )
    close(bridge.coupling_covariance, (math.sqrt(5) - 1) / 2 * torch.eye(5, dtype=F64))
    t = 0.3
    close(
        bridge.marginal(t)[1][0, 0],
        torch.tensor((1 - t) ** 2 + t**2 + t * (1 - t) * math.sqrt(5), dtype=F64),
    )


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
def test_the_coupling_solves_the_static_problem(sigma):
    """Its precision off the diagonal is that of the Brownian kernel, -I / sigma^2: so is its density's form."""
    m0, a, m1, b = gaussians(4)
    c = transport.gaussian_bridge(m0, a, m1, b, sigma=sigma).coupling_covariance
    joint = torch.cat([torch.cat([a, c], 1), torch.cat([c.mT, b], 1)])
    close(torch.linalg.inv(joint)[:4, 4:], -torch.eye(4, dtype=F64) / sigma**2, 1e-8)


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.5])
def test_the_cost_is_that_of_the_coupling(sigma):
    """E|x0 - x1|^2 + 2 sigma^2 KL(joint | product), with the KL by determinants."""
    m0, a, m1, b = gaussians(4)
    bridge = transport.gaussian_bridge(m0, a, m1, b, sigma=sigma)
    c = bridge.coupling_covariance
    transported = (m0 - m1).square().sum() + (a + b - 2 * c).trace()
    close(bridge.transport_cost, transported)
    wanted = transported
    if sigma > 0:
        joint = torch.cat([torch.cat([a, c], 1), torch.cat([c.mT, b], 1)])
        kl = (a.logdet() + b.logdet() - joint.logdet()) / 2
        wanted = transported + 2 * sigma**2 * kl
    close(bridge.cost, wanted, 1e-8)


def test_without_volatility_it_is_the_map_of_bures():
    m0, a, m1, b = gaussians(3)
    bridge = transport.gaussian_bridge(m0, a, m1, b, sigma=0.0)
    bures = (m0 - m1).square().sum() + (a + b - 2 * root(root(a) @ b @ root(a))).trace()
    close(bridge.cost, bures)
    inverse = torch.linalg.inv(root(a))
    linear = inverse @ root(root(a) @ b @ root(a)) @ inverse  # of the map of optimal transport
    close(bridge.coupling_covariance, a @ linear)
    path = bridge.sample(torch.randn(5, 3, dtype=F64), steps=4)
    close(path[-1], m1 + (path[0] - m0) @ linear, 1e-6)
    close(path[2], (path[0] + path[-1]) / 2)


def test_small_volatility_tends_to_bures_and_large_to_independence():
    ends = gaussians(3)
    exact = transport.gaussian_bridge(*ends, sigma=0.0)
    errors = [
        float(
            (
                transport.gaussian_bridge(*ends, sigma=s).coupling_covariance
                - exact.coupling_covariance
            ).norm()
        )
        for s in (0.2, 0.1, 0.05)
    ]
    assert all(3 < big / small < 5 for big, small in itertools.pairwise(errors))  # sigma^2
    far = transport.gaussian_bridge(*ends, sigma=1e4)
    # C = A B / sigma^2 to leading order: small, and right in its digits
    close(far.coupling_covariance * 1e8, ends[1] @ ends[3], 1e-6)


def test_the_entropic_plan_tends_to_the_deterministic_map():
    """One dimension, where the map is monotone: the plan's mean image of each point nears its partner."""
    x = torch.linspace(-2, 2, 60, dtype=F64)[:, None]
    y = (x + 0.3 * x.sin()).flip(0)
    errors = []
    for sigma in (0.4, 0.2, 0.1):
        found = transport.sinkhorn(x, y, epsilon=2 * sigma**2, max_iterations=20_000)
        errors.append(float((found.barycentric_map() - y.flip(0)).abs().mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.03


def test_the_entropic_plan_tends_to_the_map_of_bures():
    """Three dimensions: y are the images of x by the map of the oracle, in another order."""
    m0, a, m1, b = gaussians(3)
    exact = transport.gaussian_bridge(m0, a, m1, b, sigma=0.0)
    g = torch.Generator().manual_seed(0)
    x = m0 + torch.randn(150, 3, generator=g, dtype=F64) @ torch.linalg.cholesky(a).mT
    linear = torch.linalg.solve(a, exact.coupling_covariance)
    image = m1 + (x - m0) @ linear
    y = image[torch.randperm(150, generator=g)]
    errors, costs = [], []
    for sigma in (0.4, 0.2, 0.1, 0.05):
        found = transport.sinkhorn(x, y, epsilon=2 * sigma**2, max_iterations=20_000)
        errors.append(float((found.barycentric_map() - image).norm(dim=1).mean()))
        costs.append(float(found.plan.transport_cost()))
    # each halving takes off a third of it at least; the last plan is the map but for its neighbours
    assert all(late < 0.67 * early for early, late in itertools.pairwise(errors))
    assert errors[-1] < 0.02
    assert all(late < early for early, late in itertools.pairwise(costs))
    assert costs[-1] == pytest.approx(float((image - x).square().sum(1).mean()), rel=1e-2)


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.8])
def test_marginals_begin_and_end_where_they_should(sigma):
    ends = gaussians(3)
    bridge = transport.gaussian_bridge(*ends, sigma=sigma)
    for t, (mean, cov) in ((0.0, ends[:2]), (1.0, ends[2:])):
        close(bridge.marginal(t)[0], mean)
        close(bridge.marginal(t)[1], cov)
    times = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    mean, cov = bridge.marginal(times)
    assert mean.shape == (3, 3)
    assert cov.shape == (3, 3, 3)
    close(cov[1], bridge.marginal(0.3)[1])


def test_the_drift_is_the_mean_velocity_to_the_end():
    m0, a, m1, b = gaussians(3)
    bridge = transport.gaussian_bridge(m0, a, m1, b, sigma=0.8)
    t, x = 0.4, torch.randn(7, 3, dtype=F64)
    mean, cov = bridge.marginal(t)
    cross = (1 - t) * bridge.coupling_covariance.mT + t * b  # Cov(x1, xt)
    end = m1 + (x - mean) @ torch.linalg.solve(cov, cross.mT)
    close(bridge.drift(t, x), (end - x) / (1 - t))
    assert bridge.drift(1.0, x).isfinite().all()


def test_the_drift_is_a_gradient():
    """u = sigma^2 grad log h, so that its matrix is symmetric: the optimality of the bridge."""
    bridge = bridge_of()
    zero = torch.zeros(3, dtype=F64)
    matrix = torch.func.jacrev(lambda x: bridge.drift(0.35, x[None])[0])(zero)
    close(matrix, matrix.mT)


@pytest.mark.parametrize("sigma", [0.0, 0.8])
def test_fields_move_the_marginals(sigma):
    """dS/dt = V S + S V^T of the flow, and of the SDE with sigma^2 I, by a difference quotient."""
    bridge, t, h = bridge_of(sigma=sigma), 0.35, 1e-5
    zero = torch.zeros(3, dtype=F64)
    cov = bridge.marginal(t)[1]
    rate = (bridge.marginal(t + h)[1] - bridge.marginal(t - h)[1]) / (2 * h)
    diffusion = sigma**2 * torch.eye(3, dtype=F64)
    for field, source in (
        (bridge.probability_flow, 0 * diffusion),
        (bridge.drift, diffusion),
        (bridge.backward_drift, -diffusion),
    ):
        v = torch.func.jacrev(lambda x, field=field: field(t, x[None])[0])(zero)
        close(v @ cov + cov @ v.mT + source, rate, 1e-7)
        close(field(t, bridge.marginal(t)[0][None])[0], bridge.mean1 - bridge.mean0)


def test_the_score_is_the_gradient_of_the_density():
    bridge = bridge_of()
    x = torch.randn(5, 3, dtype=F64, requires_grad=True)
    log_prob = bridge.log_prob(0.6, x)
    close(torch.autograd.grad(log_prob.sum(), x)[0], bridge.score(0.6, x))
    mean, cov = bridge.marginal(0.6)
    close(log_prob, torch.distributions.MultivariateNormal(mean, cov).log_prob(x))


def test_each_sample_may_have_its_time():
    bridge = bridge_of()
    t, x = torch.rand(6, dtype=F64), torch.randn(6, 3, dtype=F64)
    for name in ("drift", "score", "probability_flow", "backward_drift", "log_prob"):
        field = getattr(bridge, name)
        each = torch.cat([field(float(t[k]), x[k : k + 1]) for k in range(6)])
        close(field(t, x), each)
    assert bridge.drift(0.5, x.float()).dtype == torch.float32


def test_paths_have_the_law_of_the_bridge():
    """40,000 paths: a covariance is off by 1.2 % of its scale at one standard deviation of five entries."""
    bridge = bridge_of(2)
    path = bridge.sample(40_000, steps=4, generator=torch.Generator().manual_seed(0))
    assert path.shape == (5, 40_000, 2)
    for k in range(5):
        mean, cov = bridge.marginal(k / 4)
        close(path[k].mean(0), mean, 0.05)
        close(path[k].T.cov(), cov, 0.08)
    close(torch.cat([path[0], path[4]], 1).T.cov()[:2, 2:], bridge.coupling_covariance, 0.08)
    # given both ends, the middle is that of a Brownian bridge
    middle = path[2] - (path[0] + path[4]) / 2
    close(middle.T.cov(), bridge.sigma**2 / 4 * torch.eye(2, dtype=F64), 0.02)
    # Markov: given the present, past and future are independent
    back, on = path[1] - path[2], path[3] - path[2]
    now = path[2] - path[2].mean(0)
    rest = [s - now @ torch.linalg.lstsq(now, s - s.mean(0)).solution for s in (back, on)]
    close(torch.cat(rest, 1).T.cov()[:2, 2:], torch.zeros(2, 2, dtype=F64), 0.02)


@pytest.mark.parametrize("backward", [False, True])
def test_steps_of_euler_and_maruyama_reach_the_other_end(backward):
    bridge, steps = bridge_of(2), 100
    g = torch.Generator().manual_seed(0)
    start = bridge.sample(10_000, steps=1, generator=g)[1 if backward else 0]
    x, dt = start, 1 / steps
    for k in range(steps):
        noise = bridge.sigma * math.sqrt(dt) * torch.randn(x.shape, generator=g, dtype=F64)
        x = (
            x - dt * bridge.backward_drift(1 - k * dt, x)
            if backward
            else x + dt * bridge.drift(k * dt, x)
        )
        x = x + noise
    mean, cov = bridge.marginal(0.0 if backward else 1.0)
    close(x.mean(0), mean, 0.08)
    close(x.T.cov(), cov, 0.12)
    cross = torch.cat([start, x], 1).T.cov()[:2, 2:]
    wanted = bridge.coupling_covariance.mT if backward else bridge.coupling_covariance
    close(cross, wanted, 0.12)


@pytest.mark.parametrize("kind", ["bridge", "independent"])
def test_the_likelihood_along_the_flow_is_that_of_the_end(kind):
    ends = gaussians(3)
    path = (
        transport.gaussian_bridge(*ends, sigma=0.8)
        if kind == "bridge"
        else transport.independent_gaussian_path(*ends)
    )
    zero = torch.zeros(3, dtype=F64)

    def field(t, state):
        x, _ = state
        jacobian = torch.func.jacrev(lambda z: path.probability_flow(t, z[None])[0])
        return path.probability_flow(t, x), jacobian(zero).trace().expand(len(x))

    x0 = torch.randn(6, 3, dtype=F64)
    x, trace = ode.solve(
        field, (x0, torch.zeros(6, dtype=F64)), [0.0, 1.0], rtol=1e-10, atol=1e-12
    ).ys
    close(path.log_prob(0.0, x0) - trace[-1], path.log_prob(1.0, x[-1]), 1e-8)


def test_independent_ends_have_the_velocity_of_the_formula():
    m0, a, m1, b = gaussians(3)
    t, x = 0.35, torch.randn(5, 3, dtype=F64)
    path = transport.independent_gaussian_path(m0, a, m1, b)
    cov = (1 - t) ** 2 * a + t**2 * b
    mean = (1 - t) * m0 + t * m1
    gain = (t * b - (1 - t) * a) @ torch.linalg.inv(cov)
    close(path.probability_flow(t, x), m1 - m0 + (x - mean) @ gain.mT)


# --- iterations in the Gaussian family ------------------------------------------------------------


def gaussian_kl(first, second):
    d = len(first)
    return (torch.linalg.solve(second, first).trace() - d + second.logdet() - first.logdet()) / 2


def test_markovian_fitting_of_gaussians_converges_to_the_bridge():
    """Iterative Markovian fitting of scalars in closed form (Shi et al. 2023); the KLs both ways shrink at each step.

    A mixture of Brownian bridges with coupling c has v_t = (1-t)^2 a + t^2 b + t(1-t)(2c + s^2); its Markovian
    projection has the linear drift (k_t / v_t) x, whose ends are correlated by exp of its integral.
    """
    a, b, s2 = 1.0, 1.0, 1.0
    one = torch.ones(1, 1, dtype=F64)
    best = float(
        transport.gaussian_bridge(one[0], a * one, one[0], b * one, sigma=1.0).coupling_covariance
    )

    def ends(c):
        return torch.tensor([[a, c], [c, b]], dtype=F64)

    t = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    c, distances = 0.0, []
    for _ in range(7):  # until rounding
        both = gaussian_kl(ends(c), ends(best)) + gaussian_kl(ends(best), ends(c))
        distances.append(float(both))
        path = transport.GaussianPath(one[0], a * one, one[0], b * one, c * one, math.sqrt(s2))
        slope = path.drift(t, one.expand(len(t), 1) + 1) - path.drift(t, one.expand(len(t), 1))
        c = a * math.exp(float(slope.mean()))
    assert all(later < 0.1 * former for former, later in itertools.pairwise(distances))
    assert c == pytest.approx(best, abs=1e-7)


def test_proportional_fitting_of_gaussians_converges_to_the_bridge():
    """Each half step keeps a conditional and replaces a marginal; both KLs to the bridge shrink at every step."""
    _, a, _, b = gaussians(3)
    c = transport.gaussian_bridge(*gaussians(3), sigma=0.8).coupling_covariance
    best = torch.cat([torch.cat([a, c], 1), torch.cat([c.mT, b], 1)])
    joint = torch.cat([torch.cat([a, a], 1), torch.cat([a, a + 0.64 * torch.eye(3)], 1)])
    ends, distances = (slice(0, 3), slice(3, 6)), []
    for step in range(200):
        distances.append(float(gaussian_kl(joint, best) + gaussian_kl(best, joint)))
        held, other, marginal = (*ends, a) if step % 2 else (*ends[::-1], b)
        gain = joint[other, held] @ torch.linalg.inv(joint[held, held])
        rest = joint[other, other] - gain @ joint[held, other]
        joint[held, held], joint[other, held] = marginal, gain @ marginal
        joint[held, other] = joint[other, held].mT
        joint[other, other] = rest + gain @ marginal @ gain.mT
    assert all(later < former + 1e-12 for former, later in itertools.pairwise(distances))
    close(joint, best, 1e-8)


# --- wrong arguments ------------------------------------------------------------------------------


def test_wrong_arguments():
    m, one = torch.zeros(2), torch.eye(2)
    skew = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    for arguments, match in (
        ((m[None], one, m, one), "mean0 must have shape"),
        ((m, one[:1], m, one), "cov0 must have shape"),
        ((m, one, m[:1], one), "mean1 must have shape"),
        ((m, skew, m, one), "cov0 must be symmetric"),
        ((m, one, m, -one), "cov1 must be positive definite"),
        ((m, one, m * math.nan, one), "mean1 must be finite"),
    ):
        with pytest.raises(ValueError, match=match):
            transport.gaussian_bridge(*arguments, sigma=1.0)
    for sigma in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma must be"):
            transport.gaussian_bridge(m, one, m, one, sigma=sigma)
    bridge = transport.gaussian_bridge(m, one, m, one, sigma=1.0)
    with pytest.raises(ValueError, match="t must be between"):
        bridge.drift(1.5, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="t must be a number or have shape"):
        bridge.drift(torch.zeros(3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="x must have shape"):
        bridge.score(0.5, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="steps must be"):
        bridge.sample(3, steps=0)
    for arguments, match in (
        ((m, one, m, one, one[:1], 0.0), "coupling_covariance must have shape"),
        ((m, one, m, one, one, -1.0), "sigma must be"),
        ((m, one, m, -one, one, 1.0), "cov1 must be positive definite"),
    ):
        with pytest.raises(ValueError, match=match):
            transport.GaussianPath(*arguments)
    assert transport.GaussianPath(m, one, m, one, one / 2, 1).cov0.dtype == F64
