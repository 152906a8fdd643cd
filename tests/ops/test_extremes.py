"""Extreme but finite numbers: kernel and reference are finite and right where the exact result is."""

import itertools

import pytest
import torch
from laws import normal

from pyflowkern import ops, use_reference
from pyflowkern.ops import SplineMap


def results(function, tensors, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves)
    grads = torch.autograd.grad([y.sum() for y in outputs], leaves, allow_unused=True)
    return [t.detach() for t in (*outputs, *grads)]


def exact(function, tensors):
    with use_reference():
        return results(function, tensors, torch.float64)


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu", "gelu"])
def test_fields_with_huge_gates(backend, activation, method):
    """Second derivatives of saturated activations are zero, not infinity times zero."""
    sizes = (3, 8, 8, 3)
    weights = [normal(b, a, seed=a) / a**0.5 for a, b in itertools.pairwise(sizes)]
    biases = [normal(b, seed=b) for b in sizes[1:]]
    gates = [1e12 * normal(b, seed=20 + b).abs() for b in sizes[1:]]
    probe = {"probe": normal(6, 3, seed=9)} if method == "hutchinson" else {"method": "exact"}

    def field(x, *t):
        options = {k: v.to(x.dtype) if k == "probe" else v for k, v in probe.items()}
        return ops.field_divergence(x, t[:3], t[3:6], t[6:], activation=activation, **options)

    tensors = [normal(6, 3), *weights, *biases, *gates]
    found, expected = results(field, tensors, torch.float32), exact(field, tensors)
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        # rounding of the arguments of order 1e24 decides the last digits, and the largest entry the rest
        atol = 1e-4 * float(b.abs().max()) + 1e-10  # slopes of 1e-37 in place of 0, times gates
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=atol)


@pytest.mark.parametrize(
    "options",
    [{"min_bin_width": 0.0, "min_bin_height": 0.0}, {"parameterization": "domain"}],
    ids=["zero minimum", "domain"],
)
def test_splines_with_tiny_bins(backend, options):
    """Bins of 1e-30 of the interval: the square of their slope is no float32, the log-det is."""
    smap = SplineMap(bins=8, **options)
    x, p = 2 * normal(500, 1), 20 * normal(500, 1, smap.params, seed=1)

    def spline(x, p):
        return ops.spline(x, p, smap, elementwise=True)

    with torch.no_grad():
        y, log_slope = spline(x.float(), p.float())
        with use_reference():
            expected = spline(x.float().double(), p.float().double())
    torch.testing.assert_close(y.double(), expected[0], rtol=1e-4, atol=1e-4)
    # an element so near a knot that float32 puts it into the next bin has the slope of that bin
    right = (log_slope - expected[1]).abs() <= 1e-2 * (1 + expected[1].abs())
    assert right.double().mean() >= 0.99


NO_LEAST_SIZES = {"min_bin_width": 0.0, "min_bin_height": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        NO_LEAST_SIZES,
        NO_LEAST_SIZES | {"min_derivative": 0.0},
        NO_LEAST_SIZES | {"tails": "none"},
        NO_LEAST_SIZES | {"tails": "circular"},
        {"parameterization": "domain"},
        NO_LEAST_SIZES | {"parameterization": "domain", "tails": "affine"},
        NO_LEAST_SIZES | {"kind": "linear"},
        NO_LEAST_SIZES | {"kind": "quadratic"},
        NO_LEAST_SIZES | {"kind": "cubic"},
    ],
    ids=lambda o: "-".join(v for v in o.values() if isinstance(v, str)) or str(len(o)),
)
@pytest.mark.parametrize("inverse", [False, True])
def test_splines_whose_bins_underflow_stay_finite_and_monotone(backend, options, inverse):
    """At raw numbers of order 20, float32 has bins of size 0, and slopes of which squares overflow."""
    smap, count = SplineMap(bins=8, **options), 400
    low, high = (0.0, 1.0) if smap.tails == "none" else (-3.0, 3.0)
    x = torch.linspace(low, high, count)[:, None]  # all of one spline
    for seed in range(12):
        raw = 20 * normal(1, 1, smap.params, seed=seed).float().expand(count, 1, -1)
        y, log_slope = ops.spline(x, raw, smap, inverse=inverse, elementwise=True)
        assert y.isfinite().all()
        # a derivative of exactly 0 at a knot is what min_derivative=0 allows; its logarithm is infinite
        assert (log_slope.isfinite() | (smap.min_derivative == 0)).all()
        assert not log_slope.isnan().any()
        inside = y[:-1] if smap.tails == "circular" else y  # the end of a circle is its start
        assert (inside.diff(dim=0) >= -1e-5 * y.abs().max()).all()
