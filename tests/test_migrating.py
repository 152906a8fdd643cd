"""docs/migrating.md: each name of its tables exists, in the other library and in ours, and says what is so."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import pyflowkern

PAGE = (Path(__file__).resolve().parents[1] / "docs/migrating.md").read_text()
ROW = re.compile(r"^\| `([\w.]+)` \| `([\w.]+)` \|", re.MULTILINE)
LIBRARIES = ("nflows", "normflows", "zuko", "FrEIA", "torchdiffeq", "torchcfm")
ROWS = [pytest.param(*row, id=row[0]) for row in ROW.findall(PAGE)]


def resolve(name):
    """Return the object of a dotted name: of each part an attribute, or a module that is not imported yet."""
    path, *parts = name.split(".")
    found = importlib.import_module(path)
    for part in parts:
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


@pytest.mark.parametrize(("theirs", "ours"), ROWS)
def test_both_names_exist(theirs, ours):
    assert callable(resolve(f"pyflowkern.{ours}"))
    pytest.importorskip(theirs.partition(".")[0])
    assert callable(resolve(theirs))


def test_each_library_has_a_table_and_each_row_is_read():
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    for library in LIBRARIES:
        (section,) = (s for s in sections if s.startswith(f"{library}\n"))
        lines = [line for line in section.splitlines() if line.startswith("| `")]
        assert len(lines) == len(ROW.findall(section)) > 3
        assert all(line.startswith(f"| `{library}.") for line in lines)


def test_forward_of_nflows_is_ours_and_that_of_normflows_our_inverse():
    """By the sign of the log-determinant of a map whose scale is known in the direction of the data."""
    transforms = pytest.importorskip("nflows.transforms")
    normflows = pytest.importorskip("normflows")
    x, scale = torch.randn(5, 2), torch.tensor([2.0, 3.0])
    log_scale = scale.log().expand(5, 2).sum(1)
    layer = transforms.PointwiseAffineTransform(shift=torch.zeros(2), scale=scale)
    torch.testing.assert_close(layer(x), (x * scale, log_scale))
    theirs = normflows.flows.AffineConstFlow((2,))
    theirs.s.data.copy_(scale.log())
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), [theirs])
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), scale), 1)
    torch.testing.assert_close(flow.log_prob(x), base.log_prob(x))  # scales noise, not data


def test_actnorm_shifts_before_it_scales_and_nflows_after():
    layer = pyflowkern.nn.ActNorm(2)
    theirs = pytest.importorskip("nflows.transforms").ActNorm(2)
    x = torch.randn(50, 2) * 3 + 7
    for made in (layer, theirs):
        made(x)  # the first data decide scale and shift
    ours = dict(layer.named_parameters())
    torch.testing.assert_close(layer(x)[0], (x + ours["bias"]) * ours["log_scale"].exp())
    torch.testing.assert_close(theirs(x)[0], x * theirs.log_scale.exp() + theirs.shift)
    for made, correction in ((layer, 0), (theirs, 1)):  # and whether deviations are unbiased
        torch.testing.assert_close(made(x)[0].std(0, correction=correction), torch.ones(2))


def test_permutations_of_nflows_and_ours_read_the_same_channel():
    theirs = pytest.importorskip("nflows.transforms").Permutation(torch.tensor([2, 0, 1]))
    x = torch.randn(4, 3)
    torch.testing.assert_close(pyflowkern.nn.Permutation([2, 0, 1])(x)[0], theirs(x)[0])


def test_solves_are_those_of_torchdiffeq():
    theirs = pytest.importorskip("torchdiffeq")
    y0, t = torch.ones(3, dtype=torch.float64), torch.linspace(0, 1, 4, dtype=torch.float64)
    found = pyflowkern.ode.odeint(lambda t, y: -y, y0, t, method="dopri5")
    wanted = theirs.odeint(lambda t, y: -y, y0, t, method="dopri5")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)  # the default tolerances
