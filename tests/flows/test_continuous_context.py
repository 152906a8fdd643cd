"""Continuous flows with a context: against a hand-written solve, row by row, and as a distribution."""

import pytest
import torch
from laws import check_gradients, check_inverse, check_log_det, normal

from pyflowkern import flows, nn

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
COARSE = {"method": "rk4", "step_size": 0.25}
SHAPES = {"vectors": (2,), "images": (1, 4, 4)}


def make(kind, **options):
    torch.manual_seed(0)
    options = {"divergence": "exact", "context_features": 3, "hidden": (6, 5), **options}
    if kind == "images":
        options |= {"levels": 2, "hidden": (4,)}
    return flows.FFJORD(SHAPES[kind], **options).double()


def batch(kind, n=4):
    return normal(n, *SHAPES[kind]), normal(n, 3, seed=1)


def by_hand(field, x, context, steps):
    """RK4 of the state, and of the trace of the Jacobian that autograd gives."""

    def slope(t, y):
        jacobian = torch.stack(
            [
                torch.autograd.functional.jacobian(lambda v, c=c: field(t, v[None], c[None])[0], s)
                for s, c in zip(y, context, strict=True)
            ]
        )
        return field(t, y, context), jacobian.diagonal(dim1=1, dim2=2).sum(1)

    log_det, h = torch.zeros(len(x)).double(), 1 / steps
    for i in range(steps):
        t = i * h
        k1, d1 = slope(t, x)
        k2, d2 = slope(t + h / 2, x + h / 2 * k1)
        k3, d3 = slope(t + h / 2, x + h / 2 * k2)
        k4, d4 = slope(t + h, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        log_det = log_det + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return x, log_det


def test_log_prob_is_that_of_a_solve_by_hand():
    flow, (x, context) = make("vectors", **COARSE), batch("vectors")
    z, log_det = by_hand(next(flow.blocks()).field, x, context, 4)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + log_det
    torch.testing.assert_close(flow.log_prob(x, context), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow.terms(x, context).log_prob, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", list(SHAPES))
def test_rows_are_independent(kind):
    flow, (x, context) = make(kind, **COARSE), batch(kind)
    found = flow.log_prob(x, context)
    alone = [flow.log_prob(a[None], c[None])[0] for a, c in zip(x, context, strict=True)]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-12, atol=1e-12)
    context[1] += 1
    moved = flow.log_prob(x, context)
    others = torch.arange(4) != 1
    assert torch.equal(moved[others], found[others])
    assert (moved[1] - found[1]).abs() > 1e-6
    context[1, 0] = torch.nan
    spoilt = flow.log_prob(x, context)
    torch.testing.assert_close(spoilt[others], found[others], rtol=1e-12, atol=1e-12)
    assert spoilt[1].isnan()


@pytest.mark.parametrize("kind", list(SHAPES))
def test_inverse_and_log_det(kind):
    flow, (x, context) = make(kind, **TIGHT), batch(kind, 2)
    check_inverse(flow, x, context, atol=1e-7)
    if kind == "vectors":
        check_log_det(flow, x, context)


@pytest.mark.parametrize("adjoint", ["direct", "continuous", "reversible"])
@pytest.mark.parametrize("kind", list(SHAPES))
def test_gradients_reach_the_context(kind, adjoint):
    """Also where the context is not a leaf: a network that embeds it is trained with the flow."""
    flow, (x, context) = make(kind, adjoint=adjoint, **TIGHT), batch(kind, 2)
    embed = torch.nn.Linear(3, 3).double()
    loss = flow.log_prob(x, embed(context)).sum()
    check_gradients(flow, loss)
    assert embed.weight.grad.abs().max() > 0

    def shifted(by):
        moved = embed.bias.detach().clone()
        moved[1] += by
        given = torch.nn.functional.linear(context, embed.weight, moved)
        return float(flow.log_prob(x, given).sum().detach())

    numeric = (shifted(1e-4) - shifted(-1e-4)) / 2e-4
    assert abs(float(embed.bias.grad[1]) - numeric) < 1e-5 * max(1, abs(numeric))


def test_distribution_and_samples():
    flow, (x, context) = make("vectors", **COARSE), batch("vectors")
    d = flow.distribution(context)
    assert d.batch_shape == (4,)
    torch.testing.assert_close(d.log_prob(x), flow.log_prob(x, context))
    assert d.sample((5,)).shape == (5, 4, 2)
    draw = torch.Generator().manual_seed(3)
    found = flow.sample(3, context[0], generator=draw)
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(found, flow.inverse(z, context[:1].expand(3, -1))[0])
    y, log_prob = flow.sample_and_log_prob(4, context)
    # error of RK4
    torch.testing.assert_close(log_prob, flow.log_prob(y, context), rtol=1e-3, atol=1e-3)
    path = next(flow.blocks()).trajectory(x, [0.0, 1.0], context)
    torch.testing.assert_close(path[-1], flow(x, context)[0], rtol=1e-3, atol=1e-3)


def test_a_field_of_the_user():
    class Shift(torch.nn.Module):
        def forward(self, t, x, context):
            return context[:, :2] - x

    field = nn.VectorField(Shift(), context_features=2)
    flow = flows.CNF(2, field=lambda _: field, context_features=2, divergence="exact", **TIGHT)
    x, context = normal(3, 2), normal(3, 2, seed=1)
    z, log_det = flow.double()(x, context)
    decay = torch.tensor(-1.0).double().exp()
    torch.testing.assert_close(z, context + (x - context) * decay, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_det, torch.full((3,), -2.0).double(), rtol=1e-8, atol=1e-8)


def test_wrong_arguments():
    flow, plain = flows.CNF(2, context_features=3), flows.CNF(2)
    x, context = torch.zeros(4, 2), torch.zeros(4, 3)
    for error, message, call in (
        (ValueError, "context must have shape", lambda: flow.log_prob(x)),
        (ValueError, "context must have shape", lambda: flow.terms(x, context[:2])),
        (ValueError, "context_features=0", lambda: plain.terms(x, context)),
        (ValueError, "context must have shape", lambda: next(flow.blocks()).integrate(x)),
        (TypeError, "context_features", lambda: flows.CNF(2, context_features=1.5)),
        (
            ValueError,
            "context_features=3, got 0",
            lambda: flows.CNF(2, field=nn.VectorFieldMLP, context_features=3),
        ),
    ):
        with pytest.raises(error, match=message):
            call()
