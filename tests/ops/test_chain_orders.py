"""Chains of networks whose weights lie in other orders, and of matrices in packed triangles."""

import pytest
import torch
from cases.chain import K, leaves, value
from laws import normal
from laws.foreign import agree, glu_coupling, shuffled
from torch.nn import functional

from pyflowkern import ops
from pyflowkern.ops import ChainLayer, ChainProgram, LUStep


@pytest.mark.parametrize("name", ["columns", "rows"])
@pytest.mark.parametrize("order", [[0, 0], [1], [0, 2], [0, 1, 2]])
def test_orders_are_permutations(name, order):
    with pytest.raises(ValueError, match=f"{name} must be a permutation of 0 ... 1, got"):
        ChainLayer(2, 2, **{name: order})


def test_an_order_says_which_row_and_column_belongs_to_a_unit(backend):
    """A network whose weights lie in another order is the network of the weights put in order."""
    step = glu_coupling(4, 6, activation="tanh")
    plain = ChainProgram(4, [step], K)
    tensors = [value(w, i, torch.float64) for i, w in enumerate(plain.tensors)]
    x, context = normal(7, 4, seed=1), normal(7, K, seed=2)
    want = ops.chain(x, plain, tensors, context=context)
    moved = shuffled(step)
    given, left = [], iter(tensors)
    for old, new in zip(step.network.layers, moved.network.layers, strict=True):
        # where the old layer's unit j lies, the new one's must lie in its own order
        rows, before = (torch.tensor(each.rows or range(old.outputs)) for each in (new, old))
        columns = torch.tensor(new.columns or range(old.inputs))
        weight = next(left)
        inputs, joined = weight[:, : old.inputs], weight[:, old.inputs :]
        placed = torch.empty_like(inputs)
        placed[rows[:, None], columns] = inputs[before]
        extra = torch.empty_like(joined)
        extra[rows] = joined[before]
        given.append(torch.cat([placed, extra], 1))
        for _ in range(1 + 2 * (old.context == "gate")):
            t = next(left)
            given.append(torch.empty_like(t))
            given[-1][rows] = t[before]
    program = ChainProgram(4, [moved], K)
    got = ops.chain(x, program, given, context=context)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def triangles(lower, upper, raw, eps):
    n = len(raw)
    left, right = torch.eye(n, dtype=raw.dtype), torch.zeros(n, n, dtype=raw.dtype)
    left[tuple(torch.tril_indices(n, n, -1))] = lower
    right[tuple(torch.triu_indices(n, n, 1))] = upper
    right = right + torch.diag(functional.softplus(raw) + eps)
    return left, right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [1, 2, 5, 33])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_matrix_in_packed_triangles(backend, features, inverse, dtype):
    program = ChainProgram(features, [LUStep(eps=1e-3)])
    tensors = leaves(program, dtype)
    lower, upper, raw, bias = tensors
    for t in (lower, upper):  # an inverse of larger ones grows with its size
        t.detach().mul_(features**-0.5)
    x = normal(19, features, seed=3, dtype=dtype).requires_grad_()
    left, right = triangles(lower, upper, raw, 1e-3)
    log_det = (-1 if inverse else 1) * right.diagonal().log().sum().expand(19)
    matrix = torch.linalg.inv(left @ right) if inverse else left @ right
    moved = functional.linear(x - bias if inverse else x, matrix, None if inverse else bias)
    found = ops.chain(x, program, tensors, inverse=inverse)
    agree(found, (moved, log_det), [x, *tensors], dtype)


def test_diagonals_of_any_size(backend):
    """Softplus of large numbers is the number, of very small ones nothing but eps; slopes stay finite."""
    program = ChainProgram(4, [LUStep(eps=1e-3)])
    lower, upper = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    raw = torch.tensor([-800.0, -30.0, 30.0, 800.0], dtype=torch.float64).requires_grad_()
    x = torch.ones(1, 4, dtype=torch.float64)
    z, log_det = ops.chain(x, program, [lower, upper, raw, lower[:4]])
    d = functional.softplus(raw.detach(), threshold=50.0) + 1e-3
    torch.testing.assert_close(z[0], d, rtol=1e-13, atol=0)
    torch.testing.assert_close(log_det[0], d.log().sum(), rtol=1e-13, atol=0)
    (grad,) = torch.autograd.grad(log_det.sum(), raw)
    torch.testing.assert_close(grad, torch.sigmoid(raw.detach()) / d, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eps", [-1.0, float("inf"), float("nan")])
def test_lu_has_a_diagonal_that_is_positive(eps):
    with pytest.raises(ValueError, match="eps must be"):
        LUStep(eps)
