"""slogdet_inverse and householder_matrix; test_plu.py has the rest of the family."""

import math

import numpy as np
import pytest
import torch
from laws import normal

from pyflowkern.ops import (
    householder_matrix,
    householder_matrix_reference,
    matrix,
    slogdet_inverse,
    slogdet_inverse_reference,
)

SIZES = [1, 2, 3, 7, 10, 48, 127, 128, 129]  # the last is the reference's
FLOATS = [torch.float32, torch.float64]
HALF = [torch.bfloat16, torch.float16]


def rotations(*shape, seed=0):
    return torch.linalg.qr(normal(*shape, seed=seed))[0]


def conditioned(batch, c, condition, seed=0):
    """Matrices with singular values from 1 down to 1 / condition."""
    values = torch.logspace(0, -math.log10(condition), c, dtype=torch.float64)
    shape = (*batch, c, c)
    return rotations(*shape, seed=seed) * values @ rotations(*shape, seed=seed + 1)


def worst(found, exact):
    """Largest error over the matrices, each relative to its largest entry."""
    if exact.numel() == 0:
        return 0.0
    found, exact = found.detach().cpu().double(), exact.detach().cpu()
    size = exact.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return ((found - exact) / size).abs().max().item()


# --- slogdet_inverse -----------------------------------------------------------------------------


def exact_slogdet_inverse(weight):
    """In float64, the inverse improved by a Newton step in the longest numbers that numpy has."""
    sign, log_abs_det, inverse = slogdet_inverse_reference(weight.double())
    v, w = (t.cpu().numpy().astype(np.longdouble) for t in (inverse, weight.double()))
    v = v + v @ (np.eye(w.shape[-1], dtype=w.dtype) - w @ v)
    return sign, log_abs_det, torch.from_numpy(v.astype(np.float64))


def check_slogdet_inverse(weight, condition, device):
    """Hold sign, log-determinant and inverse to float64."""
    exact = exact_slogdet_inverse(weight)
    plain = slogdet_inverse_reference(weight)
    sign, log_abs_det, inverse = slogdet_inverse(weight.to(device))
    assert sign.shape == log_abs_det.shape == weight.shape[:-2]
    assert inverse.shape == weight.shape
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    assert (sign.dtype, log_abs_det.dtype, inverse.dtype) == (wide, wide, weight.dtype)
    assert torch.equal(sign.cpu().double(), exact[0])
    # the floor: some roundings of every entry, which an inverse amplifies by the condition
    eps, c = torch.finfo(wide).eps, weight.shape[-1]
    floor = 4 * eps * condition + torch.finfo(weight.dtype).eps
    assert worst(inverse, exact[2]) <= 2 * worst(plain[2], exact[2]) + floor
    error = (log_abs_det.cpu().double() - exact[1]).abs()
    error_of_plain = (plain[1].double() - exact[1]).abs()
    # and of the log-det one of every summand, and of the sum
    floor = 4 * eps * (c + condition + exact[1].abs())
    assert bool((error <= 2 * error_of_plain.max() + floor if error.numel() else error == 0).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("c", SIZES)
def test_slogdet_inverse_matches_float64(backend, c, dtype):
    for batch in ((), (0,), (5,), (2, 3)):
        for condition in (1.0, 10.0, 1e3):
            weight = conditioned(batch, c, condition, seed=c).to(dtype)
            check_slogdet_inverse(weight, condition, backend)
    weight = normal(20, c, c, dtype=dtype, seed=c)
    check_slogdet_inverse(weight, torch.linalg.cond(weight.double()).max().item(), backend)


@pytest.mark.parametrize("dtype", HALF)
def test_slogdet_inverse_of_half_is_computed_in_float(backend, dtype):
    check_slogdet_inverse(conditioned((4,), 10, 10.0).to(dtype), 10.0, backend)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_scaled_matrices(backend, scale, dtype):
    """The determinant leaves the range of numbers, its logarithm does not."""
    for c in (3, 48, 128):
        weight = conditioned((2,), c, 10.0)
        check_slogdet_inverse((scale * weight).to(dtype), 10.0, backend)
        rows = torch.logspace(-10, 10, c, dtype=torch.float64)[:, None] * rotations(2, c, c)
        _, log_abs_det, inverse = slogdet_inverse((scale**0.5 * rows).to(backend, dtype))
        exact = slogdet_inverse_reference((scale**0.5 * rows).to(dtype).double())
        # row scaling is no ill condition to an elimination
        assert worst(inverse, exact[2]) <= 1000 * torch.finfo(dtype).eps
        torch.testing.assert_close(log_abs_det.cpu(), exact[1].to(dtype), rtol=1e-5, atol=1e-4)


def test_permutations(backend):
    """A zero on the diagonal at every step; every sign right, every entry exact."""
    for c in (2, 3, 7, 48, 128):
        generator = torch.Generator().manual_seed(c)
        for _ in range(10):
            order = torch.randperm(c, generator=generator)
            weight = torch.eye(c)[order] * 2.0
            sign, log_abs_det, inverse = slogdet_inverse(weight.to(backend))
            assert torch.equal(sign.cpu(), torch.linalg.slogdet(weight).sign)
            assert abs(log_abs_det.item() / (c * math.log(2.0)) - 1) < 1e-6
            assert torch.equal(inverse.cpu(), weight.mT / 4)


def test_singular_matrices(backend):
    zero_column = torch.eye(5).index_fill(1, torch.tensor([3]), 0.0)
    twice = normal(9, 9, dtype=torch.float32)
    twice[7] = 2 * twice[2]
    for weight in (torch.zeros(1, 1), torch.zeros(6, 6), zero_column, twice):
        sign, log_abs_det, inverse = slogdet_inverse(weight.to(backend))
        if weight is twice and not matrix.kernel_serves("slogdet_inverse", weight.to(backend)):
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
        for result in slogdet_inverse(weight.to(backend)):
            assert result.isnan().all()


def test_a_bad_matrix_spoils_no_other(backend):
    weight = conditioned((9,), 11, 10.0).float().to(backend)
    expected = slogdet_inverse(weight)
    weight[1], weight[4, 3, 3], weight[6, 0, 10] = 0.0, math.nan, math.inf
    keep = torch.tensor([0, 2, 3, 5, 7, 8])
    for a, b in zip(slogdet_inverse(weight), expected, strict=True):
        torch.testing.assert_close(a[keep], b[keep])
        assert a[keep].isfinite().all()


def test_extreme_matrices_terminate(backend):
    """Overflow in the course of an elimination gives what it gives, but gives it."""
    for value in (1e38, 1e-38, 1e-45):
        for c in (2, 5, 40):
            weight = (value * normal(c, c)).float()
            assert slogdet_inverse(weight.to(backend))[2].shape == (c, c)


def test_strides(backend):
    weight = conditioned((2, 3), 12, 10.0).float().to(backend)
    wide = torch.zeros(2, 3, 12, 30, device=backend)
    wide[..., 3:27:2] = weight
    transposed = weight.mT.contiguous().mT
    for other in (wide[..., 3:27:2], transposed, weight.flip(0).flip(0)):
        for a, b in zip(slogdet_inverse(other), slogdet_inverse(weight), strict=True):
            torch.testing.assert_close(a, b)
    one = weight[:1, :1].expand(4, 5, 12, 12)
    assert torch.equal(slogdet_inverse(one)[2][3, 4], slogdet_inverse(one)[2][0, 0])


def test_same_bits_for_any_thread_count_and_place(backend):
    weight = normal(64, 48, 48, dtype=torch.float32).to(backend)
    if not matrix.kernel_serves("slogdet_inverse", weight):
        pytest.skip("torch's own library promises less")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(slogdet_inverse(weight))
    finally:
        torch.set_num_threads(before)
    alone = [torch.stack(t) for t in zip(*(slogdet_inverse(w) for w in weight), strict=True)]
    for other in (*results[1:], alone):
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- gradients -----------------------------------------------------------------------------------


def gradients(function, tensors):
    """Gradients of a random combination of the outputs."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)[1:]
    weights = [normal(*t.shape, seed=9).to(t) for t in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("c", SIZES)
def test_slogdet_inverse_gradients_match_float64(backend, c, dtype):
    for batch in ((), (0,), (5,), (2, 3)):
        weight = conditioned(batch, c, 10.0).to(dtype)
        (found,) = gradients(slogdet_inverse, [weight.to(backend)])
        (plain,) = gradients(slogdet_inverse_reference, [weight])
        (exact,) = gradients(slogdet_inverse_reference, [weight.double()])
        # the floor: the inverse's own, twice over
        floor = 8 * torch.finfo(dtype).eps * 10.0
        assert worst(found, exact) <= 2 * worst(plain, exact) + floor


def test_gradients_of_one_output_alone(backend):
    for i in (1, 2):
        weight = conditioned((3,), 6, 10.0).to(backend).requires_grad_()
        out, plain = slogdet_inverse(weight)[i], slogdet_inverse_reference(weight)[i]
        g = normal(*out.shape, seed=3).to(backend)
        (found,) = torch.autograd.grad(out, weight, g)
        (expected,) = torch.autograd.grad(plain, weight, g)
        torch.testing.assert_close(found, expected)


def test_gradcheck(backend):
    weight = conditioned((2,), 4, 10.0).to(backend).requires_grad_()
    wrapped = lambda w: slogdet_inverse(w)[1:]  # noqa: E731
    assert torch.autograd.gradcheck(wrapped, weight)
    assert torch.autograd.gradgradcheck(wrapped, weight)


# --- householder_matrix --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, *HALF])
def test_householder_matrix(backend, dtype):
    for k, c in ((1, 1), (0, 3), (2, 5), (7, 3), (48, 48), (129, 129)):
        vectors = normal(k, c, dtype=dtype, seed=k)
        if k > 1:
            vectors[1] = 0.0
        found = householder_matrix(vectors.to(backend)).cpu()
        exact = householder_matrix_reference(vectors.double())
        assert found.dtype == dtype
        # some roundings of every reflection
        tolerance = 4 * torch.finfo(dtype).eps * (1 + k**0.5)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)
        square = found.double() @ found.double().mT
        torch.testing.assert_close(
            square, torch.eye(c).double(), rtol=0, atol=2 * tolerance * c**0.5
        )


def test_householder_gradients(backend):
    vectors = normal(3, 4).to(backend).requires_grad_()
    assert torch.autograd.gradcheck(householder_matrix, vectors)
    assert torch.autograd.gradgradcheck(householder_matrix, vectors)
    for scale in (1e-30, 1e30):
        large = (scale * normal(3, 4)).float().to(backend).requires_grad_()
        q = householder_matrix(large)
        torch.testing.assert_close(q @ q.mT, torch.eye(4, device=backend), rtol=0, atol=1e-6)


# --- integration, bad input ----------------------------------------------------------------------


def test_opcheck():
    if not matrix.kernel_serves("slogdet_inverse", torch.ones(1)):
        pytest.skip("slogdet_inverse has no kernel in this build")
    for batch in ((), (3,)):
        weight = conditioned(batch, 5, 10.0).float().requires_grad_()
        torch.library.opcheck(torch.ops.pyflowkern.slogdet_inverse.default, (weight,))


@pytest.mark.slow
def test_compile(backend):
    weight = conditioned((3,), 6, 10.0).float().to(backend)
    compiled = torch.compile(slogdet_inverse, fullgraph=True)
    for a, b in zip(compiled(weight), slogdet_inverse(weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    (a,), (b,) = gradients(compiled, [weight]), gradients(slogdet_inverse, [weight])
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_autocast_changes_nothing(backend):
    weight = conditioned((3,), 6, 10.0).float().to(backend)
    expected = (*slogdet_inverse(weight), householder_matrix(weight[0]))
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        found = (*slogdet_inverse(weight), householder_matrix(weight[0]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_vmap_runs_the_reference(backend):
    weight = conditioned((3,), 6, 10.0).to(backend)
    for a, b in zip(torch.vmap(slogdet_inverse)(weight), slogdet_inverse(weight), strict=True):
        torch.testing.assert_close(a, b)


def test_empty_matrices(backend):
    for batch in ((), (3,)):
        sign, log_abs_det, inverse = slogdet_inverse(torch.zeros(*batch, 0, 0, device=backend))
        assert inverse.shape == (*batch, 0, 0)
        assert (sign == 1).all()
        assert (log_abs_det == 0).all()


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
