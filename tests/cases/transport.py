"""sinkhorn, plan_product and plan_draw."""

import torch
from laws import OpCase, Sample, normal, unit

from pyflowkern import ops

STATES = (torch.float32, torch.float64)
ROWS = dict.fromkeys(("x", "y", "a", "b"), 0)
PLAN_ROWS = ROWS | dict.fromkeys(("f", "g"), 0)


def clouds(problems, n, m, d, dtype, apart=2.0, scale=0.3):
    """Clouds and masses; their distance is what centring has to take away."""
    mass = [0.5 + unit(problems, k, seed=k) for k in (n, m)]
    root = d**0.5
    return {
        "x": ((scale * normal(problems, n, d, seed=1) + apart) / root + 1).to(dtype),
        "y": ((scale * normal(problems, m, d, seed=2) - apart) / root + 1).to(dtype),
        "a": mass[0] / mass[0].sum(-1, keepdim=True),
        "b": mass[1] / mass[1].sum(-1, keepdim=True),
    }


def sinkhorn(x, y, a, b, **options):
    """The cost, which is differentiated, and the potentials."""
    return ops.sinkhorn(x, y, a, b, **options)[:3]


def sinkhorn_reference(x, y, a, b, **options):
    return ops.sinkhorn_reference(x, y, a, b, **options)[:3]


#: So many iterations that the gradient of all of them, which the reference takes, is that of the solution.
SOLVED = {"epsilon": 1.0, "max_iterations": 30, "tolerance": 0.0}
SIZES = [
    (2, 5, 7, 1),
    (2, 37, 20, 2),
    (3, 8, 100, 3),
    (1, 33, 9, 4),
    (2, 17, 40, 5),
    (1, 30, 70, 33),
]


def problems(dtype):
    for size in SIZES:
        yield Sample(clouds(*size, dtype), **SOLVED)
    tensors = clouds(2, 20, 30, 2, dtype)
    # how the cost changes with the sum of a alone says nothing, and two ways to compute it differ
    fixed = {name: tensors[name] for name in ("a", "b")}
    points = {name: tensors[name] for name in ("x", "y")}
    twice = SOLVED | {"max_iterations": 60}  # each halves the error
    yield Sample(points, **fixed, **twice, scale=0.5, schedule="symmetric")
    near = clouds(2, 20, 30, 2, dtype, apart=0.3)  # else next to nothing is transported
    yield Sample(near, **SOLVED, penalty_x=0.7, penalty_y=2.0)
    yield Sample(near, **SOLVED, penalty_y=0.3)
    yield Sample(clouds(1, 1, 1, 3, dtype), **SOLVED)


def small_problems(dtype):
    """Costs that differ little: a few iterations solve them, and their graph is short."""
    solved = {"epsilon": 1.0, "max_iterations": 6, "tolerance": 0.0}
    yield Sample(clouds(3, 4, 5, 2, dtype, scale=0.05), **solved)
    near = clouds(3, 5, 4, 6, dtype, apart=0.1, scale=0.05)
    yield Sample(near, **solved | {"max_iterations": 30}, penalty_x=1.0, penalty_y=1.0)


def plan_of(problems, n, m, d, dtype):
    """A plan of potentials that solve nothing: its sums are of order one all the same."""
    given = clouds(problems, n, m, d, dtype, apart=0.1)
    return given | {"f": 0.2 * normal(problems, n, seed=5), "g": 0.2 * normal(problems, m, seed=6)}


def products(sizes, dtype):
    for problems, n, m, d, width in sizes:
        matrix = normal(problems, m, width, seed=7).to(dtype)
        yield Sample({"matrix": matrix}, **plan_of(problems, n, m, d, dtype), epsilon=0.8)


def draws(sizes, dtype):
    for problems, n, m, d in sizes:
        uniforms = unit(problems, n, seed=8)
        yield Sample({}, **plan_of(problems, n, m, d, dtype), uniforms=uniforms, epsilon=0.8)


CASES = [
    OpCase(
        sinkhorn,
        sinkhorn_reference,
        problems,
        small_problems,
        floor=32,
        reason="plain PyTorch computes in float64; scores carry several roundings into sums that cancel (16 seen)",
        large=lambda: [
            Sample(clouds(4, 100, 80, 2, torch.float32), epsilon=0.5, max_iterations=3),
            Sample(clouds(1, 600, 500, 3, torch.float32), epsilon=0.5, max_iterations=2),
            Sample(clouds(2, 200, 100, 20, torch.float32), epsilon=0.5, max_iterations=3),
        ],
        rows=ROWS,
        dtypes=STATES,
    ),
    OpCase(
        ops.plan_product,
        ops.plan_product_reference,
        lambda dtype: products([(2, 37, 20, 2, 3), (1, 20, 300, 3, 70), (2, 33, 9, 20, 1)], dtype),
        lambda dtype: products([(3, 4, 5, 2, 2), (3, 4, 5, 6, 2)], dtype),
        floor=16,
        reason="plain PyTorch computes in float64; a score carries some roundings into each entry of the plan (5 seen)",
        large=lambda: products([(3, 100, 300, 2, 5), (1, 500, 300, 20, 40)], torch.float32),
        rows={"matrix": 0} | PLAN_ROWS,
        dtypes=STATES,
    ),
    OpCase(
        ops.plan_draw,
        ops.plan_draw_reference,
        lambda dtype: draws([(2, 37, 20, 2), (1, 20, 300, 3), (2, 33, 9, 20)], dtype),
        lambda dtype: draws([(3, 4, 5, 2), (3, 4, 5, 6)], dtype),
        floor=0,
        reason="columns are integers",
        large=lambda: draws([(3, 30, 500, 2), (1, 200, 600, 20)], torch.float32),
        rows=PLAN_ROWS | {"uniforms": 0},
        dtypes=STATES,
    ),
]
