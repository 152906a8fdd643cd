"""Step control on the device of the state: the steps of the ordinary controller, and their gradients."""

import pytest
import torch
from laws import normal
from torch import nn

from pyflowkern import ode
from pyflowkern.ode.loops import device as device_control

ADAPTIVE = ["bosh3", "dopri5", "dopri8", "tsit5"]
SPANS = ([0.0, 5.0], [0.0, 0.0, 0.7, 0.71, 4.0, 9.0, 9.0], [1.0, 0.2, -3.0], [2.0, 2.0])
TIGHT = {"rtol": 1e-7, "atol": 1e-9}
SETTINGS = (
    {"rtol": 1e-4, "atol": 1e-5},
    {"rtol": 1e-6, "atol": 1e-8},
    {"first_step": 1e-3, "max_step": 0.2},
    {"min_step": 0.3},
)


def pendulum(t, y):
    """y'' = -sin y - 0.1 y' + cos 3t."""
    a, v = y[..., 0], y[..., 1]
    return torch.stack([v, -torch.sin(a) - 0.1 * v + torch.cos(3 * t)], -1)


def both(field, y0, times, **settings):
    return [ode.solve(field, y0, times, control=c, **settings) for c in ("batch", "device")]


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("check_every", [1, 8])
def test_steps_are_those_of_the_ordinary_controller(method, check_every):
    """The same decisions and, to the rounding of sums in another order, the same sizes.

    Every two of method, interval of checks, span and settings meet; not every three.
    """
    turn = ADAPTIVE.index(method) + (check_every > 1)
    for i, span in enumerate(SPANS):
        for j, settings in enumerate(SETTINGS):
            if (i + j + turn) % 2:
                continue
            # the host's controller looks at every step and has no check_every
            settings = settings | {"method": method, "check_every": check_every, "dense": True}
            a, b = both(pendulum, normal(7, 2), span, **settings)
            assert (a.status, a.stats.accepted, a.stats.rejected) == (
                b.status,
                b.stats.accepted,
                b.stats.rejected,
            )
            # step sizes follow from errors that may be 1e-12 of the state, of which rounding leaves four digits
            torch.testing.assert_close(b.dense.starts, a.dense.starts, rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(b.ys, a.ys, rtol=1e-8, atol=1e-8)
            if a.dense.starts:
                middle = sum(span[:: len(span) - 1]) / 2
                torch.testing.assert_close(b.dense(middle), a.dense(middle), rtol=1e-8, atol=1e-8)


def test_tuples_and_tolerances_and_norms_of_the_user():
    def field(t, state):
        return -state[0], torch.cos(5 * t) * torch.ones_like(state[1]) * 30

    state = (normal(5, 3), torch.zeros(5).double())
    for settings in (
        {"rtol": (1e-5, 1e-7), "atol": (1e-6, 1e-8)},
        {"norm": lambda r: torch.maximum(r[0].abs().max(), r[1].abs().max())},
    ):
        a, b = both(field, state, [0.0, 1.0, 2.0], **settings)
        assert (a.stats.accepted, a.stats.rejected) == (b.stats.accepted, b.stats.rejected)
        for x, y in zip(b.ys, a.ys, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_half_and_single_precision():
    for dtype in (torch.float32, torch.bfloat16):
        y0 = normal(7, 2, dtype=dtype)
        a, b = both(pendulum, y0, [0.0, 1.0, 3.0], rtol=1e-3, atol=1e-3)
        assert b.ys.dtype == dtype
        torch.testing.assert_close(b.ys, a.ys, rtol=2e-3, atol=2e-3)  # twice the tolerance


@pytest.mark.parametrize("check_every", [1, 7])
def test_how_a_solve_ends(check_every):
    """The statuses, counts and last finite states of the ordinary controller."""
    one = torch.ones(3).double()
    for field, y0, settings in (
        (lambda t, y: y * torch.nan, one, {}),
        (lambda t, y: y, one * torch.nan, {}),
        (lambda t, y: -y, one, {"max_steps": 3}),
        (lambda t, y: -y, one, {"max_steps": 1000}),
    ):
        a, b = both(field, y0, [0.0, 0.2, 2.0], check_every=check_every, **settings)
        assert (a.status, a.stats.accepted, a.stats.rejected) == (
            b.status,
            b.stats.accepted,
            b.stats.rejected,
        )
        torch.testing.assert_close(b.ys, a.ys, equal_nan=True)


@pytest.mark.parametrize("check_every", [1, 7])
def test_discontinuities_that_no_step_passes(check_every):
    """The field is NaN from t = 0.5 on, or has a pole at t = 1: shortened steps come close."""
    one = torch.ones(3).double()
    for field, wall in (
        (lambda t, y: torch.where(t > 0.5, torch.nan, -y), 0.5),
        (lambda t, y: y * y, 1.0),
    ):
        times = [0.0, 0.2, 2.0]
        a, b = both(field, one, times, check_every=check_every, dense=True)
        assert a.status == b.status != ode.Status.ok
        torch.testing.assert_close(b.ys[1], a.ys[1])
        assert torch.isfinite(b.ys).all()
        for s in (a, b):
            assert (
                abs(s.dense.starts[-1] - wall) < 1e-6
            )  # the tolerance, 1e-7, moves the second one


def test_the_host_asks_the_device_every_few_steps(monkeypatch):
    looks = []
    look = device_control._Solve.look
    monkeypatch.setattr(device_control._Solve, "look", lambda self: looks.append(1) or look(self))
    s = ode.solve(pendulum, normal(7, 2), [0.0, 5.0], control="device", check_every=8, **TIGHT)
    steps = s.stats.accepted + s.stats.rejected
    assert len(looks) == -(-steps // 8) + 2  # before the first step and at the end
    assert s.stats.evaluations == 2 + 6 * 8 * -(-steps // 8)  # dopri5 has six new stages


# --- gradients -----------------------------------------------------------------------------------


def gradients(control, adjoint, times, create_graph=False, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    y0 = normal(5, 3).requires_grad_()
    t = torch.tensor(times).double().requires_grad_()
    s = ode.solve(
        lambda t, y: net(y) * torch.cos(t),
        y0, t, control=control, adjoint=adjoint, **TIGHT, **settings,
    )  # fmt: skip
    loss = (s.ys * normal(*s.ys.shape, seed=4)).sum()
    leaves = [y0, t, *net.parameters()]
    found = torch.autograd.grad(loss, leaves, create_graph=create_graph)
    if create_graph:
        found += torch.autograd.grad(sum(g.square().sum() for g in found), [y0, *net.parameters()])
    return found


@pytest.mark.parametrize("check_every", [1, 8])
@pytest.mark.parametrize("times", [[0.0, 2.0], [0.0, 0.0, 0.3, 0.31, 2.0, 2.0], [1.0, -0.5]])
@pytest.mark.parametrize("adjoint", ["direct", "continuous"])
def test_gradients_are_those_of_the_ordinary_controller(adjoint, times, check_every):
    a = gradients("batch", adjoint, times)
    b = gradients("device", adjoint, times, check_every=check_every)
    for x, y in zip(b, a, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8)


def test_second_derivatives():
    a = gradients("batch", "direct", [0.0, 0.4, 1.0], create_graph=True)
    b = gradients("device", "direct", [0.0, 0.4, 1.0], create_graph=True, check_every=8)
    for x, y in zip(b, a, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_gradients_of_a_solve_that_ended_early():
    """Outputs that were not reached hold the last state, and have its gradient."""
    y0 = torch.ones(2).double()
    found = []
    for control in ("batch", "device"):
        leaf = y0.clone().requires_grad_()
        s = ode.solve(lambda t, y: -y, leaf, [0.0, 0.001, 9.0], control=control, max_steps=4)
        assert s.status == ode.Status.max_steps
        found.append(torch.autograd.grad(s.ys.sum(), leaf)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0)


# --- wrong arguments -----------------------------------------------------------------------------


def test_wrong_arguments():
    y0 = torch.ones(2).double()
    for message, settings in (
        ("control must be", {"control": "gpu"}),
        ("error weights", {"method": "rk4"}),
        ("no step_size", {"step_size": 0.1}),
        ("adjoint='direct' or 'continuous'", {"adjoint": "reversible"}),
        ("checkpoint=True", {"checkpoint": False}),
        ("without compat", {"compat": "torchdiffeq"}),
        ("check_every", {"check_every": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            ode.solve(lambda t, y: -y, y0, [0.0, 1.0], **({"control": "device"} | settings))


def test_the_backward_pass_sees_the_times_of_the_forward_pass():
    """A field that is NaN from some time on is evaluated there by neither pass: its gradient is finite."""
    gradients = []
    for control in ("batch", "device"):
        rate = torch.ones((), requires_grad=True)

        def field(t, y, rate=rate):
            return torch.where(t > 0.5, torch.full_like(y, torch.nan), -rate * y)

        s = ode.solve(field, torch.ones(3), [0.0, 1.0], control=control, rtol=1e-5, atol=1e-5)
        assert not s.ok
        gradients += torch.autograd.grad(s.ys[-1].sum(), rate)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=0)
