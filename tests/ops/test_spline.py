"""spline and rational_quadratic_spline: every kind, tail and parameterization against float64 and autograd."""

import pytest
import torch
from cases.spline import every_map, inputs

from pyflowkern.ops import (
    SplineMap,
    spline,
)


def name(smap):
    return f"{smap.kind}-{smap.tails}-{smap.parameterization}"


MAPS = every_map()
each_map = pytest.mark.parametrize("smap", MAPS, ids=name)


def test_the_combinations_that_exist():
    assert len(MAPS) == 10 + 4 + 4 + 3


@each_map
def test_elementwise_terms(backend, smap):
    x, p = inputs(smap, 3, 4, 2)
    y, terms = spline(x, p, smap, elementwise=True)
    same, log_det = spline(x, p, smap)
    assert torch.equal(y, same)
    assert terms.shape == x.shape
    torch.testing.assert_close(terms.flatten(1).sum(1), log_det)


@each_map
def test_inverse_undoes_forward(backend, smap):
    x, p = inputs(smap, 50, 4)
    y, log_det = spline(x, p, smap)
    back, minus = spline(y, p, smap, inverse=True)
    if smap.tails == "circular":
        x = torch.remainder(x + smap.bound, 2 * smap.bound) - smap.bound
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(minus, -log_det, rtol=0, atol=1e-8)


@pytest.mark.parametrize("smap", every_map(bins=8), ids=name)
def test_identity(backend, smap):
    x, _ = inputs(smap, 30, 4, dtype=torch.float32)
    raw = smap.identity_raw().expand(30, 4, -1)
    if smap.tails == "circular":
        x = torch.remainder(x + 3, 6) - 3
    for inverse in (False, True):
        y, log_det = spline(x, raw, smap, inverse=inverse)
        # knots and outputs round by some units of the bound; cubic roots take the square root of it nowhere
        torch.testing.assert_close(y, x, rtol=0, atol=4e-6)
        torch.testing.assert_close(log_det, torch.zeros(30), rtol=0, atol=2e-5)


def test_outside_without_tails_is_nan(backend):
    smap = SplineMap(tails="none")
    x = torch.tensor([[0.0, 1.0], [-1e-6, 0.5], [0.5, 1.1]])
    _, p = inputs(smap, 3, 2, dtype=torch.float32)
    for inverse in (False, True):
        y, log_det = spline(x, p, smap, inverse=inverse)
        assert y.isnan().tolist() == [[False, False], [True, False], [False, True]]
        assert log_det.isnan().tolist() == [False, True, True]
