"""Biases and gates of a field's layers at given times, against plain PyTorch."""

import pytest
import torch
from cases.field_time import sample
from laws import normal, run

from pyflowkern.ops.field_time import _backward_op, _op, at_time, at_time_reference


def arguments(rows, dtype, *sizes):
    return list(sample(rows, dtype, *sizes).tensors.values())


def test_without_gradients_it_is_the_same(backend):
    given = sample(3, torch.float32)
    with torch.no_grad():
        found = [t for part in at_time(**given.tensors) for t in part]
    for a, b in zip(found, run(at_time, given)[0], strict=False):
        assert torch.equal(a, b)


def test_an_infinite_time_closes_and_opens_gates(backend):
    """Whole vectors of a kernel reach beyond the last of 17 numbers."""
    given = sample(3, torch.float64, (17,))
    given.tensors["time"] = torch.tensor(torch.inf, dtype=torch.float64)
    ours, plain = (run(f, given)[0] for f in (at_time, at_time_reference))
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


@pytest.mark.parametrize("backend", ["cpu", "cuda_on_host"], indirect=True)
def test_rows_that_do_not_fit_are_an_error(backend):
    """Of the kernels: the reference takes what torch takes."""
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
