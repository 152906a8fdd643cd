"""Events: their times and states, and the gradients of both."""

import math

import pytest
import torch

from pyflowkern import ode

GRAVITY = 9.81


def fall(t, y):
    return torch.stack([y[1], torch.full_like(y[1], -GRAVITY)])


def height(t, y):
    return y[0]


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5", "dopri8"])
def test_bouncing_ball(method):
    """Bounces at v -> -e v: the times are sqrt(2 h / g) and then 2 e^n times that longer each."""
    h, e = 10.0, 0.8
    t, y = torch.tensor(0.0).double(), torch.tensor([h, 0.0]).double()
    first = math.sqrt(2 * h / GRAVITY)
    for n in range(5):
        t, ys = ode.odeint_event(fall, y, t, event_fn=height, method=method)
        expected = first * (1 + 2 * sum(e**k for k in range(1, n + 1)))
        assert t.item() == pytest.approx(expected, rel=1e-9)
        assert abs(ys[-1][0].item()) < 1e-8
        y = torch.stack([torch.zeros(()).double(), -e * ys[-1][1]])


@pytest.mark.parametrize("adjoint", ["direct", "continuous", "reversible"])
def test_gradient_of_the_time_and_of_the_state(adjoint):
    """t* = sqrt(2 h / g) and v* = -sqrt(2 g h), as functions of h, g and the start."""
    h, g, t0 = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (10.0, 9.81, 0.5)
    )

    def field(t, y):
        return torch.stack([y[1], -g.expand(())])

    y0 = torch.stack([h, torch.zeros_like(h)])
    t, ys = ode.odeint_event(field, y0, t0, event_fn=height, adjoint=adjoint)
    found = torch.autograd.grad(t, [h, g, t0], retain_graph=True)
    root = math.sqrt(2 * 10 / 9.81)
    assert t.item() == pytest.approx(0.5 + root, rel=1e-10)
    for a, b in zip(found, (root / 20, -root / (2 * 9.81), 1.0), strict=True):
        assert a.item() == pytest.approx(b, rel=1e-6)
    found = torch.autograd.grad(ys[-1][1], [h, g])
    speed = math.sqrt(2 * 9.81 * 10)
    for a, b in zip(found, (-speed / 20, -speed / (2 * 9.81)), strict=True):
        assert a.item() == pytest.approx(b, rel=1e-6)
    height_found = torch.autograd.grad(
        ode.odeint_event(field, y0, t0, event_fn=height)[1][-1][0], [h, g]
    )
    # the height at the event is always zero
    assert all(abs(v.item()) < 1e-6 for v in height_found)


def test_an_event_that_depends_on_the_time_only():
    t, ys = ode.odeint_event(lambda t, y: -y, torch.ones(2).double(), 0.0,
                             event_fn=lambda t, y: t - 0.75)  # fmt: skip
    assert t.item() == pytest.approx(0.75, rel=1e-12)
    torch.testing.assert_close(
        ys[-1], torch.full((2,), math.exp(-0.75)).double(), rtol=1e-6, atol=0
    )


def test_reverse_time_tuples_and_several_components():
    def field(t, state):
        return -state[0], torch.ones_like(state[1])

    def event(t, state):
        return torch.cat([state[0] - 3.0, state[1] + 5.0])

    start = (torch.ones(1).double(), torch.zeros(1).double())
    t, (x, clock) = ode.odeint_event(field, start, 0.0, event_fn=event, reverse_time=True)
    assert t.item() == pytest.approx(-math.log(3.0), rel=1e-7)
    assert x[-1].item() == pytest.approx(3.0, rel=1e-7)
    assert clock[-1].item() == pytest.approx(-math.log(3.0), rel=1e-7)


def test_no_event_warns():
    with pytest.warns(RuntimeWarning, match="no_event"):
        t, ys = ode.odeint_event(lambda t, y: -y, torch.ones(1), 0.0, max_time=2.0,
                                 event_fn=lambda t, y: y + 1)  # fmt: skip
    assert t.item() == 2.0
    assert ys[-1].item() == pytest.approx(math.exp(-2), rel=1e-4)
    with pytest.raises(ValueError, match="step control"):
        ode.odeint_event(fall, torch.ones(2), 0.0, event_fn=height, method="rk4")


@pytest.mark.parametrize(
    ("settings", "status", "end"),
    [({"max_steps": 30}, "max_steps", None), ({}, "dt_underflow", 1.0)],
    ids=["max_steps", "pole"],
)
def test_a_solve_that_fails_before_the_event_returns_the_time_it_reached(settings, status, end):
    """y' = y^2 from 1 is 1 / (1 - t), and never negative."""
    y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    with pytest.warns(RuntimeWarning, match=status):
        t, ys = ode.odeint_event(
            lambda t, y: y * y, y0, 0.0, event_fn=lambda t, y: y + 1, **settings
        )
    assert 0.5 < t.item() < 1.00001
    if end is not None:
        assert t.item() == pytest.approx(end, abs=1e-5)
        assert 1e10 < ys[-1].item() < math.inf
    else:
        assert ys[-1].item() == pytest.approx(1 / (1 - t.item()), rel=1e-5)
        (grad,) = torch.autograd.grad(ys[-1], y0)
        assert grad.item() == pytest.approx(ys[-1].item() ** 2, rel=1e-5)


# --- events that have no derivative --------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        lambda t, y: torch.where(t > 0.5, 0.0, 1.0),
        lambda t, y: torch.where(t > 0.5, -1.0, 1.0),
        lambda t, y: torch.where(
            t > 0.5, -y, y
        ),  # its gradient would lead a Newton step elsewhere
        lambda t, y: torch.sign(0.5 - t) * (1 + y * y),
        lambda t, y: torch.where(t > 0.5, -1.0, 1.0) + 0 * y,
    ],
    ids=["to zero", "constant", "proportional", "sign", "zero gradient"],
)
@pytest.mark.parametrize("steps", [{}, {"method": "rk4", "step_size": 0.0625}])
def test_discontinuous_events(event, steps):
    """dy/dt = -k y: the event is at 0.5 whatever the state; the state there depends on k at that time."""
    k = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64)
    t, ys = ode.odeint_event(lambda t, y: -k * y, y0, 0.0, event_fn=event, **steps)
    assert t.item() == pytest.approx(0.5, abs=1e-12)
    assert ys[-1].item() == pytest.approx(math.exp(-0.5), rel=1e-5)
    (grad,) = torch.autograd.grad(ys[-1].sum(), k)
    assert grad.item() == pytest.approx(-0.5 * math.exp(-0.5), rel=1e-5)
    assert not t.requires_grad


def test_an_event_without_gradient_in_float32():
    t, ys = ode.odeint_event(lambda t, y: -torch.ones_like(y), torch.ones(1), 0.0,
                             event_fn=lambda t, y: torch.where(t > 0.5, 0.0, 1.0))  # fmt: skip
    assert t.item() == pytest.approx(0.5, abs=1e-6)
    assert ys[-1].item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("method", ["rk4", "midpoint", "dopri5"])
@pytest.mark.parametrize("reverse", [False, True])
def test_events_of_fixed_steps(method, reverse):
    """A parabola, which these methods follow exactly."""
    y0 = torch.tensor([10.0, 0.0], dtype=torch.float64, requires_grad=True)
    t, ys = ode.odeint_event(fall, y0, 1.0, event_fn=height, method=method, step_size=0.25,
                             reverse_time=reverse)  # fmt: skip
    root = math.sqrt(2 * 10 / GRAVITY) * (-1 if reverse else 1)
    assert t.item() == pytest.approx(1 + root, rel=1e-9)
    assert abs(ys[-1, 0].item()) < 1e-8
    (grad,) = torch.autograd.grad(t, y0)
    assert grad[0].item() == pytest.approx(root / 20, rel=1e-6)


def test_fixed_steps_without_an_event():
    with pytest.warns(RuntimeWarning, match="no_event"):
        t, _ = ode.odeint_event(lambda t, y: -y, torch.ones(1), 0.0, event_fn=lambda t, y: y + 1,
                                method="euler", step_size=0.1, max_time=1.05)  # fmt: skip
    assert t.item() == 1.05
    with pytest.warns(RuntimeWarning, match="max_steps"):
        ode.odeint_event(lambda t, y: -y, torch.ones(1), 0.0, event_fn=lambda t, y: y + 1,
                         method="euler", step_size=0.1, max_steps=5)  # fmt: skip
    with pytest.warns(RuntimeWarning, match="non_finite"):
        t, ys = ode.odeint_event(lambda t, y: y**4, torch.full((1,), 1e6), 0.0,
                                 event_fn=lambda t, y: y + 1, method="euler", step_size=0.1)  # fmt: skip
    assert torch.isfinite(ys).all()
