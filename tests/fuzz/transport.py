"""Random calls of the ops of optimal transport."""

import itertools

import torch

from fuzz.call import Call
from pyflowkern import ops


def transport(draw, problems):
    """Two clouds and their masses, of which some may be zero."""
    n, m, d = draw.size(1), draw.size(1), draw.choice((1, 2, 3, 4, 5, 8, 33))
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32

    def mass(count):
        drawn = torch.rand(problems, count, generator=draw.generator, dtype=torch.float64) + 1e-3
        drawn[:, 1:] *= torch.rand(count - 1, generator=draw.generator) < draw.choice((0.7, 1.0))
        return drawn / drawn.sum(1, keepdim=True)

    # a score is rounded as its largest term is, so that float32 knows nothing of a plan between points far apart
    return {
        "x": draw.tensor(problems, n, d).to(dtype).clamp(-10, 10),
        "y": draw.tensor(problems, m, d).to(dtype).clamp(-10, 10),
        "a": mass(n),
        "b": mass(m),
        "epsilon": draw.choice((0.3, 2.0, 20.0)),
        "scale": draw.choice((0.5, 1.0)),
    }


def rounding_decides(given):
    """Whether an error is that of an iteration before but for rounding: a step is prolonged if it is not larger."""
    counts = range(1, given["max_iterations"])
    errors = [ops.sinkhorn_reference(**given | {"max_iterations": k}).error for k in counts]
    return any(
        bool(((a - b).abs() <= 1e-4 * b).any()) for a, b in itertools.combinations(errors, 2)
    )


def sinkhorn(draw):
    given = transport(draw, draw.size())
    # the reference differentiates every iteration, the op the solution: here neither
    given |= {"max_iterations": draw.choice((1, 2, 5)), "tolerance": 0.0}
    given["schedule"] = draw.choice(("alternating", "symmetric", "accelerated"))
    for name in ("penalty_x", "penalty_y"):
        given[name] = draw.choice((None, 0.5, 10.0))
    if given["schedule"] == "accelerated" and rounding_decides(given):
        given["schedule"] = "alternating"

    def values(**arguments):
        cost, f, g, *_ = (t.detach() for t in ops.sinkhorn(**arguments))
        return torch.cat((cost[:, None], f, g), 1)  # one may be zero by cancellation of the others

    return Call(values, given, ("x", "y", "a", "b"))


def plan_product(draw):
    problems = draw.size()
    given = transport(draw, problems)
    n, m = given["x"].shape[1], given["y"].shape[1]
    for name, count in (("f", n), ("g", m)):
        given[name] = draw.tensor(problems, count).double().clamp(-3, 3)
    given["matrix"] = draw.tensor(problems, m, draw.choice((1, 3, 40))).to(given["x"].dtype)
    return Call(ops.plan_product, given, ("x", "y", "a", "b", "f", "g", "matrix"))


def plan_draw(draw):
    given = plan_product(draw).arguments
    del given["matrix"]
    uniforms = torch.rand(given["f"].shape, generator=draw.generator, dtype=torch.float64)
    names = ("x", "y", "a", "b", "f", "g", "uniforms")

    def has_mass(b, **arguments):  # which column it is depends on the last digit
        return (torch.gather(b, 1, ops.plan_draw(b=b, **arguments)) > 0).to(torch.uint8)

    return Call(has_mass, given | {"uniforms": uniforms}, names)
