"""A second derivative is right, or it is an error."""

import math

import pytest
import torch
from laws import normal
from torch import nn

from pyflowkern import ode
from pyflowkern.core.first_derivative import first_derivative_only, once_differentiable

ADJOINTS = ["direct", "continuous", "reversible"]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def number(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_only_a_parameter_requires_a_gradient(adjoint):
    """dy/dt = a y: d(y + dy/dy0)/da = (y0 + 1) e^a at t = 1."""
    a, y0 = number(1.5), number([0.7])
    y = ode.odeint(lambda t, y: a * y, y0, [0.0, 1.0], adjoint=adjoint, **TIGHT)[-1]
    (slope,) = torch.autograd.grad(y.sum(), y0, create_graph=True)
    (found,) = torch.autograd.grad((y + slope).sum(), a)
    assert found.item() == pytest.approx(1.7 * math.exp(1.5), rel=1e-7)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_every_pair_of_derivatives_of_a_nonlinear_flow(adjoint):
    """y' = -a y^2 has y = y0 / (1 + a y0 t): the Hessian in (a, y0), through outputs before the last as well."""
    ts = [0.0, 0.4, 0.4, 1.0]

    def solved(a, y0):
        return ode.odeint(lambda t, y: -a * y**2, y0, ts, adjoint=adjoint, **TIGHT)

    def exact(a, y0):
        return torch.stack([y0 / (1 + a * y0 * t) for t in ts])

    g = normal(4, 2)
    found, expected = [], []
    for function, rows in ((solved, found), (exact, expected)):
        at = number(0.8), number([0.5, 1.2])
        slopes = torch.autograd.grad((function(*at) * g).sum(), at, create_graph=True)
        for slope in torch.cat([s.reshape(-1) for s in slopes]):
            rows += torch.autograd.grad(slope, at, retain_graph=True)
    for one, other in zip(found, expected, strict=True):
        # a thousand times the tolerance: the errors of three solves of some hundred steps add up
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def test_third_derivatives_of_the_continuous_adjoint():
    a = number(0.6)
    y = ode.odeint(
        lambda t, y: a * y, torch.ones(1).double(), [0.0, 1.0], adjoint="continuous", **TIGHT
    )
    g = y[-1].sum()
    for _ in range(3):
        (g,) = torch.autograd.grad(g, a, create_graph=True)
        assert g.item() == pytest.approx(math.exp(0.6), rel=1e-6)


def test_a_parameter_that_is_read_only_later_has_second_derivatives():
    """Two layers, the second read from the middle on: the continuous adjoint against the direct one."""
    torch.manual_seed(0)
    nets = [nn.Linear(2, 2).double(), nn.Linear(2, 2).double()]
    found = []
    for adjoint in ("direct", "continuous"):
        y0 = normal(3, 2).requires_grad_()
        y = ode.odeint(
            lambda t, y: torch.tanh(nets[int(t > 0.5)](y)), y0, [0.0, 0.5, 1.0],
            method="rk4", step_size=0.01, adjoint=adjoint,
        )  # fmt: skip
        (slope,) = torch.autograd.grad(y[-1].sum(), y0, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [n.weight for n in nets]))
    for one, other in zip(*found, strict=True):
        # a step has stages on both sides of the middle
        torch.testing.assert_close(one, other, rtol=0.02, atol=0)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_second_derivatives_of_times_are_right_or_an_error(adjoint):
    """y' = t y: dy/dT = T y, and its derivative (1 + T^2) y; the mixed one is T y / y0."""
    ts, y0 = number([0.0, 0.9]), number([0.7])
    y = ode.odeint(lambda t, y: t * y, y0, ts, adjoint=adjoint, **TIGHT)[-1].sum()
    by_time, by_state = torch.autograd.grad(y, (ts, y0), create_graph=True)
    value = 0.7 * math.exp(0.405)
    assert by_time[1].item() == pytest.approx(0.9 * value, rel=1e-7)
    # in the first state alone the second derivative is right everywhere
    (mixed,) = torch.autograd.grad(by_time[1], y0, retain_graph=True)
    assert mixed.item() == pytest.approx(0.9 * value / 0.7, rel=1e-7)
    if adjoint != "continuous":
        for g in (by_time[1], by_state.sum()):
            with pytest.raises(RuntimeError, match="no derivative by t"):
                torch.autograd.grad(g, ts, retain_graph=True)
        return
    (second,) = torch.autograd.grad(by_time[1], ts, retain_graph=True)
    (mixed,) = torch.autograd.grad(by_state.sum(), ts)
    assert second[1].item() == pytest.approx((1 + 0.81) * value, rel=1e-6)
    assert mixed[1].item() == pytest.approx(0.9 * value / 0.7, rel=1e-6)


def test_an_event_has_a_first_derivative_only():
    y0 = number([1.0])
    t, ys = ode.odeint_event(lambda t, y: -y, y0, 0.0, event_fn=lambda t, y: y[0] - 0.5)
    for value in (t, ys[-1].sum()):
        (g,) = torch.autograd.grad(value, y0, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(g.sum(), y0, retain_graph=True)
    assert torch.autograd.grad(t, y0)[0].item() == pytest.approx(1.0, rel=1e-6)


# --- the helper ----------------------------------------------------------------------------------


def test_only_causes_of_a_gradient_are_refused():
    x, z = number(2.0), number(3.0)
    g = first_derivative_only(z * x.detach() ** 2, (x,), "no more")
    assert torch.autograd.grad(g, z, retain_graph=True)[0].item() == 4.0
    with pytest.raises(RuntimeError, match="no more"):
        g.backward()


def test_once_differentiable():
    x = number(2.0)
    y = once_differentiable(3 * x, "no more")
    assert torch.autograd.grad(y, x, retain_graph=True)[0].item() == 3.0
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    assert g.item() == 3.0
    with pytest.raises(RuntimeError, match="no more"):
        torch.autograd.grad(g, x)
