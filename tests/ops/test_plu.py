"""plu_matrix: values, gradients, edges, bad input."""

import pytest
import torch
from cases.matrix import factors
from laws import hold

from pyflowkern.ops import plu_matrix, plu_matrix_reference, slogdet_inverse

directions = pytest.mark.parametrize("inverse", [False, True])


def given(c, dtype=torch.float64):
    sample = factors(c, dtype)
    return {**sample.tensors, **sample.fixed}


def test_plu_matrix_against_slogdet_and_its_inverse(backend):
    for c in (1, 3, 10, 48):
        args = given(c)
        weight, inverse = plu_matrix(**args), plu_matrix(**args, inverse=True)
        eye = torch.eye(c, dtype=torch.float64)
        torch.testing.assert_close(weight @ inverse, eye, rtol=0, atol=1e-10)
        sign, log_abs_det, same = slogdet_inverse(weight)
        torch.testing.assert_close(log_abs_det, args["log_diag"].sum())
        torch.testing.assert_close(same, inverse)
        parity = torch.linalg.det(torch.eye(c)[args["permutation"]]).round()
        assert sign.item() == (args["sign"].prod() * parity).item()


@directions
def test_plu_matrix_of_a_repeated_index(backend, inverse):
    """No permutation at all, but the gather still has a meaning and a gradient."""
    sample = factors(4, inverse=inverse)
    sample.fixed["permutation"] = torch.tensor([0, 2, 2, 1])
    hold(plu_matrix, plu_matrix_reference, sample)


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
    with pytest.raises(error, match=match):
        plu_matrix(**given(3, torch.float32) | change)
