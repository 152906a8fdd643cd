"""torchdiffeq's functions by our solvers: its numbers, gradients, counts of evaluations and exceptions."""

import math
from functools import partial

import pytest
import torch
import torchdiffeq as theirs
from torch import nn

from pyflowkern.interop import torchdiffeq as ours

ADAPTIVE = ["dopri5", "dopri8", "bosh3"]
FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]


class Field(nn.Module):
    """A small network of state, and of time, that counts its evaluations."""

    def __init__(self, timed=True):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        self.timed = timed
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return self.net(y * (1 + t) if self.timed else y)


def solved(interface, times, timed=True, needs_t=False, **settings):
    """Return states, gradients of state, parameters and times, and evaluations forward and in all."""
    field, y0 = Field(timed), torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    t = torch.tensor(times, dtype=torch.float64, requires_grad=needs_t)
    y0.requires_grad_()
    y = interface(field, y0, t, **settings)
    forward = field.calls
    wanted = [y0, *field.parameters(), *([t] if needs_t else [])]
    grads = torch.autograd.grad(y[1:].square().sum(), wanted)
    return [y, *grads], (forward, field.calls)


def compare(name, times, near, grads_near=None, counts=True, **settings):
    found, want = (solved(getattr(lib, name), times, **settings) for lib in (ours, theirs))
    if counts:
        assert found[1] == want[1]
    for i, (a, b) in enumerate(zip(found[0], want[0], strict=True)):
        tolerance = near if i == 0 or grads_near is None else grads_near
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("times", [[0.0, 0.4, 1.0], [1.0, 0.3, -0.5]])
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps(method, times):
    compare("odeint", times, 1e-10, method=method, options={"step_size": 0.15})
    compare("odeint", times, 1e-10, method=method)
    perturbed = {"step_size": 0.15, "perturb": True}
    compare("odeint_adjoint", times, 1e-10, method=method, options=perturbed)
    # the slope at the end of each step is asked for once more
    compare("odeint_adjoint", times, 1e-10, counts=False, method=method,
            options=perturbed | {"interp": "cubic"})  # fmt: skip


def test_fixed_steps_are_one_graph():
    settings = {"method": "rk4", "options": {"step_size": 0.15}}
    compare("odeint", [0.0, 0.4, 1.0], 1e-10, needs_t=True, **settings)
    y0 = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    t, field = torch.tensor([0.0, 1.0], dtype=torch.float64), Field()
    twice = []
    for lib in (ours, theirs):
        y = lib.odeint(field, y0, t, **settings)
        (grad,) = torch.autograd.grad(y[-1].square().sum(), y0, create_graph=True)
        twice.append(torch.autograd.grad(grad.square().sum(), [y0, *field.parameters()][:-1]))
    torch.testing.assert_close(*twice, rtol=1e-10, atol=1e-10)
    y = ours.odeint(field, y0, t, **settings)
    nodes = [y.grad_fn]
    for node in nodes:
        parents = {parent for parent, _ in node.next_functions} - {None, *nodes}
        nodes += parents
    names = {node.name() for node in nodes}
    assert "TanhBackward0" in names
    assert "DirectBackward" not in names


def test_fields_that_differentiate_by_their_state():
    field = Field()

    def force(t, y):
        energy = field(t, y).square().sum()
        return -torch.autograd.grad(energy, y, create_graph=True)[0]

    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for y0 in (torch.ones(3, 2).double(), torch.ones(3, 2).double().requires_grad_()):
        y = ours.odeint(force, y0, t, method="midpoint", options={"step_size": 0.25})
        grads = torch.autograd.grad(y[-1].sum(), [*field.parameters()][:-1])
        start = y0.detach().requires_grad_()
        want = theirs.odeint(force, start, t, method="midpoint", options={"step_size": 0.25})
        torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
        want_grads = torch.autograd.grad(want[-1].sum(), [*field.parameters()][:-1])
        torch.testing.assert_close(grads, want_grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
def test_gradients_of_the_times(name):
    compare(name, [0.0, 0.4, 1.0], 1e-7, 1e-5, counts=False, needs_t=True, rtol=1e-8, atol=1e-8)


def test_a_grid_of_its_own():
    def grid(func, y0, t):
        return torch.linspace(float(t[0]), float(t[-1]), 8, dtype=torch.float64)

    compare("odeint", [0.0, 0.4, 1.0], 1e-10, method="rk4", options={"grid_constructor": grid})


@pytest.mark.parametrize("times", [[0.0, 0.4, 1.0], [1.0, 0.3, -0.5]])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_steps_with_control(method, times):
    loose = {"method": method, "rtol": 1e-5, "atol": 1e-5}
    compare("odeint", times, 1e-10, 1e-4, **loose)
    compare("odeint", times, 1e-10, options={"first_step": 0.05, "max_step": 0.2}, **loose)
    compare("odeint_adjoint", times, 1e-10, timed=False, **loose)
    # torchdiffeq has the gradient of the time in the norm of the backward solve, whether it is wanted or not
    # (dopri8 then has errors that are rounding alone, and so differ, and with them its steps by 1e-9)
    tight = {"method": method, "rtol": 1e-6, "atol": 1e-7}
    compare("odeint_adjoint", times, 1e-8, 1e-4, counts=False, **tight)
    compare("odeint_adjoint", times, 1e-10, timed=False, adjoint_rtol=1e-4, adjoint_atol=1e-4,
            adjoint_options={"norm": "seminorm"}, **loose)  # fmt: skip


def test_a_jump_is_a_step():
    got, want = (
        lib.odeint(lambda t, y: torch.where(t < 0.5, -y, y), torch.ones(2, dtype=torch.float64),
                   torch.tensor([0.0, 1.0]), options={"jump_t": torch.tensor([0.5])})
        for lib in (ours, theirs)
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
def test_states_that_are_tuples(name, method):
    def run(lib):
        w = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
        state = (torch.ones(2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64))
        more = {"adjoint_params": (w,)} if name == "odeint_adjoint" else {"atol": (1e-6, 1e-7)}
        a, b = getattr(lib, name)(lambda t, s: (w * s[0], s[1] * s[0] - t * s[1]), state,
                                  torch.linspace(0, 1, 4).double(), method=method, rtol=1e-6,
                                  **more)  # fmt: skip
        (grad,) = torch.autograd.grad(a[-1].sum() + b.square().sum(), w)
        return a.detach(), b.detach(), grad

    for got, want, near in zip(run(ours), run(theirs), (1e-10, 1e-10, 1e-4), strict=True):
        torch.testing.assert_close(got, want, rtol=near, atol=near)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
def test_events(name, reverse):
    def run(lib, interface):
        speed = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        class Growth(nn.Module):
            def __init__(self):
                super().__init__()
                self.speed = speed

            def forward(self, t, y):
                return (-speed if not reverse else speed) * y

        y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
        t, y = lib.odeint_event(Growth(), y0, torch.tensor(0.25, dtype=torch.float64), reverse_time=reverse,
                                event_fn=lambda t, y: y - 0.5, odeint_interface=interface, atol=1e-10)  # fmt: skip
        return t, y, *torch.autograd.grad(t + y[-1].sum(), [y0, speed])

    want = run(theirs, getattr(theirs, name))
    for interface in (
        getattr(ours, name),
        getattr(theirs, name),
        partial(getattr(ours, name), rtol=1e-7),
    ):
        for a, b in zip(run(ours, interface), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    sign = -1 if reverse else 1
    assert want[0].item() == pytest.approx(0.25 + sign * math.log(2) / 1.5, abs=1e-8)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "implicit_adams"},
        {"method": "adaptive_heun", "rtol": 1e-3},
        {"method": "fehlberg2", "rtol": 1e-3},
        {"method": "explicit_adams", "options": {"step_size": 0.1}},
        {"options": {"safety": 0.5}},
        {"options": {"dtype": torch.float32}},
        {"options": {"max_num_steps": 100}},
    ],
)
def test_what_only_torchdiffeq_has_is_left_to_it(settings):
    compare("odeint", [0.0, 0.4, 1.0], 0.0, **settings)
    compare("odeint_adjoint", [0.0, 0.4, 1.0], 0.0, **settings)


def test_options_that_a_method_does_not_have_are_warned_of_and_ignored():
    with pytest.warns(UserWarning, match="step_size"):
        compare("odeint", [0.0, 1.0], 0.0, options={"step_size": 0.5})
    with pytest.raises(ValueError, match="Invalid method"):
        ours.odeint(Field(), torch.ones(1, 2).double(), torch.tensor([0.0, 1.0]), method="rk5")


def test_failures_raise_as_there():
    def square(t, y):
        return y**2

    y0, t = torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 2.0])
    for lib in (ours, theirs):
        with pytest.raises(AssertionError, match="underflow in dt"):
            lib.odeint(square, y0, t)
        with pytest.raises(AssertionError, match="max_num_steps exceeded"):
            lib.odeint(square, y0, t, options={"max_num_steps": 5})
        y = lib.odeint(square, y0, torch.linspace(0.0, 20.0, 41), method="euler")
        assert y[1].isfinite().all()
        assert not y[-1].isfinite().any()


def test_function_transforms_run_torchdiffeq():
    y0, t = torch.randn(4, 2), torch.tensor([0.0, 1.0])

    def loss(y):
        return ours.odeint(lambda t, y: -y * y, y, t, method="rk4")[-1].sum()

    y0.requires_grad_()
    (want,) = torch.autograd.grad(loss(y0), y0)
    torch.testing.assert_close(torch.func.grad(loss)(y0.detach()), want)


def test_without_torchdiffeq_the_error_says_what_it_is_for(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    y = ours.odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))
    assert y[-1].item() == pytest.approx(math.exp(-1), rel=1e-5)
    with pytest.raises(ImportError, match="needs torchdiffeq"):
        ours.odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), method="implicit_adams")  # fmt: skip
