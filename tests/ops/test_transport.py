"""Entropic optimal transport: what is true of it beyond the laws of ops."""

import itertools
import math

import pytest
import torch
from cases.transport import clouds
from laws import normal, unit

from pyflowkern import ops

FLOAT64 = 1e-9  # of sums of some hundred terms, with potentials of size 10 over an epsilon of 0.1
#: Three times what these problems need, but for one; on CUDA all that are allowed are launched, needed or not.
ENOUGH = 300


def plan(x, y, a, b, f, g, epsilon):
    cost = (x.double()[:, :, None] - y.double()[:, None]).square().sum(-1)
    return a[:, :, None] * b[:, None] * torch.exp((f[:, :, None] + g[:, None] - cost) / epsilon)


SCHEDULES = ["alternating", "symmetric", "accelerated"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_the_plan_has_the_marginals(backend, schedule, scaling):
    given = clouds(2, 20, 30, 3, torch.float64)
    out = ops.sinkhorn(
        **given,
        epsilon=0.1,
        tolerance=1e-10,
        max_iterations=ENOUGH,
        schedule=schedule,
        epsilon_scaling=scaling,
    )
    p = plan(**given, f=out.f, g=out.g, epsilon=0.1)
    assert (out.error <= 1e-10).all()
    torch.testing.assert_close(p.sum(2), given["a"], atol=1e-9, rtol=0)
    torch.testing.assert_close(p.sum(1), given["b"], atol=1e-9, rtol=0)
    cost = (given["x"][:, :, None] - given["y"][:, None]).square().sum(-1)
    product = given["a"][:, :, None] * given["b"][:, None]
    value = (p * cost).sum((1, 2)) + 0.1 * (p * (p / product).log()).sum((1, 2))
    torch.testing.assert_close(out.cost, value, rtol=FLOAT64, atol=FLOAT64)


def test_the_gradient_is_that_of_the_plan(backend):
    given = clouds(1, 9, 7, 2, torch.float64)
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    out = ops.sinkhorn(**leaves, epsilon=0.3, tolerance=1e-13, max_iterations=ENOUGH)
    out.cost.sum().backward()
    p = plan(**given, f=out.f, g=out.g, epsilon=0.3)
    difference = given["x"][:, :, None] - given["y"][:, None]
    expected = 2 * (p[..., None] * difference).sum(2)
    torch.testing.assert_close(leaves["x"].grad, expected, rtol=FLOAT64, atol=FLOAT64)
    torch.testing.assert_close(leaves["a"].grad, out.f, rtol=FLOAT64, atol=FLOAT64)
    assert not out.f.requires_grad


def test_two_points_are_transported_at_their_distance(backend):
    x, y = torch.tensor([[[1.0, 2.0]]]).double(), torch.tensor([[[4.0, 6.0]]]).double()
    one = torch.ones(1, 1).double()
    out = ops.sinkhorn(x, y, one, one, epsilon=0.1, max_iterations=10)
    assert out.cost.item() == pytest.approx(25.0, rel=1e-14)
    assert out.iterations.item() == 1


def test_a_small_epsilon_finds_the_best_permutation(backend):
    n = 6
    x, y = normal(1, n, 2), normal(1, n, 2, seed=1)
    mass = torch.full((1, n), 1 / n, dtype=torch.float64)
    out = ops.sinkhorn(
        x, y, mass, mass, epsilon=1e-3, epsilon_scaling=0.5, max_iterations=ENOUGH, tolerance=1e-8
    )
    cost = (x[0][:, None] - y[0]).square().sum(-1)
    orders = list(itertools.permutations(range(n)))
    best = min(orders, key=lambda order: float(cost[range(n), order].sum()))
    p = plan(x, y, mass, mass, out.f, out.g, 1e-3)[0]
    assert p.argmax(1).tolist() == list(best)


def test_prolonged_steps_need_a_third_of_the_iterations(backend):
    given = clouds(1, 60, 60, 2, torch.float64, scale=1.0)
    options = {"epsilon": 0.02, "epsilon_scaling": 0.5, "tolerance": 1e-3, "max_iterations": 700}
    plain, fast = (ops.sinkhorn(**given, **options, schedule=s) for s in SCHEDULES[::2])
    assert (plain.error <= 1e-3).all()
    assert (fast.error <= 1e-3).all()
    assert int(fast.iterations) < int(plain.iterations) / 3
    torch.testing.assert_close(fast.cost, plain.cost, rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", [1275, 1963])
def test_prolonged_steps_do_not_run_in_circles(backend, seed):
    """Compared with the last error alone, a step too long came again and again: 1000 iterations left 0.9."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(1, n, 2, generator=generator, dtype=torch.float64) for n in (9, 3))
    masses = (torch.full((1, n), 1 / n, dtype=torch.float64) for n in (9, 3))
    given = dict(zip("xyab", (x, 1.5 * y + 2, *masses), strict=True))
    given = {name: t.to(backend) for name, t in given.items()}
    options = {"epsilon": 0.1, "epsilon_scaling": 0.25, "tolerance": 1e-2}
    out = ops.sinkhorn(**given, **options, max_iterations=100, schedule="accelerated")
    assert out.error.item() <= 1e-2


@pytest.mark.parametrize("seed", [56, 946, 992])
def test_a_prolonged_step_that_makes_the_error_larger_is_taken_back(backend, seed):
    """Three clusters far apart: kept, such steps took more iterations than none did, or never came to an end."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n):
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    centres = 10 * normal(3)
    given = {name: (centres.repeat(4, 1) + 0.3 * normal(12))[None] for name in "xy"}
    for name in "ab":
        mass = torch.rand(1, 12, generator=generator, dtype=torch.float64) ** 4
        given[name] = mass / mass.sum()
    given = {name: t.to(backend) for name, t in given.items()}
    options = {"epsilon": 1.0, "epsilon_scaling": 0.5, "tolerance": 1e-3, "max_iterations": ENOUGH}
    plain, fast = (ops.sinkhorn(**given, **options, schedule=s) for s in SCHEDULES[::2])
    assert fast.error.item() <= 1e-3
    assert fast.iterations.item() <= plain.iterations.item()


def test_the_error_does_not_depend_on_the_unit_of_mass(backend):
    given = clouds(1, 200, 200, 2, torch.float32, scale=3.0)
    options = {"epsilon": 0.05, "max_iterations": 60, "tolerance": 0.0}
    unit_error = ops.sinkhorn(**given, **options).error
    heavy = given | {"a": given["a"] * 1e34, "b": given["b"] * 1e34}
    error = ops.sinkhorn(**heavy, **options).error / 1e34
    torch.testing.assert_close(error, unit_error, rtol=1e-2, atol=0)


def test_what_does_not_converge_says_so(backend):
    given = clouds(1, 20, 20, 2, torch.float32)
    out = ops.sinkhorn(**given, epsilon=1e-6, max_iterations=5, tolerance=1e-6)
    assert out.error.item() > 1e-6
    assert out.iterations.item() == 5
    assert out.f.isfinite().all()
    assert out.cost.isfinite().all()


@pytest.mark.parametrize(
    ("schedule", "iterations", "ratio"),
    [
        *itertools.product(SCHEDULES, [3, 40], [0.4]),
        *itertools.product(SCHEDULES[:2], [60], [0.002]),  # prolonged steps magnify rounding
    ],
)
def test_larger_epsilons_are_those_of_the_reference(backend, schedule, iterations, ratio):
    """Which there are, and how many iterations each has, stands in C++, in CUDA and in Python."""
    given = clouds(2, 12, 17, 2, torch.float64, scale=1.0)
    options = {"epsilon": 1e-4 if ratio < 0.1 else 0.05, "epsilon_scaling": ratio}
    options |= {"tolerance": 1e-2, "schedule": schedule}
    found = ops.sinkhorn(**given, **options, max_iterations=iterations)
    expected = ops.sinkhorn_reference(**given, **options, max_iterations=iterations)
    assert torch.equal(found.iterations, expected.iterations)
    for a, b in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("d", [2, 7])
def test_a_translation_adds_its_square_and_costs_no_digits(backend, d):
    given = clouds(1, 30, 40, d, torch.float32, apart=0.0)
    options = {"epsilon": 0.1, "max_iterations": 50, "tolerance": 0.0}
    moved = given | {
        "x": given["x"] + 1024
    }  # which float32 stores to four digits behind the point
    rounded = moved["x"] - 1024
    far = ops.sinkhorn(**moved, **options)
    again = ops.sinkhorn(**given | {"x": rounded}, **options)
    mean = (given["a"][..., None] * rounded).sum(1) - (given["b"][..., None] * given["y"]).sum(1)
    expected = again.cost + (1024 * 1024 * d + 2 * 1024 * mean.sum(-1))
    torch.testing.assert_close(far.cost, expected, rtol=1e-9, atol=0)


def test_points_without_mass_change_nothing(backend):
    given = clouds(1, 10, 12, 2, torch.float64)
    options = {"epsilon": 0.2, "tolerance": 1e-12, "max_iterations": ENOUGH}
    expected = ops.sinkhorn(**given, **options)
    x = torch.cat((given["x"], torch.full((1, 3, 2), 50.0).double()), 1)
    a = torch.cat((given["a"], torch.zeros(1, 3).double()), 1)
    found = ops.sinkhorn(**given | {"x": x, "a": a}, **options)
    torch.testing.assert_close(found.cost, expected.cost, rtol=FLOAT64, atol=0)
    torch.testing.assert_close(found.f[:, :10], expected.f, rtol=FLOAT64, atol=FLOAT64)
    assert found.f.isfinite().all()


def test_a_point_without_mass_does_not_end_the_iteration(backend):
    """Its share of the error is none, however far its potential is from a solution."""
    x = torch.tensor([[[0.0], [40.0], [1.0]]]).double()
    a = torch.tensor([[0.5, 0.0, 0.5]]).double()
    out = ops.sinkhorn(
        x,
        x[:, :1],
        a,
        a[:, :1] * 2,
        epsilon=0.1,
        max_iterations=3,
        tolerance=0.0,
        schedule="symmetric",
    )
    assert out.iterations.item() == 3
    assert out.error.isfinite().all()


def test_penalized_marginals_minimize_the_objective(backend):
    given = clouds(1, 6, 5, 2, torch.float64, apart=0.3)
    out = ops.sinkhorn(
        **given, epsilon=0.2, penalty_x=0.5, penalty_y=1.5, tolerance=1e-13, max_iterations=ENOUGH
    )
    cost = (given["x"][:, :, None] - given["y"][:, None]).square().sum(-1)
    product = given["a"][:, :, None] * given["b"][:, None]

    def divergence(p, q):
        return (p * (p / q).log() - p + q).sum()

    def objective(p):
        penalties = 0.5 * divergence(p.sum(2), given["a"]) + 1.5 * divergence(p.sum(1), given["b"])
        return (p * cost).sum() + 0.2 * divergence(p, product) + penalties

    p = plan(**given, f=out.f, g=out.g, epsilon=0.2).requires_grad_()
    value = objective(p)
    torch.testing.assert_close(out.cost[0], value.detach(), rtol=FLOAT64, atol=0)
    (slope,) = torch.autograd.grad(value, p)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


@pytest.mark.parametrize("d", [2, 6])
def test_draws_follow_the_plan(backend, d):
    """Pearson's statistic of the draws of a row stays within five standard deviations of its mean."""
    given = clouds(1, 1, 12, d, torch.float32, apart=0.1)
    f, g = torch.zeros(1, 1).double(), 0.3 * normal(1, 12)
    draws = 2_000
    many = {
        name: given[name].expand(1, draws, d) if name == "x" else given[name] for name in "xyb"
    }
    a = torch.full((1, draws), 1 / draws, dtype=torch.float64)
    drawn = ops.plan_draw(
        **many, a=a, f=f.expand(1, draws), g=g, uniforms=unit(1, draws, seed=4), epsilon=0.5
    )
    p = plan(**given, f=f, g=g, epsilon=0.5)[0, 0]
    expected = draws * p / p.sum()
    seen = torch.bincount(drawn[0], minlength=12)
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert abs(statistic - 11) < 5 * math.sqrt(22)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_uniform_numbers_draw_columns_with_mass(backend, uniform):
    given = clouds(1, 3, 700, 2, torch.float32, apart=0.1)
    b = given["b"].clone()
    b[0, 0] = b[0, -1] = 0.0
    zeros = {"f": torch.zeros(1, 3).double(), "g": torch.zeros(1, 700).double()}
    u = torch.full((1, 3), uniform, dtype=torch.float64)
    drawn = ops.plan_draw(**given | {"b": b}, **zeros, uniforms=u, epsilon=0.5)
    assert (drawn > 0).all()
    assert (drawn < 699).all()


on_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


def apart(n, m, d, between):
    """Two groups of points in each cloud, far from each other, with unequal masses: potentials become large."""
    given = clouds(1, n, m, d, torch.float64, apart=0.1)
    for name in ("x", "y"):
        given[name][:, : n // 3] += between
    return given


@on_cpu
@pytest.mark.parametrize("d", [2, 7])
@pytest.mark.parametrize("scaling", [None, 0.5, 0.25, 0.4])
@pytest.mark.parametrize(
    ("schedule", "epsilon", "between"),
    [
        *itertools.product(["alternating"], [0.05, 1e-3], [0.0, 6.0]),
        *itertools.product(["accelerated"], [0.05, 1e-3], [0.0]),  # as above
    ],
)
def test_iterations_of_a_kept_kernel_are_those_of_logarithms(
    backend, d, schedule, scaling, epsilon, between
):
    """Also where the factors leave the range in which the kernel may be kept, and for points far away without mass."""
    given = apart(24, 31, d, between)
    given["x"][0, -1] = 1e3
    given["a"][0, -1] = 0.0
    given["a"] /= given["a"].sum()
    options = {"epsilon": epsilon, "epsilon_scaling": scaling, "tolerance": 1e-4}
    options["schedule"] = schedule
    found = ops.sinkhorn(**given, **options, max_iterations=80)
    expected = ops.sinkhorn_reference(**given, **options, max_iterations=80)
    assert torch.equal(found.iterations, expected.iterations)
    # prolonged steps magnify rounding: points moved by 1e-15 move these potentials of the reference by 7e-8
    atol = 1e-6 if (schedule, epsilon) == ("accelerated", 1e-3) else 1e-8
    for a, b in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=atol)


@pytest.mark.parametrize("backend", ["baseline", "avx2", "avx512", "reference"], indirect=True)
@pytest.mark.parametrize("scaling", [0.5, 0.125])
@pytest.mark.parametrize("d", [2, 7])
def test_prolonged_steps_solve_what_is_far_apart(backend, d, scaling):
    """A third of the points is 6 units from the others: 400 alternating iterations solve neither problem.

    The error stays the same, up to rounding, for many iterations.
    """
    given = apart(24, 31, d, 6.0)
    options = {"epsilon": 0.02, "epsilon_scaling": scaling, "tolerance": 1e-6}
    out = ops.sinkhorn(**given, **options, max_iterations=1500, schedule="accelerated")
    p = plan(**given, f=out.f, g=out.g, epsilon=0.02)
    torch.testing.assert_close(p.sum(2), given["a"], atol=2e-6, rtol=0)
    torch.testing.assert_close(p.sum(1), given["b"], atol=2e-6, rtol=0)


@on_cpu
@pytest.mark.parametrize("d", [2, 6])
def test_a_kept_kernel_gives_what_tiles_give(backend, d):
    """Beyond a size powers of two, and products of the points, are made anew in each iteration."""
    given = clouds(1, 1000, 900, d, torch.float32)
    options = {"epsilon": 0.5, "max_iterations": 10, "tolerance": 0.0}
    kept = ops.sinkhorn(**given, **options)
    twice = {
        "x": torch.cat((given["x"], given["x"]), 1),
        "a": torch.cat((given["a"], torch.zeros_like(given["a"])), 1),
    }
    made = ops.sinkhorn(**given | twice, **options)
    torch.testing.assert_close(made.cost, kept.cost, rtol=1e-6, atol=0)
    torch.testing.assert_close(made.f[:, :1000], kept.f, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [1, 10_000])
def test_any_number_of_coordinates(d):
    given = clouds(1, 20, 30, d, torch.float32)
    out = ops.sinkhorn(**given, epsilon=0.5, max_iterations=20)
    expected = ops.sinkhorn_reference(**given, epsilon=0.5, max_iterations=20)
    torch.testing.assert_close(out.cost, expected.cost, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon must be positive and finite, got 0.0"),
        ({"epsilon": math.nan}, ValueError, "epsilon must be positive"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be at least 1"),
        ({"max_iterations": 2.5}, TypeError, "max_iterations must be an int"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be zero or positive"),
        ({"schedule": "jacobi"}, ValueError, "schedule must be one of"),
        ({"epsilon_scaling": 1.0}, ValueError, "epsilon_scaling must be between 0 and 1"),
        ({"penalty_x": 0.0}, ValueError, "penalty_x must be positive"),
    ],
)
def test_wrong_numbers_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ops.sinkhorn(**clouds(1, 3, 3, 2, torch.float32), **{"epsilon": 1.0} | options)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (1, 0, 2), "x must have a point and a coordinate at least"),
        ("x", (3, 2), r"x must have shape \[B, points, d\]"),
        ("y", (1, 3, 5), "x and y must have the same batch and the same coordinates"),
        ("a", (1, 4), r"a must have shape \(1, 3\)"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    given = clouds(1, 3, 3, 2, torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.sinkhorn(**given | {name: torch.zeros(shape).to(given[name])}, epsilon=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_refused(dtype):
    given = clouds(1, 3, 3, 2, torch.float32)
    with pytest.raises(TypeError, match="x must be float32 or float64"):
        ops.sinkhorn(**given | {"x": given["x"].to(dtype)}, epsilon=1.0)
