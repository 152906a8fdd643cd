"""What a time makes of a field's layers, against plain PyTorch."""

import pytest
import torch
from laws import normal

from pyflowkern import _library
from pyflowkern.ops.field_time import _backward_op, _op, at_time, at_time_reference

SIZES = (5, 64, 1, 17, 300)


def arguments(rows, dtype, sizes=SIZES):
    """A time, and biases and rows of times of every layer."""
    biases = [normal(n, seed=i, dtype=dtype) for i, n in enumerate(sizes)]
    times = [normal(rows, n, seed=50 + i, dtype=dtype) for i, n in enumerate(sizes)]
    return torch.tensor(0.3, dtype=dtype), biases, times


def run(function, time, biases, times):
    leaves = [t.detach().clone().requires_grad_() for t in (time, *biases, *times)]
    n = len(biases)
    found = [t for part in function(leaves[0], leaves[1 : n + 1], leaves[n + 1 :]) for t in part]
    grads = [normal(*t.shape, seed=7 + i).to(t.dtype) for i, t in enumerate(found)]
    return [t.detach() for t in (*found, *torch.autograd.grad(found, leaves, grads))]


@pytest.mark.parametrize("rows", [1, 3], ids=["concat", "concatsquash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients(backend, dtype, rows):
    for sizes in (SIZES, (1,), (7,) * 16, (3,) * 17):  # as many layers as one call takes, and more
        time, biases, times = arguments(rows, dtype, sizes)
        ours = run(at_time, time, biases, times)
        double = [[t.double() for t in part] for part in (biases, times)]
        exact = run(at_time_reference, time.double(), *double)
        for a, b in zip(ours, exact, strict=True):
            assert (a.shape, a.dtype) == (b.shape, dtype)
            tol = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol * sum(sizes) ** 0.5)


def test_without_gradients_it_is_the_same(backend):
    inputs = arguments(3, torch.float32)
    with torch.no_grad():
        found = [t for part in at_time(*inputs) for t in part]
    assert all(map(torch.equal, found, run(at_time, *inputs)))


def test_a_result_that_nothing_comes_from(backend):
    """Gates of the last layer alone are used: the others have no gradient to pass on."""
    time, biases, times = arguments(3, torch.float64)
    leaves = [t.requires_grad_() for t in (time, *biases, *times)]
    grads = [
        torch.autograd.grad(
            function(time, biases, times)[1][-1].sum(), leaves, materialize_grads=True
        )
        for function in (at_time, at_time_reference)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_an_infinite_time_closes_and_opens_gates(backend):
    """Whole vectors of a kernel reach beyond the last of 17 numbers."""
    _, biases, times = arguments(3, torch.float64, (17,))
    time = torch.tensor(torch.inf, dtype=torch.float64)
    ours, plain = (run(f, time, biases, times) for f in (at_time, at_time_reference))
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_a_time_of_each_sample(backend):
    _, biases, times = arguments(3, torch.float64)
    moments = normal(6)
    found = at_time(moments, biases, times)
    for i, moment in enumerate(moments):
        for many, one in zip(found, at_time(moment, biases, times), strict=True):
            for a, b in zip(many, one, strict=True):
                torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("rows", [1, 3], ids=["concat", "concatsquash"])
def test_second_derivatives(backend, rows):
    time, biases, times = arguments(rows, torch.float64, (2, 3))
    leaves = [t.requires_grad_() for t in (time, *biases, *times)]

    def function(time, *p):
        return tuple(t for part in at_time(time, p[:2], p[2:]) for t in part)

    torch.autograd.gradcheck(function, leaves)
    torch.autograd.gradgradcheck(function, leaves)


def test_opcheck(backend):
    for rows in (1, 3):
        time, biases, times = arguments(rows, torch.float32, (2, 3))
        torch.library.opcheck(torch.ops.pyflowkern.field_time.default, (time, biases, times))
        grads = _op(time, biases, times)
        torch.library.opcheck(
            torch.ops.pyflowkern.field_time_backward.default, (grads, time, biases, times)
        )


def test_rows_that_do_not_fit_are_an_error(backend):
    if not _library.kernel_serves("field_time", torch.ones(1)):
        pytest.skip("the reference takes what torch takes")
    time, biases, times = arguments(3, torch.float32)
    for wrong in (
        (time, biases[:2], times),
        (time, biases, times[::-1]),
        (time.double(), biases, times),
    ):
        with pytest.raises(RuntimeError, match=r"layer|rows"):
            _op(*wrong)
    grads = [*biases, *biases]
    for wrong in (biases, grads[::-1], [g.double() for g in grads]):
        with pytest.raises(RuntimeError, match="gradient"):
            _backward_op(wrong, time, biases, times)


def test_kernels_serve():
    assert {"field_time", "field_time_backward"} <= set(_library.OPS)
