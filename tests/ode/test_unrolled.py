"""Fixed steps under torch.compile and inside the transforms of torch.func."""

import pytest
import torch
from laws import normal
from torch.func import grad, jacrev, vmap

from pyflowkern import ode

MATRIX = normal(3, 3, seed=1)
SETTINGS = {
    "outputs at the ends of steps": {"method": "rk4", "step_size": 0.3},
    "outputs inside of steps": {"method": "midpoint", "grid": lambda t: [t[0], 0.4, t[-1]]},
    "on cubics": {"method": "heun", "grid": lambda t: [t[0], t[-1]], "interp": "cubic"},
    "beside the ends": {"method": "dopri5", "step_size": 0.5, "perturb": True},
    "as torchdiffeq": {"method": "rk4", "step_size": 0.3, "compat": "torchdiffeq"},
    "too many steps": {"method": "euler", "step_size": 0.2, "max_steps": 3},
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


def field(t, state):
    y, _ = state
    return torch.tanh(y @ MATRIX) * (1 + t), y.sum(1)


def solve(y, **settings):
    start = (y, y.new_zeros(len(y)))
    return ode.solve(field, start, [0.0, 0.25, 1.0], **settings)


def loss(y, **settings):
    states, totals = solve(y, **settings).ys
    return states.square().sum() + totals.sin().sum()


@every_setting
def test_transforms_of_a_solve(name):
    settings, y = SETTINGS[name], normal(4, 3)
    leaf = y.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, **settings), leaf)
    torch.testing.assert_close(grad(lambda y: loss(y, **settings))(y), expected)
    each = vmap(grad(lambda row: loss(row[None], **settings)))(y)
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(jacrev(lambda y: loss(y, **settings))(y), expected)


@pytest.mark.parametrize("name", ["outputs at the ends of steps", "too many steps"])
def test_a_solve_is_one_graph(name):
    settings, y = SETTINGS[name], normal(4, 3).requires_grad_()
    compiled = torch.compile(lambda y: loss(y, **settings), fullgraph=True, backend="eager")
    results = [(f, *torch.autograd.grad(f, y)) for f in (compiled(y), loss(y, **settings))]
    torch.testing.assert_close(*results)


def test_a_long_solve_is_no_graph():
    settings, y = {"method": "rk4", "step_size": 0.02}, normal(4, 3)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="128 evaluations of the field at most"
    ):
        torch.compile(lambda y: loss(y, **settings), fullgraph=True, backend="eager")(y)
    compiled = torch.compile(lambda y: loss(y, **settings), backend="eager")
    torch.testing.assert_close(compiled(y), loss(y, **settings))


@pytest.mark.parametrize("settings", [{}, {"method": "rk4", "adjoint": "continuous"}])
def test_other_solves_are_refused_by_transforms(settings):
    for transform in (grad, lambda f: vmap(lambda row: f(row[None]))):
        with pytest.raises(RuntimeError, match=r"with fixed steps and adjoint='direct' alone"):
            transform(lambda y: loss(y, **settings))(normal(4, 3))
