"""Chains of networks whose weights lie in other orders, and of matrices in packed triangles."""

import pytest
import torch
from cases.chain import K, value
from laws import normal
from laws.foreign import glu_coupling, shuffled

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


def test_lu_is_the_product_of_its_triangles(backend):
    program = ChainProgram(3, [LUStep(eps=1e-3)])
    lower, upper, raw, bias = (value(w, i, torch.float64) for i, w in enumerate(program.tensors))
    left = torch.eye(3, dtype=torch.float64)
    left[1, 0], left[2, 0], left[2, 1] = lower
    right = torch.diag(torch.nn.functional.softplus(raw) + 1e-3)
    right[0, 1], right[0, 2], right[1, 2] = upper
    x = normal(5, 3, seed=1)
    z, log_det = ops.chain(x, program, [lower, upper, raw, bias])
    torch.testing.assert_close(z, x @ (left @ right).mT + bias)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(left @ right)[1].expand(5))
    back, minus = ops.chain(z, program, [lower, upper, raw, bias], inverse=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -log_det)


@pytest.mark.parametrize("eps", [-1.0, float("inf"), float("nan")])
def test_lu_has_a_diagonal_that_is_positive(eps):
    with pytest.raises(ValueError, match="eps must be"):
        LUStep(eps)
