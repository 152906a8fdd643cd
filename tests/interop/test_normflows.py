"""Models of normflows: what runs in the place of their transforms gives what the library gives."""

import copy

import normflows as nf
import pytest
import torch
from laws.chains import calls
from laws.draws import normal
from laws.normflows_models import (
    CLOSE,
    IMAGES,
    VECTORS,
    D,
    context_of,
    coupling,
    data,
    derivatives,
    glow,
    log_prob,
    pair,
)

import pyflowkern

__all__ = ["calls"]  # a fixture


@pytest.fixture(params=[*VECTORS, *IMAGES])
def name(request):
    return request.param


def test_log_densities_and_gradients_are_those_of_the_library(name):
    model, twin = pair(name)
    torch.testing.assert_close(
        derivatives(twin, data(twin)), derivatives(model, data(model)), **CLOSE
    )


def test_float32_is_as_exact_as_the_librarys(name):
    model, twin = pair(name)
    x = data(model)
    want = derivatives(model, x)

    def error(m):
        found = derivatives(m.float(), x.float())
        return max(
            (a - b).abs().max() / (1 + b.abs().max()) for a, b in zip(found, want, strict=True)
        )

    assert error(twin) <= 3 * error(model) + 1e-6


def test_samples_are_drawn_alike(name):
    model, twin = pair(name)
    found = []
    for m in (model, twin):
        torch.manual_seed(5)
        found.append(m.sample(6, *context_of(m)))
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("name", VECTORS)
def test_other_methods_are_those_of_the_library(name):
    model, twin = pair(name)
    x = data(model)
    for method in (
        "forward",
        "inverse",
        "forward_and_log_det",
        "inverse_and_log_det",
        "forward_kld",
    ):
        given = [x, *context_of(model)]
        want = getattr(model, method)(*given)
        # log-dets of a model in float64 come in float32, as from the library
        torch.testing.assert_close(getattr(twin, method)(*given), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VECTORS)
def test_a_flow_is_one_op(name, calls):
    _, twin = pair(name)
    x = data(twin)
    calls.clear()
    log_prob(twin, x)
    assert len(calls) == 1
    twin.sample(6, *context_of(twin))
    assert len(calls) == 2


def test_training_goes_as_without(name):
    losses = []
    for model in pair(name):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        x = data(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss = -log_prob(model, x).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-8)


def test_a_glow_block_is_a_network_of_convolutions_and_three_ops():
    twin, x = glow(side=16), torch.randn(2, 3, 16, 16)
    log_prob(twin, x)
    pyflowkern.accelerate(twin)
    with torch.no_grad(), torch.profiler.profile() as profile:
        log_prob(twin, x)
    found = {e.key: e.count for e in profile.key_averages() if e.key.startswith("pyflowkern::")}
    blocks = sum(isinstance(m, nf.flows.GlowBlock) for m in twin.modules())
    names = ("conv_network", "affine_coupling", "plu_matrix", "linear_mix")
    assert found == {f"pyflowkern::{name}": blocks for name in names}


def test_classes_of_the_base_stay(calls):
    torch.manual_seed(0)
    base = nf.distributions.ClassCondDiagGaussian(D, 3)
    model = nf.ClassCondFlow(base, [coupling(), nf.flows.Permute(D), coupling()]).double()
    twin = copy.deepcopy(model)
    pyflowkern.accelerate(twin)
    calls.clear()
    x, y = normal(6, D), torch.tensor([0, 1, 2, 0, 1, 2])
    found = []
    for m in (model, twin):
        torch.manual_seed(1)
        found.append([m.log_prob(x, y), m.forward_kld(x, y), *m.sample(6, y), *m.sample(6)])
    torch.testing.assert_close(*found, **CLOSE)
    assert len(calls) == 4


def _circular(bound):
    """Splines with circular and linear tails, of each feature and of all."""
    options = {"tail_bound": bound}
    coupled = nf.flows.CircularCoupledRationalQuadraticSpline
    return [
        nf.flows.CircularAutoregressiveRationalQuadraticSpline(D, 1, 8, [1, 2], **options),
        coupled(D, 1, 8, [1, 3], **options),
        coupled(D, 1, 8, [0], mask=torch.tensor([0, 1, 0, 1]), num_bins=5, **options),
        coupled(D, 1, 8, [0, 1, 2, 3], reverse_mask=True, **options),
        nf.flows.CoupledRationalQuadraticSpline(D, 1, 8, tails="circular", **options),
        nf.flows.CoupledRationalQuadraticSpline(D, 1, 8, tails="linear", **options),
    ]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("each", [True, False])
def test_circular_splines_are_those_of_the_library(inside, each):
    """Outside of its interval a feature with tails of its own is 0 there, and others stay what they are."""
    torch.manual_seed(0)
    bound = torch.tensor([5.0, 3.0, 4.0, 3.0]) if each else 3.0
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(D), _circular(bound)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    twin = copy.deepcopy(model)
    report = pyflowkern.accelerate(twin)
    assert sum("Coupling" in e.kind for e in report.accelerated) == 5
    assert sum("CDF" in e.kind for e in report.accelerated) == 5
    x = normal(6, D).clamp(-2, 2) * (1 if inside else 3)
    if not inside:
        x[0] = torch.tensor([5.0, 3.0, -4.0, -3.0])  # the ends belong to the intervals
        x[1] = torch.tensor([100.0, -50.0, 1.0, 0.0])
    torch.testing.assert_close(derivatives(twin, x), derivatives(model, x), **CLOSE)
    z = normal(6, D, seed=2).clamp(-2, 2)
    torch.testing.assert_close(
        twin.forward_and_log_det(z), model.forward_and_log_det(z), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("bound", [3.0, torch.tensor([5.0, 3.0, 4.0, 3.0])], ids=["one", "each"])
def test_circular_splines_are_one_op_for_all_features(bound, monkeypatch):
    seen = []
    spline = pyflowkern.ops.spline
    monkeypatch.setattr(
        pyflowkern.ops, "spline", lambda x, *a, **k: seen.append(x.shape) or spline(x, *a, **k)
    )
    for module, count in zip(_circular(bound)[:5], (1, 2, 2, 2, 2), strict=True):
        pyflowkern.accelerate(module)
        seen.clear()
        module.inverse(normal(6, D, dtype=torch.float32))
        assert len(seen) == count
        assert sum(s[1] for s in seen) == D


@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_splines_whose_bounds_fit_no_input_raise_as_before(method):
    module = nf.flows.CoupledRationalQuadraticSpline(D, 1, 8, tails="circular")
    module.prqct.tail_bound = torch.ones(D)  # of all features, not of those that are moved
    twin = copy.deepcopy(module)
    pyflowkern.accelerate(twin)
    for m in (module, twin):
        with pytest.raises(RuntimeError, match=r"must match|broadcast"):
            getattr(m, method)(normal(6, D, dtype=torch.float32))


def test_a_singular_matrix_is_the_librarys_error():
    layer = nf.flows.InvertibleAffine(3, use_lu=False)
    model = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(3), [nf.flows.MaskedAffineAutoregressive(3, 8), layer]
    )
    pyflowkern.accelerate(model)
    layer.W.data.zero_()
    with pytest.raises(RuntimeError, match="singular"):
        model.forward(torch.randn(4, 3))


@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_a_method_that_replaces_a_door_is_called(method):
    """From data to latent the library calls ``inverse``."""
    steps = [nf.flows.MaskedAffineAutoregressive(3, 8) for _ in range(3)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(3), steps)
    pyflowkern.accelerate(model)
    x = torch.randn(4, 3)
    run = getattr(model, method)
    run(x)
    setattr(steps[1], method, lambda x, context=None: (x + 1, torch.zeros(len(x))))
    got = run(x)
    pyflowkern.restore(model)
    torch.testing.assert_close(got, run(x))


@pytest.mark.parametrize("layer", ["ActNorm", "AffineConstFlow"])
def test_norms_of_one_feature_are_steps_like_others(layer, calls):
    """There the library's log-determinant is that of one pixel, which is the feature."""
    torch.manual_seed(0)
    norms = [getattr(nf.flows, layer)((1,)), nf.flows.Reverse(getattr(nf.flows, layer)((1,)))]
    spline = nf.flows.AutoregressiveRationalQuadraticSpline(1, 1, 8)
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(1), [norms[0], spline, norms[1]])
    model = model.double()
    x = normal(6, 1)
    model.log_prob(x)  # norms start here
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    twin = copy.deepcopy(model)
    assert not pyflowkern.accelerate(twin).left
    calls.clear()
    torch.testing.assert_close(derivatives(twin, x), derivatives(model, x), **CLOSE)
    assert len(calls) == 1
    wide = normal(6, 3)  # one scale for all features
    torch.testing.assert_close(twin.flows[0].inverse(wide), model.flows[0].inverse(wide), **CLOSE)
