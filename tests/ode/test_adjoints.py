"""Gradients: against closed forms, against autograd through the steps, and what they keep in memory."""

import gc
import math

import pytest
import torch
from laws import normal
from torch import nn

from pyflowkern import ode
from pyflowkern.ode.adjoints.reversible import back
from pyflowkern.ode.adjoints.steps import differentiable_step
from pyflowkern.ode.steppers import Stepper, stage_times
from pyflowkern.ode.tableaus import TABLEAUS, coefficients

ADJOINTS = ["direct", "continuous", "reversible"]
PLAIN = (torch.Tensor, nn.Parameter)  # and not the fake tensors that compilation leaves behind
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


class Field(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.first, self.second = nn.Linear(width + 1, 16).double(), nn.Linear(16, width).double()

    def forward(self, t, y):
        if t.dim() == 0:
            t = t.expand(len(y))
        return self.second(torch.tanh(self.first(torch.cat([y, t[:, None]], 1))))


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


# --- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_affine_flow(adjoint, direction):
    """y' = A y + b: gradients of <g, y(T)> in y0, A, b and T against matrix exponentials."""
    matrix, shift, y0 = leaves(0.5 * normal(3, 3), normal(3, seed=1), normal(4, 3, seed=2))
    ends = torch.tensor([0.2, 0.2 + direction * 0.9], dtype=torch.float64, requires_grad=True)
    g = normal(4, 3, seed=3)
    y = ode.odeint(lambda t, y: y @ matrix.T + shift, y0, ends, adjoint=adjoint, **TIGHT)
    found = torch.autograd.grad((y[-1] * g).sum(), [y0, matrix, shift, ends])

    def exact(y0, matrix, shift, ends):
        augmented = torch.cat([torch.cat([matrix, shift[:, None]], 1), torch.zeros(1, 4).double()])
        flow = torch.linalg.matrix_exp(augmented * (ends[1] - ends[0]))
        return y0 @ flow[:3, :3].T + flow[:3, 3]

    expected = torch.autograd.grad(
        (exact(y0, matrix, shift, ends) * g).sum(), [y0, matrix, shift, ends]
    )
    torch.testing.assert_close(y[-1], exact(y0, matrix, shift, ends), rtol=1e-7, atol=1e-7)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # 1e-9 a step, some 100 steps


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_affine_flow_changes_the_log_density_by_the_trace(adjoint):
    """With d log p / dt = -tr A the change is -T tr A exactly, and its gradient -T I."""
    (matrix,) = leaves(0.5 * normal(3, 3))

    def field(t, state):
        y, log_p = state
        return y @ matrix.T, -torch.trace(matrix).expand(log_p.shape)

    state = (normal(5, 3, seed=1), torch.zeros(5).double())
    log_p = ode.odeint(field, state, [0.0, 1.5], adjoint=adjoint)[1][-1]
    torch.testing.assert_close(log_p, (-1.5 * torch.trace(matrix)).expand(5), rtol=1e-12, atol=0)
    (found,) = torch.autograd.grad(log_p.sum(), matrix)
    torch.testing.assert_close(found, -7.5 * torch.eye(3).double(), rtol=1e-7, atol=1e-12)


# --- the discrete gradient -----------------------------------------------------------------------


def rounding(a, b):
    """Equal up to rounding: a few hundred operations on numbers of order one."""
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", sorted(TABLEAUS))
@pytest.mark.parametrize("checkpoint", [True, False])
def test_direct_is_autograd_through_the_steps(name, checkpoint):
    """With fixed steps, against autograd through a plain loop."""
    field, (y0,) = Field(), leaves(normal(4, 3))
    ts, g = [0.0, 0.5, 0.5, 1.0], normal(4, 4, 3, seed=5)
    ys = ode.odeint(field, y0, ts, method=name, step_size=0.25, checkpoint=checkpoint)
    found = torch.autograd.grad((ys * g).sum(), [y0, *field.parameters()])
    t, y, states = TABLEAUS[name], y0, [y0]
    c = coefficients(t, torch.float64, y0.device)
    for i in range(4):
        y, _ = differentiable_step(field, t, stage_times(c, 0.25 * i, 0.25, False), 0.25, y)
        states.append(y)
    plain = torch.stack([states[0], states[2], states[2], states[4]])
    expected = torch.autograd.grad((plain * g).sum(), [y0, *field.parameters()])
    rounding(ys, plain)
    for a, b in zip(found, expected, strict=True):
        rounding(a, b)


SETTINGS = [
    {"method": name, "compat": compat, "adjoint": "direct", "checkpoint": checkpoint}
    for name in ("dopri5", "bosh3", "tsit5", "dopri8")
    for compat in (None, "torchdiffeq")
    for checkpoint in (True, False)
]
SETTINGS += [{"method": "dopri5", "control": "sample"}]
SETTINGS += [{"method": name, "adjoint": "reversible"} for name in ("dopri5", "bosh3")]
SETTINGS += [{"method": "rk4", "step_size": 0.1, "adjoint": "reversible"}]
SETTINGS += [{"method": "rk4", "step_size": 0.13, "compat": "torchdiffeq"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_are_those_of_the_replay(settings):
    """The backward pass against autograd through the accepted steps, which runs under create_graph."""
    field, (y0,) = Field(), leaves(normal(4, 3))
    for ts in ([0.0, 0.3, 0.31, 1.0], [1.0, 0.2, -0.5]):
        g = normal(len(ts), 4, 3, seed=5)
        ys = ode.odeint(field, y0, ts, rtol=1e-5, atol=1e-5, **settings)
        variables = [y0, *field.parameters()]
        by_hand = torch.autograd.grad((ys * g).sum(), variables, retain_graph=True)
        replayed = torch.autograd.grad((ys * g).sum(), variables, create_graph=True)
        for a, b in zip(by_hand, replayed, strict=True):
            # the reversible states of the backward pass differ from the forward pass's by rounding
            rounding(a, b)


@pytest.mark.parametrize(
    "settings",
    [{}, {"adjoint": "reversible"}, {"control": "sample"}, {"method": "rk4", "step_size": 0.25}],
    ids=str,
)
def test_double_backward(settings):
    """gradgradcheck, of states and of parameters reached through a closure, at fixed step sizes."""

    def solve(y0, weight):
        def field(t, y):
            return torch.tanh(y @ weight)

        # steps so coarse that finite differences do not change their number
        return ode.odeint(
            field, y0, [0.0, 0.5, 1.0], **({"first_step": 0.5, "rtol": 1e3} | settings)
        )

    inputs = leaves(normal(2, 3), normal(3, 3, seed=1))
    torch.autograd.gradcheck(solve, inputs)
    torch.autograd.gradgradcheck(solve, inputs)


def test_gradients_through_the_first_state_and_through_the_field():
    """The first state depends on a parameter of the field: its gradient is the sum of both contributions."""
    for settings in ({}, {"adjoint": "continuous", **TIGHT}, {"adjoint": "reversible"}):
        (rate,) = leaves(torch.tensor(0.7).double())
        y = ode.odeint(
            lambda t, y, rate=rate: rate * y, rate.exp()[None] * 1.0, [0.0, 1.0], **settings
        )[-1]
        (first,) = torch.autograd.grad(y.sum(), rate, retain_graph=True)
        assert first.item() == pytest.approx(2 * math.exp(1.4), rel=1e-6)  # d e^(2 r)
        if settings.get("adjoint") == "continuous":
            continue
        (graph,) = torch.autograd.grad(y.sum(), rate, create_graph=True)
        assert graph.item() == pytest.approx(2 * math.exp(1.4), rel=1e-6)
        (second,) = torch.autograd.grad(graph, rate)
        assert second.item() == pytest.approx(4 * math.exp(1.4), rel=1e-5)


def test_named_parameters_that_are_not_leaves():
    (seed,) = leaves(torch.tensor(0.5).double())
    rate = seed * 2
    y = ode.odeint(lambda t, y: rate * y, torch.ones(1).double(), [0.0, 1.0], params=[rate])
    (y.sum() + rate).backward()
    assert seed.grad.item() == pytest.approx(2 * math.e + 2, rel=1e-6)


def test_unused_parameters_and_constant_fields():
    """Parameters that are not used, fields that are zero, fields without parameters."""
    unused = nn.Linear(3, 3)

    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = unused

        def forward(self, t, y):
            return torch.zeros_like(y)

    (y0,) = leaves(normal(2, 3))
    for adjoint in ADJOINTS:
        y = ode.odeint(Still(), y0, [0.0, 1.0], adjoint=adjoint)
        (found,) = torch.autograd.grad(y[-1].sum(), y0)
        assert torch.equal(found, torch.ones_like(y0))
    assert not ode.odeint(lambda t, y: -y, y0.detach(), [0.0, 1.0]).requires_grad
    with torch.no_grad():
        assert not ode.odeint(Field(), y0, [0.0, 1.0]).requires_grad


def test_autocast_holds_in_the_backward_pass():
    field, (y0,) = nn.Linear(3, 3), leaves(normal(4, 3, dtype=torch.float32))
    seen = []

    def call(t, y):
        out = field(y)
        seen.append((y.dtype, out.dtype))
        return torch.tanh(out)

    with torch.autocast("cpu", torch.bfloat16):
        y = ode.odeint(call, y0, [0.0, 1.0], method="rk4", step_size=0.5)
    y[-1].sum().backward()
    assert y.dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert torch.isfinite(field.weight.grad).all()


# --- reversibility -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["midpoint", "rk4", "dopri5"])
@pytest.mark.parametrize("coupling", [1.0, 0.99, 0.9])
def test_reversible_round_trip(name, coupling):
    """Steps forward and back give the start again, up to rounding times coupling^-n."""
    field, y0, n, h = Field(), normal(4, 3), 40, 0.05
    t = TABLEAUS[name]
    with torch.no_grad():
        stepper = Stepper(field, t, y0)
        y = z = y0
        for i in range(n):
            step = stepper.increment(i * h, (i + 1) * h - i * h, z)
            y1 = torch.lerp(z, y, coupling) + step
            z = z - stepper.increment((i + 1) * h, -((i + 1) * h - i * h), y1)
            y = y1
        for i in reversed(range(n)):
            y, z = back(field, t, coupling, i * h, (i + 1) * h, y, z)
    allowed = 50 * torch.finfo(torch.float64).eps * n * coupling**-n
    assert (y - y0).abs().max() < allowed
    assert (z - y0).abs().max() < allowed


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_reversible_solver_keeps_the_order(name, order):
    errors = []
    for n in (32, 64):
        y = ode.odeint(lambda t, y: y * torch.cos(t), torch.ones(1).double(), [0.0, 2.0],
                       method=name, step_size=2 / n, adjoint="reversible")  # fmt: skip
        errors.append(abs(y[-1].item() - math.exp(math.sin(2.0))))
    assert order - 0.3 < math.log2(errors[0] / errors[1]) < order + 1.6


@pytest.mark.parametrize(("rate", "end"), [(1.0, 10.0), (5.0, 2.0), (10.0, 2.0)])
def test_reversible_pairs_stay_close_where_the_field_contracts(rate, end):
    """Uncontrolled, the parasitic solution would grow by 0.99 e^(rate h) a step, unseen by the error estimate."""

    def field(t, y):
        return -rate * (y - torch.cos(t))

    y0 = torch.ones(1).double()
    exact = ode.odeint(field, y0, [0.0, end], rtol=1e-10, atol=1e-10)[-1]
    found = ode.solve(field, y0, [0.0, end], adjoint="reversible", rtol=1e-5, atol=1e-5)
    assert found.ok
    torch.testing.assert_close(found.ys[-1], exact, rtol=0, atol=1e-4)


# --- memory --------------------------------------------------------------------------------------


def kept(adjoint, steps, **settings):
    """Bytes that the graph of a solve keeps alive."""
    field, (y0,) = Field(), leaves(normal(64, 3))
    gc.collect()
    before = live()
    y = ode.odeint(
        field, y0, [0.0, 1.0], method="rk4", step_size=1 / steps, adjoint=adjoint, **settings
    )
    gc.collect()
    after = live()
    assert y.requires_grad
    return after - before


def live():
    seen = {}
    for o in gc.get_objects():
        if type(o) in PLAIN:
            storage = o.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def test_memory():
    """One state a step by default, nothing that grows with the steps otherwise."""
    state = 64 * 3 * 8
    growth = kept("direct", 100) - kept("direct", 50)
    assert growth <= 51 * state
    for adjoint in ("continuous", "reversible"):
        assert kept(adjoint, 100) <= kept(adjoint, 50) + state


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_solves_leak_no_memory(adjoint):
    """After 100 solves with first and second gradients no tensor is left, without the garbage collector."""
    field, (y0,) = Field(1), leaves(normal(1, 1))
    settings = {"method": "bosh3", "first_step": 1.0, "rtol": 1e3, "adjoint": adjoint}

    def count():
        return sum(type(o) in PLAIN for o in gc.get_objects())

    def work(n):
        for i in range(n):
            again = i % 10 == 0 and adjoint != "continuous"
            y = ode.odeint(field, y0, [0.0, 1.0], **settings)
            found = torch.autograd.grad(y[-1].sum(), [y0, *field.parameters()], create_graph=again)
            if again:
                found[0].sum().backward(inputs=[y0])
                y0.grad = None

    work(20)
    gc.collect()
    gc.disable()
    try:
        before = count()
        work(100)
        assert count() - before <= 0
    finally:
        gc.enable()
