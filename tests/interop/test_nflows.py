"""Models of nflows: what runs in the place of their transforms gives what the library gives."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from laws.chains import calls  # noqa: F401
from laws.draws import normal, unit
from laws.nflows_models import (
    BOUNDED,
    VECTORS,
    WITHOUT_INVERSE,
    D,
    K,
    flow,
    masked,
    multiscale,
    resnet,
    spline,
)
from nflows import distributions, transforms
from nflows.transforms.base import InputOutsideDomain

import pyflowkern

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
N = 7
ALL = {**VECTORS, **BOUNDED, "multiscale": multiscale}


def needs_context(model):
    return any(
        getattr(m, "context_features", None) or hasattr(m, "context_layer")
        for m in model.modules()
    )


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def context_of(model, dtype=torch.float64, n=N):
    return normal(n, K, seed=3, dtype=dtype) if needs_context(model) else None


def data(name, dtype=torch.float64):
    if name in BOUNDED:
        return unit(N, D, dtype=dtype)
    return 1.5 * normal(N, *((4, 4, 4) if name == "multiscale" else (D,)), dtype=dtype)


def make(name, dtype=torch.float64):
    """Return a model in evaluation mode whose parameters are not those it starts with."""
    torch.manual_seed(0)
    model = ALL[name]().to(dtype)
    with torch.no_grad():
        model.train().log_prob(data(name, dtype), context_of(model, dtype))  # norms start here
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def pair(name, dtype=torch.float64):
    """Return a model as it is, and an accelerated copy."""
    model = make(name, dtype)
    twin = copy.deepcopy(model)
    assert pyflowkern.accelerate(twin).accelerated
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    return model, twin


def derivatives(model, x, context):
    given = [t.detach().clone().requires_grad_() for t in (x, context) if t is not None]
    found = model.log_prob(*given)
    loss = (found * torch.arange(1, 1 + len(x))).sum()
    wanted = [*given, *model.parameters()]
    return [found, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


@pytest.fixture(params=ALL)
def name(request):
    return request.param


def test_log_densities_and_gradients_are_those_of_the_library(name):
    model, twin = pair(name)
    given = data(name), context_of(model)
    torch.testing.assert_close(derivatives(twin, *given), derivatives(model, *given), **CLOSE)


def test_transforms_are_those_of_the_library_both_ways(name):
    model, twin = pair(name)
    x, context = data(name), context_of(model)
    want = model._transform(x, context)
    got = twin._transform(x, context=context)
    torch.testing.assert_close(got, want, **CLOSE)
    back = twin._transform.inverse(got[0], context)
    close = CLOSE if name not in WITHOUT_INVERSE else {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(back, (x, -got[1]), **close)
    if name not in WITHOUT_INVERSE:
        with default_dtype(torch.float64):  # in which caches are made
            want = model._transform.inverse(got[0], context)
        torch.testing.assert_close(back, want, **CLOSE)


@pytest.mark.parametrize(
    "name", [name for name in [*VECTORS, "multiscale"] if name not in WITHOUT_INVERSE]
)
def test_samples_are_drawn_alike(name):
    model, twin = pair(name)
    context = context_of(model, n=2)
    if isinstance(model._distribution, distributions.DiagonalNormal):
        with pytest.raises(NotImplementedError):
            twin.sample(3)
        return
    found = []
    for m in (model, twin):
        torch.manual_seed(5)
        with default_dtype(torch.float64):
            found.append([m.sample(3, context), *m.sample_and_log_prob(2, context)])
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("name", [*VECTORS, *BOUNDED])
def test_a_flow_is_one_op(name, calls):  # noqa: F811
    _, twin = pair(name)
    x, context = data(name), context_of(twin)
    calls.clear()
    twin.log_prob(x, context)
    assert len(calls) == 1
    z, _ = twin._transform(x, context)
    twin._transform.inverse(z, context)
    assert len(calls) == 3


@pytest.mark.parametrize("name", VECTORS)
def test_training_goes_as_without(name):
    losses = []
    for model in pair(name):
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        x, context = data(name), context_of(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss = -model.log_prob(x, context).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        losses += [b.double().sum().item() for b in model.buffers()]
    half = len(losses) // 2
    assert losses[:half] == pytest.approx(losses[half:], rel=1e-8)


@pytest.mark.parametrize("name", ["NSF", "MAF of sbi", "autoregressive NSF", "RealNVP of nessai"])
def test_errors_in_float32_are_those_of_the_library(name):
    exact, _ = pair(name)
    model, twin = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    pyflowkern.accelerate(twin)
    x, context = data(name).float(), context_of(exact, torch.float32)
    want = derivatives(exact, x.double(), None if context is None else context.double())
    errors = [
        max(
            (a.double() - b).abs().max().item() / (1 + b.abs().max().item())
            for a, b in zip(got, want, strict=True)
        )
        for got in (derivatives(model, x, context), derivatives(twin, x, context))
    ]
    assert errors[1] < 3 * errors[0] + 1e-6


@pytest.mark.parametrize("name", ["random masks", "autoregressive quadratic", "RealNVP"])
def test_new_structure_counts(name):
    model, twin = pair(name)
    x = data(name)
    torch.manual_seed(7)
    other = ALL[name]().double().eval()
    twin.log_prob(x)
    for m in (twin, model):
        m.load_state_dict(other.state_dict())
    torch.testing.assert_close(twin.log_prob(x), model.log_prob(x), **CLOSE)


def test_a_permutation_that_is_drawn_again_counts():
    model, twin = pair("MAF")
    x = data("MAF")
    twin.log_prob(x)
    for m in (model, twin):
        permutation = m._transform._transforms[3]
        permutation._permutation = torch.tensor([4, 0, 3, 1, 2])
    torch.testing.assert_close(twin.log_prob(x), model.log_prob(x), **CLOSE)
    for m in (model, twin):
        m._transform._transforms[3]._permutation.data.copy_(torch.tensor([0, 1, 4, 3, 2]))
    torch.testing.assert_close(twin.log_prob(x), model.log_prob(x), **CLOSE)


def test_values_that_the_library_refuses_are_refused():
    _, twin = pair("RationalQuadratic on [0, 1]")
    with pytest.raises(InputOutsideDomain):
        twin.log_prob(data("RationalQuadratic on [0, 1]") + 0.5)
    _, twin = pair("MAF with a context")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        twin.log_prob(data("MAF"), normal(N, K + 1))
    with pytest.raises(ValueError, match="Number of input items"):
        twin.log_prob(data("MAF"), normal(N + 1, K))


def test_dropouts_run_in_training_only(calls):  # noqa: F811
    model = flow(
        spline(net=resnet(dropout_probability=0.5)), masked(dropout_probability=0.5)
    ).double()
    twin = copy.deepcopy(model)
    pyflowkern.accelerate(twin)
    x = data("NSF")
    for training in (True, False, True):
        found = []
        calls.clear()
        for m in (model.train(training), twin.train(training)):
            torch.manual_seed(3)
            found.append(m.log_prob(x))
        torch.testing.assert_close(*found, **CLOSE)
        assert len(calls) == (0 if training else 1)


def test_batch_norms_in_networks_are_called():
    model = flow(
        spline(net=resnet(use_batch_norm=True)),
        masked(use_batch_norm=True),
        masked("PiecewiseRationalQuadratic", use_batch_norm=True, num_bins=3, tails="linear"),
    ).double()
    twin = copy.deepcopy(model)
    own = [e.name for e in pyflowkern.accelerate(twin).entries if e.runs == "own op"]
    assert own == [f"_transform._transforms.{i}" for i in range(3)]
    x = data("NSF")
    for training in (True, False):
        given = x, None
        torch.testing.assert_close(
            derivatives(twin.train(training), *given),
            derivatives(model.train(training), *given),
            **CLOSE,
        )
    z, _ = model._transform(x)
    torch.testing.assert_close(twin._transform.inverse(z), model._transform.inverse(z), **CLOSE)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_convolutions_of_pixels_are_one_product():
    torch.manual_seed(0)
    model = transforms.OneByOneConvolution(6, identity_init=False).double()
    with torch.no_grad():
        model.bias.normal_()
    twin = copy.deepcopy(model)
    entry = pyflowkern.accelerate(twin).accelerated[0]
    assert (entry.name, entry.runs) == ("", "own op")
    found = []
    for m in (model, twin):
        x = normal(3, 6, 2, 5).requires_grad_()
        for run in (m, m.inverse):
            y, log_det = run(x)
            loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() + 3 * log_det.sum()
            wanted = [x, m.bias, m.lower_entries, m.upper_entries, m.unconstrained_upper_diag]
            found.append([y, log_det, *torch.autograd.grad(loss, wanted)])
    torch.testing.assert_close(found[2:], found[:2], **CLOSE)
    with torch.no_grad(), torch.profiler.profile() as profile:
        twin(x)
    assert sum(e.key == "pyflowkern::linear_mix" for e in profile.key_averages()) == 1
    with pytest.raises(ValueError, match="4D"):
        twin(normal(3, 6))


def test_networks_that_are_not_known_are_called():
    class Net(torch.nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.layer = torch.nn.Linear(inputs, outputs)

        def forward(self, x, context):
            return torch.sin(self.layer(x))

    model = flow(
        spline(net=Net, apply_unconditional_transform=True), spline("Quadratic", net=Net)
    ).double()
    twin = copy.deepcopy(model)
    entries = pyflowkern.accelerate(twin).entries
    assert [e.runs for e in entries if e.kind.endswith("CouplingTransform")] == ["own op"] * 2
    given = data("NSF"), None
    torch.testing.assert_close(derivatives(twin, *given), derivatives(model, *given), **CLOSE)
    z, _ = model._transform(given[0])
    torch.testing.assert_close(twin._transform.inverse(z), model._transform.inverse(z), **CLOSE)


def test_subclasses_and_replaced_methods_are_left_alone():
    class Mine(transforms.LULinear):
        def forward(self, inputs, context=None):
            outputs, log_det = super().forward(inputs, context)
            return 2 * outputs, log_det + D * math.log(2)

    other = transforms.LULinear(D)
    other.inverse = lambda z, context=None: (z, z.new_zeros(len(z)))
    model = flow(Mine(D), spline(), other).double()
    twin = copy.deepcopy(model)
    report = pyflowkern.accelerate(twin)
    assert [e.name for e in report.left] == [
        "_transform._transforms.0",
        "_transform._transforms.2",
    ]
    given = data("NSF"), None
    torch.testing.assert_close(derivatives(twin, *given), derivatives(model, *given), **CLOSE)


def test_known_differences_are_said():
    notes = {
        e.kind: e.note
        for e in pyflowkern.accelerate(
            flow(spline("Cubic"), transforms.LULinear(D, using_cache=True))
        ).entries
    }
    assert "cubic equations" in notes["nflows.PiecewiseCubicCouplingTransform"]
    assert "cache" in notes["nflows.LULinear"]


def test_a_cached_matrix_stays_the_one_of_the_cache():
    model = flow(spline(), transforms.SVDLinear(D, 2, using_cache=True)).double().eval()
    twin = copy.deepcopy(model)
    pyflowkern.accelerate(twin)
    x = data("NSF")
    for m in (model, twin):
        with torch.no_grad():
            m.log_prob(x)
            m._transform._transforms[1].unconstrained_diagonal.add_(1.0)
    torch.testing.assert_close(twin.log_prob(x), model.log_prob(x), **CLOSE)


def test_a_scale_that_becomes_negative_is_the_librarys():
    """The step of a chain has the logarithm of a scale; a comparison of an earlier instance says nothing of it."""
    models = []
    for _ in range(2):
        first = transforms.PointwiseAffineTransform(torch.zeros(D), torch.arange(1.0, D + 1))
        models.append(transforms.CompositeTransform([first, spline()]).double())
    twins = copy.deepcopy(models)
    pyflowkern.accelerate(twins[0])
    for model in (*models, *twins):
        model._transforms[0]._scale[1] *= -1
    pyflowkern.accelerate(twins[1])  # of the form that was compared
    x = data("NSF")
    for model, twin in zip(models, twins, strict=True):
        torch.testing.assert_close(twin(x), model(x), equal_nan=True, **CLOSE)
        assert twin(x)[0].isfinite().all()
