"""Spline and autoregressive flows: initial values, masks, angles, arguments that exclude each other."""

import math
from functools import partial

import pytest
import torch
from laws import normal, randomize

from pyflowkern import flows, nn
from pyflowkern.ops import SplineMap

SMALL = {"transforms": 3, "hidden": (16, 16)}
BUILDS = {
    "MAF": partial(flows.MAF, **SMALL),
    "IAF": partial(flows.IAF, **SMALL),
    "NSF": partial(flows.NSF, bound=4.0, **SMALL),
    "NSF autoregressive": partial(flows.NSF, autoregressive=True, bound=4.0, **SMALL),
}


@pytest.mark.parametrize(
    "build",
    [
        *BUILDS.values(),
        partial(flows.NSF, circular=True, **SMALL),
        partial(flows.NSF, tails="none", **SMALL),
        partial(flows.NSF, tails="affine", mixing="none", unconditional=True, **SMALL),
        partial(flows.NSF, residual=False, mixing="permutation", **SMALL),
    ],
)
def test_a_new_flow_is_the_identity_but_for_the_order(build):
    flow = build(5)
    x = torch.rand(20, 5)
    z, log_det = flow(x)
    torch.testing.assert_close(z.sort(1).values, x.sort(1).values, atol=2e-6, rtol=0)
    torch.testing.assert_close(log_det, torch.zeros(20), atol=2e-5, rtol=0)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_it_learns_a_ring(build):
    torch.manual_seed(0)
    flow = build(2)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    angle = 2 * math.pi * torch.rand(256)
    x = torch.stack([angle.cos(), angle.sin()], 1) * 1.4 + 0.05 * torch.randn(256, 2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    gaussian = 0.5 * torch.logdet(2 * math.pi * math.e * torch.cov(x.T, correction=0))
    assert loss < gaussian - 0.2  # nats better than the best Gaussian
    assert 1.1 < flow.sample(500).norm(dim=1).median() < 1.7


def test_the_masks_alternate_and_the_networks_see_what_passes():
    flow = flows.NSF(5, transforms=4, hidden=8, mixing="none")
    masks = [layer.mask.tolist() for layer in flow.bijection]
    assert masks[0] == [False, True, False, True, False]
    assert masks[1] == [True, False, True, False, True]
    assert masks[2:] == masks[:2]
    assert [layer.conditioner.first.in_features for layer in flow.bijection] == [3, 2, 3, 2]
    kinds = [type(layer) for layer in flows.NSF(5, transforms=2, hidden=8).bijection]
    assert kinds == [nn.SplineCoupling, nn.InvertibleLinear] * 2


def test_random_masks_are_those_of_every_flow_of_the_kind():
    for build in (
        partial(flows.NSF, 6, mixing="permutation", **SMALL),
        partial(flows.NSF, 6, mixing="permutation", autoregressive=True, **SMALL),
        partial(flows.MAF, 6, order="random", **SMALL),
    ):
        flow = randomize(build()).eval()
        torch.manual_seed(5)
        other = build().eval()
        other.load_state_dict(flow.state_dict())
        x = normal(4, 6, dtype=torch.float32)
        assert torch.equal(flow(x)[0], other(x)[0])


def test_autoregressive_orders_alternate():
    flow = flows.MAF(3, transforms=3, hidden=8)
    assert [layer.conditioner.order for layer in flow.bijection] == [
        [0, 1, 2],
        [2, 1, 0],
        [0, 1, 2],
    ]


def test_a_sample_of_an_iaf_has_its_density_without_an_inverse(monkeypatch):
    flow = randomize(flows.IAF(4, context_features=2, **SMALL)).double()
    context = normal(6, 2)

    def refuse(*_):
        raise AssertionError("the slow direction ran")

    with monkeypatch.context() as patch:
        patch.setattr(nn.MaskedAutoregressive, "inverse", refuse)
        x, log_prob = flow.sample_and_log_prob(6, context)
    log_prob.sum().backward()
    torch.testing.assert_close(flow.log_prob(x, context), log_prob)


# --- angles and the unit interval ---


@pytest.mark.parametrize("mixing", ["none", "permutation"])
def test_the_density_of_angles_is_continuous_where_they_wrap(mixing):
    torch.manual_seed(0)
    flow = flows.NSF(3, circular=True, mixing=mixing, **SMALL)
    randomize(flow, 0.5).double().eval()
    x = (torch.rand(50, 3).double() * 2 - 1) * math.pi
    for axis in range(3):
        left, right = x.clone(), x.clone()
        left[:, axis], right[:, axis] = -math.pi, math.pi * (1 - 1e-12)
        torch.testing.assert_close(flow.log_prob(left), flow.log_prob(right), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options", [{"circular": True}, {"circular": True, "autoregressive": True}, {"tails": "none"}]
)
def test_on_a_bounded_domain_the_density_integrates_to_one(options):
    torch.manual_seed(0)
    flow = randomize(flows.NSF(2, **SMALL, **options)).double().eval()
    low, high = flow.domain
    step = (high - low) / 400
    grid = torch.arange(400).double() * step + low + step / 2
    with torch.no_grad():
        mass = flow.log_prob(torch.cartesian_prod(grid, grid)).exp().sum() * step**2
    torch.testing.assert_close(mass.item(), 1.0, atol=2e-3, rtol=0)
    x = flow.sample(1000)
    assert low <= x.min() < x.max() <= high
    assert flow.distribution().support.check(x).all()
    assert not bool(flow.distribution().support.check(x[0] + 10))


BOUNDED = [
    {"circular": True},
    {"circular": True, "autoregressive": True},
    {"tails": "none"},
    {"tails": "none", "autoregressive": True, "mixing": "permutation"},
]
bounded = pytest.mark.parametrize("options", BOUNDED, ids=str)


def bounded_flow(options, dtype=torch.float64):
    """Return a flow of three features, and ten points of its domain, including the ends."""
    torch.manual_seed(0)
    flow = randomize(flows.NSF(3, context_features=2, **SMALL, **options)).to(dtype).eval()
    low, high = flow.domain
    x = torch.rand(10, 3, dtype=dtype) * (high - low) + low
    x[0, 0], x[1, 1] = low, high
    return flow, x, normal(10, 2, dtype=dtype)


@bounded
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_lies_outside_of_a_bounded_domain(options, dtype):
    flow, x, context = bounded_flow(options, dtype)
    low, high = flow.domain
    inside = flow.log_prob(x, context)
    assert inside.isfinite().all()
    spoilt = x.clone()
    spoilt[3, 0] = low - 1e-3
    spoilt[4, 1], spoilt[4, 2] = high + 100, high + 0.5
    spoilt[5, 2], spoilt[6, 2] = math.inf, -math.inf
    spoilt[7, 1] = math.nan
    spoilt[8, 0], spoilt[8, 1] = math.nan, high + 1
    spoilt.requires_grad_()
    found = flow.log_prob(spoilt, context)
    assert found[3:7].tolist() == [-math.inf] * 4
    assert found[7:9].isnan().all()  # NaN is unknown, not outside
    kept = [0, 1, 2, 9]
    assert torch.equal(found[kept], inside[kept])
    assert flow.bits_per_dim(spoilt, context)[3] == math.inf
    found.exp().sum().backward()
    x.requires_grad_()
    flow.log_prob(x, context).exp().sum().backward()
    torch.testing.assert_close(spoilt.grad[kept], x.grad[kept], rtol=0, atol=0)
    assert spoilt.grad[3:7].eq(0).all()


@pytest.mark.filterwarnings("ignore:values of .* lie outside")
@bounded
def test_points_outside_leave_the_parameters_gradients_finite(options):
    flow, x, context = bounded_flow(options)
    x[3:6] = flow.domain[1] + 1
    log_prob = flow.log_prob(x, context)
    torch.where(log_prob.isfinite(), log_prob, 0.0).sum().backward()
    found = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    kept = [0, 1, 2, 6, 7, 8, 9]
    flow.log_prob(x[kept], context[kept]).sum().backward()
    torch.testing.assert_close(found, [p.grad for p in flow.parameters()])


@bounded
def test_torch_knows_the_bounded_domain(options):
    flow, x, context = bounded_flow(options)
    lenient = flow.distribution(context, validate_args=False)
    strict = flow.distribution(context, validate_args=True)
    for d in (strict, strict.expand((2, 10))):
        expected = lenient.log_prob(x).expand(d.batch_shape)
        torch.testing.assert_close(d.log_prob(x), expected)
        for bad in (flow.domain[1] + 0.1, math.nan):
            with pytest.raises(ValueError, match="to be within the support"):
                d.log_prob(torch.full((10, 3), bad))
    assert lenient.log_prob(x + 10).eq(-math.inf).all()
    transform = flow.transform(context)
    z = transform(x)
    for t in (transform, transform.with_cache()):
        assert t.domain.check(x).all()
        assert t.codomain.check(z).all()
        assert not t.domain.check(x + 10).any()
        assert not t.codomain.check(z + 10).any()
        assert t.inv.domain is t.codomain
        assert (t.domain.event_dim, t.codomain.event_dim) == (1, 1)


def test_only_densities_validate_pixels():
    flow = flows.Glow((1, 4, 4), levels=1, steps=1, hidden=4, bits=8)
    d = flow.distribution(validate_args=True)
    assert d.log_prob(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)).isfinite().all()
    with pytest.raises(ValueError, match="to be within the support"):
        d.log_prob(torch.full((2, 1, 4, 4), 2.0))
    domain = flow.transform().domain
    assert domain.event_dim == 3
    assert domain.check(torch.ones(2, 1, 4, 4)).all()
    assert not domain.check(2 * torch.ones(2, 1, 4, 4)).any()


def test_a_circular_flow_learns_two_directions():
    torch.manual_seed(0)
    flow = flows.NSF(2, circular=True, transforms=2, hidden=16)
    # one angle at the cut, and the other at half of it
    x = torch.randn(256, 2) * 0.3 + torch.tensor([math.pi, 0.0])
    x = torch.remainder(x + math.pi, 2 * math.pi) - math.pi
    optimizer = torch.optim.Adam(flow.parameters(), 2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    entropy = math.log(2 * math.pi * math.e * 0.3**2)
    assert loss < entropy + 0.15  # nats above the entropy of the data; the uniform density has 3.7


# --- errors ---


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: flows.NSF(4, transforms=0), "transforms must be at least 1, got 0"),
        (lambda: flows.NSF(4, hidden=0), "hidden must be at least 1, .* got 0"),
        (lambda: flows.NSF(4, hidden=()), r"hidden must be at least 1, .* got \(\)"),
        (lambda: flows.NSF(4, hidden=(8, 9)), r"must have one width, got hidden=\(8, 9\)"),
        (lambda: flows.NSF(4, bins=1), "bins must be from 2 to"),
        (lambda: flows.NSF(4, bound=-1.0), "bound must be positive and finite, got -1.0"),
        (lambda: flows.NSF(4, tails="round"), "tails must be one of .* got 'round'"),
        (lambda: flows.NSF(4, mixing="qr"), "mixing must be one of .* got 'qr'"),
        (lambda: flows.NSF(4, circular=True, mixing="plu"), "on a bounded domain, got 'plu'"),
        (lambda: flows.NSF(4, circular=True, tails="none"), "must be 'circular' for angles"),
        (lambda: flows.NSF(4, circular=True, bits=8), "for real vectors, .* bits=8"),
        (lambda: flows.NSF((3, 8, 8), circular=True), r"for real vectors, .* \(3, 8, 8\)"),
        (lambda: flows.NSF((3, 8, 8), autoregressive=True), "for real vectors"),
        (lambda: flows.NSF((3, 12, 12), levels=3), "divisible by"),
        (lambda: flows.MAF((3, 8, 8)), r"a dimension D or \(D,\) for this flow"),
        (lambda: flows.MAF(4, order="up"), "order must be 'reverse' or 'random', got 'up'"),
        (lambda: flows.MAF(4, transforms=0), "transforms must be at least 1, got 0"),
        (lambda: flows.IAF(4, scale_map="cube"), "scale_map .* 'cube'"),
        (lambda: flows.NSF(4, autoregressive=True, unconditional=True), "are for couplings"),
        (lambda: flows.NSF(4, autoregressive=True, conditioner=nn.MLP), "are for couplings"),
        (
            lambda: flows.NSF(4, circular=True, spline=SplineMap()),
            "spline must have circular tails for angles, got 'linear'",
        ),
        (lambda: flows.MAF(True), "event_shape must be .* got True"),
        (lambda: flows.MAF(4, hidden=True), "hidden must be at least 1, .* got True"),
        (lambda: flows.MAF(4).distribution(torch.zeros(2)), "context was given"),
        (
            lambda: flows.MAF(4, context_features=2).distribution(torch.zeros(5, 3)),
            r"context must have shape \[\*batch, 2\], got \(5, 3\)",
        ),
        (
            lambda: flows.MAF(4, context_features=2).distribution(),
            r"context must have shape \[\*batch, 2\], got None",
        ),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: flows.MAF(2.5), "event_shape must be an int or a sequence of ints, got float"),
        (lambda: flows.NSF(4, hidden=None), "hidden must be an int or a sequence .* got NoneType"),
        (lambda: flows.MAF(4, context_features=2.0), "context_features must be an int, got float"),
        (lambda: flows.NSF(4, spline="cubic"), "spline must be a SplineMap, got str"),
        (lambda: flows.NSF(4, bins=8.0), "bins must be an int, got float"),
        (lambda: flows.NSF(4, bound="3"), "bound must be a number, got str"),
        (
            lambda: flows.MAF(4, context_features=2).distribution([1.0, 2.0]),
            "context must be a torch.Tensor, got list",
        ),
        (lambda: flows.MixtureOfGaussians(2, 2.0), "components must be an int, got float"),
        (
            lambda: flows.MixtureOfGaussians(2, 1, means=[[0.0, 1.0]]),
            "means must be a torch.Tensor, got list",
        ),
    ],
)
def test_wrong_types_are_named(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_one_dimension_is_enough_for_autoregressive_flows():
    for flow in (flows.MAF(1, hidden=4), flows.NSF(1, hidden=4, autoregressive=True)):
        x = torch.randn(5, 1)
        torch.testing.assert_close(flow.inverse(flow(x)[0])[0], x)


def test_the_default_bound():
    """examples/spline_bound.py has the table; 3 is nflows' default and makes narrow posteriors too wide."""
    assert flows.NSF(2, hidden=4).bijection[0].spline.bound == 5.0
    assert flows.NSF(2, hidden=4, circular=True).bijection[1].spline.bound == math.pi


def test_other_splines():
    flow = flows.NSF(4, spline=SplineMap(bins=5, bound=2.0, tails="affine"), **SMALL)
    assert flow.bijection[0].spline.params == 16
    assert flows.NSF(4, spline=SplineMap(tails="none"), **SMALL).domain == (0.0, 1.0)


@pytest.mark.parametrize(
    "given", [{"residual": False}, {"context_features": 0}, {"event_shape": (1, 4, 4)}]
)
def test_gates_need_blocks_a_context_and_vectors(given):
    arguments = {"event_shape": 3, "hidden": 4, "context_features": 2} | given
    with pytest.raises(ValueError, match="gated=True needs context_features"):
        flows.NSF(**arguments, gated=True)


def test_gates_reach_every_network():
    for flow in (
        flows.MAF(3, hidden=(4, 4), context_features=2, residual=True, gated=True),
        flows.NSF(3, hidden=(4, 4), context_features=2, gated=True),
        flows.NSF(3, hidden=(4, 4), context_features=2, gated=True, autoregressive=True),
    ):
        gates = [name for name, _ in flow.named_parameters() if ".gates." in name]
        assert len(gates) == 5 * 2 * 2  # layers, blocks, weight and bias
