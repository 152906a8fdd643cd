"""Flows of zuko: what runs in the place of their transforms gives what zuko gives."""

import copy
from functools import partial

import pytest
import torch
import zuko
from laws.chains import calls  # noqa: F401
from laws.draws import normal
from laws.zuko_models import CLOSE, FLOWS, ONE_OP, D, K, context, data, make
from torch.distributions.transforms import _InverseTransform

import pyflowkern

N = 7


@pytest.fixture(params=FLOWS)
def name(request):
    return request.param


@pytest.fixture(params=[0, K], ids=["", "given"])
def size(request):
    return request.param


def derivatives(flow, function, *leaves):
    """Return what a function of a flow gives, and its gradients."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    found = function(*leaves)
    found = list(found) if isinstance(found, tuple) else [found]
    loss = sum(
        (t * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in found
    )
    wanted = [t for t in (*leaves, *flow.parameters()) if t is not None]
    return [*found, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


def same(pair, function, *leaves):
    """Compare values and gradients of a function of a flow, as it is and accelerated."""
    want, got = (derivatives(flow, partial(function, flow), *leaves) for flow in pair)
    torch.testing.assert_close(got, want, **CLOSE)


def test_log_densities(name, size):
    pair = make(name, size)
    same(pair, lambda flow, x, c: flow(c).log_prob(x), data(pair[0], N), context(size, N))


def test_transforms_and_their_inverses(name, size):
    pair = make(name, size)
    x, c = data(pair[0], N), context(size, N)
    same(pair, lambda flow, x, c: flow(c).transform.call_and_ladj(x), x, c)
    same(pair, lambda flow, x, c: flow(c).transform.inv.call_and_ladj(x), x, c)
    same(pair, lambda flow, x, c: flow.transform(c)(x), x, c)
    same(pair, lambda flow, x, c: flow.transform(c).inv(x), x, c)
    with torch.no_grad():
        made = pair[1].transform(c)
        y = made(x)
        ladj = made.log_abs_det_jacobian(x, y)
        torch.testing.assert_close(made.inv.log_abs_det_jacobian(y, x), -ladj, **CLOSE)
        torch.testing.assert_close(made.inv.inv(x), y, **CLOSE)
        torch.testing.assert_close(made.inv(y), x, rtol=1e-7, atol=1e-7)


def test_samples_are_drawn_alike(name, size):
    pair, c = make(name, size), context(size, 3)

    def drawn(flow, c):
        torch.manual_seed(5)
        made = flow(c)
        return made.rsample((2,)), *made.rsample_and_log_prob(()), made.sample((2, 3))

    same(pair, lambda flow, c: drawn(flow, c)[:3], c)
    torch.testing.assert_close(drawn(pair[1], c)[3], drawn(pair[0], c)[3], **CLOSE)


@pytest.mark.parametrize("name", ONE_OP)
def test_a_flow_is_one_op(name, size, calls):  # noqa: F811
    _, flow = make(name, size)
    x, c = data(flow, N), context(size, N)
    calls.clear()
    flow(c).log_prob(x)
    flow(c).sample()
    flow(c).rsample_and_log_prob()
    flow(c).transform(x)
    flow.transform(c).inv.call_and_ladj(x)
    density = "none" if name == "inverse" or name.startswith("NCSF") else "normal"
    assert [program.base for program in calls] == [density, *["none"] * 4]


@pytest.mark.parametrize("name", ["MAF", "NSF", "NICE", "NCSF", "standardized", "one feature"])
@pytest.mark.parametrize(
    ("lead", "given"),
    [((), ()), ((4,), ()), ((), (4,)), ((2, 4), (4,)), ((2, 1), (4,)), ((2, 3, 4), (3, 1))],
)
def test_leading_dimensions_are_broadcast(name, lead, given):
    pair = make(name, K)
    x, c = data(pair[0], *lead), context(K, *given)
    full = torch.broadcast_shapes(lead, given)
    if name == "NICE" and full != lead:
        for flow in pair:
            with pytest.raises(RuntimeError):
                flow(c).log_prob(x)
    else:
        for function in (
            lambda flow, x, c: flow(c).log_prob(x),
            lambda flow, x, c: flow(c).transform.inv.call_and_ladj(x),
        ):
            # zuko wants all dimensions of x for some of its transforms
            wide = x.expand(*full, -1).contiguous()
            want = derivatives(pair[0], partial(function, pair[0]), wide, c)
            got = derivatives(pair[1], partial(function, pair[1]), x, c)
            at = len(got) - 2 - len([*pair[0].parameters()])  # the gradient of x
            want[at] = want[at].sum_to_size(x.shape)
            torch.testing.assert_close(got, want, **CLOSE)
    want, got = (flow(c) for flow in pair)
    assert got.batch_shape == want.batch_shape
    assert got.event_shape == want.event_shape
    torch.manual_seed(1)
    wanted = want.rsample((2,))
    torch.manual_seed(1)
    torch.testing.assert_close(got.rsample((2,)), wanted, **CLOSE)


@pytest.mark.parametrize("name", ["MAF", "NICE", "mixed", "one feature"])
def test_what_is_returned_is_of_the_library(name):
    want, got = (flow(context(K, 4)) for flow in make(name, K))
    assert isinstance(got, zuko.distributions.NormalizingFlow)
    assert isinstance(got.transform, zuko.transforms.ComposedTransform)
    assert isinstance(got.transform.inv, zuko.transforms.ComposedTransform)
    for mine, theirs in zip(got.transform.transforms, want.transform.transforms, strict=True):
        assert isinstance(mine, type(theirs))
        if isinstance(theirs.inv, _InverseTransform):
            assert isinstance(mine.inv, _InverseTransform)
            assert mine.inv is mine.inv
            assert mine.inv.inv is mine
    assert repr(got) == repr(want)
    assert got.has_rsample
    for each in ("domain", "codomain", "bijective"):
        assert repr(getattr(got.transform, each)) == repr(getattr(want.transform, each))
    larger = got.expand((2, 4))
    assert larger.batch_shape == (2, 4)
    x = data(make(name, K)[0], 4)
    torch.testing.assert_close(larger.log_prob(x), want.expand((2, 4)).log_prob(x), **CLOSE)


def test_parts_are_ops_by_themselves(calls):  # noqa: F811
    pair = make("mixed", K)
    x, c = data(pair[0], N), context(K, N)
    first = [flow.transform.transforms[1](c) for flow in pair]
    calls.clear()
    for method in ("call_and_ladj", "__call__", "inv", "inverse pair"):
        got, want = (
            t.inv(x)
            if method == "inv"
            else t.inv.call_and_ladj(x)
            if method == "inverse pair"
            else getattr(t, method)(x)
            for t in first[::-1]
        )
        torch.testing.assert_close(got, want, **CLOSE)
    assert len(calls) == 4


def test_single_precision_is_as_close_as_the_library(name):
    exact, _ = make(name, K)
    flow, twin = make(name, K, torch.float32)
    x, c = data(exact, 500), context(K, 500)
    want = exact(c).log_prob(x)
    errors = [(f(c.float()).log_prob(x.float()) - want).abs().max() for f in (flow, twin)]
    assert errors[1] < 2 * errors[0] + 1e-5


def test_density_in_two_passes_over_a_base_of_another_kind():
    """Bases that are not standard normal, or not any more, count as they are."""
    flow, twin = make("MAF")
    x = data(flow, N)
    for each in (flow, twin):
        each(None).log_prob(x)
        each.base.loc.data.fill_(0.3)
        each.base._buffers["scale"].mul_(2)
    torch.testing.assert_close(twin().log_prob(x), flow().log_prob(x), **CLOSE)
    for each in (flow, twin):
        each.base = zuko.lazy.UnconditionalDistribution(
            zuko.distributions.GeneralizedNormal, torch.full((D,), 1.5, dtype=torch.float64)
        )
    same((flow, twin), lambda f, x: f().log_prob(x), x)
    torch.manual_seed(0)
    want = flow().rsample((2,))
    torch.manual_seed(0)
    torch.testing.assert_close(twin().rsample((2,)), want, **CLOSE)


def test_another_base_of_a_distribution_counts():
    flow, twin = make("MAF")
    x = data(flow, N)
    found = []
    for each in (flow, twin):
        made = each()
        made.base = zuko.distributions.DiagNormal(torch.ones(D).double(), torch.ones(D).double())
        torch.manual_seed(2)
        found.append((made.log_prob(x), *made.rsample_and_log_prob((2,))))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("write", ["in place", "another buffer", "data"])
def test_values_of_a_base_that_were_written_count(write):
    torch.manual_seed(0)
    flow = zuko.flows.NICE(80, hidden_features=(8,)).double()
    twin = copy.deepcopy(flow)
    pyflowkern.accelerate(twin, strict=True)
    x = torch.randn(N, 80).double()
    for value in (1.0, 2.0, 1.0):
        for each in (flow, twin):
            scale = each.base._buffers["scale"]
            if write == "another buffer":
                each.base._buffers["scale"] = torch.full_like(scale, value)
            else:
                with torch.no_grad():
                    (scale.data if write == "data" else scale).fill_(value)
        torch.testing.assert_close(twin().log_prob(x), flow().log_prob(x), **CLOSE)


def test_inverses_of_circular_splines_beyond_the_circle():
    """There the library's log-determinant is not that of the inverse spline, but of the way forward."""
    pair = make("NCSF")
    z = torch.tensor([3.2, -3.2, 4.0, 0.3, -7.0, 3.1], dtype=torch.float64)
    z = torch.stack([z.roll(i) for i in range(D)], 1)
    same(pair, lambda flow, z: flow().transform.inv.call_and_ladj(z), z)


@pytest.mark.parametrize("size", [0, K], ids=["", "given"])
@pytest.mark.parametrize(
    "base",
    [
        lambda c: zuko.flows.GMM(D, c, components=3),
        lambda c: zuko.flows.MAF(D, c, transforms=1, hidden_features=(8,)),
        lambda c: zuko.lazy.UnconditionalDistribution(
            torch.distributions.MultivariateNormal, torch.ones(D), 2 * torch.eye(D), buffer=True
        ),
    ],
    ids=["mixture", "flow", "matrix"],
)
def test_bases_of_other_kinds(base, size):
    """Mixtures and flows make their distributions themselves, and a mixture has no ``rsample``."""
    torch.manual_seed(0)
    transform = zuko.flows.MAF(D, size, transforms=2, hidden_features=(9, 8)).transform
    flow = zuko.flows.Flow(transform, base(size)).double()
    twin = copy.deepcopy(flow)
    assert "one op" in {entry.runs for entry in pyflowkern.accelerate(twin).entries}
    x, c = normal(N, D), context(size, N)
    same((flow, twin), lambda flow, x, c: flow(c).log_prob(x), x, c)
    for function in (
        lambda flow, c: flow(c).sample((3,)),
        lambda flow, c: flow(c).rsample((3,)),
        lambda flow, c: flow(c).rsample_and_log_prob((3,)),
    ):
        found = []
        for model in (flow, twin):
            torch.manual_seed(1)
            found.append(function(model, c))
        torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_inverses_through_networks_that_are_not_masked_throughout():
    """A LayerNorm lets all features see each other: no number of passes inverts that, and they count as they are."""
    torch.manual_seed(0)
    flow = zuko.flows.NSF(
        D, transforms=2, hidden_features=(9, 9), activation=partial(torch.nn.LayerNorm, 9)
    ).double()
    twin = copy.deepcopy(flow)
    assert {e.runs for e in pyflowkern.accelerate(twin, strict=True).entries} == {"own op"}
    same((flow, twin), lambda flow, z: flow().transform.inv.call_and_ladj(z), normal(N, D))
