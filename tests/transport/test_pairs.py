"""Pairs drawn from plans: their distribution, draws without replacement, samplers and batches of pairs."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import chi2

from pyflowkern import transport
from pyflowkern.transport.plan import draw

F64 = torch.float64


#: The host-run CUDA sources are held to the laws of their ops; here they would take minutes.
on_backends = pytest.mark.parametrize(
    "backend",
    ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
    indirect=True,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def solution(n=6, m=5, epsilon=0.5, **options):
    numbers = [(11 * k**2 % 17) / 8 - 1 for k in range(2 * n + 2 * m)]
    points = torch.tensor(numbers).reshape(n + m, 2)
    a = torch.arange(1.0, n + 1)
    options = {"epsilon": epsilon, "tolerance": 1e-6, **options}
    return transport.sinkhorn(points[:n], points[n:], a=a / a.sum(), **options)


def same_distribution(cells, probabilities):
    """Pearson's test at one in a million, over cells that are expected five times or more."""
    expected = probabilities.double().flatten()
    expected = expected / expected.sum() * len(cells)
    counts = torch.bincount(cells, minlength=len(expected)).double()
    big = expected >= 5
    if not bool(big.all()):  # the rest is one cell
        expected = torch.cat([expected[big], expected[~big].sum()[None]])
        counts = torch.cat([counts[big], counts[~big].sum()[None]])
    statistic = ((counts - expected).square() / expected.clamp(min=1e-9)).sum()
    return float(statistic) < chi2.ppf(1 - 1e-6, len(expected) - 1)


def test_the_test_of_distributions_sees_a_difference():
    p = torch.tensor([0.5, 0.3, 0.2])
    cells = torch.multinomial(p, 20_000, replacement=True, generator=seeded())
    assert same_distribution(cells, p)
    assert not same_distribution(cells, torch.tensor([0.47, 0.33, 0.2]))


@on_backends
def test_pairs_have_the_distribution_of_the_plan(backend):
    found = solution()
    i, j = found.pairs(20_000, generator=torch.Generator(backend).manual_seed(0))
    assert same_distribution((i * 5 + j).cpu(), found.plan.dense().cpu())


def test_every_row_once_with_partners_of_its_row():
    found = solution()
    dense = found.plan.dense()
    draws = [found.pairs(generator=seeded(k)) for k in range(3000)]
    assert all(i.tolist() == list(range(6)) for i, _ in draws)
    for row in range(6):
        assert same_distribution(torch.stack([j[row] for _, j in draws]), dense[row])


def test_unbalanced_pairs_have_the_distribution_of_the_plan():
    found = solution(unbalanced=0.3)
    i, j = found.pairs(20_000, generator=seeded())
    assert same_distribution(i * 5 + j, found.plan.dense())


def test_draws_without_replacement_are_successive_draws():
    """The law of two different cells by enumeration: P(c1) P(c2) / (1 - P(c1))."""
    found = solution(2, 2)
    p = found.plan.dense().double().flatten()
    law = p[:, None] * p / (1 - p[:, None])
    law.fill_diagonal_(0)
    codes = []
    generator = seeded()
    for _ in range(4000):
        i, j = found.pairs(2, replace=False, generator=generator)
        first, second = (2 * i + j).tolist()
        codes.append(4 * first + second)
    assert same_distribution(torch.tensor(codes), law)


def test_draws_without_replacement_reach_every_cell():
    found = solution(epsilon=50.0)
    i, j = found.pairs(30, replace=False)
    assert sorted((5 * i + j).tolist()) == list(range(30))
    batch = torch.randn(2, 4, 3)
    i, j = transport.sinkhorn(batch, batch + 1, epsilon=20.0).pairs(10, replace=False)
    assert i.shape == (2, 10)
    assert all(len(set((4 * i[k] + j[k]).tolist())) == 10 for k in range(2))


def test_too_few_cells_with_mass():
    with pytest.raises(ValueError, match="n must be at most 30"):
        solution().pairs(31, replace=False)
    x = 100 * torch.arange(4.0)[:, None]
    found = transport.sinkhorn(x, x + 1, epsilon=0.1)
    with pytest.raises(ValueError, match="n must be fewer distinct cells"):
        found.pairs(5, replace=False)


def test_a_generator_makes_pairs_reproducible():
    found = solution()
    for options in ({}, {"n": 20}, {"n": 20, "replace": False}):
        one, two = (found.pairs(**options, generator=seeded(5)) for _ in range(2))
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_wrong_arguments_of_pairs():
    found = solution()
    for options, error in (
        ({"n": 0}, ValueError),
        ({"n": 2.5}, TypeError),
        ({"replace": 1}, TypeError),
        ({"generator": 0}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            found.pairs(**options)


def test_rows_of_no_mass_are_never_drawn_and_a_plan_of_none_is_an_error():
    sums = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    rows = draw(sums, torch.rand(1, 10_000, dtype=F64, generator=seeded()))[0]
    assert set(rows.tolist()) == {1, 3}
    for bad in (torch.zeros(1, 3), torch.tensor([[1.0, math.nan]])):
        with pytest.raises(ValueError, match="mass"):
            draw(bad, torch.rand(1, 3, dtype=F64))


# --- exact assignment -----------------------------------------------------------------------------


def test_assignment_of_unequal_clouds_and_of_batches():
    x, y = torch.randn(3, 5, 2), torch.randn(3, 7, 2)
    i, j = transport.assignment(x, y)
    assert i.shape == j.shape == (3, 5)
    for k in range(3):
        one = transport.assignment(x[k], y[k])
        assert torch.equal(one[0], i[k])
        assert torch.equal(one[1], j[k])
        assert len(set(j[k].tolist())) == 5


@pytest.mark.parametrize("counts", [(150, 150), (150, 300), (300, 150)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_potentials_change_no_pair(counts, scale):
    x, y = (scale * (torch.randn(n, 3) + k) for k, n in enumerate(counts))
    costs = torch.cdist(x.double(), y.double()).square()
    i, j = linear_sum_assignment(costs.numpy())
    best = float(costs[i, j].mean())
    ours = transport.assignment(x, y)
    assert float(costs[ours].mean()) == pytest.approx(best, rel=1e-9)
    each = torch.arange(300) // (300 // counts[0]), torch.arange(300) // (300 // counts[1])
    repeated = costs[each[0]][:, each[1]]
    best = float(repeated[linear_sum_assignment(repeated.numpy())].mean())
    assert transport.wasserstein(x, y) ** 2 == pytest.approx(best, rel=1e-9)
    plan = transport.OTPlanSampler("exact").get_map(x, y).double()
    assert float((plan * costs).sum()) == pytest.approx(best, rel=1e-6)


def test_pairs_of_points_that_are_all_equal():
    x = torch.zeros(200, 2)
    i, j = transport.assignment(x, x + 1)
    assert sorted(j.tolist()) == i.tolist() == list(range(200))
    assert transport.wasserstein(x, x + 1) == pytest.approx(2**0.5)


def test_assignment_without_scipy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="needs SciPy"):
        transport.assignment(torch.zeros(2, 1), torch.ones(2, 1))


# --- samplers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(5, 5), (4, 6)])
def test_the_exact_plan_is_a_plan_and_the_best(counts):
    x0, x1 = torch.randn(counts[0], 3, dtype=F64), torch.randn(counts[1], 3, dtype=F64)
    plan = transport.OTPlanSampler("exact").get_map(x0, x1)
    torch.testing.assert_close(plan.sum(1), torch.full((counts[0],), 1 / counts[0], dtype=F64))
    torch.testing.assert_close(plan.sum(0), torch.full((counts[1],), 1 / counts[1], dtype=F64))
    cost = float((plan * torch.cdist(x0, x1).square()).sum())
    # the dual of the entropic problem with a small epsilon is below, its plan above
    near = transport.sinkhorn(x0, x1, epsilon=1e-3, max_iterations=100_000, tolerance=1e-6)
    assert cost == pytest.approx(float(near.plan.transport_cost()), abs=2e-3)


def test_unequal_counts_without_a_common_multiple():
    with pytest.raises(ValueError, match="x0 and x1 must have equal counts"):
        transport.OTPlanSampler("exact").get_map(torch.zeros(101, 1), torch.zeros(97, 1))


@pytest.mark.parametrize("method", ["exact", "sinkhorn", "unbalanced", "partial"])
def test_samplers_draw_from_their_map(method):
    sampler = transport.OTPlanSampler(method, reg=0.5)
    x0, x1 = torch.randn(6, 1, 2), torch.randn(6, 1, 2)
    plan = sampler.get_map(x0, x1)
    generator = seeded()
    i, j = (
        torch.cat(t)
        for t in zip(
            *(sampler.pairs(x0, x1, generator=generator) for _ in range(2000)), strict=True
        )
    )
    assert same_distribution(6 * i + j, plan)
    i, j = sampler.sample_map(plan, 12_000, generator=generator)
    assert same_distribution(6 * i + j, plan)
    one, other = sampler.sample_plan(x0, x1)
    assert one.shape == other.shape == x0.shape
    kept, _ = sampler.sample_plan(x0, x1, replace=False)
    assert torch.equal(kept, x0)


def test_a_map_without_replacement():
    sampler = transport.OTPlanSampler()
    p = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    law = p.flatten()[:, None] * p.flatten() / (1 - p.flatten()[:, None])
    law.fill_diagonal_(0)
    generator = seeded()
    draws = [sampler.sample_map(p, 2, False, generator=generator) for _ in range(4000)]
    codes = torch.stack([4 * (2 * i[0] + j[0]) + 2 * i[1] + j[1] for i, j in draws])
    assert same_distribution(codes, law)
    with pytest.raises(ValueError, match="batch_size must be at most"):
        sampler.sample_map(torch.eye(2), 3, False)


def test_labels_go_with_their_samples():
    x0, x1 = torch.randn(8, 2), torch.randn(8, 2)
    sampler = transport.OTPlanSampler("sinkhorn", reg=0.1)
    one, other, y0, y1 = sampler.sample_plan_with_labels(x0, x1, x0[:, 0], None)
    assert torch.equal(one[:, 0], y0)
    assert y1 is None
    assert other.shape == x1.shape


@pytest.mark.parametrize("unit", [True, "spread"])
def test_normalized_costs_do_not_see_the_scale(unit):
    x0, x1 = torch.randn(8, 2, dtype=F64), torch.randn(8, 2, dtype=F64)
    sampler = transport.OTPlanSampler("sinkhorn", normalize_cost=unit, tolerance=1e-9)
    torch.testing.assert_close(sampler.get_map(x0, x1), sampler.get_map(100 * x0, 100 * x1))


def test_trajectories_follow_the_plans():
    x = torch.arange(4.0)[:, None, None].expand(4, 3, 1).clone()
    x[:, 1], x[:, 2] = x[:, 1].flip(0) + 10, x[:, 2].roll(1, 0) + 20
    path = transport.OTPlanSampler("exact").sample_trajectory(x)
    torch.testing.assert_close(path[:, :, 0] - path[:, :1, 0], torch.tensor([[0.0, 10, 20]] * 4))


def test_wasserstein():
    x, shift = torch.randn(30, 2), torch.tensor([3.0, 4.0])
    assert transport.wasserstein(x, x + shift) == pytest.approx(5.0)
    assert transport.wasserstein(x, x + shift, power=1) == pytest.approx(5.0)
    assert transport.wasserstein(x, x + shift, "sinkhorn", reg=0.01) == pytest.approx(
        5.0, rel=0.01
    )
    for options in ({"method": "partial"}, {"power": 3}, {"method": "sinkhorn", "power": 1}):
        with pytest.raises(ValueError, match=r"method must be|power must be"):
            transport.wasserstein(x, x, **options)


def test_wrong_arguments_of_samplers():
    for options in (
        {"method": "best"},
        {"mass": 0.0, "method": "partial"},
        {"mass": 1.1, "method": "partial"},
        {"mass": 0.5},
        {"reg": 0.0},
        {"reg_m": -1.0},
        {"normalize_cost": "max"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            transport.OTPlanSampler(**options)
    x = torch.zeros(3, 2)
    for sampler in (transport.OTPlanSampler(), transport.OTPlanSampler("sinkhorn")):
        for pair, match in (
            ((x, torch.zeros(3, 3)), "x0 and x1 must have samples of one shape"),
            ((x, torch.zeros(3)), "x1 must have shape"),
            ((x[:0], x), "x0 must have a sample"),
            ((x, x / 0), "x1 must be finite"),
        ):
            with pytest.raises(ValueError, match=match):
                sampler.sample_plan(*pair)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F64])
def test_samples_keep_their_dtype(dtype):
    x = torch.randn(6, 2).to(dtype)
    for method in ("exact", "sinkhorn"):
        one, other = transport.OTPlanSampler(method).sample_plan(x, x + 1)
        assert one.dtype == other.dtype == dtype


# --- one plan for many minibatches ----------------------------------------------------------------


def test_minibatches_are_the_pairs_of_one_plan():
    target = torch.randn(300, 2) + 5
    pairs = transport.PairedBatches(
        lambda n: torch.randn(n, 2), target, plan_size=256, batch_size=64, generator=seeded()
    )
    stream = iter(pairs)
    parts = [next(stream) for _ in range(4)]
    x0, x1 = (torch.cat(t) for t in zip(*parts, strict=True))
    assert len(x0.unique(dim=0)) == 256  # every sample of the source once
    best = transport.wasserstein(x0, x1) ** 2
    independent = float((x0 - x1[torch.randperm(256)]).square().sum(1).mean())
    drawn = float((x0 - x1).square().sum(1).mean())
    assert drawn < best + 0.1 * (independent - best)
    again, _ = next(stream)  # of a new plan
    assert again.shape == (64, 2)
    assert not bool((again[:, None] == x0).all(-1).any())


def test_exact_pairs_of_half_samples_do_not_depend_on_their_count():
    x = torch.randn(200, 2, generator=seeded()).half()
    i, j = transport.assignment(x, x.flip(0))
    assert (i + j == 199).all()
