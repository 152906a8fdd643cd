"""Learned integration times: analytic derivatives of affine flows, finite differences of others."""

import pytest
import torch
from laws import check_gradients, check_inverse, normal

from pyflowkern import flows, nn

ADJOINTS = ["direct", "continuous", "reversible"]
TIGHT = {"divergence": "exact", "rtol": 1e-10, "atol": 1e-10}


class Linear(torch.nn.Module):
    """f(t, x) = A x."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)

    def forward(self, t, x):
        return x @ self.matrix.t()


def small(**options):
    torch.manual_seed(0)
    options = {"hidden": (6, 5), "duration": 0.7, "train_time": True, **TIGHT, **options}
    return flows.FFJORD(2, **options).double()


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_affine_flows_have_an_analytic_derivative(adjoint):
    r"""``log det = T tr A`` forward, ``-T tr A`` back; ``d log p / dT = -z^T A z + tr A``."""
    matrix = normal(3, 3) / 2
    field = nn.VectorField(Linear(matrix))
    flow = flows.CNF(
        3, field=lambda _: field, duration=0.8, train_time=True, adjoint=adjoint, **TIGHT
    ).double()
    block = next(flow.blocks())
    torch.testing.assert_close(block.duration, torch.tensor(0.8).double(), rtol=1e-7, atol=0)
    x, duration, trace = normal(5, 3, seed=2), block.duration.detach(), matrix.trace()

    def slope(value):
        (grad,) = torch.autograd.grad(value, block.log_duration)
        return grad / duration

    z, log_det = flow(x)
    torch.testing.assert_close(z, x @ torch.matrix_exp(duration * matrix).t(), rtol=0, atol=1e-8)
    torch.testing.assert_close(slope(log_det.sum()), 5 * trace, rtol=1e-8, atol=1e-8)
    _, back = flow.inverse(x)
    torch.testing.assert_close(slope(back.sum()), -5 * trace, rtol=1e-8, atol=1e-8)
    log_prob = flow.log_prob(x).sum()
    expected = 5 * trace - ((z @ matrix.t()) * z).sum()
    torch.testing.assert_close(slope(log_prob), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("options", [{}, {"method": "rk4", "step_size": 0.25}], ids=str)
def test_gradient_is_that_of_finite_differences(adjoint, options):
    """Also with fixed steps, which scale with T."""
    flow, x = small(adjoint=adjoint, **options), normal(4, 2)
    log_duration = next(flow.blocks()).log_duration

    def loss():
        terms = flow.terms(x)
        return (-terms.log_prob + 0.1 * terms.kinetic + 0.1 * terms.jacobian).mean()

    check_gradients(flow, loss())
    found, h = float(log_duration.grad), 1e-4
    with torch.no_grad():
        values = []
        for step in (h, -2 * h):
            log_duration += step
            values.append(float(loss()))
    numeric = (values[0] - values[1]) / (2 * h)
    assert abs(found - numeric) < 1e-6 * max(1.0, abs(numeric))


def test_a_learned_time_gives_the_values_of_a_fixed_one():
    """A learned T gives the values of the same fixed T."""
    flow, x = small(), normal(4, 2)
    plain = small(train_time=False)
    state = {k: v for k, v in flow.state_dict().items() if not k.endswith("log_duration")}
    plain.load_state_dict(state)
    for a, b in zip(flow.terms(x), plain.terms(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    check_inverse(flow, x, atol=1e-7)
    path = next(flow.blocks()).trajectory(x, [0.0, next(flow.blocks()).duration.item()])
    torch.testing.assert_close(path[-1], flow(x)[0], rtol=1e-7, atol=1e-7)


def test_the_time_of_a_scaled_normal_is_learned():
    """x = e^(-T) z for f = x, so that data of deviation e^-1 has T = 1; learned from T = 0.3."""

    class Growth(torch.nn.Module):
        def forward(self, t, x):
            return x

    field = nn.VectorField(Growth())
    options = {"duration": 0.3, "train_time": True, "divergence": "exact", "method": "rk4"}
    flow = flows.CNF(2, field=lambda _: field, step_size=0.25, **options)
    block, x = next(flow.blocks()), normal(2000, 2, dtype=torch.float32)
    x = x / x.square().mean().sqrt() * torch.tensor(-1.0).exp()
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (-flow.log_prob(x)).mean().backward()
        optimizer.step()
    assert abs(block.duration.item() - 1) < 1e-2  # error of RK4 with four steps
