"""Bounds of a discrete likelihood beside the likelihood itself, in closed form and by quadrature."""

import math

import pytest
import torch

from pyflowkern import flows, ops
from pyflowkern.estimation import likelihood_bounds

RATE = 40.0


class Exponential:
    """One 3-bit number, by the density a e^(-a v) / (1 - e^-a) of v in [0, 1], which varies much within a level."""

    def log_prob(self, x):
        v, log_det = ops.dequantize(x, bits=3)
        return math.log(RATE / -math.expm1(-RATE)) - RATE * v.flatten(1)[:, 0] + log_det


@pytest.fixture(scope="module")
def flow():
    return Exponential()


@pytest.fixture(scope="module")
def exact():
    """The log of each level's probability, in closed form."""
    levels = torch.arange(8).double()
    return -RATE / 8 * levels + math.log(math.expm1(-RATE / 8) / math.expm1(-RATE))


def test_bounds_of_a_flow_beside_quadrature():
    """Four binary pixels: the probabilities of three pictures by the midpoint rule on their 16th of the unit cube."""
    torch.manual_seed(0)
    flow = flows.RealNVP((1, 2, 2), levels=1, steps=1, hidden=4, bits=1).eval()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    pictures = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]])
    u = (torch.arange(12) + 0.5) / 12
    v = (pictures[:, None] + torch.cartesian_prod(u, u, u, u)) / 2
    with torch.no_grad():
        density = flow.log_prob(v.reshape(-1, 1, 2, 2)).double().exp()
    exact = (density.view(3, -1).mean(1) / 16).log()
    rows = pictures.to(torch.uint8).view(3, 1, 2, 2)
    bounds = likelihood_bounds(flow, rows, draws=8000, chunk=8000)
    assert bool((bounds.elbo < exact).all())
    # weights that spread by twice their mean have an error of 0.022 after 8000 draws; the quadrature's is smaller
    assert bool(((bounds.iwbo - exact).abs() < 0.07).all())


def test_bounds_rise_to_the_likelihood(flow, exact):
    levels = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1)
    rows = levels.repeat_interleave(400, 0)
    found = {
        k: likelihood_bounds(flow, rows, draws=k, generator=torch.Generator().manual_seed(k))
        for k in (1, 4, 32)
    }
    assert torch.equal(found[1].elbo, found[1].iwbo)
    means = {k: bounds.iwbo.view(8, 400).mean(1) for k, bounds in found.items()}
    errors = {k: bounds.iwbo.view(8, 400).std(1) / 20 for k, bounds in found.items()}
    for k in (1, 4, 32):
        assert bool((means[k] <= exact + 4 * errors[k]).all()), k
        assert bool((found[k].iwbo >= found[k].elbo - 1e-9).all())
    gaps = {k: float((exact - means[k]).mean()) for k in means}
    assert gaps[1] > 3 * gaps[4] > 9 * gaps[32] > 0  # of order 1 / k, for so many levels together
    same = (found[32].elbo.view(8, 400).mean(1) - means[1]).abs()
    assert bool((same < 5 * errors[1]).all())  # the ELBO does not get closer


def test_means_are_over_rows(flow):
    rows = torch.tensor([0, 3, 5], dtype=torch.uint8).view(3, 1, 1, 1)
    found = likelihood_bounds(flow, rows, draws=5)
    assert found.mean_iwbo.value == pytest.approx(float(found.iwbo.mean()))
    assert found.mean_elbo.value < found.mean_iwbo.value
    assert found.bits_per_dim.value == pytest.approx(-found.mean_iwbo.value / math.log(2))


def test_seed_and_the_generators_of_others(flow):
    rows = torch.tensor([0, 3, 5], dtype=torch.uint8).view(3, 1, 1, 1)
    before = torch.get_rng_state()
    one, two = (
        likelihood_bounds(flow, rows, draws=3, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.iwbo, two.iwbo)
    small = likelihood_bounds(
        flow, rows, draws=3, generator=torch.Generator().manual_seed(1), chunk=2
    )
    assert small.iwbo.shape == (3,)
    assert not torch.equal(small.iwbo, one.iwbo)  # other noise, of the same law


def test_contexts_go_with_their_rows():
    class Model:
        """log p = context + u, one draw of u a row."""

        def log_prob(self, x, context):
            return context[:, 0] + torch.rand(len(x))

    context = torch.tensor([[0.0], [10.0], [20.0]])
    x = torch.zeros(3, 1, dtype=torch.uint8)
    for chunk in (1, 4, 100):
        found = likelihood_bounds(Model(), x, context, draws=4, chunk=chunk)
        assert bool(((found.elbo - context[:, 0] > 0) & (found.elbo - context[:, 0] < 1)).all())


@pytest.mark.parametrize(
    ("x", "options", "kind", "words"),
    [
        (torch.zeros(2, 1), {}, TypeError, "uint8"),
        (torch.zeros(0, 1, dtype=torch.uint8), {}, ValueError, "N at least 1"),
        (torch.zeros(2, 1, dtype=torch.uint8), {"draws": 0}, ValueError, "draws must be"),
        (
            torch.zeros(2, 1, dtype=torch.uint8),
            {"context": torch.zeros(3, 1)},
            ValueError,
            "2 rows",
        ),
    ],
)
def test_errors(x, options, kind, words):
    with pytest.raises(kind, match=words):
        likelihood_bounds(None, x, **options)
