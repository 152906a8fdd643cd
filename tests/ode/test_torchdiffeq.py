"""The door for those who come from torchdiffeq: its functions, arguments, options and callbacks."""

import math
from functools import partial

import pytest
import torch
from laws.decay import ADAPTIVE, UNIT, Decay, start
from torch import nn

from pyflowkern import ode
from pyflowkern.ode import odeint, odeint_adjoint, odeint_dense, odeint_event

# --- the adjoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rk4", *ADAPTIVE])
def test_odeint_adjoint(method):
    """y(1) = exp(-a): the gradients in ``a``, ``y0`` and the times, by the backward solve."""
    f, y0, t = Decay(), start(2).requires_grad_(), UNIT.clone().requires_grad_()
    fixed = {"options": {"step_size": 0.01}} if method == "rk4" else {}
    y = odeint_adjoint(f, y0, t, method=method, rtol=1e-6, atol=1e-6, **fixed)
    a, b, c = torch.autograd.grad(y[-1].sum(), [f.a, y0, t])
    assert a.item() == pytest.approx(-2 * math.exp(-1), rel=1e-3)
    torch.testing.assert_close(b, torch.full_like(b, math.exp(-1)), rtol=1e-3, atol=0)
    torch.testing.assert_close(c, 2 * math.exp(-1) * torch.tensor([1.0, -1.0]).double(),
                               rtol=1e-3, atol=0)  # fmt: skip


def test_a_backward_solve_of_its_own():
    """Looser, by another method, with fixed steps: fewer evaluations, and what they give."""

    def backward(**settings):
        f = Decay()
        y = odeint_adjoint(f, start(2), UNIT, rtol=1e-9, atol=1e-9, **settings)
        f.times.clear()
        y[-1].sum().backward()
        return len(f.times), f.a.grad.item()

    calls, grad = backward()
    assert grad == pytest.approx(-2 * math.exp(-1), rel=1e-7)
    fewer, near = backward(adjoint_rtol=1e-3, adjoint_atol=1e-3)
    assert fewer < calls / 2
    assert near == pytest.approx(grad, rel=1e-2)
    fewer, near = backward(adjoint_method="bosh3", adjoint_rtol=1e-3, adjoint_atol=1e-3)
    assert near == pytest.approx(grad, rel=1e-2)
    steps, near = backward(adjoint_method="rk4", adjoint_options={"step_size": 0.25})
    assert steps == 16
    assert near == pytest.approx(grad, rel=1e-3)
    steps, _ = backward(adjoint_options={"max_step": 0.01})
    assert steps >= 600
    with pytest.raises(ValueError, match="adjoint_options"):
        backward(adjoint_method="rk4", options={"first_step": 0.1})


def test_norms_of_the_backward_solve():
    """With a parameter that needs no care, the full norm takes more steps than the one without parameters."""
    weight = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = weight.requires_grad_()
    seen = []

    def field(t, y):
        seen.append(1)
        return torch.tanh(y @ weight) * torch.sin(9 * t)

    def calls(**settings):
        y = odeint_adjoint(field, start(500, 2), UNIT, rtol=1e-7, atol=1e-7, **settings)
        seen.clear()
        torch.autograd.grad(y[-1].sum(), weight)
        return len(seen)

    full = calls()
    assert calls(adjoint_options={}) == full
    assert calls(adjoint_options={"norm": "seminorm"}) < full
    shapes = []

    def norm(parts):
        shapes.append([tuple(p.shape) for p in parts])
        return max(p.pow(2).mean().sqrt() for p in parts)

    assert calls(adjoint_params=(weight,), adjoint_options={"norm": norm}) == full
    assert shapes[0] == [(), (500, 2), (500, 2), (2, 2)]


def test_the_norm_of_a_tuple_is_given_all_entries():
    shapes = []

    def norm(parts):
        shapes.append([tuple(p.shape) for p in parts])
        return max(p.abs().max() for p in parts)

    state = (start(), start(2, 3))
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    _, y = odeint_adjoint(lambda t, s: (-s[0], -w * s[1]), state, UNIT, adjoint_params=[w],
                          adjoint_options={"norm": norm})  # fmt: skip
    y[-1].sum().backward()
    assert shapes[0] == [(), (), (2, 3), (), (2, 3), (3,)]
    torch.testing.assert_close(w.grad, torch.full_like(w, -2 * math.exp(-1)))


# --- options -------------------------------------------------------------------------------------


def test_options_of_step_control():
    f = Decay()
    many = ode.solve(f, start(1), UNIT, max_step=0.01).stats.accepted
    assert many >= 100
    f.times.clear()
    odeint(f, start(1), UNIT, options={"max_step": torch.tensor(0.01)})
    assert len(f.times) >= 600
    f.times.clear()
    odeint(f, start(1), UNIT, rtol=1e-9, options={"min_step": 0.5, "first_step": 0.5})
    assert len(f.times) < 20
    with pytest.warns(RuntimeWarning, match="max_steps"):
        odeint(f, start(1), UNIT, options={"max_num_steps": 2})
    odeint(f, start(1), UNIT, options={"dtype": torch.float64, "safety": 0.9, "ifactor": 10.0})
    calls = []

    def norm(r):
        calls.append(r.shape)
        return r.abs().max()

    odeint(f, start(3, 2), UNIT, options={"norm": norm})
    assert calls[0] == (3, 2)


def test_options_that_mean_nothing_are_warned_of():
    def warned(match, **settings):
        with pytest.warns(UserWarning, match=match):
            odeint(Decay(), start(1), UNIT, **settings)

    warned("'max_stepp'.*did you mean 'max_step'", options={"max_stepp": 1})
    warned("'first_step'.*'rk4' takes", method="rk4", options={"first_step": 0.1})
    warned("'interp'.*'dopri5' takes", options={"interp": "cubic"})
    with pytest.warns(UserWarning, match="adjoint_options"):
        odeint_adjoint(Decay(), start(1), UNIT, adjoint_options={"nonsense": 1})
    with pytest.raises(ValueError, match="safety"):
        odeint(Decay(), start(1), UNIT, options={"safety": 0.5})
    with pytest.raises(TypeError, match="dtype"):
        odeint(Decay(), start(1), UNIT, options={"dtype": "float64"})
    with pytest.raises(ValueError, match="once"):
        odeint(Decay(), start(1), UNIT, first_step=0.1, options={"first_step": 0.1})
    with pytest.raises(ValueError, match="exclude"):
        odeint(Decay(), start(1), UNIT, method="rk4",
               options={"step_size": 0.1, "grid_constructor": lambda f, y, t: t})  # fmt: skip
    with pytest.raises(ValueError, match="nearest is 'rk4'"):
        odeint(Decay(), start(1), UNIT, method="implicit_adams")


# --- events --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "interface", [odeint, odeint_adjoint, partial(odeint_adjoint, adjoint_params=())]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_event_fn(interface, dtype):
    """exp(-t) is 1/2 at log 2, and exp(t) at -log 2; the time has the dtype of ``t``."""

    def event(t, y):
        return y - 0.5

    y0 = torch.ones(1, dtype=dtype, requires_grad=True)
    t, y = interface(lambda t, y: -y, y0, torch.tensor([0.0, 1.0], dtype=dtype), event_fn=event)
    assert t.dtype == dtype
    assert y.shape == (2, 1)
    assert t.item() == pytest.approx(math.log(2), rel=1e-5)
    (grad,) = torch.autograd.grad(t, y0)
    assert grad.item() == pytest.approx(1.0, rel=1e-4)
    t, _ = interface(lambda t, y: y, y0, torch.tensor([0.0, -1.0], dtype=dtype), event_fn=event)
    assert t.item() == pytest.approx(-math.log(2), rel=1e-5)
    t0 = torch.tensor(0.0, dtype=dtype)
    t, y = odeint_event(lambda t, y: y, y0, t0, event_fn=event, reverse_time=True,
                        odeint_interface=interface, rtol=1e-6, atol=1e-6)  # fmt: skip
    assert t.dtype == dtype
    assert t.item() == pytest.approx(-math.log(2), rel=1e-4)
    with pytest.raises(ValueError, match="two times"):
        interface(lambda t, y: y, y0, [0.0, 1.0, 2.0], event_fn=event)


def test_odeint_dense():
    y = odeint_dense(lambda t, y: -y, start(2), torch.tensor(0.0), torch.tensor(1.0),
                     options={"max_step": 0.1})  # fmt: skip
    assert y(0.37)[0].item() == pytest.approx(math.exp(-0.37), rel=1e-7)
    with pytest.raises(ValueError, match="between"):
        y(1.5)


# --- beside torchdiffeq itself -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dopri5", "rk4", "heun3"])
def test_the_same_code_gives_the_same_numbers(method):
    import torchdiffeq as theirs

    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, y):
            return self.net(y) * torch.cos(t)

    t = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
    fixed = method in ("rk4", "heun3")
    settings = {"options": {"step_size": 0.05, "perturb": True, "interp": "cubic"}} if fixed else {
        "rtol": 1e-6, "atol": 1e-6, "options": {"first_step": 0.1, "jump_t": torch.tensor([0.7])}}  # fmt: skip
    found = []
    for interface in (theirs.odeint_adjoint, partial(odeint_adjoint, compat="torchdiffeq")):
        y = interface(Field(), start(3, 2), t, method=method, **settings)
        found.append((y, *torch.autograd.grad(y[-1].square().sum(), list(net.parameters()))))
    near = {"rtol": 1e-10, "atol": 1e-10} if fixed else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **near)
