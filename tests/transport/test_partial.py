"""Plans of a part of the mass."""

import math

import pytest
import torch
from scipy.optimize import linprog

from pyflowkern import transport

F64 = torch.float64


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("counts", [(4, 4), (2, 3)])
def test_a_partial_plan_is_the_cheapest_of_its_mass(counts, mass):
    """Against the linear program, of the mass rounded to whole cells."""
    n, m = counts
    x0, x1 = torch.randn(n, 2, dtype=F64), torch.randn(m, 2, dtype=F64)
    cells = n * m // math.gcd(n, m)
    kept = max(1, round(mass * cells)) / cells
    plan = transport.OTPlanSampler("partial", mass=mass).get_map(x0, x1)
    assert float(plan.sum()) == pytest.approx(kept)
    assert bool((plan.sum(1) <= 1 / n + 1e-12).all())
    assert bool((plan.sum(0) <= 1 / m + 1e-12).all())
    costs = torch.cdist(x0, x1).square()
    rows = torch.eye(n).repeat_interleave(m, 1)
    columns = torch.eye(m).repeat(1, n)
    best = linprog(
        costs.flatten().numpy(),
        A_ub=torch.cat([rows, columns]).numpy(),
        b_ub=[1 / n] * n + [1 / m] * m,
        A_eq=[[1.0] * (n * m)],
        b_eq=[kept],
    )
    assert float((plan * costs).sum()) == pytest.approx(best.fun, rel=1e-9)


def test_a_partial_plan_leaves_outliers_alone():
    x0 = torch.cat([torch.arange(9.0), torch.tensor([1000.0])])[:, None]
    x1 = torch.cat([torch.tensor([-500.0]), torch.arange(9.0) + 0.1])[:, None]
    sampler = transport.OTPlanSampler("partial", mass=0.9)
    one, other = sampler.sample_plan(x0, x1, generator=torch.Generator().manual_seed(0))
    assert one.shape == other.shape == x0.shape
    torch.testing.assert_close(other - one, torch.full((10, 1), 0.1))
    with pytest.raises(ValueError, match="replace must be True"):
        sampler.sample_plan(x0, x1, False)
    with pytest.raises(ValueError, match="method must be"):
        sampler.solve(x0, x1)
    whole = transport.OTPlanSampler("partial")  # all of the mass: the exact plan
    wanted = transport.OTPlanSampler("exact").sample_plan(x0, x1, False)
    assert torch.equal(whole.sample_plan(x0, x1, False)[1], wanted[1])
