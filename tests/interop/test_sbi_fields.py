"""Fields of sbi's flow matching and score estimators: what solves them gives what sbi and zuko give."""

import copy
import functools
import pickle

import pytest
import torch
from laws.draws import normal

import pyflowkern
from pyflowkern.interop._zuko.continuous import may_solve
from pyflowkern.nn.links import Door

nets = pytest.importorskip("sbi.neural_nets.net_builders.vector_field_nets")
solvers = pytest.importorskip("sbi.samplers.ode_solvers")

D, K, N = 3, 4, 5
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
KINDS = {
    "flow": {"estimator_type": "flow"},
    "flow, z-scored": {"estimator_type": "flow", "z_score_x": "independent", "z_score_y": "independent"},
    "flow around a normal density": {
        "estimator_type": "flow", "gaussian_baseline": True, "z_score_x": "independent",
    },
    "flow of GELU and no norms": {"estimator_type": "flow", "layer_norm": False, "skip_connections": False},
    "adaptive flow": {"estimator_type": "flow", "net": "ada_mlp", "time_emb_type": "random_fourier"},
    "ve score": {"estimator_type": "score", "sde_type": "ve"},
    "vp score": {"estimator_type": "score", "sde_type": "vp", "z_score_x": "independent"},
    "subvp score": {"estimator_type": "score", "sde_type": "subvp", "activation": torch.nn.SiLU},
    "adaptive score": {"estimator_type": "score", "net": "ada_mlp", "time_emb_type": "random_fourier"},
}  # fmt: skip
#: The solver takes several steps a wave of the time, so that there are few waves: with hundreds of steps, whose sizes
#: follow from an estimate of the error, rounding shows.
SIZES = {
    "hidden_features": 8,
    "num_layers": 2,
    "time_embedding_dim": 6,
    "condition_emb_dim": 7,
    "fourier_scale": 0.3,
}


def estimator(name="flow", **options):
    """Return an estimator whose weights are not those it starts with."""
    torch.manual_seed(0)
    theta, x = 2 * normal(50, D).float() + 1, 5 * normal(50, K, seed=1).float()
    made = nets.build_vector_field_estimator(theta, x, **SIZES, **KINDS[name], **options)
    with torch.no_grad():
        for p in made.net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return made.double().eval()


def ode_of(made, **options):
    """Return what a posterior of sbi makes of an estimator."""
    return solvers.build_neural_ode(
        made.ode_fn, made.net, made.mean_base, made.std_base, made.condition_shape,
        t_min=made.t_min, t_max=made.t_max, **options,
    )  # fmt: skip


def pair(name="flow", **options):
    """Return what integrates a field as it is, and accelerated."""
    ode = ode_of(estimator(name, **options))
    twin = copy.deepcopy(ode)
    (entry,) = pyflowkern.accelerate(twin, strict=True).entries
    assert (entry.name, entry.kind, entry.runs) == ("", "sbi.ZukoNeuralODE", "own op")
    return ode, twin


def density(ode, x, c, **options):
    torch.manual_seed(3)
    return ode(c, **options).log_prob(x)


@pytest.mark.parametrize("name", KINDS)
def test_velocities_and_traces_are_those_of_the_library(name):
    ode, twin = pair(name)
    x, c, probe = normal(N, 1, D), normal(1, K, seed=2), normal(N, 1, D, seed=5)
    for t in torch.tensor([0.1, 0.5, 0.9]).double():
        x.requires_grad_()
        velocity = ode.f(x, c, t)
        rows = [
            torch.autograd.grad(velocity[..., i].sum(), x, retain_graph=True)[0] for i in range(D)
        ]
        jacobian = torch.stack(rows, -2)
        trace = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
        estimate = torch.einsum("nbi,nbij,nbj->nb", probe, jacobian, probe)
        field = twin.get_distribution.field(x, c)
        torch.testing.assert_close(field.velocity(t, x), velocity, **CLOSE)
        torch.testing.assert_close(field.with_trace(t, x), (velocity, trace), **CLOSE)
        torch.testing.assert_close(field.with_estimate(t, x, probe), (velocity, estimate), **CLOSE)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_densities_and_samples_are_those_of_the_library(name, exact):
    ode, twin = pair(name)
    x, c = 0.5 * normal(N, 1, D), normal(1, K, seed=2)
    with torch.no_grad():
        want = density(ode, x, c, exact=exact)
        torch.testing.assert_close(density(twin, x, c, exact=exact), want, **CLOSE)
        found = []
        for each in (ode, twin):
            torch.manual_seed(4)
            made = each(c)
            found.append([made.sample((6,)), *made.rsample_and_log_prob((2,))])
        torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("name", ["flow, z-scored", "adaptive flow", "vp score"])
def test_gradients_are_those_of_the_library(name):
    found = []
    for each in pair(name):
        x, c = 0.5 * normal(N, 1, D), normal(1, K, seed=2)
        x.requires_grad_()
        c.requires_grad_()
        value = density(each, x, c)
        leaves = [x, c, *each.net.parameters()]
        found.append([value, *torch.autograd.grad(value.sum(), leaves)])
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("batch", [(1,), (N,)])
def test_conditions_spread_over_samples(batch):
    ode, twin = pair("flow, z-scored")
    c, x = normal(*batch, K, seed=2), normal(2, *batch, D)
    with torch.no_grad():
        torch.testing.assert_close(density(twin, x, c), density(ode, x, c), **CLOSE)


def test_a_condition_runs_once_for_all_samples():
    _, twin = pair()
    seen = []
    layer = twin.net.condition_layer
    field = twin.get_distribution.field(normal(N, 1, D), normal(1, K))
    layer.forward = lambda x: (
        seen.append(len(x)) or torch.nn.functional.linear(x, layer.weight, layer.bias)
    )
    field.velocity(torch.tensor(0.5).double(), normal(N, 1, D))
    assert seen == [1]
    # of an instance with a method of its own, later solves are the library's
    assert twin.get_distribution.field(normal(N, 1, D), normal(1, K)) is None


def test_single_precision_is_as_close_as_the_library():
    ode, twin = pair("flow, z-scored")
    x, c = normal(50, 1, D), normal(1, K, seed=2)
    with torch.no_grad():
        want = density(ode, x, c)
        singles = []
        for each in (ode, twin):
            each.f.__self__.float()
            each.mean_base, each.std_base = each.mean_base.float(), each.std_base.float()
            singles.append(density(each, x.float(), c.float()))
    errors = [(s - want).abs().max() for s in singles]
    assert errors[1] < 2 * errors[0] + 1e-4


@pytest.mark.parametrize("how", ["a hook", "a method", "another network", "a parametrization"])
def test_what_hangs_on_a_part_is_the_librarys(how):
    ode, twin = pair()
    x, c = 0.5 * normal(N, 1, D), normal(1, K, seed=2)
    with torch.no_grad():
        density(twin, x, c)
        for each in (ode, twin):
            made = each.f.__self__
            if how == "a hook":
                each.net.layers[0].register_forward_hook(lambda m, given, out: 2 * out)
            elif how == "a method":
                made.forward = functools.partial(lambda m, x, c, t: x, made)
            elif how == "another network":
                made.net.activation = torch.nn.Softsign()
            else:
                torch.nn.utils.parametrizations.weight_norm(made.net.layers[1])
                made.net.layers[1].parametrizations.weight.original0.mul_(2)
        torch.testing.assert_close(density(twin, x, c), density(ode, x, c), **CLOSE)


def test_weights_are_read_at_each_call_however_they_were_written():
    ode, twin = pair("flow, z-scored")
    x, c = 0.5 * normal(N, 1, D), normal(1, K, seed=2)
    with torch.no_grad():
        made = [each(c) for each in (ode, twin)]
        for step in range(2):
            for each in (ode, twin):
                each.net.layers[step].weight.data.mul_(-0.5)
                each.f.__self__.mean_0.data.add_(1.0)
            torch.testing.assert_close(density(twin, x, c), density(ode, x, c), **CLOSE)
            torch.testing.assert_close(made[1].log_prob(x), made[0].log_prob(x), **CLOSE)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_nothing(how):
    ode, twin = pair()
    x, c = 0.5 * normal(N, 1, D), normal(1, K, seed=2)
    with torch.no_grad():
        want = density(twin, x, c)
        other = how(twin)
        assert isinstance(other.__dict__["get_distribution"], Door)
        for p in other.net.parameters():
            p.mul_(0.5)
        assert not torch.allclose(density(other, x, c), want)
        torch.testing.assert_close(density(twin, x, c), density(ode, x, c), **CLOSE)
    pyflowkern.restore(twin)
    assert not any(isinstance(v, Door) for v in twin.__dict__.values())


def test_states_that_zuko_integrates_in_another_way_are_its_own():
    _, twin = pair()
    x, c = normal(D), normal(1, K, seed=2)
    assert may_solve(x, c)
    assert twin.get_distribution.field(x, c) is None  # of one axis
    assert (
        twin.get_distribution.field(normal(2, D), normal(3, 1, K)) is None
    )  # which would become more
    assert twin.get_distribution.field(normal(N, D + 1), c) is None
    assert twin.get_distribution.field(normal(N, D), c.float()) is None


def test_the_line_for_the_process_serves_what_a_posterior_makes():
    x, c = 0.5 * normal(N, 1, D), normal(1, K, seed=2)
    with torch.no_grad():
        want = density(ode_of(estimator()), x, c)
        with pyflowkern.accelerate():
            ode = ode_of(estimator())
            got = density(ode, x, c)
            assert isinstance(ode.__dict__["get_distribution"], Door)
        torch.testing.assert_close(got, want, **CLOSE)
        assert "get_distribution" not in ode.__dict__
        torch.testing.assert_close(density(ode, x, c), want, **CLOSE)


def test_what_is_left_alone_is_said():
    (entry,) = pyflowkern.accelerate(estimator()).left
    assert entry.kind == "sbi.FlowMatchingEstimator"
    assert "posterior.potential_fn.neural_ode" in entry.note
    transformer = {"net": "transformer", "hidden_features": 10, "num_heads": 2}
    torch.manual_seed(0)
    made = nets.build_vector_field_estimator(
        normal(9, D).float(), normal(9, K).float(), **transformer
    )
    (entry,) = pyflowkern.accelerate(ode_of(made)).left
    assert entry.note == "its network is not known: VectorFieldTransformer"
    ode = ode_of(estimator())
    ode.f = lambda x, c, t: x
    (entry,) = pyflowkern.accelerate(ode).left
    assert entry.note == "what it integrates is not the field of one of sbi's estimators"


def test_embeddings_of_time_in_single_precision_are_compared_in_it():
    """sbi's sinusoidal embedding is of float32 whatever the network is."""
    made = estimator("flow", time_emb_type="sinusoidal").float()
    ode = ode_of(made)
    twin = copy.deepcopy(ode)
    assert pyflowkern.accelerate(twin, strict=True).accelerated
    x, c = 0.5 * normal(N, 1, D).float(), normal(1, K, seed=2).float()
    with torch.no_grad():
        torch.testing.assert_close(density(twin, x, c), density(ode, x, c), rtol=1e-3, atol=1e-3)
