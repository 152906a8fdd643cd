"""Small invertible matrices: determinant with inverse, P L U and its inverse, Householder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, random_inputs
from pyflowkern import ops

PASSES = ("forward", "forward+backward")


def slogdet_and_inv(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute both by torch's two calls, without any handling of matrices that are singular or not finite."""
    sign, log_abs_det = torch.linalg.slogdet(weight)
    return sign, log_abs_det, torch.linalg.inv_ex(weight).inverse


def near_identity(*shape: int) -> Callable[..., Inputs]:
    """Return a ``make_inputs`` of well-conditioned matrices."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        noise = torch.randn(shape, generator=generator, device=device)
        eye = torch.eye(shape[-1], device=device)
        return {"weight": (eye + 0.5 / shape[-1] ** 0.5 * noise).to(dtype)}

    return make


def plu_factors(c: int) -> Callable[..., Inputs]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        return {
            "permutation": torch.randperm(c, generator=generator, device=device),
            "lower": 0.5 / c**0.5 * drawn(c, c),
            "upper": 0.5 / c**0.5 * drawn(c, c),
            "log_diag": 0.3 * drawn(c),
            "sign": drawn(c).sign(),
        }

    return make


# --- cases ---------------------------------------------------------------------------------------


def slogdet_inverse(batch: int, c: int, **case: Any) -> Case:
    return Case(
        name=f"slogdet_inverse {batch}x{c}",
        make_inputs=near_identity(batch, c, c),
        providers={
            "eager": ops.slogdet_inverse_reference,
            "ours": ops.slogdet_inverse,
            "slogdet, inv_ex": slogdet_and_inv,
        },
        passes=PASSES,
        flops=lambda inputs: 2.0 * batch * c**3,
        **case,
    )


def plu(c: int, inverse: bool = False, **case: Any) -> Case:
    return Case(
        name=f"plu_matrix {'inverse ' * inverse}{c}",
        make_inputs=plu_factors(c),
        providers={
            "eager": partial(ops.plu_matrix_reference, inverse=inverse),
            "ours": partial(ops.plu_matrix, inverse=inverse),
        },
        passes=PASSES,
        flops=lambda inputs: (2.0 if inverse else 2.0 / 3) * c**3,
        constants=("sign",),
        **case,
    )


def householder(c: int) -> Case:
    return Case(
        name=f"householder_matrix {c}",
        make_inputs=random_inputs(vectors=(c, c)),
        providers={"eager": ops.householder_matrix_reference, "ours": ops.householder_matrix},
        passes=PASSES,
        flops=lambda inputs: 5.0 * c**3,
    )


TWICE, EQUAL = {"forward vs eager": 2.0}, {"forward vs eager": 1.0}
NO_SLOWER = {"forward+backward vs eager": 1.0}
CASES = [
    slogdet_inverse(1, 3, targets=TWICE),
    slogdet_inverse(1, 12, targets=TWICE),
    slogdet_inverse(1, 48, targets=TWICE),
    slogdet_inverse(1, 128, targets=EQUAL),
    slogdet_inverse(64, 12, targets=TWICE),
    slogdet_inverse(64, 48, targets=TWICE),
    slogdet_inverse(64, 128, targets=EQUAL, extra=True),
    plu(12, targets=NO_SLOWER),
    plu(48, targets=NO_SLOWER),
    plu(12, inverse=True, targets=NO_SLOWER),
    plu(48, inverse=True, targets=NO_SLOWER),
    plu(128, inverse=True, extra=True),
    householder(48),
]
