"""Base distributions: their densities, samples, contracts, and flows on them."""

import math

import pytest
import torch
from laws import check_copies, normal, randomize

from pyflowkern import flows


def mixture(dims=3, components=4):
    torch.manual_seed(0)
    return randomize(flows.MixtureOfGaussians(dims, components, spread=2.0)).double()


def seed(value):
    return torch.Generator().manual_seed(value)


@pytest.mark.parametrize("base", [mixture(), flows.Uniform(3, -1.0, 2.0).double()])
def test_the_density_is_that_of_torch(base):
    z = 0.5 * normal(50, 3)
    expected = base.distribution().log_prob(z)
    torch.testing.assert_close(base.log_prob(z), expected)
    assert base.log_prob(z[:0]).shape == (0,)
    assert base.float().log_prob(z.float()).dtype == torch.float32
    assert base.bfloat16().log_prob(z.bfloat16()).dtype == torch.float32


def test_samples_of_a_mixture_are_of_its_density():
    base = mixture(2)
    z = base.sample(200_000, generator=seed(0))
    d = base.distribution()
    # 200,000 samples: the mean is exact to 5 standard deviations / sqrt(200,000)
    torch.testing.assert_close(z.mean(0), d.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(z.var(0), d.variance, atol=0.1, rtol=0)
    share = (torch.cdist(z, base.means).argmin(1)[:, None] == torch.arange(4)).double().mean(0)
    assert (share > 0.01).all()


def test_a_generator_and_a_temperature_decide_the_samples():
    base = mixture()
    assert torch.equal(base.sample(5, generator=seed(1)), base.sample(5, generator=seed(1)))
    assert base.sample(0).shape == (0, 3)
    cold = base.sample(100, temperature=0.0, generator=seed(1))
    assert torch.cdist(cold, base.means).amin(1).max() == 0
    square = flows.Uniform(2, 0.0, 2.0)
    assert square.sample(1000).aminmax().max < 2
    torch.testing.assert_close(square.sample(3, temperature=0.0), torch.ones(3, 2))
    with pytest.raises(ValueError, match="temperature must be at most 1"):
        square.sample(2, temperature=1.5)


def test_nan_and_far_points_stay_in_their_sample():
    for base in (mixture(), flows.Uniform(3, -5.0, 5.0).double()):
        z = normal(4, 3)
        expected = base.log_prob(z)
        z[1, 0], z[2, 2] = math.nan, 1e200
        found = base.log_prob(z)
        assert found.isnan().tolist() == [False, True, False, False]
        assert found[2] == -math.inf
        torch.testing.assert_close(found[[0, 3]], expected[[0, 3]])


def test_a_mixture_learns_or_stays():
    base = mixture()
    z = base.sample(100)
    assert z.requires_grad
    base.log_prob(z.detach()).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in base.parameters())
    assert not list(flows.MixtureOfGaussians(2, 3, learned=False).parameters())
    means = normal(3, 2)
    assert torch.equal(flows.MixtureOfGaussians(2, 3, means=means).means, means.float())


def test_a_flow_on_a_mixture_copies_and_trains():
    def build():
        return flows.MAF(2, transforms=1, hidden=8, base=flows.MixtureOfGaussians(2, 2)).double()

    flow = build()
    check_copies(flow, build(), normal(4, 2))
    x, log_prob = flow.sample_and_log_prob(5)
    torch.testing.assert_close(log_prob, flow.log_prob(x))
    assert "base.means" in flow.state_dict()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: flows.MixtureOfGaussians(0, 2), "dims must be at least 1, got 0"),
        (lambda: flows.MixtureOfGaussians(2, 0), "components must be at least 1, got 0"),
        (lambda: flows.MixtureOfGaussians(2, 2, spread=-1), "spread must be at least 0, got -1"),
        (lambda: flows.MixtureOfGaussians(2, 2, scale=0), "scale must be positive, got 0"),
        (
            lambda: flows.MixtureOfGaussians(2, 3, means=torch.zeros(2, 3)),
            r"means must have shape \(3, 2\), got \(2, 3\)",
        ),
        (lambda: flows.Uniform(0), "dims must be at least 1, got 0"),
        (lambda: flows.Uniform(2, 1.0, 1.0), "high must be above low, got 1.0 and 1.0"),
        (
            lambda: mixture().log_prob(torch.zeros(2, 4)),
            r"z must have shape \[N, 3\], got \(2, 4\)",
        ),
        (
            lambda: flows.Uniform(3).log_prob(torch.zeros(3)),
            r"z must have .* got shape \(3,\)",
        ),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_means_are_real():
    with pytest.raises(TypeError, match=r"means must be real, got torch\.complex64"):
        flows.MixtureOfGaussians(2, 3, means=torch.zeros(3, 2, dtype=torch.complex64))
