"""slogdet_inverse and householder_matrix; test_plu.py has the rest of the family."""

import math

import pytest
import torch
from cases.matrix import conditioned, rotations
from laws import normal

from pyflowkern.ops import (
    householder_matrix,
    matrix,
    slogdet_inverse,
    slogdet_inverse_reference,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_scaled_matrices(backend, scale, dtype):
    """The determinant leaves the range of numbers, its logarithm does not; row scaling is no ill condition."""
    for c in (3, 48, 128):
        rows = torch.logspace(-6, 6, c, dtype=torch.float64)[:, None] * rotations(2, c, c)
        for weight in (scale * conditioned((2,), c, 10.0), scale**0.5 * rows):
            found = slogdet_inverse(weight.to(dtype))
            exact = slogdet_inverse_reference(weight.to(dtype).double())
            size = exact[2].abs().amax((1, 2), keepdim=True)
            worst = (found[2].double() / size - exact[2] / size).abs().max()
            # an elimination amplifies a rounding by the condition, and once for each row at worst
            assert worst <= 10 * c * torch.finfo(dtype).eps
            torch.testing.assert_close(found[1], exact[1].to(dtype), rtol=1e-5, atol=1e-4)


def test_permutations(backend):
    """A zero on the diagonal at every step; every sign right, every entry exact."""
    for c in (2, 3, 7, 48, 128):
        generator = torch.Generator().manual_seed(c)
        for _ in range(10):
            order = torch.randperm(c, generator=generator)
            weight = torch.eye(c)[order] * 2.0
            sign, log_abs_det, inverse = slogdet_inverse(weight)
            assert torch.equal(sign.cpu(), torch.linalg.slogdet(weight).sign)
            assert abs(log_abs_det.item() / (c * math.log(2.0)) - 1) < 1e-6
            assert torch.equal(inverse.cpu(), weight.mT / 4)


def test_singular_matrices(backend):
    zero_column = torch.eye(5).index_fill(1, torch.tensor([3]), 0.0)
    twice = normal(9, 9, dtype=torch.float32)
    twice[7] = 2 * twice[2]
    for weight in (torch.zeros(1, 1), torch.zeros(6, 6), zero_column, twice):
        sign, log_abs_det, inverse = slogdet_inverse(weight)
        if weight is twice and not matrix.kernel_serves("slogdet_inverse", weight):
            continue  # LAPACK need not see it; an elimination row by row cancels it exactly
        assert sign.item() == 0
        assert log_abs_det.item() == -math.inf
        assert inverse.isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("c", [1, 3, 48, 129])
def test_matrices_that_are_not_finite(backend, c, bad):
    for at in ((0, 0), (c - 1, c // 2)):
        weight = torch.eye(c)
        weight[at] = bad
        for result in slogdet_inverse(weight):
            assert result.isnan().all()


def test_extreme_matrices_terminate(backend):
    """Overflow in the course of an elimination gives what it gives, but gives it."""
    for value in (1e38, 1e-38, 1e-45):
        for c in (2, 5, 40):
            weight = (value * normal(c, c)).float()
            assert slogdet_inverse(weight)[2].shape == (c, c)


# --- householder_matrix --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_householder_matrices_are_orthogonal(backend, dtype):
    for k, c, scale in ((2, 5, 1.0), (48, 48, 1.0), (129, 129, 1.0), (3, 4, 1e-30), (3, 4, 1e30)):
        q = householder_matrix((scale * normal(k, c, seed=k)).to(dtype))
        # some roundings of every reflection
        tolerance = 8 * torch.finfo(dtype).eps * (1 + k**0.5) * c**0.5
        torch.testing.assert_close(q @ q.mT, torch.eye(c, dtype=dtype), rtol=0, atol=tolerance)


# --- integration, bad input ----------------------------------------------------------------------


def test_bad_matrices(backend):
    with pytest.raises(ValueError, match=r"weight must hold square matrices .* got \(2, 3\)"):
        slogdet_inverse(torch.ones(2, 3))
    with pytest.raises(ValueError, match="weight must hold square matrices"):
        slogdet_inverse(torch.ones(3))
    with pytest.raises(TypeError, match="weight must be a floating-point tensor"):
        slogdet_inverse(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"vectors must have shape \[K, C\]"):
        householder_matrix(torch.ones(3))
    with pytest.raises(TypeError, match="vectors must be"):
        householder_matrix(torch.ones(3, 3, dtype=torch.int64))
