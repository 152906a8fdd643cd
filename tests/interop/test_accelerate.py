"""accelerate(): what a model keeps, whichever library it is from."""

import pytest
import torch

import pyflowkern
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


def test_gains_are_those_of_transforms_that_were_measured():
    assert expected_gain("nflows.PiecewiseRationalQuadraticCouplingTransform").startswith(
        "5.7-6.2x a step"
    )
    assert expected_gain("normflows.MaskedAffineAutoregressive").startswith("4.7-10x a step")
    assert expected_gain("nflows.LULinear") == ""
