"""The reduction of a probe with its product, against plain PyTorch."""

import pytest
import torch
from laws import normal

from pyflowkern.ops import hutchinson_trace, hutchinson_trace_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_hutchinson_trace(backend, dtype):
    for shape in ((0, 3), (1, 1), (127, 3), (3, 1000), (2, 3, 4, 5), (4, 5000)):
        leaves = [normal(*shape, seed=i, dtype=dtype).requires_grad_() for i in (0, 1)]
        found = hutchinson_trace(*leaves, with_norm=True)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        expected = hutchinson_trace_reference(*exact)
        grads = [normal(*t.shape, seed=3 + i).to(t.dtype) for i, t in enumerate(found)]
        ours = (*found, *torch.autograd.grad(found, leaves, grads))
        plain = (*expected, *torch.autograd.grad(expected, exact, [g.double() for g in grads]))
        for a, b in zip(ours, plain, strict=True):
            # a pairwise sum: a few roundings of the sum of magnitudes, which is below the size
            tol = 8 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(
                a.double(), b.detach(), rtol=tol, atol=tol * shape[-1] ** 0.5
            )


def test_hutchinson_trace_second_derivatives(backend):
    a, b = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    torch.autograd.gradgradcheck(lambda u, v: hutchinson_trace(u, v, with_norm=True), (a, b))
