"""The coefficients: order conditions of methods, embedded methods and dense output, and observed orders."""

import itertools
import math

import numpy as np
import pytest
import torch

from pyflowkern import ode
from pyflowkern.ode.tableaus import TABLEAUS, end_slope

METHODS = sorted(TABLEAUS)
ADAPTIVE = [name for name in METHODS if TABLEAUS[name].error is not None]
# Prince and Dormand's fractions approximate their numbers to about 18 digits, with coefficients up to 100
ROUNDING = 1e-11


def rooted_trees(order):
    """All rooted trees with ``order`` vertices, each a sorted tuple of its branches."""
    if order == 1:
        return [()]
    trees = set()
    for sizes in partitions(order - 1):
        for branches in itertools.product(*(rooted_trees(n) for n in sizes)):
            trees.add(tuple(sorted(branches)))
    return sorted(trees)


def partitions(n, least=1):
    yield (n,)
    for first in range(least, n // 2 + 1):
        for rest in partitions(n - first, first):
            yield (first, *rest)


def vertices(tree):
    return 1 + sum(vertices(branch) for branch in tree)


def density(tree):
    """gamma: the number of vertices times the densities of the branches."""
    return vertices(tree) * math.prod(density(branch) for branch in tree)


def matrix(t):
    a = np.zeros((t.stages, t.stages))
    for i, row in enumerate(t.a):
        a[i, : len(row)] = row
    return a


def derivative(tree, a):
    """The vector of a tree, ``prod A phi(branch)`` over its branches."""
    out = np.ones(len(a))
    for branch in tree:
        out = out * (a @ derivative(branch, a))
    return out


def test_the_number_of_rooted_trees():
    """Cayley: 1, 1, 2, 4, 9, 20, 48, 115 rooted trees."""
    assert [len(rooted_trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@pytest.mark.parametrize("name", METHODS)
def test_order_conditions(name):
    """``b phi(tree) = 1 / gamma(tree)`` for all trees up to the order, and not for all of the next."""
    t = TABLEAUS[name]
    a, b = matrix(t), np.array(t.b)
    np.testing.assert_allclose(a.sum(1), t.c, atol=1e-13)
    for order in range(1, t.order + 1):
        for tree in rooted_trees(order):
            assert abs(b @ derivative(tree, a) - 1 / density(tree)) < ROUNDING, tree
    beyond = [b @ derivative(tree, a) - 1 / density(tree) for tree in rooted_trees(t.order + 1)]
    assert max(map(abs, beyond)) > 1e-6


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_embedded_method_has_one_order_less(name):
    t = TABLEAUS[name]
    a, error = matrix(t), np.array(t.error)
    for order in range(1, t.order):
        for tree in rooted_trees(order):
            assert abs(error @ derivative(tree, a)) < ROUNDING
    assert max(abs(error @ derivative(tree, a)) for tree in rooted_trees(t.order)) > 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_dense_output(name):
    """At the ends it is state and slope; in between it satisfies the order conditions scaled by ``theta^order``."""
    t = end_slope(TABLEAUS[name])
    a, p = matrix(t), np.array(t.dense)
    degrees = np.arange(1, p.shape[1] + 1)
    unit = np.eye(t.stages)
    np.testing.assert_allclose(p.sum(1), t.b, atol=1e-12)
    np.testing.assert_allclose(p[:, 0], unit[0], atol=1e-12)
    np.testing.assert_allclose(p @ degrees, unit[-1], atol=1e-10)  # of numbers up to 500
    order = {"dopri5": 4, "tsit5": 4, "dopri8": 5}.get(name, min(t.order, 3))
    for theta in (0.1, 0.5, 0.8):
        weights = p @ theta**degrees
        for n in range(1, order + 1):
            for tree in rooted_trees(n):
                expected = theta**n / density(tree)
                # Shampine's value half way is a fraction good to 1e-8
                assert abs(weights @ derivative(tree, a) - expected) < 1e-7, (theta, tree)


@pytest.mark.parametrize("name", METHODS)
def test_last_stage_is_the_next_first(name):
    # the last stage of these is the slope at the end of the lower-order step
    other = ("adaptive_heun", "fehlberg2")
    assert TABLEAUS[name].fsal == (name in ADAPTIVE and name not in other)
    assert end_slope(TABLEAUS[name]).fsal


@pytest.mark.parametrize("name", METHODS)
def test_linear_equations_give_the_stability_polynomial(name):
    """``y' = lambda y``: a step multiplies by ``R(z) = 1 + z b (I - z A)^-1 1``, a polynomial, ``z = h lambda``."""
    t = TABLEAUS[name]
    a, b = matrix(t), np.array(t.b)
    # three steps of coefficients up to 13 (tsit5), rounded to 2e-16 each, that cancel down to 1e-2
    for z in (-1.5, -0.3, 0.7):
        growth = 1 + z * b @ np.linalg.solve(np.eye(t.stages) - z * a, np.ones(t.stages))
        y = ode.odeint(lambda t, y, z=z: z * y, torch.ones(2).double(), [0.0, 3.0], method=name,
                       step_size=1.0)  # fmt: skip
        np.testing.assert_allclose(y[-1].numpy(), growth**3, rtol=1e-12)
    if name in ("rk4", "rk4_38"):
        y = ode.odeint(lambda t, y: y, torch.ones(1).double(), [0.0, 1.0], method=name)
        assert y[-1].item() == pytest.approx(1 + 1 + 1 / 2 + 1 / 6 + 1 / 24, rel=1e-15)


@pytest.mark.parametrize("name", METHODS)
def test_convergence_has_the_order_as_its_slope(name):
    """``y' = y cos t``: log2 of the ratio of errors of steps h and h / 2."""
    order = TABLEAUS[name].order
    exact = math.exp(math.sin(2.0))
    steps = (4, 8) if order == 8 else (32, 64)
    errors = []
    for n in steps:
        y = ode.odeint(lambda t, y: y * torch.cos(t), torch.ones(1).double(), [0.0, 2.0],
                       method=name, step_size=2.0 / n)  # fmt: skip
        errors.append(abs(y[-1].item() - exact))
    slope = math.log2(errors[0] / errors[1])
    # for a single equation the order may appear one higher
    assert order - 0.3 < slope < order + 1.6


@pytest.mark.parametrize("name", ADAPTIVE)
def test_tolerances_are_met(name):
    """A rotation: the error of the solve is at most some 50 tolerances, and falls with the tolerance."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    errors = []
    # Fehlberg's estimate is the difference h^2 / 512 y'' of two methods, not the error, which goes with h^3
    factor = 5000 if name == "fehlberg2" else 50
    for tolerance in (1e-4, 1e-7):
        solution = ode.solve(lambda t, y: y @ turn.T, torch.tensor([1.0, 0.0]).double(),
                             [0.0, 2 * math.pi], method=name, rtol=tolerance, atol=tolerance)  # fmt: skip
        assert solution.ok
        errors.append((solution.ys[-1] - solution.ys[0]).abs().max().item())
        assert errors[-1] < factor * tolerance
    assert errors[1] < errors[0] / 50


@pytest.mark.parametrize(
    ("method", "near"),
    [("implicit_adams", "rk4"), ("fixed_adams", "rk4"), ("implicit_euler", "euler"), ("gl6", "dopri8"),
     ("radauIIA5", "dopri5"), ("trapezoid", "heun2"), ("scipy_solver", "dopri5")],
)  # fmt: skip
def test_missing_methods_name_the_nearest_one(method, near):
    with pytest.raises(ValueError, match=f"{method}.*nearest is '{near}'"):
        ode.solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0], method=method)
    ode.solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0], method=near, step_size=0.5)


def test_heun2_is_heun():
    a, b = (ode.odeint(lambda t, y: -y, torch.ones(2), [0.0, 1.0], method=m, step_size=0.1)
            for m in ("heun", "heun2"))  # fmt: skip
    assert torch.equal(a, b)
