"""Samples that blow up in a continuous flow are NaN and do not change the others."""

import math
import warnings

import pytest
import torch
from laws import normal

from pyflowkern import flows, nn

TIGHT = {"rtol": 1e-8, "atol": 1e-8, "max_steps": 100}  # towards a pole steps become ever smaller
FIXED = {"method": "rk4", "step_size": 0.02}
SETTINGS = [
    {**TIGHT},
    {**TIGHT, "adjoint": "continuous"},
    {**TIGHT, "adjoint": "reversible"},
    {**TIGHT, "control": "sample"},
    {**TIGHT, "compat": "torchdiffeq"},
    {**FIXED},
    {**FIXED, "adjoint": "reversible"},
    {"method": "dopri5", "step_size": 0.02},
]


class Square(torch.nn.Module):
    """f = a x^2 in each dimension: x(t) = x / (1 - a x t), which ends at t = 1 / (a x)."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones(()).double())

    def forward(self, t, x):
        return self.a * x * x


def make(**options):
    field = nn.VectorField(Square())
    options = {"divergence": "exact", **options}
    return flows.CNF(2, field=lambda _: field, **options).double(), field.net.a


def exact(x):
    return x / (1 - x), -2 * torch.log(1 - x).sum(1)


GOOD = torch.tensor([[0.1, -2.0], [-0.4, 0.5], [0.3, 0.2]]).double()
BATCH = torch.stack([GOOD[0], torch.tensor([0.2, 3.0]).double(), GOOD[1], GOOD[2]])
KEPT = torch.arange(4) != 1


@pytest.mark.parametrize(
    ("options", "recorded"),
    # what a recorded solve gives depends on the adjoint; all of them are recorded in the test below
    [*((s, False) for s in SETTINGS), *((s, True) for s in SETTINGS[1:3])],
    ids=str,
)
def test_only_the_sample_that_blows_up_is_nan(options, recorded):
    flow, _ = make(**options)
    with (
        torch.set_grad_enabled(recorded),
        pytest.warns(RuntimeWarning, match="1 of 4 samples .*(non_finite|max_steps)"),
    ):
        z, log_det = flow(BATCH)
    assert z[1].isnan().all()
    assert log_det[1].isnan()
    expected = exact(GOOD)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if "step_size" in options else {"rtol": 1e-6, "atol": 1e-7}
    )
    torch.testing.assert_close((z[KEPT], log_det[KEPT]), expected, **tolerance)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_gradients_of_the_other_samples(options):
    """The parameter's gradient is finite: failed samples add zero, not zero times infinity."""
    flow, a = make(**options)
    found = []
    for x, keep in ((BATCH, KEPT), (GOOD, slice(None))):
        x = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            terms = flow.terms(x)
        loss = (terms.log_prob + terms.kinetic + terms.jacobian)[keep].sum()
        slopes = torch.autograd.grad(loss, (a, x))
        found.append((slopes[0], slopes[1][keep]))
        if len(x) == 4:
            assert torch.equal(slopes[1][1], torch.zeros(2).double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [TIGHT, FIXED], ids=str)
def test_the_inverse_and_the_trajectory(options):
    flow, _ = make(**options)
    z = -BATCH  # the inverse is x = z / (1 + z)
    with pytest.warns(RuntimeWarning, match="1 of 4"):
        x, log_det = flow.inverse(z)
    torch.testing.assert_close(x[KEPT], -exact(GOOD)[0], rtol=1e-5, atol=1e-6)
    assert x[1].isnan().all()
    assert log_det[1].isnan()
    with pytest.warns(RuntimeWarning, match="1 of 4"):
        path = next(flow.blocks()).trajectory(BATCH, [0.0, 0.5, 1.0])
    torch.testing.assert_close(path[-1, KEPT], exact(GOOD)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(path[1, KEPT], GOOD / (1 - GOOD / 2), rtol=1e-5, atol=1e-6)
    assert path[:, 1].isnan().all()


def test_a_sample_that_needs_too_many_steps():
    """Only the sample whose context makes it oscillate ends with max_steps."""

    class Wave(torch.nn.Module):
        def forward(self, t, x, context):
            return context * torch.cos(context * t) + 0 * x

    field = nn.VectorField(Wave(), context_features=1)
    options = {"max_steps": 200, "rtol": 1e-8, "atol": 1e-8, "divergence": "exact"}
    flow = flows.CNF(1, field=lambda _: field, context_features=1, **options).double()
    context = torch.tensor([[1.0], [2.0], [1e4], [3.0]]).double()
    x, others = normal(4, 1), torch.arange(4) != 2
    with pytest.warns(RuntimeWarning, match=r"1 of 4 samples .*\(1 max_steps\)"):
        z, log_det = flow(x, context)
    torch.testing.assert_close(z[others], (x + context.sin())[others], rtol=1e-6, atol=1e-6)
    assert z[2].isnan()
    assert torch.equal(log_det[others], torch.zeros(3).double())


def test_a_field_without_times_of_each_sample():
    """Nothing is raised where the time must be a number: then no sample is known to be right."""

    class Scalar(Square):
        def forward(self, t, x):
            return self.a * x * x + 0 * float(t)

    field = nn.VectorField(Scalar())
    flow = flows.CNF(2, field=lambda _: field, divergence="exact", **TIGHT).double()
    with pytest.warns(RuntimeWarning, match="4 of 4 samples"):
        assert flow.log_prob(BATCH).isnan().all()
    torch.testing.assert_close(flow(GOOD), exact(GOOD), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [TIGHT, FIXED, {**TIGHT, "control": "sample"}], ids=str)
def test_where_all_fail_nothing_is_raised(options):
    flow, a = make(**options)
    with torch.no_grad():
        a.fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match="4 of 4 samples"):
        assert flow.log_prob(BATCH).isnan().all()
    flow, _ = make(**{**FIXED, "max_steps": 7})
    with pytest.warns(RuntimeWarning, match=r"3 of 3 samples .*\(3 max_steps\)"):
        assert flow.log_prob(GOOD).isnan().all()


def test_no_warning_where_nothing_failed():
    """A NaN in the input stays in its sample; a solve that succeeds is run once."""
    flow, _ = make(**TIGHT)
    field, calls = next(flow.blocks()).field, []
    field.register_forward_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            flow.log_prob(GOOD)
            once = len(calls)
            x = GOOD.clone()
            x[0, 0] = torch.nan
            found = flow.log_prob(x)
    assert found[0].isnan()
    assert torch.isfinite(found[1:]).all()
    assert len(calls) <= 2 * once


def test_images_with_contexts():
    """A convolutional field, a context that is infinite, one that makes the field overflow."""
    torch.manual_seed(0)
    flow = flows.FFJORD(
        (1, 4, 4), hidden=(4,), levels=2, context_features=2, divergence="exact", activation="silu"
    )
    x, context = normal(4, 1, 4, 4, dtype=torch.float32), normal(4, 2, dtype=torch.float32)
    good = flow.log_prob(x[2:], context[2:])
    context[0, 0], context[1] = torch.inf, 3e38
    with pytest.warns(RuntimeWarning, match="1 of 4 samples"):
        found = flow.log_prob(x, context)
    assert found[:2].isnan().all()
    # solves with tolerances of 1e-5
    torch.testing.assert_close(found[2:], good, rtol=1e-3, atol=1e-3)
    found[2:].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters())


@pytest.mark.parametrize("norm", ["max_sample", "max"])
def test_every_sample_meets_the_tolerance(norm):
    """One sample in a fast part of the field among 500 that hardly move: the mean over the batch hides its error."""

    class Turning(torch.nn.Module):
        def forward(self, t, x):
            return 3 * x.square().sum(1, keepdim=True) * torch.stack([-x[:, 1], x[:, 0]], 1)

    x = torch.cat([torch.tensor([[3.0, 0.0]]), 1e-2 * normal(500, 2)])

    def error(rows, **settings):
        field = nn.VectorField(Turning())
        flow = flows.ContinuousBijection(
            field, divergence="exact", rtol=1e-5, atol=1e-5, **settings
        )
        with torch.no_grad():
            end = flow(x[:rows])[0][0]
        exact = 3 * torch.tensor([math.cos(27.0), math.sin(27.0)], dtype=torch.float64)
        return (end - exact).abs().max().item()

    found = error(501, norm=norm)
    assert found < 1.1 * error(1)  # the error of this sample alone
    assert error(501) > 3 * found
