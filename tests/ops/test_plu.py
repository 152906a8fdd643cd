"""plu_matrix: values, gradients, edges, bad input."""

import pytest
import torch
from laws import normal

from pyflowkern.ops import matrix, plu_matrix, plu_matrix_reference, slogdet_inverse

SIZES = [1, 2, 3, 7, 10, 48, 127, 128, 129]  # the last is the reference's
FLOATS = [torch.float32, torch.float64]
HALF = [torch.bfloat16, torch.float16]
directions = pytest.mark.parametrize("inverse", [False, True])


def factors(c, dtype=torch.float64, seed=0):
    """Arguments of plu_matrix; what the unread triangles hold must not matter."""
    scale = 0.7 / max(c, 1) ** 0.5
    lower, upper = (scale * normal(c, c, seed=seed + i) for i in (1, 2))
    lower += 1e6 * torch.ones(c, c).triu()
    upper += 1e6 * torch.ones(c, c).tril()
    log_diag, sign = 0.5 * normal(c, seed=seed + 3), normal(c, seed=seed + 4).sign()
    permutation = torch.randperm(c, generator=torch.Generator().manual_seed(seed))
    return [permutation, *(t.to(dtype) for t in (lower, upper, log_diag, sign))]


def on(device, tensors):
    return [t.to(device) for t in tensors]


def double(args):
    return [args[0], *(t.double() for t in args[1:])]


def gap(found, exact):
    return (found.detach().cpu().double() - exact).abs().max().item()


# --- values ----------------------------------------------------------------------------------


@directions
@pytest.mark.parametrize("dtype", [*FLOATS, *HALF])
@pytest.mark.parametrize("c", SIZES)
def test_plu_matrix_matches_float64(backend, c, dtype, inverse):
    for seed in range(3):
        args = factors(c, dtype, seed)
        found = plu_matrix(*on(backend, args), inverse=inverse)
        exact = plu_matrix_reference(*double(args), inverse=inverse)
        plain = plu_matrix_reference(*args, inverse=inverse)
        assert found.dtype == dtype
        # the floor: some roundings of the largest entry, which substitution amplifies; float64 has
        # nothing exacter beside it, only sums of 128 terms in another order
        amplified = 1.0
        if inverse:
            amplified = torch.linalg.cond(plu_matrix_reference(*double(args))).item()
        eps = torch.finfo(dtype).eps
        roundings = 16 if dtype == torch.float64 else 4
        floor = 4 * (eps if dtype in HALF else 0) + roundings * min(eps, 2**-23) * amplified
        floor *= exact.abs().max().item()
        assert gap(found, exact) <= 2 * gap(plain, exact) + floor


def test_plu_matrix_against_slogdet_and_its_inverse(backend):
    for c in (1, 3, 10, 48):
        args = on(backend, factors(c))
        weight, inverse = plu_matrix(*args), plu_matrix(*args, inverse=True)
        eye = torch.eye(c, dtype=torch.float64, device=backend)
        torch.testing.assert_close(weight @ inverse, eye, rtol=0, atol=1e-10)
        sign, log_abs_det, same = slogdet_inverse(weight)
        torch.testing.assert_close(log_abs_det, args[3].sum())
        torch.testing.assert_close(same, inverse)
        parity = torch.linalg.det(torch.eye(c, device=backend)[args[0]]).round()
        assert sign.item() == (args[4].prod() * parity).item()


@directions
def test_plu_matrix_strides(backend, inverse):
    permutation, lower, upper, log_diag, sign = on(backend, factors(12, torch.float32))
    expected = plu_matrix(permutation, lower, upper, log_diag, sign, inverse=inverse)
    wide = torch.zeros(12, 24, device=backend)
    wide[:, ::2] = upper
    found = plu_matrix(
        torch.stack([permutation, permutation], 1)[:, 0],
        lower.mT.contiguous().mT,
        wide[:, ::2],
        torch.stack([log_diag, log_diag], 1)[:, 1],
        sign,
        inverse=inverse,
    )
    assert torch.equal(found, expected)


def test_plu_matrix_rejects_indices_out_of_range():
    args = factors(3, torch.float32)
    for bad in (3, -1):
        with pytest.raises(ValueError, match="permutation must hold indices"):
            plu_matrix(torch.tensor([0, 1, bad]), *args[1:])


@directions
def test_plu_matrix_of_a_repeated_index(backend, inverse):
    """No permutation at all, but the gather still has a meaning and a gradient."""
    args = factors(4)
    args[0] = torch.tensor([0, 2, 2, 1])
    check_plu_gradients(args, torch.float64, backend, inverse)


# --- gradients -----------------------------------------------------------------------------------


def gradients(function, args, **options):
    """Gradients of lower, upper and log_diag, of a random combination of the outputs."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in args]
    outputs = function(*leaves, **options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    weights = [normal(*t.shape, seed=9).to(t) for t in outputs]
    wanted = [t for t in leaves if t.requires_grad]
    return torch.autograd.grad(outputs, wanted, weights, allow_unused=True)[:3]


def check_plu_gradients(args, dtype, device, inverse):
    found = gradients(plu_matrix, on(device, args), inverse=inverse)
    plain = gradients(plu_matrix_reference, args, inverse=inverse)
    exact = gradients(plu_matrix_reference, double(args), inverse=inverse)
    for f, p, e, like in zip(found, plain, exact, args[1:4], strict=True):
        assert f.dtype == dtype
        assert f.shape == like.shape
        # the floor: some roundings of the largest entry, of a sum of C products
        floor = 4 * torch.finfo(dtype).eps * (1 + e.abs().max().item()) * len(args[0]) ** 0.5
        assert gap(f, e) <= 2 * gap(p, e) + floor


@directions
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("c", SIZES)
def test_plu_gradients_match_float64(backend, c, dtype, inverse):
    check_plu_gradients(factors(c, dtype), dtype, backend, inverse)


def test_gradients_of_transposed_gradients(backend):
    """The gradient that arrives need not be contiguous."""
    for inverse in (False, True):
        args = on(backend, factors(7))
        leaf = args[1].requires_grad_()
        g = normal(7, 7, seed=5).to(backend).mT
        expected = torch.autograd.grad(plu_matrix_reference(*args, inverse=inverse), leaf, g)[0]
        found = torch.autograd.grad(plu_matrix(*args, inverse=inverse), leaf, g)[0]
        torch.testing.assert_close(found, expected)


@directions
def test_gradcheck_of_plu_matrix(backend, inverse):
    # the unread triangles are large here, and their gradients zero
    permutation, *tensors, sign = on(backend, factors(4))
    leaves = [t.requires_grad_() for t in tensors]
    wrapped = lambda *t: plu_matrix(permutation, *t, sign, inverse=inverse)  # noqa: E731
    assert torch.autograd.gradcheck(wrapped, leaves)
    assert torch.autograd.gradgradcheck(wrapped, leaves)


# --- integration, bad input ------------------------------------------------------------------------


@directions
def test_opcheck_of_plu_matrix(inverse):
    if not matrix.kernel_serves("plu_matrix", torch.ones(1)):
        pytest.skip("plu_matrix has no kernel in this build")
    permutation, *rest, sign = factors(5, torch.float32)
    args = (permutation, *(t.requires_grad_() for t in rest), sign, inverse)
    torch.library.opcheck(torch.ops.pyflowkern.plu_matrix.default, args)
    grad = normal(5, 5, dtype=torch.float32)
    detached = [t.detach() for t in args[:-1]]
    backward = torch.ops.pyflowkern.plu_matrix_backward.default
    torch.library.opcheck(backward, (grad, *detached, inverse))


@pytest.mark.slow
def test_compile(backend):
    permutation, *rest = on(backend, factors(6, torch.float32))

    def step(lower, upper, log_diag, sign):
        weight = plu_matrix(permutation, lower, upper, log_diag, sign)
        return weight, plu_matrix(permutation, lower, upper, log_diag, sign, inverse=True)

    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(compiled(*rest), step(*rest), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients(compiled, rest), gradients(step, rest), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@directions
def test_autocast_changes_nothing(backend, inverse):
    args = on(backend, factors(6, torch.float32))
    expected = plu_matrix(*args, inverse=inverse)
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        assert torch.equal(plu_matrix(*args, inverse=inverse), expected)


@directions
def test_empty_factors(backend, inverse):
    args = on(backend, factors(0, torch.float32))
    assert plu_matrix(*args, inverse=inverse).shape == (0, 0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"lower": torch.ones(3)}, ValueError, "lower must hold square matrices"),
        ({"lower": torch.ones(2, 3, 3)}, ValueError, r"lower must have shape \[C, C\]"),
        ({"lower": 1.0}, TypeError, "lower must be a torch.Tensor"),
        ({"permutation": torch.ones(3)}, TypeError, "permutation must be an int64 tensor"),
        ({"permutation": [0, 1, 2]}, TypeError, "permutation must be an int64 tensor, got list"),
        ({"permutation": torch.arange(4)}, ValueError, r"permutation must have shape \(3,\)"),
        ({"upper": torch.ones(3, 4)}, ValueError, r"upper must have shape \(3, 3\)"),
        ({"upper": torch.ones(3, 3).long()}, TypeError, "upper must be a floating-point"),
        ({"log_diag": torch.ones(2)}, ValueError, r"log_diag must have shape \(3,\)"),
        ({"sign": torch.ones(3).int()}, TypeError, "sign must be a floating-point"),
        ({"sign": torch.ones(3, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_factors(backend, change, error, match):
    names = ("permutation", "lower", "upper", "log_diag", "sign")
    args = {**dict(zip(names, factors(3, torch.float32), strict=True)), **change}
    with pytest.raises(error, match=match):
        plu_matrix(**args)
