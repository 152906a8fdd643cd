"""accelerate(): what a model keeps, whichever library it is from."""

import copy
import itertools
from functools import partial
from types import MethodType

import normflows as nf
import numpy as np
import pytest
import torch
import zuko
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock, GLOWCouplingBlock
from laws import glow_script, normal
from laws.chains import calls  # noqa: F401
from nflows.flows import SimpleRealNVP
from nflows.nn.nets import ResidualNet
from nflows.transforms import AffineCouplingTransform, CompositeTransform, LULinear

import pyflowkern
from pyflowkern.interop import _accelerate, _check
from pyflowkern.interop._gains import expected_gain


def test_a_model_with_nothing_known_is_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    report = pyflowkern.accelerate(model)
    assert report.entries == []
    assert all(m.__dict__.keys() == before[name].keys() for name, m in model.named_modules())


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        pyflowkern.accelerate([])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        pyflowkern.restore("model")
    with pytest.raises(TypeError, match="strict must be True or False, got 1"):
        pyflowkern.accelerate(torch.nn.Linear(1, 1), strict=1)


def test_a_report_is_a_table():
    entries = [
        pyflowkern.interop.Entry("", "nflows.CompositeTransform", "one op", "5x"),
        pyflowkern.interop.Entry(
            "_transforms.0", "mine.MADE", note="a subclass of nflows.MADE may do anything"
        ),
    ]
    lines = str(pyflowkern.interop.Report(entries)).splitlines()
    assert len(lines) == 4
    assert "one op" in lines[2]
    assert lines[3].startswith("_transforms.0")
    assert lines[3].endswith("may do anything")


def test_a_long_note_of_several_modules_stands_once_below_the_table():
    note = "a known defect of the library, which takes a long line to say"
    entries = [pyflowkern.interop.Entry(f"{i}", "lib.A", "one op", note=note) for i in range(3)]
    entries += [pyflowkern.interop.Entry("3", "lib.B", note="short"), entries[0]]
    lines = str(pyflowkern.interop.Report(entries)).splitlines()
    assert lines[-1] == f"[1] {note}"
    assert [line.split()[-1] for line in lines[2:-1]] == ["[1]", "[1]", "[1]", "short", "[1]"]
    assert max(map(len, lines[:-1])) < 80


def test_gains_are_those_of_transforms_that_were_measured():
    assert expected_gain("nflows.PiecewiseRationalQuadraticCouplingTransform").startswith(
        "5-6.2x a step"
    )
    assert expected_gain("normflows.MaskedAffineAutoregressive").startswith("4.5-14x a step")
    assert expected_gain("nflows.LULinear") == ""


def affine_couplings(hidden):
    layers = []
    for i in range(2):
        net = partial(ResidualNet, hidden_features=hidden)
        layers.append(AffineCouplingTransform([i, 1 - i, i, 1 - i], net))
    return CompositeTransform(layers)


def test_wide_networks_are_the_library_s_while_gradients_are_recorded(calls):  # noqa: F811
    model = affine_couplings(130)
    want = copy.deepcopy(model)
    report = pyflowkern.accelerate(model)
    assert all("so wide" in entry.note for entry in report.entries[1:])
    x = normal(5, 4)
    calls.clear()  # those that compared
    looks = model.double().forward._runs._chains
    torch.testing.assert_close(model(x), want.double()(x))
    assert not calls
    assert looks._refused
    before = looks._refused
    torch.testing.assert_close(model(x), want(x))
    assert not calls
    assert looks._refused == before - 1  # nothing was looked at
    with torch.no_grad():
        torch.testing.assert_close(model(x), want(x))
    assert len(calls) == 1
    narrow = pyflowkern.accelerate(affine_couplings(8))
    assert not any(entry.note for entry in narrow.entries)


def of_zuko(hidden):
    return zuko.flows.NICE(4, transforms=2, hidden_features=hidden)


def of_normflows(hidden):
    nets = [nf.nets.MLP([2, *hidden, 4]) for _ in range(2)]
    flows = [nf.flows.AffineCouplingBlock(net) for net in nets]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(4), flows)


def of_freia(hidden):
    def subnet(inputs, outputs):
        sizes = [inputs, *hidden, outputs]
        layers = [torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        between = [part for layer in layers for part in (layer, torch.nn.ReLU())]
        return torch.nn.Sequential(*between[:-1])

    model = SequenceINN(4)
    for _ in range(2):
        model.append(AllInOneBlock, subnet_constructor=subnet)
    return model


def training_density(model, x):
    if isinstance(model, SequenceINN):
        return model(x)[1]
    return model().log_prob(x) if isinstance(model, zuko.flows.NICE) else model.log_prob(x)


@pytest.mark.parametrize("build", [of_zuko, of_normflows, of_freia])
@pytest.mark.parametrize(
    ("hidden", "ops"), [((300,), 1), ((200, 200), 1), ((300, 300), 0), ((200, 200, 200), 0)]
)
def test_how_wide_networks_may_be_depends_on_their_depth(build, hidden, ops, calls):  # noqa: F811
    model = build(hidden).double()
    twin, x = copy.deepcopy(model), normal(5, 4)
    report = pyflowkern.accelerate(twin)
    assert any("so wide" in entry.note for entry in report.entries) == (ops == 0)
    calls.clear()
    torch.testing.assert_close(training_density(twin, x), training_density(model, x))
    assert len(calls) == ops


def lu_composite():
    return CompositeTransform([LULinear(4), LULinear(4)])


def test_an_instance_that_cannot_be_read_is_left_alone():
    model = lu_composite()
    del model._transforms[1].eps
    report = pyflowkern.accelerate(model)
    assert [entry.name for entry in report.left] == ["_transforms.1"]
    assert "AttributeError" in report.left[0].note


def test_devices_and_autocast_of_the_caller_do_not_matter():
    for around in (torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16)):
        _check._agreed.clear()
        model = lu_composite()
        with around:
            assert len(pyflowkern.accelerate(model, strict=True).accelerated) == 3


def test_forms_that_were_compared_say_nothing_of_methods_of_an_instance():
    def doubled(self, params):
        scale, shift = AffineCouplingTransform._scale_and_shift(self, params)
        return 2 * scale, shift

    def make():
        return AffineCouplingTransform(torch.tensor([1, 0]), lambda i, o: ResidualNet(i, o, 8))

    pyflowkern.accelerate(make(), strict=True)
    known = len(_check._agreed)
    for own in (MethodType(doubled, mine := make()), partial(doubled, mine)):
        mine._scale_and_shift = own
        x = torch.randn(5, 2)
        want = mine(x)
        assert pyflowkern.accelerate(mine).left
        assert all(map(torch.equal, mine(x), want))
    assert len(_check._agreed) == known


def test_a_call_that_failed_holds_nothing(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    before = CompositeTransform.forward
    with monkeypatch.context() as patch:
        patch.setattr(_accelerate, "patch_functions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pyflowkern.accelerate()
    with pyflowkern.accelerate():
        assert CompositeTransform.forward is not before
    assert CompositeTransform.forward is before


def freia_blocks():
    model = SequenceINN(6)
    for block in (AllInOneBlock, GLOWCouplingBlock):
        model.append(block, subnet_constructor=lambda a, b: torch.nn.Linear(a, b))
    return model


MODELS = {
    "nflows": lambda: SimpleRealNVP(4, 8, 2, 1),
    "normflows": lambda: nf.NormalizingFlow(
        nf.distributions.DiagGaussian(2), [nf.flows.AffineCouplingBlock(nf.nets.MLP([1, 8, 2]))]
    ),
    "normflows Glow": lambda: nf.flows.GlowBlock(4, 8),
    "zuko": lambda: zuko.flows.NSF(3, transforms=1),
    "FrEIA": freia_blocks,
    "Glow": lambda: glow_script.Glow(3, 2, 1),
}


@pytest.mark.parametrize("library", MODELS)
def test_accelerating_draws_no_random_numbers_of_the_users(library):
    model = MODELS[library]()
    states = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002 - which FrEIA uses
    assert pyflowkern.accelerate(model).accelerated
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_equal(np.random.get_state(), states[1])  # noqa: NPY002
