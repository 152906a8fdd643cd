"""Matchers against their formulas, and what a field learns from them against closed forms."""

import math

import pytest
import torch

from pyflowkern import transport

F64 = torch.float64
MATCHERS = {
    "independent": lambda: transport.ConditionalFlowMatcher(0.3),
    "exact": lambda: transport.ExactOptimalTransportConditionalFlowMatcher(0.3),
    "sinkhorn": lambda: transport.SinkhornOptimalTransportConditionalFlowMatcher(0.3, 0.1),
    "target": lambda: transport.TargetConditionalFlowMatcher(0.3),
    "bridge": lambda: transport.SchrodingerBridgeConditionalFlowMatcher(0.3),
    "bridge, sinkhorn": lambda: transport.SchrodingerBridgeConditionalFlowMatcher(0.3, "sinkhorn"),
    "variance": lambda: transport.VariancePreservingConditionalFlowMatcher(0.3),
    "rectified": transport.RectifiedFlow,
}
each = pytest.mark.parametrize("name", MATCHERS)


def formulas(name, x0, x1, t, noise, s=0.3):
    """Return the point and the velocity as published."""
    if name == "target":
        x = t * x1 + (1 - (1 - s) * t) * noise
        return x, (x1 - (1 - s) * x) / (1 - (1 - s) * t)
    if name == "variance":
        cos, sin = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        return cos * x0 + sin * x1 + s * noise, math.pi / 2 * (cos * x1 - sin * x0)
    mean = (1 - t) * x0 + t * x1
    if name.startswith("bridge"):
        x = mean + s * torch.sqrt(t * (1 - t)) * noise
        return x, (1 - 2 * t) / (2 * t * (1 - t) + 1e-8) * (x - mean) + x1 - x0
    return mean + (0 if name == "rectified" else s) * noise, x1 - x0


@each
@pytest.mark.parametrize("shape", [(2,), (1, 2, 3)])
def test_points_and_velocities_are_those_of_the_formulas(name, shape):
    matcher = MATCHERS[name]()
    x0, x1 = torch.randn(6, *shape, dtype=F64), torch.randn(6, *shape, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    t, xt, ut, noise = matcher.sample_location_and_conditional_flow(
        x0, x1, return_noise=True, generator=generator
    )
    assert t.shape == (6,)
    assert xt.shape == ut.shape == noise.shape == x0.shape
    if getattr(matcher, "ot_sampler", None) is not None:  # the same draws: pairs, times, noise
        generator.manual_seed(0)
        x0, x1 = matcher.ot_sampler.sample_plan(x0, x1, generator=generator)
    wanted = formulas(name, x0, x1, t.reshape(-1, *[1] * len(shape)), noise)
    torch.testing.assert_close((xt, ut), wanted, rtol=1e-12, atol=1e-12)


@each
def test_a_generator_makes_draws_reproducible_and_given_times_are_kept(name):
    matcher = MATCHERS[name]()
    x0, x1, times = torch.randn(5, 2), torch.randn(5, 2), torch.linspace(0.1, 0.9, 5)
    one, two = (
        matcher.sample_location_and_conditional_flow(
            x0, x1, times, generator=torch.Generator().manual_seed(1)
        )
        for _ in range(2)
    )
    assert len(one) == 3
    assert torch.equal(one[0], times)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_without_plans_random_numbers_come_in_the_usual_order():
    """Times, then noise, from the default generator."""
    x0, x1 = torch.randn(5, 2), torch.randn(5, 2)
    torch.manual_seed(3)
    got = transport.ConditionalFlowMatcher(0.1).sample_location_and_conditional_flow(
        x0, x1, return_noise=True
    )
    torch.manual_seed(3)
    assert torch.equal(got[0], torch.rand(5))
    assert torch.equal(got[3], torch.randn_like(x0))


@each
def test_lambda(name):
    matcher = MATCHERS[name]()
    t = torch.tensor([0.25, 0.5])
    width = matcher.compute_sigma_t(t)
    sigma = matcher.sigma
    torch.testing.assert_close(matcher.compute_lambda(t), 2 * width / (sigma**2 + 1e-8))
    if name == "bridge":
        torch.testing.assert_close(matcher.compute_lambda(t), 2 * (t * (1 - t)).sqrt() / sigma)


@pytest.mark.parametrize("name", ["exact", "sinkhorn", "bridge"])
def test_labels_follow_their_samples(name):
    x0, x1 = torch.randn(8, 2), torch.randn(8, 2)
    t = torch.full((8,), 0.5)
    matcher = MATCHERS[name]()
    matcher.sigma = 1e-12
    _, xt, ut, y0, y1 = matcher.guided_sample_location_and_conditional_flow(
        x0, x1, x0.clone(), x1.clone(), t
    )
    torch.testing.assert_close(xt, (y0 + y1) / 2)
    torch.testing.assert_close(ut, y1 - y0)
    out = matcher.guided_sample_location_and_conditional_flow(x0, x1, return_noise=True)
    assert len(out) == 6
    assert out[3] is None
    assert out[4] is None


def test_pairs_of_each_batch_are_those_of_transport():
    x0 = torch.randn(64, 2)
    x1 = (x0 + torch.tensor([5.0, 0.0]))[torch.randperm(64)]
    for matcher in (
        transport.ExactOptimalTransportConditionalFlowMatcher(),
        transport.SinkhornOptimalTransportConditionalFlowMatcher(reg=1e-3),
    ):
        ut = matcher.sample_location_and_conditional_flow(x0, x1)[2]
        torch.testing.assert_close(ut.mean(0), torch.tensor([5.0, 0.0]), rtol=0, atol=0.1)
        assert float(ut.var(0).sum()) < 0.1
    kept = transport.ExactOptimalTransportConditionalFlowMatcher(replace=False)
    t, xt, ut = kept.sample_location_and_conditional_flow(x0, x1)
    torch.testing.assert_close(xt - t[:, None] * ut, x0, rtol=1e-5, atol=1e-5)


def linear_fit(t, x, target):
    """Return mean and matrix of the best affine field at times near ``t``."""
    inputs = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    return torch.linalg.lstsq(inputs, target).solution


def test_the_best_field_of_independent_pairs_is_the_closed_form():
    """Regression of ut on xt at one time: Gaussians have affine fields; 100,000 samples are within 1 %."""
    cov1 = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    zero, one = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    x0 = torch.randn(100_000, 2, dtype=F64)
    x1 = torch.randn(100_000, 2, dtype=F64) @ torch.linalg.cholesky(cov1).mT + 1
    t = torch.full((100_000,), 0.4, dtype=F64)
    _, xt, ut = transport.ConditionalFlowMatcher().sample_location_and_conditional_flow(x0, x1, t)
    path = transport.independent_gaussian_path(zero, one, zero + 1, cov1)
    probe = torch.randn(20, 2, dtype=F64)
    learned = torch.cat([probe, torch.ones_like(probe[:, :1])], 1) @ linear_fit(t, xt, ut)
    torch.testing.assert_close(learned, path.probability_flow(0.4, probe), rtol=0, atol=0.05)


def test_the_best_fields_of_bridge_pairs_are_those_of_the_bridge():
    """Pairs of the exact coupling: velocity, and with lambda half of sigma^2 times the score."""
    cov1 = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    zero, one = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    bridge = transport.gaussian_bridge(zero, one, zero + 1, cov1, sigma=0.8)
    ends = bridge.sample(100_000, steps=1)
    matcher = transport.SchrodingerBridgeConditionalFlowMatcher(0.8, ot_method=None)
    t = torch.full((100_000,), 0.4, dtype=F64)
    _, xt, ut, noise = matcher.sample_location_and_conditional_flow(
        ends[0], ends[1], t, return_noise=True
    )
    probe = torch.randn(20, 2, dtype=F64)
    inputs = torch.cat([probe, torch.ones_like(probe[:, :1])], 1)
    flow = inputs @ linear_fit(t, xt, ut)
    torch.testing.assert_close(flow, bridge.probability_flow(0.4, probe), rtol=0, atol=0.05)
    score = inputs @ linear_fit(t, xt, -noise / matcher.compute_lambda(t)[:, None])
    wanted = 0.8**2 / 2 * bridge.score(0.4, probe)
    torch.testing.assert_close(score, wanted, rtol=0, atol=0.05)
    torch.testing.assert_close(flow + score, bridge.drift(0.4, probe), rtol=0, atol=0.08)


def test_reflow_pairs_are_the_ends_of_the_flow_and_straight_ones_stay():
    rectified = transport.RectifiedFlow()
    x0 = torch.randn(10, 2, dtype=F64)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64) * math.pi / 2
    a, b = rectified.reflow(lambda t, x: x @ turn.mT, x0, steps=50, method="rk4")
    assert a is x0
    torch.testing.assert_close(b, torch.stack([-x0[:, 1], x0[:, 0]], 1), rtol=0, atol=1e-5)
    straight = rectified.straightness(lambda t, x: torch.ones_like(x), x0)
    torch.testing.assert_close(straight, torch.zeros(10, dtype=F64), rtol=0, atol=1e-20)
    # a quarter of a circle: |x1 - x0|^2 = 2 r^2, |v|^2 = (pi / 2)^2 r^2, int v = x1 - x0
    bent = rectified.straightness(lambda t, x: x @ turn.mT, x0, steps=4000)
    wanted = (math.pi**2 / 4 - 2) * x0.square().sum(1)
    torch.testing.assert_close(bent, wanted, rtol=0.01, atol=0)


def test_a_flow_that_fails_says_so():
    with pytest.warns(RuntimeWarning, match="ended early"):
        transport.RectifiedFlow().reflow(lambda t, x: x / 0, torch.ones(2, 2), steps=4)


def test_gradients_reach_the_samples():
    x0, x1 = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    for make in MATCHERS.values():
        _, xt, ut = make().sample_location_and_conditional_flow(x0, x1)
        (xt.sum() + ut.sum()).backward()
    assert x0.grad is not None
    assert x1.grad is not None


def test_wrong_arguments():
    for make in (
        transport.ConditionalFlowMatcher,
        transport.TargetConditionalFlowMatcher,
        transport.SchrodingerBridgeConditionalFlowMatcher,
    ):
        for sigma in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="sigma must be"):
                make(sigma)
        with pytest.raises(TypeError, match="sigma must be"):
            make("small")
    with pytest.raises(ValueError, match="sigma must be positive"):
        transport.SchrodingerBridgeConditionalFlowMatcher(0.0)
    with pytest.warns(UserWarning, match="sigma"):
        transport.SchrodingerBridgeConditionalFlowMatcher(1e-4)
    matcher, x = transport.ConditionalFlowMatcher(), torch.zeros(3, 2)
    for arguments, error, match in (
        ((x, x[:2]), ValueError, "x0 and x1 must have as many"),
        ((x, x[:, :1]), ValueError, "x0 and x1 must have samples of one shape"),
        ((x, x.double()), TypeError, "x0 and x1 must have one dtype"),
        ((x.long(), x), TypeError, "x0 must be"),
        ((x, x, torch.zeros(2)), ValueError, "t must have shape"),
        ((x, x, 0.5), TypeError, "t must be"),
        ((x, x, None, 1), TypeError, "return_noise must be"),
    ):
        with pytest.raises(error, match=match):
            matcher.sample_location_and_conditional_flow(*arguments)
