"""The names of torchcfm, iterations of other libraries, and what plans and samplers say where a problem is hard."""

import inspect
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyflowkern import ops, transport

F64 = torch.float64


#: The host-run CUDA sources are held to the laws of their ops; here they would take minutes.
on_backends = pytest.mark.parametrize(
    "backend",
    ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
    indirect=True,
)

#: Arguments of torchcfm 1.0.7, in its order.
ARGUMENTS = {
    "ConditionalFlowMatcher": "sigma",
    "ConditionalFlowMatcher.compute_mu_t": "x0 x1 t",
    "ConditionalFlowMatcher.compute_sigma_t": "t",
    "ConditionalFlowMatcher.sample_xt": "x0 x1 t epsilon",
    "ConditionalFlowMatcher.compute_conditional_flow": "x0 x1 t xt",
    "ConditionalFlowMatcher.sample_noise_like": "x",
    "ConditionalFlowMatcher.sample_location_and_conditional_flow": "x0 x1 t return_noise",
    "ConditionalFlowMatcher.compute_lambda": "t",
    "ExactOptimalTransportConditionalFlowMatcher": "sigma",
    "ExactOptimalTransportConditionalFlowMatcher.guided_sample_location_and_conditional_flow": (
        "x0 x1 y0 y1 t return_noise"
    ),
    "TargetConditionalFlowMatcher": "sigma",
    "SchrodingerBridgeConditionalFlowMatcher": "sigma ot_method",
    "SchrodingerBridgeConditionalFlowMatcher.guided_sample_location_and_conditional_flow": (
        "x0 x1 y0 y1 t return_noise"
    ),
    "VariancePreservingConditionalFlowMatcher": "sigma",
    "OTPlanSampler": "method reg reg_m normalize_cost num_threads warn",
    "OTPlanSampler.get_map": "x0 x1",
    "OTPlanSampler.sample_map": "pi batch_size replace",
    "OTPlanSampler.sample_plan": "x0 x1 replace",
    "OTPlanSampler.sample_plan_with_labels": "x0 x1 y0 y1 replace",
    "wasserstein": "x0 x1 method reg power",
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_those_of_torchcfm(name):
    ours = transport
    for part in name.split("."):
        ours = getattr(ours, part)
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = [p.name for p in inspect.signature(ours).parameters.values() if p.kind is positional]
    assert [p for p in found if p != "self"] == ARGUMENTS[name].split()


# --- iterations -----------------------------------------------------------------------------------


def problem():
    """Return points of fixed numbers, which the recorded results are of."""
    x = torch.sin(1.3 * torch.arange(10, dtype=F64).reshape(1, 5, 2))
    return x, torch.cos(0.7 * torch.arange(8, dtype=F64).reshape(1, 4, 2)) + 0.2


#: Potentials of geomloss 0.3.1 by its own schedule, far from a solution: SamplesLoss(p=2, blur=sqrt(0.1), scaling,
#: debias=False, potentials=True), with reach=sqrt(0.5) and twice the masses b, or without; and its count of epsilons.
BY_SCHEDULE = {
    (
        None,
        0.5,
        6,
    ): """-0.05772504766945115 0.4962282891018954 0.44920059562189973 -0.5484207474760419
                       0.4327315187476586 0.8936042596530639 -0.23977507414643284 -0.2998060422654838
                       -0.09860425988114818""",
    (
        None,
        0.9,
        23,
    ): """-0.1874439125356867 0.6045269958194979 0.45025916643834346 -0.6785199408619033
                        0.4057111071139612 1.004929217790045 -0.3773924201282093 -0.2730131116299433
                        -0.09991792771673935""",
    (
        0.5,
        0.5,
        6,
    ): """0.01920150025232158 0.06255499939883002 0.0060557067602016856 -0.1649377492777936
                      -0.11974382141462274 0.46725144469809793 0.1401925543958253 0.20711930579193008
                      0.2620483516312376""",
    (
        0.5,
        0.9,
        23,
    ): """0.020241467897242675 0.1398517317514039 0.013550898868009718 -0.22945715931629507
                       -0.13127556153699105 0.5308403899006574 0.06283853132311992 0.2188694232590059
                       0.2543320642387416""",
}


@on_backends
@pytest.mark.parametrize(("rho", "scaling", "count"), BY_SCHEDULE)
def test_iterations_of_the_symmetric_schedule_are_those_of_geomloss(backend, rho, scaling, count):
    a = torch.tensor([[0.1, 0.3, 0.2, 0.15, 0.25]], dtype=F64)
    b = torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=F64)
    out = ops.sinkhorn(
        *problem(),
        a,
        b if rho is None else 2 * b,
        epsilon=0.1,
        scale=0.5,
        max_iterations=count,
        tolerance=0.0,
        schedule="symmetric",
        epsilon_scaling=scaling**2,
        penalty_x=rho,
        penalty_y=rho,
    )
    wanted = [float(v) for v in BY_SCHEDULE[rho, scaling, count].split()]
    found = torch.cat([out.f[0], out.g[0]])
    torch.testing.assert_close(found, found.new_tensor(wanted), rtol=0, atol=1e-12)
    assert float(out.error) > 0.05


@on_backends
def test_iterations_of_the_alternating_schedule_are_those_of_pot(backend):
    """Column 2 of POT 0.9.7: ot.sinkhorn(a, b, M, 0.1, "sinkhorn_log", numItermax=7, stopThr=0) with equal masses."""
    a, b = torch.full((1, 5), 0.2, dtype=F64), torch.full((1, 4), 0.25, dtype=F64)
    x, y = problem()
    out = ops.sinkhorn(x, y, a, b, epsilon=0.1, max_iterations=7, tolerance=0.0)
    last = torch.eye(4, dtype=F64)[None, :, 2:3]
    found = ops.plan_product(x, y, a, b, out.f, out.g, last, epsilon=0.1).flatten()
    wanted = found.new_tensor([3.728713083724682e-14, 2.863778912276371e-08, 0.0021819679667952887,
                               2.133283349607578e-19, 0.19999991356588423])  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert float(out.error) > 0.1


# --- plans ----------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_point_that_sends_out_next_to_nothing_has_an_image(backend, dtype):
    """That of the little that it sends, exp(-1500) of its mass, which no dtype has."""
    y = torch.linspace(-1, 1, 7).to(dtype)[:, None]
    x = torch.cat([y, y.new_tensor([[40.0]])])
    options = {"epsilon": 0.05, "unbalanced": 1.0}
    found = transport.sinkhorn(x, y, **options)
    scores = (found.g - (x[-1].double() - y[:, 0].double()).square()) / 0.05
    wanted = (torch.softmax(scores, 0) @ y.double()).to(dtype)
    torch.testing.assert_close(found.barycentric_map()[-1], wanted, rtol=1e-3, atol=0)
    assert float(found.plan.growth()[-1]) < 1e-30
    turned = transport.sinkhorn(y, x, **options).plan.T
    torch.testing.assert_close(turned.conditional_mean()[-1], wanted, rtol=1e-2, atol=0)


def marginals(found, x, y):
    """Return by how much both marginals of equal masses are off, in float64."""
    cost = torch.cdist(
        x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    scores = (found.f[:, None] + found.g - cost) / found.plan.epsilon
    dense = scores.exp() / cost.numel()
    return [float((dense.sum(axis) - 1 / cost.shape[1 - axis]).abs().sum()) for axis in (1, 0)]


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)  # the reference computes in float64
@pytest.mark.parametrize(("d", "apart", "epsilon"), [(3, 20, 6e-3), (784, 10, 0.2), (50, 0, 1.0)])
def test_no_plan_is_called_converged_that_float32_cannot_tell(backend, d, apart, epsilon):
    """Two clusters far apart for their epsilon: rounded scores are solved, those that were asked for are not."""
    x, y = (torch.randn(200, d, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    for cloud in (x, y):
        cloud[:100] += apart
        cloud[100:] -= apart
    found = transport.sinkhorn(x, y, epsilon=epsilon)
    worst = max(marginals(found, x, y))
    assert float(found.plan.marginal_error()) == pytest.approx(worst, rel=1e-6)
    assert (found.status is transport.Status.converged) == (apart == 0)
    if apart:
        assert float(found.error) == pytest.approx(worst, rel=1e-6)
    wide = transport.sinkhorn(x.double(), y.double(), epsilon=epsilon, max_iterations=5000)
    assert wide.status is transport.Status.converged
    assert max(marginals(wide, x, y)) < 1.1e-3


def test_marginal_errors_of_penalties_and_of_batches():
    x, y = torch.randn(3, 6, 2), torch.randn(3, 5, 2)
    exact = {"epsilon": 0.5, "tolerance": 1e-9, "max_iterations": 10_000}
    for unbalanced in (None, 0.7, (None, 0.7)):
        found = transport.sinkhorn(x.double(), y.double(), unbalanced=unbalanced, **exact)
        assert found.plan.marginal_error().shape == (3,)
        assert float(found.plan.marginal_error().max()) < 1e-8
    few = transport.sinkhorn(x.double(), y.double(), epsilon=0.5, max_iterations=1, tolerance=0.0)
    torch.testing.assert_close(few.plan.marginal_error(), few.error)
    assert transport.sinkhorn(x[:0], y[:0], epsilon=0.5).plan.marginal_error().shape == (0,)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest result of an operation has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, out.numel())
        return out


def test_a_dense_plan_has_no_matrix_for_each_coordinate():
    x = torch.randn(64, 500, dtype=F64)
    plan = transport.sinkhorn(x, x.flip(0), epsilon=1.0).plan
    with Largest() as largest:
        dense = plan.dense()
    assert largest.numbers <= 64 * 500
    torch.testing.assert_close(dense, torch.eye(64, dtype=F64).flip(0) / 64)


# --- samplers and distances -----------------------------------------------------------------------


def test_a_plan_that_did_not_converge_says_so():
    x0, x1 = torch.randn(50, 2), torch.rand(50, 2)
    with pytest.warns(RuntimeWarning, match="did not converge"):
        transport.OTPlanSampler("sinkhorn", 1e-7, max_iterations=5).sample_plan(x0, x1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = transport.OTPlanSampler("sinkhorn", 1e-7, 1.0, False, 1, False, max_iterations=5)
        silent.sample_plan(x0, x1)
        transport.OTPlanSampler("sinkhorn", 0.1).sample_plan(x0, x1)
    with pytest.raises(TypeError, match="warn must be"):
        transport.OTPlanSampler(warn=1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_entropic_distance_is_precise(dtype):
    """Pairs are drawn from plans that are solved to a hundredth; of a distance that would be seen."""
    x, y = torch.randn(40, 3).to(dtype), torch.randn(30, 3).to(dtype) + 0.5
    exact = {"tolerance": 1e-12, "max_iterations": 100_000}
    plan = transport.sinkhorn(x.double(), y.double(), epsilon=0.3, **exact).plan.dense()
    wanted = float((plan * torch.cdist(x.double(), y.double()).square()).sum()) ** 0.5
    assert transport.wasserstein(x, y, "sinkhorn", 0.3) == pytest.approx(wanted, rel=1e-5)
    with pytest.warns(RuntimeWarning, match="did not converge"):
        transport.wasserstein(x, y, "sinkhorn", 1e-6)


def test_wrong_samplers_are_named():
    x = torch.randn(8, 2)
    with pytest.raises(TypeError, match="sampler must be an OTPlanSampler, got str"):
        transport.PairedBatches(x, x, plan_size=8, batch_size=4, sampler="exact")
    with pytest.raises(ValueError, match="method must be one of"):
        transport.SchrodingerBridgeConditionalFlowMatcher(1.0, "")
    with pytest.raises(TypeError, match="x0 must be"):
        transport.wasserstein([0.0], x, "sinkhorn")
