r"""Small invertible matrices: built from their factors, inverted, and their log-determinants.

The gradients use no second factorization: with :math:`V = W^{-1}`,
:math:`\bar W = \bar\ell\, V^T - V^T \bar V V^T`; those of :math:`W = P L U` stand in
``csrc/matrix/matrix.h``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.checks import (
    check_dense,
    check_flag,
    check_floating,
    check_same_device,
    check_shape,
)
from pyflowkern.core.dtypes import accumulation_dtype, cast, full_precision
from pyflowkern.core.register import register

__all__ = [
    "householder_matrix",
    "householder_matrix_reference",
    "plu_matrix",
    "plu_matrix_reference",
    "slogdet_inverse",
    "slogdet_inverse_reference",
]

#: A larger matrix no longer fits the inner caches, and torch's own library is the better kernel.
_MAX_SIZE = 128


# --- public functions ----------------------------------------------------------------------------


def plu_matrix(
    permutation: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diag: Tensor,
    sign: Tensor,
    *,
    inverse: bool = False,
) -> Tensor:
    r"""Build :math:`W = P L (U + \mathrm{diag}(\sigma e^{d}))`, or its inverse by substitution.

    :math:`\log|\det W|` is ``log_diag.sum()``, so no determinant is ever computed.  Gradients flow
    to ``lower``, ``upper`` and ``log_diag``.

    Args:
        permutation: ``[C]`` int64, ``(P M)[i] = M[permutation[i]]``.
        lower: ``[C, C]``; only the strict lower triangle is read, the diagonal of ``L`` is one.
        upper: ``[C, C]``; only the strict upper triangle is read.
        log_diag: ``[C]``, the log of the absolute diagonal.
        sign: ``[C]``, the signs of the diagonal: constants, without a gradient.
        inverse: return the inverse matrix.

    Returns:
        ``[C, C]`` in the dtype of ``lower``.

    Raises:
        TypeError: for tensors that are not floating-point, or a permutation that is not int64.
        ValueError: for shapes that do not fit ``lower``, or on the CPU an index out of range (on a GPU nobody may
            look: its row is NaN).

    Source: Kingma and Dhariwal 2018, *Glow*, section 3.2.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import plu_matrix
        >>> permutation, ones = torch.tensor([1, 0]), torch.ones(2, 2)
        >>> args = (permutation, ones, ones, torch.zeros(2), torch.ones(2))
        >>> plu_matrix(*args).tolist()
        [[1.0, 2.0], [1.0, 1.0]]
        >>> (plu_matrix(*args) @ plu_matrix(*args, inverse=True)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    inverse = check_flag("inverse", inverse)
    _check_plu(permutation, lower, upper, log_diag, sign)
    if lower.shape[0] > _MAX_SIZE or not kernel_serves("plu_matrix", lower, upper, log_diag, sign):
        call: Callable[..., Tensor] = plu_matrix_reference
    else:
        call = _plu_matrix_kernel
    try:
        return call(permutation, lower, upper, log_diag, sign, inverse=inverse)
    except (RuntimeError, IndexError):
        # both paths look at each index: it is checked a second time only here, to name what is wrong
        _check_permutation(permutation)
        raise


def slogdet_inverse(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return sign and logarithm of the determinant, and the inverse, from one LU factorization.

    With :math:`V = W^{-1}` and upstream gradients :math:`\bar\ell` of the log-determinant and :math:`\bar V` of the
    inverse, :math:`\bar W = \bar\ell\, V^T - V^T \bar V V^T`: nothing is factorized again.

    A singular matrix gives sign 0, log-determinant -inf and an inverse of NaN; one that holds NaN
    or inf gives NaN throughout.  It never raises, and spoils no other matrix of the batch.

    Args:
        weight: ``[..., C, C]``.

    Returns:
        ``(sign, log_abs_det, inverse)``, shaped ``[...]``, ``[...]`` and ``[..., C, C]``; the
        first two are float32 at least, the inverse has the dtype of ``weight``.

    Raises:
        TypeError: for a tensor that is not floating-point.
        ValueError: for matrices that are not square.

    Source: LU factorization with partial pivoting (Golub and Van Loan 2013, section 3.4).

    Example:
        >>> import torch
        >>> from pyflowkern.ops import slogdet_inverse
        >>> sign, log_abs_det, inverse = slogdet_inverse(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
        >>> sign.item(), round(log_abs_det.item(), 4), inverse.tolist()
        (-1.0, 0.6931, [[0.0, 1.0], [0.5, -0.5]])
    """
    _check_square("weight", weight)
    if weight.shape[-1] > _MAX_SIZE or not kernel_serves("slogdet_inverse", weight):
        return slogdet_inverse_reference(weight)
    sign, log_abs_det, inverse = _slogdet_inverse(cast(weight, accumulation_dtype(weight.dtype)))
    return sign, log_abs_det, cast(inverse, weight.dtype)


def householder_matrix(vectors: Tensor) -> Tensor:
    r"""Return the product :math:`H_1 \cdots H_K` of :math:`H_k = I - 2 v_k v_k^T / |v_k|^2`.

    With unit vectors as the rows of ``V`` the product is :math:`I - V^T T V`, where :math:`T^{-1}`
    is the upper triangle of :math:`V V^T` with its diagonal halved (Joffrain et al. 2006): two
    matrix products and a triangular solve of torch's own, in place of ``K`` steps.  A zero vector
    stands for the identity.

    Args:
        vectors: ``[K, C]``.

    Returns:
        ``[C, C]``, orthogonal, in the dtype of ``vectors``; its log-determinant is zero.

    Raises:
        TypeError: for a tensor that is not floating-point.
        ValueError: for a tensor that has not two axes.

    Source: Tomczak and Welling 2016, *Improving Variational Auto-Encoders using Householder Flow*.

    Example:
        >>> import torch
        >>> from pyflowkern.ops import householder_matrix
        >>> householder_matrix(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).tolist()
        [[-1.0, 0.0], [0.0, 1.0]]
    """
    v = _unit_rows(vectors)
    eye = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    half = torch.eye(v.shape[0], dtype=v.dtype, device=v.device) / 2
    with full_precision(v):
        factor = torch.triu(v @ v.mT, 1) + half
        q: Tensor = eye - v.mT @ torch.linalg.solve_triangular(factor, v, upper=True)
    return q.to(vectors.dtype)


def _plu_matrix_kernel(permutation: Tensor, *factors: Tensor, inverse: bool) -> Tensor:
    work = accumulation_dtype(factors[0].dtype)
    return cast(
        _plu_matrix(permutation, *(cast(t, work) for t in factors), inverse), factors[0].dtype
    )


# --- references ----------------------------------------------------------------------------------


def plu_matrix_reference(
    permutation: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diag: Tensor,
    sign: Tensor,
    *,
    inverse: bool = False,
) -> Tensor:
    """Compute :func:`plu_matrix` in plain PyTorch, differentiable by autograd to any order."""
    inverse = check_flag("inverse", inverse)
    work = accumulation_dtype(lower.dtype)
    eye = torch.eye(lower.shape[0], dtype=work, device=lower.device)
    lo = torch.tril(lower.to(work), -1) + eye
    up = torch.triu(upper.to(work), 1) + torch.diag(
        sign.detach().to(work) * torch.exp(log_diag.to(work))
    )
    with full_precision(lower):
        if not inverse:
            product: Tensor = (lo @ up).index_select(0, permutation)
            return product.to(lower.dtype)
        inv: Tensor = torch.linalg.solve_triangular(lo, eye, upper=False, unitriangular=True)
        inv = torch.linalg.solve_triangular(up, inv, upper=True)
    return inv.index_select(1, permutation).to(lower.dtype)


def slogdet_inverse_reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`slogdet_inverse` in plain PyTorch, differentiable to any order."""
    w = weight.to(accumulation_dtype(weight.dtype))
    with full_precision(weight):
        sign, log_abs_det = torch.linalg.slogdet(w)
        inverse = torch.linalg.inv_ex(w).inverse
    bad = (w.detach() * 0).sum((-2, -1))  # zero, or NaN where an entry is not finite
    inverse = torch.where((sign == 0)[..., None, None], torch.nan, inverse) + bad[..., None, None]
    return sign + bad, log_abs_det + bad, inverse.to(weight.dtype)


def householder_matrix_reference(vectors: Tensor) -> Tensor:
    """Compute :func:`householder_matrix` reflection by reflection."""
    v = _unit_rows(vectors)
    q: Tensor = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    with full_precision(v):
        for row in v.unbind(0):
            q = q - 2 * torch.outer(q.mv(row), row)
    return q.to(vectors.dtype)


def _unit_rows(vectors: Tensor) -> Tensor:
    """Scale each row to length one; a zero row stays, and has no gradient."""
    check_floating("vectors", vectors)
    if vectors.dim() != 2:
        raise ValueError(f"vectors must have shape [K, C], got {tuple(vectors.shape)}")
    v = vectors.to(accumulation_dtype(vectors.dtype))
    # bring the entries near one first: squares of huge or tiny ones leave the range of floats
    size = v.detach().abs().mean(1, keepdim=True)
    v = v / torch.where(size == 0, 1.0, size)
    square = (v * v).sum(1, keepdim=True)
    return v * torch.rsqrt(torch.where(square == 0, 1.0, square))


# --- argument checks -----------------------------------------------------------------------------


def _check_square(name: str, t: Tensor) -> None:
    check_floating(name, t)
    if t.dim() < 2 or t.shape[-1] != t.shape[-2]:
        raise ValueError(f"{name} must hold square matrices [..., C, C], got {tuple(t.shape)}")


def _check_plu(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diag: Tensor, sign: Tensor
) -> None:
    _check_square("lower", lower)
    if lower.dim() != 2:
        raise ValueError(f"lower must have shape [C, C], got {tuple(lower.shape)}")
    if not isinstance(permutation, Tensor) or permutation.dtype != torch.int64:
        given = getattr(permutation, "dtype", type(permutation).__name__)
        raise TypeError(f"permutation must be an int64 tensor, got {given}")
    check_dense("permutation", permutation)
    rows = lower.shape[:1]
    check_shape("permutation", permutation, rows)
    check_floating("upper", upper)
    check_shape("upper", upper, lower.shape)
    for name, t in (("log_diag", log_diag), ("sign", sign)):
        check_floating(name, t)
        check_shape(name, t, rows)
    check_same_device(
        permutation=permutation, lower=lower, upper=upper, log_diag=log_diag, sign=sign
    )


def _check_permutation(permutation: Tensor) -> None:
    if permutation.device.type != "cpu" or torch.compiler.is_compiling():
        return
    size = permutation.numel()
    if bool(((permutation < 0) | (permutation >= size)).any()):
        raise ValueError(
            f"permutation must hold indices of 0 ... {size - 1}, got {permutation.tolist()}"
        ) from None


# --- ops -----------------------------------------------------------------------------------------


def _contiguous_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _plu_fake(
    permutation: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diag: Tensor,
    sign: Tensor,
    inverse: bool,
) -> Tensor:
    return _contiguous_like(lower)


def _plu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.inverse = inputs
    ctx.save_for_backward(*tensors)


def _plu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    op = torch.ops.pyflowkern.plu_matrix_backward.default
    return None, *op(grad, *ctx.saved_tensors, ctx.inverse), None, None


def _plu_backward_fake(
    grad: Tensor,
    permutation: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diag: Tensor,
    sign: Tensor,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _contiguous_like(lower), _contiguous_like(upper), _contiguous_like(log_diag)


def _plu_flops(permutation: torch.Size, *others: Any) -> int:
    return 0 if others[-1] else 2 * permutation[0] ** 3  # triangular systems are no products


_plu_matrix = register(
    "plu_matrix(Tensor permutation, Tensor lower, Tensor upper, Tensor log_diag, Tensor sign, "
    "bool inverse) -> Tensor",
    fake=_plu_fake,
    setup_context=_plu_setup,
    backward=_plu_backward,
    reference=lambda *tensors_inverse: plu_matrix_reference(
        *tensors_inverse[:-1], inverse=tensors_inverse[-1]
    ),
    inputs=lambda ctx: (*ctx.saved_tensors, ctx.inverse),
    flops=_plu_flops,
)
register(
    "plu_matrix_backward(Tensor grad, Tensor permutation, Tensor lower, Tensor upper, "
    "Tensor log_diag, Tensor sign, bool inverse) -> (Tensor, Tensor, Tensor)",
    fake=_plu_backward_fake,
    flops=lambda grad, *_: 4 * grad[0] ** 3,
)


def _slogdet_fake(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch = weight.shape[:-2]
    return weight.new_empty(batch), weight.new_empty(batch), _contiguous_like(weight)


def _slogdet_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output[2])
    ctx.set_materialize_grads(False)  # most often only one of the outputs is used


def _slogdet_backward(
    ctx: Any, _: Tensor | None, grad_log_abs_det: Tensor | None, grad_inverse: Tensor | None
) -> Tensor | None:
    # in terms of the inverse, which is an output of this op: so it differentiates itself
    (inverse,) = ctx.saved_tensors
    transposed = inverse.mT
    grad: Tensor | None = None
    if grad_log_abs_det is not None:
        grad = grad_log_abs_det[..., None, None] * transposed
    if grad_inverse is not None:
        with full_precision(inverse):
            through_inverse = transposed @ grad_inverse @ transposed
        grad = -through_inverse if grad is None else grad - through_inverse
    return grad


_slogdet_inverse = register(
    "slogdet_inverse(Tensor weight) -> (Tensor, Tensor, Tensor)",
    fake=_slogdet_fake,
    backward=_slogdet_backward,
    setup_context=_slogdet_setup,
)
