"""Sinkhorn for users, against dense formulas, recorded numbers of other libraries, and truths of small problems."""

import itertools
import math

import pytest
import torch

from pyflowkern import transport

F64 = torch.float64
EXACT = {"tolerance": 1e-13, "max_iterations": 100_000}


#: The host-run CUDA sources are held to the laws of their ops; here they would take minutes.
on_backends = pytest.mark.parametrize(
    "backend",
    ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
    indirect=True,
)


def problem():
    """Return a problem of fixed numbers, which the recorded results are of."""
    x = torch.sin(1.3 * torch.arange(10, dtype=F64).reshape(5, 2))
    y = torch.cos(0.7 * torch.arange(8, dtype=F64).reshape(4, 2)) + 0.2
    a = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=F64)
    return x, y, a, torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=F64)


def costs(x, y):
    return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)


def dense_solution(x, y, a, b, epsilon, rho=math.inf):
    """Iterate potentials with the whole matrix, to rounding."""
    scores, f, g = -costs(x, y) / epsilon, torch.zeros_like(a), torch.zeros_like(b)
    damp = 1 / (1 + epsilon / rho)
    for _ in range(20_000):
        old = f
        g = -damp * epsilon * torch.logsumexp((scores + f[:, None] / epsilon).mT + a.log(), 1)
        f = -damp * epsilon * torch.logsumexp(scores + g / epsilon + b.log(), 1)
        if torch.equal(f, old):
            break
    return f, g, a[:, None] * b * torch.exp(scores + (f[:, None] + g) / epsilon)


# --- parity ---------------------------------------------------------------------------------------


def numbers(*lines):
    return torch.tensor([float(v) for line in lines for v in line.split()], dtype=F64)


#: Columns of plans of POT 0.9.7 with reg=0.1 and stopThr=1e-15: ot.sinkhorn, and ot.unbalanced.sinkhorn_unbalanced with
#: reg_m=0.5, (0.5, 2) and (inf, 0.5).
POT_PLANS = {
    (None, 0): """9.9966230313683013e-02 1.5003376968595364e-01 3.7355835301643223e-13
                  1.4999999999998934e-01 1.3669158117563820e-24""",
    (None, 3): """3.3769686316769110e-05 2.1242279694896915e-03 1.9784199117734450e-01
                  1.0392021683560318e-14 1.1166839500256165e-08""",
    (0.5, 0): """1.4785141193386869e-04 1.9865813601673740e-11 2.0001369937511355e-19
                 1.4212612239554853e-01 3.2447953934898720e-30""",
    ((0.5, 2.0), 3): """5.5576091203449647e-02 1.4976693039956750e-06 1.2141148320127726e-01
                        1.3786174842329221e-09 3.8231432099459871e-08""",
    ((None, 0.5), 1): """1.8846005956278224e-09 2.9970381172063953e-01 9.8860016364940420e-10
                         5.0764471119271422e-08 1.4151582224921895e-11""",
}


@pytest.mark.parametrize(("unbalanced", "column"), POT_PLANS)
def test_plans_are_those_that_pot_finds(unbalanced, column):
    x, y, a, b = problem()
    found = transport.sinkhorn(x, y, a=a, b=b, epsilon=0.1, unbalanced=unbalanced, **EXACT)
    wanted = numbers(POT_PLANS[unbalanced, column])
    torch.testing.assert_close(found.plan.dense()[:, column], wanted, rtol=1e-9, atol=0)


def test_potentials_are_those_that_pot_finds():
    """Those of method="sinkhorn_log" are log(a) + f / reg and log(b) + g / reg, up to a constant."""
    x, y, a, b = problem()
    log_u = numbers(
        "-3.7758048079976887 14.226733861254813 4.540066166821604",
        "-13.194319721254795 0.11769061830957561",
    )
    log_v = numbers("15.872898447715999 -14.851239154348518 -1.42418813156192 -2.3478100228030216")
    found = transport.sinkhorn(x, y, a=a, b=b, epsilon=0.1, **EXACT)
    u, v = found.f / 0.1 + a.log(), found.g / 0.1 + b.log()
    shift = log_u[0] - u[0]
    torch.testing.assert_close(u + shift, log_u, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(v - shift, log_v, rtol=1e-9, atol=1e-9)


#: Of geomloss 0.3.1 (SamplesLoss, p=2, blur=sqrt(0.1), tensorized), without reach and with reach=sqrt(0.5), there with
#: twice the masses b: its divergence, its cost and its potentials after 20,000 iterations at the last epsilon in place
#: of its own schedule, and its divergence by that schedule with scaling 0.9, 0.95, 0.99 and 0.999.
GEOMLOSS = {
    None: (
        0.3874230077046964,
        0.5282059244153732,
        """-0.05077911210985752 0.761710388270695 0.3680553598580785 -0.5408029742205515 0.18262231196969922
           0.8612169624355005 -0.5574095874979861 -0.0582669946740853 -0.023206062539916514""",
        "0.37387723412934937 0.37633114310007887 0.3843703340207123 0.3874117385641128",
    ),
    0.5: (
        0.33717111926348753,
        0.4648139862274381,
        """0.030273120536464637 0.19462059910896942 0.02660777368316953 -0.2488650293825105 -0.1591002822170602
           0.5497102631830882 0.0080389185792817 0.24597073455436655 0.24039566176041505""",
        "0.3346964833602524 0.3362394717509507 0.3371401671853752 0.33717365954370265",
    ),
}


@pytest.mark.parametrize("rho", GEOMLOSS)
def test_divergence_cost_and_potentials_are_those_that_geomloss_finds(rho):
    x, y, a, b = problem()
    b = b if rho is None else 2 * b
    divergence, cost, potentials, by_schedule = GEOMLOSS[rho]
    options = {"epsilon": 0.1, "cost": "half_sqeuclidean", "unbalanced": rho, **EXACT}
    found = transport.sinkhorn(x, y, a=a, b=b, **options)
    ours = float(transport.sinkhorn_divergence(x, y, a=a, b=b, **options))
    assert ours == pytest.approx(divergence, abs=1e-12)
    # of its cost it leaves out a constant of the masses, which is 0 where they are 1
    left_out = 0.1 * (a.sum() * b.sum() - (a.sum() + b.sum()) / 2)
    assert float(found.cost - left_out) == pytest.approx(cost, rel=1e-9)
    f, g = numbers(potentials).split([5, 4])
    shift = f[0] - found.f[0] if rho is None else 0.0
    torch.testing.assert_close(found.f + shift, f, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.g - shift, g, rtol=0, atol=1e-9)
    # its schedule stops at the last epsilon, converged or not: the slower it goes, the closer it comes
    errors = (numbers(by_schedule) - ours).abs().tolist()
    assert all(late < early for early, late in itertools.pairwise(errors))
    assert errors[-1] < 2e-5


@pytest.mark.parametrize("schedule", ["alternating", "symmetric"])
@pytest.mark.parametrize("rho", [None, 0.7])
@on_backends
def test_potentials_and_plan_are_those_of_the_dense_iteration(backend, schedule, rho):
    x, y, a, b = problem()
    f, g, plan = dense_solution(x, y, a, b, 0.3, rho or math.inf)
    found = transport.sinkhorn(
        x, y, a=a, b=b, epsilon=0.3, schedule=schedule, unbalanced=rho, **EXACT
    )
    torch.testing.assert_close(found.plan.dense(), plan, rtol=1e-9, atol=1e-12)
    shift = (found.f - f).mean() if rho is None else 0.0
    torch.testing.assert_close(found.f - shift, f, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.g + shift, g, rtol=1e-9, atol=1e-9)


def test_one_penalty_leaves_the_other_marginal_held():
    x, y, a, b = problem()
    found = transport.sinkhorn(x, y, a=a, b=b, epsilon=0.3, unbalanced=(None, 0.2), **EXACT)
    torch.testing.assert_close(found.plan.row_sums(), a, rtol=1e-9, atol=0)
    assert (found.plan.column_sums() - b).abs().max() > 1e-3


# --- the plan -------------------------------------------------------------------------------------


@on_backends
def test_the_plan_as_a_linear_map(backend):
    x, y, a, b = problem()
    plan = transport.sinkhorn(x, y, a=a, b=b, epsilon=0.3, **EXACT).plan
    dense = plan.dense()
    torch.testing.assert_close(dense.sum(1), a, rtol=1e-9, atol=0)
    torch.testing.assert_close(dense.sum(0), b, rtol=1e-9, atol=0)
    torch.testing.assert_close(plan.T.dense(), dense.mT, rtol=1e-12, atol=0)
    torch.testing.assert_close(plan.row_sums(), a, rtol=1e-9, atol=0)
    torch.testing.assert_close(plan.column_sums(), b, rtol=1e-9, atol=0)
    matrix = torch.randn(4, 3, dtype=F64, requires_grad=True)
    torch.testing.assert_close(plan @ matrix, dense @ matrix)
    torch.testing.assert_close(plan @ matrix[:, 0], dense @ matrix[:, 0])
    (plan @ matrix).sum().backward()
    torch.testing.assert_close(matrix.grad, b[:, None].expand(4, 3), rtol=1e-9, atol=0)
    torch.testing.assert_close(plan.transport_cost(), (dense * costs(x, y)).sum())
    torch.testing.assert_close(plan.conditional_mean(), dense @ y / a[:, None])


def test_points_without_mass_change_nothing_and_have_an_image():
    x, y, a, b = problem()
    more = torch.cat([x, torch.tensor([[0.3, -0.2]], dtype=F64)])
    with_none = transport.sinkhorn(more, y, a=torch.cat([a, a.new_zeros(1)]), b=b, epsilon=0.3)
    without = transport.sinkhorn(x, y, a=a, b=b, epsilon=0.3)
    torch.testing.assert_close(with_none.cost, without.cost, rtol=1e-6, atol=0)
    image = with_none.barycentric_map()
    torch.testing.assert_close(image[:5], without.barycentric_map(), rtol=1e-3, atol=1e-3)
    assert image[5].isfinite().all()
    i, _ = with_none.pairs(2000)
    assert int(i.max()) < 5


def test_batches_are_problems_of_their_own():
    x, y = torch.randn(3, 6, 2, dtype=F64), torch.randn(3, 4, 2, dtype=F64)
    b = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    found = transport.sinkhorn(x, y, b=b, epsilon=0.5)
    assert found.status == (transport.Status.converged,) * 3
    i, j = found.pairs(5)
    assert i.shape == j.shape == (3, 5)
    assert (found.plan @ y).shape == (3, 6, 2)
    for k in range(3):
        one = transport.sinkhorn(x[k], y[k], b=b, epsilon=0.5)
        assert one.cost.shape == ()
        assert one.status is transport.Status.converged
        torch.testing.assert_close(one.cost, found.cost[k])
        torch.testing.assert_close(one.barycentric_map(), found.barycentric_map()[k])


# --- truths ---------------------------------------------------------------------------------------


def test_one_point_each():
    x, y = torch.tensor([[1.0, 2.0]], dtype=F64), torch.tensor([[4.0, 6.0]], dtype=F64)
    found = transport.sinkhorn(x, y, epsilon=0.1)
    assert float(found.cost) == pytest.approx(25.0, rel=1e-12)
    # potentials of 25, which are divided by epsilon: 250 roundings
    assert float(found.plan.dense()) == pytest.approx(1.0, rel=250 * 2.0**-52)
    assert found.pairs(3)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("n", [2, 4, 6])
def test_a_small_epsilon_gives_the_best_permutation(n):
    x, y = torch.randn(n, 3, dtype=F64), torch.randn(n, 3, dtype=F64)
    matrix = costs(x, y)
    best = min(
        itertools.permutations(range(n)), key=lambda p: sum(matrix[i, p[i]] for i in range(n))
    )
    found = transport.sinkhorn(x, y, epsilon=5e-3, max_iterations=100_000)
    assert found.status is transport.Status.converged
    assert transport.assignment(x, y)[1].tolist() == list(best)
    assert found.plan.dense().argmax(1).tolist() == list(best)
    exact = sum(float(matrix[i, best[i]]) for i in range(n)) / n
    # the entropy of a permutation against the product is log n
    assert float(found.cost) == pytest.approx(exact + 5e-3 * math.log(n), abs=1e-3)


def test_translations_and_shifts():
    x, y, a, b = problem()
    shift = torch.tensor([30.0, -40.0], dtype=F64)
    plain = transport.sinkhorn(x, y, a=a, b=b, epsilon=0.3, **EXACT)
    moved = transport.sinkhorn(x + shift, y + shift, a=a, b=b, epsilon=0.3, **EXACT)
    torch.testing.assert_close(moved.cost, plain.cost, rtol=1e-9, atol=0)
    # |x - y - s|^2 = |x - y|^2 - 2 <x - y, s> + |s|^2: the plan stays, the mean of the cross term is known
    apart = transport.sinkhorn(x, y + shift, a=a, b=b, epsilon=0.3, **EXACT)
    cross = 2 * ((a[:, None] * x).sum(0) - (b[:, None] * y).sum(0)) @ shift
    torch.testing.assert_close(apart.cost, plain.cost - cross + shift.square().sum())
    torch.testing.assert_close(apart.plan.dense(), plain.plan.dense(), rtol=1e-7, atol=1e-12)
    # potentials are determined up to a constant that moves from one to the other
    p = plain.plan
    other = transport.Plan(p.x, p.y, p.a, p.b, p.f + 5, p.g - 5, epsilon=0.3)
    torch.testing.assert_close(other.dense(), p.dense(), rtol=1e-9, atol=0)


def test_gradients_follow_from_the_plan():
    x, y, a, b = problem()
    points, others = x.clone().requires_grad_(), y.clone().requires_grad_()
    found = transport.sinkhorn(points, others, a=a, b=b, epsilon=0.3, **EXACT)
    found.cost.backward()
    plan, apart = found.plan.dense(), x[:, None] - y
    torch.testing.assert_close(points.grad, (plan[..., None] * 2 * apart).sum(1))
    torch.testing.assert_close(others.grad, -(plan[..., None] * 2 * apart).sum(0))


def test_the_gradient_by_masses_is_the_derivative():
    x, y, a, b = problem()
    masses = a.clone().requires_grad_()
    transport.sinkhorn(x, y, a=masses, b=b, epsilon=0.3, **EXACT).cost.backward()
    step = torch.tensor([1.0, -1.0, 0.5, 0.5, -1.0], dtype=F64) * 1e-4
    ends = [
        float(transport.sinkhorn(x, y, a=a + s, b=b, epsilon=0.3, **EXACT).cost)
        for s in (step, -step)
    ]
    assert float(masses.grad @ step) == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-5)


def test_divergence_is_zero_of_equal_clouds_and_its_gradient_points_apart():
    x = torch.randn(40, 2, dtype=F64)
    zero = transport.sinkhorn_divergence(x, x.clone(), epsilon=0.2, **EXACT)
    assert abs(float(zero)) < 1e-10
    moved = (x + 0.5).requires_grad_()
    transport.sinkhorn_divergence(moved, x, epsilon=0.2, **EXACT).backward()
    # S(x + s, x) = |s|^2, so that each of n points moves it by 2 s / n
    torch.testing.assert_close(moved.grad, torch.full_like(moved, 2 * 0.5 / 40))


def test_two_gaussians_cost_what_the_closed_form_says():
    """Clouds of 3000: the values of five seeds have a standard deviation near 2 % and a bias below 1 %."""
    cov1 = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F64)
    x = torch.randn(3000, 2, dtype=F64)
    y = torch.randn(3000, 2, dtype=F64) @ torch.linalg.cholesky(cov1).mT + 1
    one, zero = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64)
    bridge = transport.gaussian_bridge(zero, one, zero + 1, cov1, sigma=0.7)
    found = transport.sinkhorn(x, y, epsilon=2 * 0.7**2)
    assert found.status is transport.Status.converged
    assert float(found.cost) == pytest.approx(float(bridge.cost), rel=0.06)
    assert float(found.plan.transport_cost()) == pytest.approx(
        float(bridge.transport_cost), rel=0.06
    )
    # the coupling of the ends
    centred = x - x.mean(0)
    coupling = centred.mT @ (found.plan @ (y - y.mean(0)))
    torch.testing.assert_close(coupling, bridge.coupling_covariance, rtol=0, atol=0.06)


# --- how it ends ----------------------------------------------------------------------------------


def test_a_tiny_epsilon_says_how_far_it_came():
    x, y = torch.randn(100, 2), torch.rand(100, 2)
    found = transport.sinkhorn(x, y, epsilon=1e-6, max_iterations=300)
    assert found.status is transport.Status.not_converged
    assert 1e-3 < float(found.error) <= 2.0
    assert found.cost.isfinite()
    assert int(found.iterations) == 300
    # all the same, the plan is good: within a few percent of the exact one
    i, j = transport.assignment(x, y)
    exact = float((x[i] - y[j]).square().sum(1).mean())
    assert float(found.cost) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("points", [(20, 10_000), (300, 1)])
def test_points_of_many_coordinates_or_one(points):
    n, d = points
    x = torch.randn(n, d)
    found = transport.sinkhorn(x, x.flip(0) + 1, epsilon=0.05 * d**0.5)
    assert found.status is transport.Status.converged
    assert float(found.plan.transport_cost()) == pytest.approx(d, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_cost_has_the_dtype_of_the_points(dtype):
    x = torch.randn(10, 2, dtype=dtype)
    assert transport.sinkhorn(x, x + 1, epsilon=1.0).cost.dtype == dtype
    assert transport.sinkhorn_divergence(x, x + 1, epsilon=1.0).dtype == dtype


# --- wrong arguments ------------------------------------------------------------------------------


def wrong():
    x = torch.zeros(3, 2)
    nan, one = torch.full((3, 2), math.nan), torch.ones(3)
    third = one / 3
    return {
        "x, empty": ((x[:0], x), {}, "x must have a point"),
        "y, empty": ((x, x[:0]), {}, "y must have a point"),
        "x, no coordinates": ((x[:, :0], x[:, :0]), {}, "x must have a point"),
        "x, one axis": ((x[0], x), {}, "x must have shape"),
        "coordinates": ((x, x[:, :1]), {}, "x and y must have"),
        "x, NaN": ((nan, x), {}, "x must be finite"),
        "y, infinite": ((x, x / 0 + math.inf), {}, "y must be finite"),
        "a, negative": ((x, x), {"a": third - 1}, "a must be finite and not negative"),
        "b, NaN": ((x, x), {"b": nan[:, 0]}, "b must be finite and not negative"),
        "a, zero": ((x, x), {"a": 0 * one}, "a must have a positive total"),
        "a, length": ((x, x), {"a": one[:2]}, "a must have shape"),
        "totals": ((x, x), {"a": one}, "a and b must have the same total"),
        "epsilon, zero": ((x, x), {"epsilon": 0.0}, "epsilon must be positive"),
        "epsilon, NaN": ((x, x), {"epsilon": math.nan}, "epsilon must be positive"),
        "cost": ((x, x), {"cost": "euclidean"}, "cost must be one of"),
        "schedule": ((x, x), {"schedule": "random"}, "schedule must be one of"),
        "scaling": ((x, x), {"epsilon_scaling": 1.0}, "epsilon_scaling must be between"),
        "iterations": ((x, x), {"max_iterations": 0}, "max_iterations must be"),
        "tolerance": ((x, x), {"tolerance": -1.0}, "tolerance must be"),
        "unbalanced": ((x, x), {"unbalanced": -1.0}, "unbalanced must be positive"),
        "unbalanced, three": ((x, x), {"unbalanced": (1.0, 1.0, 1.0)}, "unbalanced must be"),
    }


@pytest.mark.parametrize("case", wrong())
def test_wrong_arguments(case):
    clouds, options, message = wrong()[case]
    with pytest.raises(ValueError, match=message):
        transport.sinkhorn(*clouds, **{"epsilon": 0.1, **options})


def test_what_is_no_number_or_tensor_is_a_type_error():
    x = torch.zeros(3, 2)
    for clouds, epsilon in (((x, x), "small"), ((x, x.double()), 0.1), ((x.half(),) * 2, 0.1)):
        with pytest.raises(TypeError):
            transport.sinkhorn(*clouds, epsilon=epsilon)


def test_matrices_that_do_not_fit_the_plan():
    plan = transport.sinkhorn(torch.zeros(3, 2), torch.ones(4, 2), epsilon=1.0).plan
    for matrix in (torch.ones(3), torch.ones(3, 2), torch.ones(1, 4, 2)):
        with pytest.raises(ValueError, match=r"matrix must have shape \(4,\)"):
            plan @ matrix
    with pytest.raises(TypeError, match="matrix"):
        plan @ torch.ones(4, dtype=F64)
