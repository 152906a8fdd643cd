"""The tensors that a field depends on are found, or reading them is an error: no gradient is lost in silence."""

import functools
import math
import types

import pytest
import torch
from torch import nn

from pyflowkern import ode
from pyflowkern.ode import parameters

ADJOINTS = [
    {"adjoint": adjoint, "control": control}
    for adjoint, control in [
        ("direct", "batch"), ("direct", "device"), ("direct", "sample"), ("continuous", "batch"),
        ("continuous", "device"), ("reversible", "batch"),
    ]
]  # fmt: skip
ADJOINTS += [
    {"adjoint": "direct", "checkpoint": False},
    {"adjoint": "direct", "compat": "torchdiffeq"},
]
GLOBAL = nn.ParameterList([nn.Parameter(torch.tensor(v).double()) for v in (-1.0, -1.0)])


def rates():
    return nn.ParameterList([nn.Parameter(torch.tensor(v).double()) for v in (-1.0, -1.0)])


def at(t):
    """The rate at a time: the second one from the middle on; a batch reads both once one sample is there."""
    return int((t > 0.5).any())


def closure(held):
    return held, lambda t, y: held[at(t)] * y


def bound_method(held):
    class Model:
        def __init__(self):
            self.parts = {"rates": [held]}

        def slope(self, t, y):
            return self.parts["rates"][0][at(t)] * y

    return held, Model().slope


def callable_object(held):
    class Model:
        __slots__ = ("inner",)

        def __call__(self, t, y):
            return self.inner[at(t)] * y

    model = Model()
    model.inner = tuple(held)
    return held, model


def partial(held):
    return held, functools.partial(lambda all_of_them, t, y: all_of_them[at(t)] * y, list(held))


def default(held):
    return held, lambda t, y, *, held=held: held[at(t)] * y


def read_from_globals(held):
    return GLOBAL, lambda t, y: GLOBAL[at(t)] * y


def attribute_of_a_python_module(held):
    module = types.ModuleType("settings")
    module.rates = held
    code = "def field(t, y):\n    return settings.rates[int((t > 0.5).any())] * y"
    scope = {"settings": module}
    exec(code, scope)
    return held, scope["field"]


def module_with_a_plain_list(held):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = [list(held)]

        def forward(self, t, y):
            return self.plain[0][at(t)] * y

    return held, Model()


def wrapped(held):
    def inner(t, y):
        return held[at(t)] * y

    @functools.wraps(inner)
    def outer(*args):
        return inner(*args)

    return held, outer


HOLDERS = [
    closure, bound_method, callable_object, partial, default, read_from_globals,
    attribute_of_a_python_module, module_with_a_plain_list, wrapped,
]  # fmt: skip


@pytest.mark.parametrize("holder", HOLDERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("adjoint_settings", ADJOINTS, ids=str)
def test_a_parameter_that_is_read_only_later(holder, adjoint_settings):
    """y' = a y, then b y from the middle on, both -1: the derivatives in a and b are y(1) / 2 each."""
    held, field = holder(rates())
    for p in held:
        p.grad = None
    settings = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4, "max_step": 0.2} | adjoint_settings
    y = ode.odeint(field, torch.ones(1, 1).double(), [0.0, 0.5, 1.0], **settings)[-1]
    y.sum().backward()
    halves = [p.grad.item() for p in held]
    assert sum(halves) == pytest.approx(math.exp(-1.0), rel=1e-3)
    # one step has stages on both sides of the middle
    assert halves[0] == pytest.approx(halves[1], rel=0.1)


@pytest.mark.parametrize("adjoint_settings", ADJOINTS, ids=str)
@pytest.mark.parametrize("named", [False, True])
def test_a_tensor_that_cannot_be_found_is_an_error_with_a_remedy(
    adjoint_settings, named, monkeypatch
):
    """As for a field too large to be searched, whose second rate lies beyond the limit."""
    first, late = rates()
    monkeypatch.setattr(parameters, "LIMIT", 0)
    settings = {"rtol": 1e-3, "atol": 1e-3} | adjoint_settings
    if named:
        settings["params"] = (first, late)
    y = ode.odeint(
        lambda t, y: (late if at(t) else first) * y,
        torch.ones(1, 1).double(),
        [0.0, 1.0],
        **settings,
    )[-1]
    if named:
        y.sum().backward()
        assert late.grad.item() + first.grad.item() == pytest.approx(math.exp(-1.0), rel=1e-2)
        return
    with pytest.raises(RuntimeError, match="name all such tensors in params="):
        torch.autograd.grad(
            y.sum(), first, create_graph=adjoint_settings["adjoint"] == "reversible"
        )


def test_parameters_that_are_held_but_not_read_cost_nothing():
    """A closure over a whole model: the continuous adjoint integrates gradients only of what is read."""
    first, _ = rates()
    model = {"rate": first, "other": nn.Linear(50, 50)}

    def field(t, y):
        return model["rate"] * y

    for adjoint in ("direct", "continuous", "reversible"):
        ode.odeint(field, torch.ones(2).double(), [0.0, 1.0], adjoint=adjoint)[-1].sum().backward()
        assert all(p.grad is None for p in model["other"].parameters())
        assert first.grad.item() == pytest.approx(2 * math.exp(-1.0), rel=1e-5)
        first.grad = None


def test_the_search_ends_for_cycles_and_large_containers():
    loop = []
    loop += [loop, list(range(10 * parameters.LIMIT)), {"again": loop}]
    w = torch.ones((), requires_grad=True)
    assert parameters.tensors_in(lambda t, y: (loop, w)) == [w]


# --- fields that differentiate -------------------------------------------------------------------


@pytest.mark.parametrize("adjoint_settings", ADJOINTS, ids=str)
@pytest.mark.parametrize("own_mode", [False, True])
def test_forces_from_energies(adjoint_settings, own_mode):
    """x' = -d(w x^2 / 2)/dx = -w x from 1: the derivative by w is -e^-w."""
    w = torch.tensor(2.0).double().requires_grad_()
    calls = []

    def force(t, x):
        calls.append(1)
        if own_mode:
            with torch.enable_grad():
                return slope(x)
        return slope(x)

    def slope(x):
        x = x if x.requires_grad else x.requires_grad_()
        return -torch.autograd.grad((w * x**2 / 2).sum(), x, create_graph=True)[0]

    s = ode.solve(force, torch.ones(1, 1).double(), [0.0, 1.0], **adjoint_settings)
    assert s.ok
    # one evaluation finds the parameters, one that the field differentiates
    assert abs(len(calls) - s.stats.evaluations) <= 2
    s.ys[-1].sum().backward()
    assert s.ys[-1].item() == pytest.approx(math.exp(-2), rel=1e-6)
    assert w.grad.item() == pytest.approx(-math.exp(-2), rel=1e-5)
    with torch.no_grad():
        ys = ode.odeint(force, torch.ones(1, 1).double(), [0.0, 1.0], **adjoint_settings)
    assert ys[-1].item() == pytest.approx(math.exp(-2), rel=1e-6)


def test_other_errors_of_a_field_are_raised_unchanged():
    def field(t, y):
        raise RuntimeError("out of fuel")

    with pytest.raises(RuntimeError, match="out of fuel"), torch.no_grad():
        ode.odeint(field, torch.ones(1), [0.0, 1.0])


def test_an_event_of_a_field_that_differentiates():
    w = torch.tensor(2.0).double().requires_grad_()

    def force(t, x):
        x = x if x.requires_grad else x.requires_grad_()
        return -torch.autograd.grad((w * x**2 / 2).sum(), x, create_graph=True)[0]

    t, _ = ode.odeint_event(force, torch.ones(1).double(), 0.0, event_fn=lambda t, y: y[0] - 0.5)
    t.backward()
    assert t.item() == pytest.approx(math.log(2) / 2, rel=1e-6)
    assert w.grad.item() == pytest.approx(-math.log(2) / 4, rel=1e-6)


@pytest.mark.parametrize("holds", [False, True], ids=["", "the field holds its list"])
@pytest.mark.parametrize("adjoint_settings", ADJOINTS, ids=str)
def test_weights_that_functional_call_takes_back_are_an_error(adjoint_settings, holds):
    """The backward pass evaluates the field when the module has its own weights again."""

    class Solve(nn.Module):
        def __init__(self, field):
            super().__init__()
            self.field = field

        def forward(self, y, inside):
            params = tuple(self.field.parameters())
            end = ode.odeint(
                lambda t, y, held=params if holds else None: self.field(y),
                y,
                [0.0, 1.0],
                params=params,
                **adjoint_settings,
            )[-1]
            if inside:
                end.sum().backward()
            return end

    solve = Solve(nn.Linear(2, 2).double())
    own = {name: p.detach().clone().requires_grad_() for name, p in solve.named_parameters()}
    start = torch.ones(3, 2).double()
    end = torch.func.functional_call(solve, own, (start, False))
    if adjoint_settings.get("checkpoint", True):
        with pytest.raises(RuntimeError, match="other tensors in the backward pass"):
            end.sum().backward()
    torch.func.functional_call(solve, own, (start, True))
    assert all(p.grad is not None and p.grad.any() for p in own.values())


@pytest.mark.parametrize("adjoint_settings", ADJOINTS, ids=str)
def test_a_list_may_leave_out_what_the_field_reads_at_other_times(adjoint_settings):
    """The evaluations that the backward pass begins with read the second layer alone."""
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]).double()

    def end(params):
        layers.zero_grad()
        y = torch.ones(1, 2).double()
        ys = ode.odeint(
            lambda t, y: layers[int(t > 0.5)](y), y, [0.0, 1.0], params=params, **adjoint_settings
        )
        ys[-1].sum().backward()
        return [p.grad for p in layers[0].parameters()]

    some = end(tuple(layers[0].parameters()))
    torch.testing.assert_close(some, end(tuple(layers.parameters())))
