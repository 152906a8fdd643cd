"""Steps that end at jumps of the field, steps on given grids, and callbacks."""

import math
import warnings
from functools import partial

import pytest
import torch
from laws.decay import ADAPTIVE, UNIT, Decay, start
from torch import nn

from pyflowkern import ode
from pyflowkern.ode import odeint, odeint_adjoint, odeint_event

# --- jumps ---------------------------------------------------------------------------------------


class Jump(nn.Module):
    """dy/dt = -a y before the time 0.5 and b after it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return -self.a * y if t < 0.5 else self.b.expand_as(y)


@pytest.mark.parametrize("adjoint", ["direct", "continuous", "reversible"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
def test_a_field_that_jumps(method, adjoint):
    """y(1) = exp(-a / 2) + b / 2, with the gradients; fewer evaluations than without jump_t."""
    fixed = {"step_size": 0.1} if method == "rk4" else {}
    f, y0 = Jump(), start(3).requires_grad_()
    t = torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0], dtype=torch.float64, requires_grad=True)
    # both are given in params: an evaluation at the start reads only one of them
    settings = {"method": method, "adjoint": adjoint, "params": tuple(f.parameters()), **fixed}
    y = odeint(f, y0, t, options={"jump_t": torch.tensor([0.5])}, **settings)
    first = math.exp(-0.25)
    exact = [1, math.exp(-0.125), first, first + 0.6, first + 1.0]
    torch.testing.assert_close(y[:, 0], torch.tensor(exact).double(), rtol=1e-6, atol=0)
    a, b, c, d = torch.autograd.grad(y[-1].sum(), [f.a, f.b, y0, t])
    assert a.item() == pytest.approx(-1.5 * first, rel=1e-5)
    assert b.item() == pytest.approx(1.5, rel=1e-6)
    torch.testing.assert_close(c, torch.full_like(c, first), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        d, 3 * torch.tensor([0.5 * first, 0, 0, 0, 2.0]).double(), rtol=1e-5, atol=1e-9
    )
    if method != "rk4" and adjoint == "direct":
        calls, g = f.calls, Jump()
        odeint(g, start(3), t.detach(), method=method)
        assert calls < g.calls


def test_jumps_backwards_in_time_and_for_every_controller():
    f = Jump()
    for control in ("batch", "device"):
        y = odeint(f, start(1), [1.0, 0.0], control=control, jump_t=[0.5])
        assert y[-1].item() == pytest.approx(0.0, abs=1e-8)
    with pytest.raises(ValueError, match="jump_t"):
        odeint(lambda t, y: -y, start(1, 1), [0.0, 1.0], control="sample", jump_t=[0.5])
    with pytest.raises(ValueError, match="NaN"):
        odeint(f, start(1), [0.0, 1.0], jump_t=[math.nan])
    with pytest.raises(TypeError, match="jump_t"):
        odeint(f, start(1), [0.0, 1.0], jump_t=0.5)


def test_jumps_out_of_range_repeated_and_at_an_output():
    plain = odeint(Decay(), start(1), [0.0, 0.5, 1.0])
    for jumps in ([], [-1.0, 0.0, 1.0, 7.0]):
        assert torch.equal(odeint(Decay(), start(1), [0.0, 0.5, 1.0], jump_t=jumps), plain)
    y = odeint(Decay(), start(1), [0.0, 0.5, 1.0],
               options={"jump_t": torch.tensor([0.5, 0.5]), "step_t": [0.25], "grid_points": [0.75]})  # fmt: skip
    torch.testing.assert_close(y, plain, rtol=1e-6, atol=0)


def test_a_solve_that_fails_after_a_jump():
    """dy/dt = 0 and then y^2 from 1: the pole is at 1.5."""

    def field(t, y):
        return 0 * y if t < 0.5 else y * y

    s = ode.solve(field, start(1), [0.0, 0.25, 1.0, 2.0], jump_t=[0.5], dense=True)
    assert s.status in (ode.Status.dt_underflow, ode.Status.non_finite)
    assert s.ys[2].item() == pytest.approx(2.0, rel=1e-6)
    assert torch.isfinite(s.ys).all()
    assert s.dense(0.4).item() == 1.0
    assert s.dense(1.0).item() == pytest.approx(2.0, rel=1e-5)
    s = ode.solve(field, start(1), [0.0, 1.0], jump_t=[0.5], max_steps=3)
    assert s.status == ode.Status.max_steps
    assert s.stats.accepted + s.stats.rejected <= 3


@pytest.mark.parametrize("jump_t", [None, [0.5]])
def test_reversible_steps_pass_a_jump_in_single_precision(jump_t):
    """With a rate of 2 and then of 6, y(1) = y0 e^-4 and dy(1)/da = -2 y0 e^-4; tolerances are the defaults.

    Rounding keeps the two states of a reversible solve apart, and steps must not shrink until they do come closer.
    """
    a = torch.ones((), requires_grad=True)
    y0 = torch.tensor([1.0, 2.0], requires_grad=True)
    options = {} if jump_t is None else {"jump_t": jump_t}
    y = odeint(lambda t, y: -2 * a * y * (1 if t < 0.5 else 3), y0, [0.0, 1.0],
               adjoint="reversible", options=options)  # fmt: skip
    by_y, by_a = torch.autograd.grad(y[-1].sum(), (y0, a))
    exact = math.exp(-4)
    torch.testing.assert_close(y[-1], exact * y0.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(by_y, torch.full((2,), exact), rtol=1e-4, atol=0)
    assert by_a.item() == pytest.approx(-4 * 3 * exact, rel=1e-4)


@pytest.mark.parametrize(
    "settings", [{"rtol": 1e-14, "atol": 1e-30}, {"options": {"max_num_steps": 3}}], ids=str
)
def test_the_warning_of_a_solve_that_ends_at_a_jump_says_what_helps(settings):
    """The field jumps back and forth at 0.5: no step across it is short enough."""
    with pytest.warns(RuntimeWarning, match=r"larger rtol.*jump_t"):
        odeint(
            lambda t, y: torch.where(t < 0.5, 1e9, -1e9) * y.abs(),
            start(2),
            [0.0, 1.0],
            **settings,
        )


def test_events_after_a_jump():
    f = Jump()
    t, y = odeint_event(f, start(1), 0.0, event_fn=lambda t, y: y - 1.2, jump_t=[0.5])
    exact = 0.5 + (1.2 - math.exp(-0.25)) / 2
    assert t.item() == pytest.approx(exact, rel=1e-7)
    assert y[-1].item() == pytest.approx(1.2, rel=1e-7)


# --- fixed steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("interface", [odeint, partial(odeint_adjoint, adjoint_params=())])
def test_grid_constructor(interface):
    """Ten Euler steps of dy/dt = y: 1.1^10, forwards and in the gradient, which has a grid of its own."""
    asked = []

    def grid(func, y0, t):
        asked.append(t.tolist())
        return torch.linspace(t[0].item(), t[1].item(), 11)

    y0 = start(1).requires_grad_()
    y = interface(lambda t, y: y, y0, UNIT, method="euler", options={"grid_constructor": grid})
    assert y[-1].item() == pytest.approx(1.1**10, rel=1e-6)
    y[-1].sum().backward()
    assert y0.grad.item() == pytest.approx(1.1**10, rel=1e-6)
    assert asked[0] == [0.0, 1.0]
    assert asked[1:] in ([], [[1.0, 0.0]])


def test_grids_that_do_not_fit():
    for bad, match in (
        ([0.0, 0.5], "last"),
        ([0.1, 1.0], "first"),
        ([0.0, 0.6, 0.5, 1.0], "monotone"),
    ):
        with pytest.raises(ValueError, match=match):
            odeint(Decay(), start(1), UNIT, method="euler", grid=lambda times, bad=bad: bad)


@pytest.mark.parametrize("adjoint", ["direct", "continuous"])
def test_output_between_the_steps_of_a_grid(adjoint):
    """Linear or cubic between the steps 0, 1/2, 1 of a method of order 4."""
    y0 = start(1).requires_grad_()
    for interp, rel in (("linear", 4e-2), ("cubic", 1e-3)):
        y = odeint(Decay(), y0, [0.0, 0.25, 0.5, 1.0], method="rk4", interp=interp, adjoint=adjoint,
                   grid=lambda t: [t[0], 0.5 * (t[0] + t[-1]), t[-1]])  # fmt: skip
        assert y[1].item() == pytest.approx(math.exp(-0.25), rel=rel)
        assert (interp == "cubic") == (abs(y[1].item() - math.exp(-0.25)) < 1e-3)
        (grad,) = torch.autograd.grad(y[1], y0)
        assert grad.item() == pytest.approx(math.exp(-0.25), rel=rel)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
@pytest.mark.parametrize("adjoint", [False, True])
def test_perturb(method, adjoint):
    """The field is never evaluated at the ends of steps but just beside them, also in the backward solve."""
    f = Decay()
    interface = odeint_adjoint if adjoint else odeint
    for perturb in (False, True):
        f.times.clear()
        y = interface(
            f, start(1), UNIT, method=method, options={"step_size": 0.5, "perturb": perturb}
        )
        ends = {0.0, 0.5, 1.0} & set(f.times)
        assert (not ends) if perturb else ({0.0, 0.5} <= ends)
        f.times.clear()
        (grad,) = torch.autograd.grad(y[-1].sum(), f.a)
        assert ({0.0, 0.5, 1.0}.isdisjoint(f.times)) == perturb
        exact = -math.exp(-1) if method == "rk4" else grad.item()
        assert grad.item() == pytest.approx(exact, rel=5e-3)


# --- callbacks -----------------------------------------------------------------------------------


class Recording(nn.Module):
    """A field whose callbacks record the steps."""

    def __init__(self, names):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
        self.told = {name: [] for name in names}
        for name in names:
            setattr(self, name, partial(self._keep, name))

    def _keep(self, name, t, y, dt):
        self.told[name].append((t.item(), y, dt.item()))

    def forward(self, t, y):
        return torch.cos(40 * self.w * t**2) * torch.ones_like(y) + 0 * y


NAMES = ["callback_step", "callback_accept_step", "callback_reject_step"]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_callbacks_of_adaptive_steps(method):
    f = Recording(NAMES)
    s = ode.solve(f, start(2), [1.0, 0.0], method=method, rtol=1e-5, atol=1e-5)
    tried, kept, again = (f.told[name] for name in NAMES)
    assert len(kept) == s.stats.accepted
    assert len(again) == s.stats.rejected > 0
    assert len(tried) == len(kept) + len(again)
    assert all(dt > 0 for _, _, dt in tried)
    assert kept[0][0] == 1.0
    assert torch.equal(kept[0][1], start(2))
    assert sum(dt for _, _, dt in kept) == pytest.approx(1.0)


def test_callbacks_of_fixed_steps_and_of_tuples():
    f = Recording(NAMES[:1])
    odeint(
        lambda t, s: (f(t, s[0]), -s[1]), (start(2), start()), UNIT, method="rk4", step_size=0.1
    )
    assert f.told["callback_step"] == []  # a function has none

    class Pair(Recording):
        def forward(self, t, s):
            return super().forward(t, s[0]), -s[1]

    f = Pair(NAMES[:1])
    odeint(f, (start(2), start()), UNIT, method="rk4", step_size=0.1)
    assert len(f.told["callback_step"]) == 10
    assert [v.shape for v in f.told["callback_step"][3][1]] == [(2,), ()]


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_callbacks_of_the_backward_solve(method):
    names = [n + "_adjoint" for n in (NAMES if method == "dopri5" else NAMES[:1])]
    f = Recording(names)
    fixed = {"options": {"step_size": 0.1}} if method == "rk4" else {"rtol": 1e-5, "atol": 1e-5}
    y = odeint_adjoint(f, start(2), UNIT, method=method, **fixed)
    assert f.told[names[0]] == []
    y[-1].sum().backward()
    tried = f.told[names[0]]
    assert len(tried) == 10 if method == "rk4" else len(tried) > 10
    assert [tuple(v.shape) for v in tried[0][1]] == [(), (2,), (2,), ()]
    if method == "dopri5":
        assert len(tried) == len(f.told[names[1]]) + len(f.told[names[2]])


@pytest.mark.parametrize(
    ("names", "settings"),
    [(NAMES[1:2], {"method": "rk4"}), (NAMES[2:], {"method": "euler", "step_size": 0.5}),
     (NAMES[:1], {"control": "sample"}), (NAMES[:1], {"control": "device"}),
     (NAMES[:1], {"adjoint": "reversible"})],
)  # fmt: skip
def test_callbacks_that_are_not_called_give_a_warning(names, settings):
    class Plain(Recording):
        def forward(self, t, y):
            return -y

    with pytest.warns(UserWarning, match=names[0]):
        odeint(Plain(names), start(1, 1), [0.0, 1.0], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odeint(Plain([]), start(1, 1), [0.0, 1.0], **settings)
