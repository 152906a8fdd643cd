"""Arguments of flows: bases of torch, integers of NumPy, flags, contexts for all, networks that take the context."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from laws import normal, randomize
from torch.distributions import Cauchy, Independent, MultivariateNormal, Normal, StudentT, Uniform

from pyflowkern import flows, nn

SOLVER = {"method": "rk4", "step_size": 0.5}
BUILDS = {
    "RealNVP": partial(flows.RealNVP, steps=2, hidden=8),
    "Glow": partial(flows.Glow, steps=2, hidden=8),
    "MAF": partial(flows.MAF, transforms=2, hidden=8),
    "IAF": partial(flows.IAF, transforms=2, hidden=8),
    "NSF": partial(flows.NSF, transforms=2, hidden=8),
    "CNF": partial(flows.CNF, hidden=(8,), divergence="exact", **SOLVER),
    "FFJORD": partial(flows.FFJORD, hidden=(8,), divergence="exact", **SOLVER),
}
every_flow = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def seed(value):
    return torch.Generator().manual_seed(value)


# --- bases ---


@every_flow
def test_a_torch_distribution_is_a_base(build):
    wide = StudentT(torch.full((3,), 4.0), torch.ones(3), torch.full((3,), 2.0))
    flow = randomize(build(3, base=Independent(wide, 1))).eval()
    x, log_prob = flow.sample_and_log_prob(6, generator=seed(1))
    torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=1e-4, atol=1e-3)
    z, log_det = flow(x)
    torch.testing.assert_close(log_prob, wide.log_prob(z).sum(1) + log_det, rtol=1e-4, atol=1e-3)
    assert x.requires_grad
    assert torch.equal(flow.sample(4, generator=seed(2)), flow.sample(4, generator=seed(2)))
    state = torch.get_rng_state()
    flow.sample(4, generator=seed(2))
    assert torch.equal(torch.get_rng_state(), state)


@every_flow
def test_a_module_is_a_base(build):
    flow = build(3, base=flows.MixtureOfGaussians(3, 2))
    x, log_prob = flow.eval().sample_and_log_prob(5)
    torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=1e-4, atol=1e-3)


def test_a_torch_base_moves_with_the_flow():
    correlated = MultivariateNormal(torch.ones(2), torch.tensor([[1.0, 0.5], [0.5, 2.0]]))
    given = flows.MAF(2, transforms=1, hidden=8, base=correlated)
    flow = given.double()
    assert flow.sample(3).dtype == flow.log_prob(normal(3, 2)).dtype == torch.float64
    assert flow.base.distribution().loc.dtype == torch.float64
    assert correlated.loc.dtype == torch.float32  # the given distribution is not changed
    z = flow.base.sample(100_000, temperature=0.5, generator=seed(0))
    torch.testing.assert_close(z.mean(0), torch.ones(2).double(), rtol=0, atol=0.02)
    torch.testing.assert_close(
        z.T.cov(), 0.25 * flow.base.distribution().covariance_matrix, rtol=0, atol=0.02
    )


def test_a_torch_base_is_bad_only_where_its_sample_is():
    flow = flows.Flow(
        nn.Reverse(2), (2,), base=Independent(Uniform(torch.zeros(2), torch.ones(2)), 1)
    )
    x = torch.tensor([[0.5, 0.5], [2.0, 0.5], [torch.nan, 0.5]])
    assert flow.log_prob(x).tolist()[:2] == [0.0, -torch.inf]
    assert flow.log_prob(x)[2].isnan()


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (Normal(torch.zeros(3), torch.ones(3)), ValueError, r"event_shape \(3,\), .*Independent"),
        (
            Normal(0.0, 1.0),
            ValueError,
            r"batch_shape \(\) and event_shape \(3,\), got \(\) and \(\)",
        ),
        (MultivariateNormal(torch.zeros(2), torch.eye(2)), ValueError, r"event_shape \(3,\)"),
        (flows.StandardNormal(2), ValueError, "base must have the flow's 3 dimensions, got 2"),
        ("normal", TypeError, "base must have a method log_prob, str has not"),
    ],
)
@every_flow
def test_a_base_that_does_not_fit_is_refused_when_the_flow_is_made(build, base, error, message):
    with pytest.raises(error, match=message):
        build(3, base=base)


def test_a_base_without_a_mean_takes_no_temperature():
    flow = flows.MAF(2, hidden=8, base=Independent(Cauchy(torch.zeros(2), torch.ones(2)), 1))
    assert flow.sample(3).isfinite().all()
    with pytest.raises(ValueError, match="temperature must be 1"):
        flow.sample(3, temperature=0.5)


# --- integers, flags ---


def test_integers_of_numpy_are_integers():
    one, two, four, eight = (np.int64(n) for n in (1, 2, 4, 8))
    for flow in (
        flows.RealNVP(two, steps=one, hidden=eight, blocks=one),
        flows.Glow((np.int32(2), four, four), levels=one, steps=one, hidden=four),
        flows.NSF(two, transforms=one, hidden=(eight, eight), bins=four),
        flows.NSF(two, transforms=one, hidden=eight, autoregressive=True),
        flows.MAF(np.array([2])[0], transforms=one, hidden=eight, context_features=np.int64(0)),
        flows.CNF(two, (eight,), blocks=one, probes=two, **SOLVER),
        flows.MAF(two, hidden=eight, base=flows.MixtureOfGaussians(two, four)),
    ):
        assert len(flow.sample(four)) == 4
        assert type(flow.dims) is int
    pixels = flows.Glow((1, 4, 4), levels=1, steps=1, hidden=4, bits=eight)
    assert pixels.sample(two, quantized=True).shape == (2, 1, 4, 4)
    assert flow.interpolate(torch.zeros(1, 2), torch.ones(1, 2), four).shape == (4, 1, 2)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: flows.NSF(3, autoregressive=1), "autoregressive"),
        (lambda: flows.NSF(3, circular=0), "circular"),
        (lambda: flows.NSF(3, residual=2), "residual"),
        (lambda: flows.NSF(3, unconditional=None), "unconditional"),
        (lambda: flows.MAF(3, residual="yes"), "residual"),
        (lambda: flows.CNF(3, train_time=1), "train_time"),
        (lambda: flows.CNF((1, 4, 4), conv=1), "conv"),
        (lambda: flows.MixtureOfGaussians(2, 2, learned=0), "learned"),
        (lambda: flows.MAF(3, hidden=4).sample(2, quantized=0), "quantized"),
        (lambda: flows.Flow(nn.Reverse(2), (2,), periodic=1), "periodic"),
    ],
)
def test_flags_are_bools(build, name):
    with pytest.raises(TypeError, match=f"{name} must be True"):
        build()


@pytest.mark.parametrize("build", [flows.NSF, flows.RealNVP, flows.Glow])
@pytest.mark.parametrize("context_features", [0, 2])
def test_couplings_of_one_dimension_follow_the_context_alone(build, context_features):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow = build(1, hidden=8, context_features=context_features)
    flow = randomize(flow).double().eval()
    c = torch.randn(2, context_features).double() if context_features else None
    x = torch.linspace(-60, 60, 20001).double()[:, None]
    for i in range(2):
        log_prob = flow.log_prob(x, None if c is None else c[i])
        mass = torch.trapezoid(log_prob.exp(), x[:, 0])
        torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-3, rtol=0)
        other = log_prob
    if c is not None:
        assert not torch.allclose(flow.log_prob(x, c[0]), other)


# --- contexts ---


@every_flow
def test_one_context_serves_all(build):
    flow = randomize(build(3, context_features=2)).double().eval()
    x, context = normal(5, 3), normal(2, seed=1)
    every = context.expand(5, 2)
    for one in (context, context[None]):
        torch.testing.assert_close(flow.log_prob(x, one), flow.log_prob(x, every))
        torch.testing.assert_close(flow.bits_per_dim(x, one), flow.bits_per_dim(x, every))
        z = flow(x, one)[0]
        torch.testing.assert_close(z, flow(x, every)[0])
        torch.testing.assert_close(flow.inverse(z, one)[0], flow.inverse(z, every)[0])
        path = flow.interpolate(x, x + 1, 3, one)
        torch.testing.assert_close(path, flow.interpolate(x, x + 1, 3, every))
        if isinstance(flow, flows.CNF):
            torch.testing.assert_close(flow.terms(x, one)[0], flow.terms(x, every)[0])
    assert flow.log_prob(x[:0], context).shape == (0,)


def test_samples_of_many_contexts_say_how():
    flow = flows.MAF(3, hidden=8, context_features=2)
    contexts = torch.randn(5, 2)
    how = r"for each of the 5 contexts flow.distribution\(context\).sample\(\(7,\)\)"
    with pytest.raises(ValueError, match=how):
        flow.sample(7, contexts)
    assert flow.distribution(contexts).sample((7,)).shape == (7, 5, 3)


@pytest.mark.parametrize("build", [flows.RealNVP, flows.Glow, flows.NSF])
def test_a_network_that_takes_no_context_is_refused_when_the_flow_is_made(build):
    def plain(inputs, outputs):
        return torch.nn.Sequential(torch.nn.Linear(inputs, 8), torch.nn.Linear(8, outputs))

    with pytest.raises(TypeError, match=r"called with \(x, context\).*context_features=2"):
        build(4, conditioner=plain, context_features=2)
    assert build(4, conditioner=plain).log_prob(torch.zeros(3, 4)).isfinite().all()
    both = partial(nn.MLP, hidden=8, context_features=2)
    flow = build(4, conditioner=both, context_features=2)
    assert flow.log_prob(torch.zeros(3, 4), torch.zeros(2)).isfinite().all()


def test_a_discrete_distribution_is_no_base():
    counts = Independent(torch.distributions.Poisson(torch.ones(2)), 1)
    with pytest.raises(ValueError, match="base must be a distribution over real vectors"):
        flows.MAF(2, transforms=1, hidden=8, base=counts)
