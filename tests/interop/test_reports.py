"""What reports say of transforms and densities that no op knows."""

import copy

import FrEIA.framework as ff
import FrEIA.modules as fm
import normflows as nf
import pytest
import torch
import zuko
from laws.draws import normal
from nflows import distributions, flows, transforms
from nflows.transforms.base import Transform

import pyflowkern

D = 4
UNKNOWN = "no op knows it"


def notes(model):
    return {entry.name: entry.note for entry in pyflowkern.accelerate(model).left}


class Doubling(Transform):
    """A transform of a user's."""

    def forward(self, inputs, context=None):
        return 2 * inputs, inputs.new_full((len(inputs),), D * torch.log(torch.tensor(2.0)))


def test_transforms_and_densities_of_nflows():
    base = distributions.ConditionalDiagonalNormal([D])
    parts = [transforms.LULinear(D), transforms.Sigmoid(), Doubling()]
    model = flows.Flow(transforms.CompositeTransform(parts), base)
    report = pyflowkern.accelerate(model)
    assert [(e.name, e.kind, e.note) for e in report.left] == [
        ("_transform._transforms.1", "nflows.Sigmoid", UNKNOWN),
        ("_transform._transforms.2", f"{__name__}.Doubling", UNKNOWN),
        ("_distribution", "nflows.ConditionalDiagonalNormal", UNKNOWN),
    ]
    with pytest.raises(ValueError, match="ConditionalDiagonalNormal"):
        pyflowkern.accelerate(model, strict=True)


def test_transforms_and_densities_of_normflows():
    base = nf.distributions.GaussianMixture(3, D)
    model = nf.NormalizingFlow(base, [nf.flows.Planar((D,)), nf.flows.Squeeze()])
    assert notes(model) == {"q0": UNKNOWN, "flows.0": UNKNOWN}
    images = nf.NormalizingFlow(
        nf.distributions.DiagGaussian((D, 2, 2)), [nf.flows.ActNorm((D, 1, 1))]
    )
    assert notes(images) == {
        "flows.0": "it is of images, of which only couplings and GlowBlocks are known"
    }


def test_transforms_of_zuko():
    clip = zuko.lazy.UnconditionalTransform(zuko.transforms.SoftclipTransform, bound=5.0)
    model = zuko.flows.Flow(
        [clip, zuko.flows.NICE(D).transform.transforms[0]], zuko.flows.NICE(D).base
    )
    assert notes(model) == {
        "transform.transforms.0": "no op knows its transform, SoftclipTransform"
    }
    assert notes(zuko.flows.GMM(D, components=3)) == {"": UNKNOWN}


def test_transforms_of_freia():
    model = ff.SequenceINN(D, 4, 4)
    model.append(fm.HaarDownsampling)
    model.append(fm.PermuteRandom)
    model.append(fm.Flatten)
    assert notes(model) == {
        "module_list.0": UNKNOWN,
        "module_list.1": "it is of images, of which only couplings are known",
    }


def test_densities_of_glasflow():
    densities, own = (
        pytest.importorskip(f"glasflow.{name}") for name in ("distributions", "flows")
    )
    accept = torch.nn.Sequential(torch.nn.Linear(D, 1), torch.nn.Sigmoid())
    box = densities.MultivariateUniform(-8 * torch.ones(D), 8 * torch.ones(D))
    for base in (box, densities.ResampledGaussian(D, accept)):
        torch.manual_seed(0)
        model = own.RealNVP(D, 2, n_neurons=8, distribution=base).double().eval()
        twin = copy.deepcopy(model)
        report = pyflowkern.accelerate(twin)
        (entry,) = report.left
        assert (entry.name, entry.note) == ("_distribution", UNKNOWN)
        assert entry.kind == f"glasflow.{type(base).__name__}"
        assert "_transform" in {e.name for e in report.accelerated if e.runs == "one op"}
        found = []
        for each in (model, twin):
            torch.manual_seed(1)
            found.append([each.log_prob(0.1 * normal(5, D)), each.forward(normal(5, D))])
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_what_a_transform_consists_of_is_not_named():
    """It runs within the transform, or is left alone with it."""
    qr = transforms.QRLinear(D, 2)
    assert any(isinstance(part, Transform) for part in list(qr.modules())[1:])
    assert not notes(qr)
    assert not notes(nf.flows.LULinearPermute(D))
    assert not notes(nf.flows.GlowBlock(D, 8))

    class Mine(transforms.QRLinear):
        pass

    assert notes(Mine(D, 2)) == {"": "a subclass of nflows.QRLinear may do anything"}


def test_the_process_is_told_once_of_what_is_left_alone():
    with pyflowkern.accelerate() as report:
        before = len(report.entries)
        assert not report.left
        for _ in range(2):
            model = flows.Flow(
                transforms.CompositeTransform([transforms.LULinear(D), Doubling()]),
                distributions.StandardNormal([D]),
            )
            model.log_prob(torch.randn(3, D))
        assert [(e.kind, e.note) for e in report.left] == [(f"{__name__}.Doubling", UNKNOWN)]
        with pyflowkern.accelerate() as other:
            assert not other.left
        assert len(report.entries) == before + 1
    assert "Doubling" in str(report)


def test_splines_that_no_op_knows_are_not_said_to_run():
    """On [0, 1] without tails normflows has its own."""
    torch.manual_seed(0)
    coupling = nf.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling(
        torch.tensor([1, 0, 1, 0]), lambda i, o: nf.nets.ResidualNet(i, o, 8), num_bins=4
    )
    assert notes(coupling) == {"": "its form is not known"}
