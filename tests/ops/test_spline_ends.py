"""Splines at the ends of their interval, and where rounding would lead beyond them."""

import itertools

import pytest
import torch

from pyflowkern import use_reference
from pyflowkern.ops import SplineMap, spline
from pyflowkern.ops.spline_map import KINDS, PARAMETERIZATIONS, TAILS


def _maps():
    for kind, tails, parameterization in itertools.product(KINDS, TAILS, PARAMETERIZATIONS):
        try:
            smap = SplineMap(kind, 5, tails=tails, parameterization=parameterization)
        except ValueError:
            continue  # a combination that does not exist
        yield pytest.param(smap, id=f"{kind}-{tails}-{parameterization}")


def _raw(smap, n, dtype, scale=3.0):
    return scale * torch.randn(n, 1, smap.params, dtype=dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}


@pytest.mark.parametrize("kind", ["rational_quadratic", "linear", "quadratic"])
@DTYPES
def test_a_circular_spline_has_its_derivative_at_both_ends(backend, kind, dtype):
    """A tie of min and max gave half of it in the reference: dy/dx is exp(log_det) there as elsewhere."""
    smap = SplineMap(kind, 5, tails="circular")
    x = torch.tensor([[-3.0], [3.0]], dtype=dtype).repeat(50, 1).requires_grad_()
    for inverse in (False, True):
        y, log_slope = spline(x, _raw(smap, 100, dtype), smap, inverse=inverse, elementwise=True)
        (grad,) = torch.autograd.grad(y.sum(), x)
        # both are a dozen roundings of one formula
        torch.testing.assert_close(grad, log_slope.exp().to(dtype), rtol=64 * EPS[dtype], atol=0)


@pytest.mark.parametrize("smap", [m for m in _maps() if m.values[0].parameterization != "domain"])
@DTYPES
def test_both_directions_stay_within_the_interval(backend, smap, dtype):
    """Inverses of ``tails="none"`` left [0, 1] by a rounding, where the next call gives NaN; cubic ones by 1e31."""
    low, high = smap.interval
    v = low + (high - low) * torch.rand(4000, 1, dtype=dtype)
    v[::3], v[1::3] = low, high
    # on CUDA a sample is a block
    v, raw = v.view(500, 8), _raw(smap, 4000, dtype).view(500, 8, -1)
    for inverse in (False, True):
        out, log_det = spline(v, raw, smap, inverse=inverse)
        assert bool(((out >= low) & (out <= high)).all())
        assert bool(log_det.isfinite().all())
        back, _ = spline(out, raw, smap, inverse=not inverse)
        assert bool(back.isfinite().all())


@pytest.mark.parametrize("smap", list(_maps()))
def test_derivatives_are_finite_where_bins_are_narrow(backend, smap):
    """Knots that rounding puts in one place made 0 / 0: a bin has the size that its parameters say."""
    raw = _raw(smap, 2000, torch.float32, scale=4.0).requires_grad_()
    low, high = smap.interval
    v = (low + (high - low) * torch.rand(2000, 1)).requires_grad_()
    for inverse in (False, True):
        out, log_det = spline(v, raw, smap, inverse=inverse)
        grads = torch.autograd.grad(out.sum() + log_det.sum(), (v, raw))
        for t in (out, log_det, *grads):
            assert bool(t.isfinite().all())


@DTYPES
def test_an_inverse_has_its_derivative_in_the_middle_of_a_bin(backend, dtype):
    """There the root may be found from either end, and |m| of the formula has a corner that the root has not."""
    smap = SplineMap(bins=6)
    y = torch.tensor([[-2.5], [-0.5], [1.5]], dtype=dtype).requires_grad_()
    raw = smap.identity_raw().to(dtype).expand(3, 1, -1).clone().requires_grad_()
    x, _ = spline(y, raw, smap, inverse=True)
    by_y, by_raw = torch.autograd.grad(x.sum(), (y, raw))
    back, _ = spline(x.detach().requires_grad_(), raw, smap)
    (wanted,) = torch.autograd.grad(back.sum(), raw)
    # the slope is 1, to the float32 that the raw numbers are: dx/draw = -dy/draw
    torch.testing.assert_close(by_y, torch.ones_like(y), rtol=1e-5, atol=0)
    torch.testing.assert_close(by_raw, -wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("smap", list(_maps()))
@pytest.mark.parametrize("inverse", [False, True])
def test_forward_mode_has_the_derivatives_of_reverse_mode(smap, inverse):
    """A value that is brought back into its interval keeps its derivative in both: no_grad would in one alone."""
    low, high = smap.interval
    v = low + (high - low) * torch.rand(200, 1, dtype=torch.float64)
    v[::3], v[1::3] = low, high
    raw = _raw(smap, 200, torch.float64, scale=1.0)

    def transform(v, raw):
        return spline(v, raw, smap, inverse=inverse, elementwise=True)

    tangents = torch.randn_like(v), torch.randn_like(raw)
    _, forward = torch.func.jvp(transform, (v, raw), tangents)
    leaves = v.requires_grad_(), raw.requires_grad_()
    with use_reference():
        outputs = transform(*leaves)
    for output, found in zip(outputs, forward, strict=True):
        grads = torch.autograd.grad(
            output.sum(), leaves, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        by_v, by_raw = (g * t for g, t in zip(grads, tangents, strict=True))
        wanted = by_v + by_raw.sum(-1)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_where_a_cubic_is_as_flat_as_can_be_its_log_slope_is_constant(backend):
    """Of a raw derivative of -5000 the slope at the end is the least number, and not what it was computed from."""
    params = torch.zeros(1, 1, 12, dtype=torch.float64, device=backend)
    params[..., [0, 5, 10, 11]] = torch.tensor([9e3, 5e2, -5e3, -5e3], dtype=torch.float64).to(
        backend
    )
    x = torch.ones(1, 1, dtype=torch.float64, device=backend).requires_grad_()
    params.requires_grad_()
    smap = SplineMap("cubic", bins=5, bound=1.0)
    log_slope = spline(x, params, smap)[1]
    for grad in torch.autograd.grad(log_slope.sum(), (x, params)):
        torch.testing.assert_close(grad, torch.zeros_like(grad))
