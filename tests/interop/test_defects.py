"""Known defects of libraries: that they are there, what an accelerated model does, and that its report says so."""

import copy

import normflows as nf
import pytest
import torch
import zuko
from FrEIA.framework import SequenceINN
from FrEIA.modules import ActNorm, AllInOneBlock
from laws import glow_script, normal
from nflows import transforms
from nflows.nn.nets import ResidualNet

import pyflowkern
from pyflowkern.interop import _defects


def said(model):
    """Accelerate a model; return what its report says of each class."""
    return {entry.kind: entry.note for entry in pyflowkern.accelerate(model).entries}


def filled(model, scale):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=draw))
    return model


def of_nflows(bound=3.0):
    def net(inputs, outputs):
        return ResidualNet(inputs, outputs, hidden_features=16, num_blocks=1)

    return transforms.PiecewiseRationalQuadraticCouplingTransform(
        [1, 0, 1, 0], net, num_bins=8, tails="linear", tail_bound=bound
    )


def of_normflows(bound=3.0):
    return nf.flows.CoupledRationalQuadraticSpline(4, 1, 16, tail_bound=bound)


@pytest.mark.parametrize("build", [of_nflows, of_normflows])
def test_inverses_of_splines_have_values(build):
    model = filled(build(), 4.0)
    name = "forward" if build is of_normflows else "inverse"
    x = 6 * torch.rand(20000, 4, generator=torch.Generator().manual_seed(1)) - 3
    with torch.no_grad():
        try:
            assert not getattr(model, name)(x)[1].isfinite().all()
        except AssertionError:  # the library's, or ours if there is no such defect
            with pytest.raises(AssertionError, match=r"^$|discriminant"):
                getattr(model, name)(x)
        notes = said(model)
        for found in getattr(model, name)(x):
            assert found.isfinite().all()
    assert any("has no bin" in note for note in notes.values())


@pytest.mark.parametrize("build", [of_nflows, of_normflows])
@pytest.mark.parametrize("name", ["forward", "inverse"])
def test_values_on_a_large_bound_have_a_bin(build, name):
    model, x = build(64.0), torch.full((5, 4), 64.0)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        getattr(model, name)(x)
    assert any("has no bin" in note for note in said(model).values())
    torch.testing.assert_close(getattr(model, name)(x)[0], x)


def test_a_matrix_that_the_library_cannot_invert():
    model, z = (
        transforms.CompositeTransform([transforms.NaiveLinear(4), of_nflows()]),
        normal(5, 4),
    )
    model.double()
    with pytest.raises(RuntimeError, match="removed"):
        model.inverse(z)
    assert "torch no longer has" in said(model)["nflows.NaiveLinear"]
    torch.testing.assert_close(model(model.inverse(z)[0])[0], z)
    with pytest.raises(RuntimeError, match="removed"):
        model._transforms[0].inverse(z)


@pytest.mark.parametrize(("name", "bias"), [("forward", 200.0), ("inverse", -200.0)])
def test_scales_of_what_passes_do_not_count(name, bias):
    net, z = nf.nets.MLP([4, 8, 4]), normal(9, 4, dtype=torch.float32)
    model = nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0.0, 1.0, 0.0]), None, net)
    with torch.no_grad():
        net.net[-1].bias[0] = bias
    before = getattr(model, name)(z)[0]
    assert before[:, 0].isnan().all()
    assert "the library makes NaN" in said(model)["normflows.MaskedAffineFlow"]
    got = getattr(model, name)(z)[0]
    assert torch.equal(got[:, 0], z[:, 0])
    torch.testing.assert_close(got[:, 1:], before[:, 1:])


@pytest.mark.parametrize(
    ("scale_map", "bias", "name"),
    [
        ("exp", 200.0, "forward"),
        ("sigmoid", -200.0, "forward"),
        ("sigmoid_inv", -200.0, "inverse"),
    ],
)
def test_scales_of_couplings_overflow_as_before(scale_map, bias, name):
    net, z = nf.nets.MLP([2, 8, 4]), normal(9, 4, dtype=torch.float32)
    model = nf.flows.AffineCouplingBlock(net, scale_map=scale_map)
    with torch.no_grad():
        net.net[-1].bias[1::2] = bias
    want = getattr(model, name)(z)
    assert want[0].isinf().any()
    assert "may overflow" in said(model)["normflows.AffineCouplingBlock"]
    got = getattr(model, name)(z)
    torch.testing.assert_close(got[0], want[0])
    assert got[1].isfinite().all()


def glow_block():
    return nf.flows.GlowBlock(4, 8)


def glow_flow():
    return glow_script.Flow(4, conv_lu=True)


def normflows_norm():
    return nf.flows.ActNorm((4,))


def freia_norm():
    model = SequenceINN(4)
    model.append(ActNorm)
    model.append(AllInOneBlock, subnet_constructor=torch.nn.Linear)
    return model


@pytest.mark.parametrize(
    ("build", "kind", "shape", "method"),
    [
        (glow_block, "normflows.GlowBlock", (6, 4, 4, 4), "inverse"),
        (glow_flow, "glow.Flow", (6, 4, 4, 4), "forward"),
        (normflows_norm, "normflows.ActNorm", (6, 4), "inverse"),
        (freia_norm, "FrEIA.ActNorm", (6, 4), "forward"),
    ],
)
def test_a_first_batch_starts_norms_in_evaluation_too(build, kind, shape, method):
    torch.manual_seed(0)
    model = build().eval()
    twin, x = copy.deepcopy(model), 3 * normal(*shape, dtype=torch.float32) + 1
    before = copy.deepcopy(model.state_dict())
    want = getattr(model, method)(x)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "a first batch starts it in evaluation mode" in said(twin)[kind]
    torch.testing.assert_close(getattr(twin, method)(x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-4)


def test_features_without_variance_make_nan_of_an_act_norm():
    model, x = freia_norm(), normal(6, 4, dtype=torch.float32)
    x[:, 1] = 3.0
    twin = copy.deepcopy(model)
    assert "without variance" in said(twin)["FrEIA.ActNorm"]
    assert model(x)[0].isnan().any()
    assert twin(x)[0].isnan().any()


def test_log_determinants_are_in_the_default_dtype():
    flows = [nf.flows.LULinearPermute(4)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), flows).double()
    twin, z = copy.deepcopy(model), normal(6, 4)
    assert "default dtype" in said(twin)["normflows.NormalizingFlow"]
    for m in (model, twin):
        assert m.forward_and_log_det(z)[1].dtype == torch.float32


def test_continuous_flows_have_no_second_derivatives():
    model = zuko.flows.CNF(3, hidden_features=(8,)).double()
    twin, x = copy.deepcopy(model), normal(4, 3).requires_grad_()
    assert "no second derivatives" in said(twin)["zuko.FFJTransform"]
    for m in (model, twin):
        (grad,) = torch.autograd.grad(m().log_prob(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grad.square().sum(), x)


def test_matrices_that_the_library_keeps_do_not_keep_a_model_from_being_accelerated():
    """Of parameters as they were, and results of operations that are recorded."""
    x = normal(5, 4)
    for recorded in (True, False):
        model = transforms.CompositeTransform(
            [
                transforms.LULinear(4, using_cache=True),
                transforms.SVDLinear(4, 2, using_cache=True),
            ]
        )
        model.double().eval()
        with torch.set_grad_enabled(recorded):
            want = model(x)
        report = pyflowkern.accelerate(model)
        assert not report.left
        torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


def test_kept_inverses_of_other_dtypes():
    model, z = transforms.LULinear(4, using_cache=True).double().eval(), normal(5, 4)
    with pytest.raises(RuntimeError, match="same dtype"):
        model.inverse(z)
    assert "made in float32 on the CPU" in said(model)["nflows.LULinear"]
    torch.testing.assert_close(model(model.inverse(z)[0])[0], z)


def test_every_defect_is_of_a_class_that_is_known():
    for start, part, text in _defects.DEFECTS:
        assert _defects.known_defect(start + part) == text
    assert _defects.known_defect("nflows.LULinear") == ""
