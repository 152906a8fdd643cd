"""rk_combine and rk_error: the sums over the stages, their order, zero weights, rows, segments, gradients."""

import math

import pytest
import torch
from cases.runge_kutta import ALLOWED, WEIGHTS, make, steps
from laws import normal

from pyflowkern.ops import (
    rk_combine,
    rk_error,
)

# --- values --------------------------------------------------------------------------------------


def test_the_next_argument_by_hand(backend):
    slopes = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    value = rk_combine(torch.ones(2), slopes, (0.5, 0.5), 0.1)
    torch.testing.assert_close(value, torch.tensor([1.2, 1.3]))
    assert torch.equal(rk_combine(torch.ones(2), slopes, (), 0.1), torch.ones(2))


def test_the_norm_by_hand(backend):
    """Errors 0.3 and 0.4 of an allowed 0.1 + 0.5 max(|y|, |y1|) = 1.1 and 0.6."""
    y, y1, slopes = torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([[3.0, 4.0]])
    norm = rk_error(y, y1, slopes, (1.0,), 0.1, rtol=0.5, atol=0.1)
    assert math.isclose(
        norm.item(), math.sqrt(((0.3 / 1.1) ** 2 + (0.4 / 0.6) ** 2) / 2), rel_tol=1e-6
    )


def test_a_step_for_each_row_is_that_row_alone(backend):
    y, y1, slopes = make((9, 70))
    h = steps(y)
    value = rk_combine(y, slopes, WEIGHTS, h)
    norms = rk_error(y, y1, slopes, WEIGHTS, h, **ALLOWED)
    assert norms.shape == (9,)
    for i in range(9):
        alone = y[i], slopes[:, i].contiguous(), WEIGHTS, h[i].item()
        torch.testing.assert_close(value[i], rk_combine(*alone))
        wanted = rk_error(y[i], y1[i], *alone[1:], **ALLOWED)
        torch.testing.assert_close(norms[i], wanted)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("sizes", [(128, 64), (64, 0, 5), (1, 190, 1), (20,)], ids=str)
def test_the_largest_segment_counts(backend, sizes, rows):
    """Segments laid end to end, each with a norm of its own; what lies beyond them has no part."""
    for width in (192, 20_000):
        y, y1, slopes = make((3, width) if rows else (width,))
        sizes = [n * width // 192 for n in sizes]
        step = steps(y) if rows else 0.3
        norm = rk_error(y, y1, slopes, WEIGHTS, step, sizes=sizes, **ALLOWED)
        parts = [
            rk_error(a, b, k.contiguous(), WEIGHTS, step, **ALLOWED)
            for a, b, k in zip(
                *(
                    t.split([*sizes, width - sum(sizes)], -1)[: len(sizes)]
                    for t in (y, y1, slopes)
                ),
                strict=True,
            )
        ]
        torch.testing.assert_close(norm, torch.stack(parts).amax(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_slope_of_weight_zero_has_no_part(backend, bad):
    y, y1, slopes = make((3, 50))
    good = rk_combine(y, slopes, WEIGHTS, 0.3), rk_error(y, y1, slopes, WEIGHTS, 0.3, **ALLOWED)
    slopes[1], slopes[4:] = bad, bad
    assert torch.equal(rk_combine(y, slopes, WEIGHTS, 0.3), good[0])
    assert torch.equal(rk_error(y, y1, slopes, WEIGHTS, 0.3, **ALLOWED), good[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [5, 3000])
def test_a_state_that_is_not_finite_has_no_norm(backend, bad, width):
    """And stays in its row: an infinite scale would hide the error."""
    y, y1, slopes = make((4, width))
    good = rk_error(y, y1, slopes, WEIGHTS, steps(y), **ALLOWED)
    y1[2, 3] = bad
    norms = rk_error(y, y1, slopes, WEIGHTS, steps(y), **ALLOWED)
    assert norms[2].isnan()
    rest = torch.tensor([0, 1, 3])
    assert torch.equal(norms[rest], good[rest])
    assert rk_error(y, y1, slopes, WEIGHTS, 0.3, **ALLOWED).isnan()
    sizes = [1, width - 1]
    assert rk_error(y, y1, slopes, WEIGHTS, steps(y), sizes=sizes, **ALLOWED)[2].isnan()


def test_squares_beyond_the_range_of_float32(backend):
    """An error of 1e25 times what is allowed is large, and one of 1e-25 is not zero."""
    y, slopes = torch.zeros(100), torch.ones(1, 100)
    for size in (1e25, 1e-25):
        norm = rk_error(y, y, slopes * size, (1.0,), 1.0, rtol=0.0, atol=1.0)
        assert math.isclose(norm.item(), size, rel_tol=1e-6)


def test_many_stages(backend):
    """More slopes than a kernel takes as arguments: the reference."""
    y, y1, slopes = make((5,), stages=40)
    weights = [1.0 / (i + 1) for i in range(40)]
    torch.testing.assert_close(
        rk_combine(y, slopes, weights, 0.1), y + 0.1 * (torch.tensor(weights).double() @ slopes)
    )
    assert rk_error(y, y1, slopes, weights, 0.1, **ALLOWED) > 0


@pytest.mark.parametrize("backend", ["cpu", "cuda_on_host"], indirect=True)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slopes": torch.zeros(2, 4, 6).mT}, "slopes must be contiguous"),
        ({"slopes": torch.zeros(2, 4, 6).mT, "slope": normal(6, 4)}, "slopes must be contiguous"),
        ({"slope": torch.zeros(5)}, "fresh slope must be like y"),
        ({"slope": normal(5)}, "fresh slope must be like y"),
        ({"row": 2}, "row must be from 0 to 1"),
        ({"steps": torch.ones(5, dtype=torch.float64)}, "one for each row of y"),
        ({"y": torch.zeros(6, 4).half()}, "float32 or float64"),
    ],
)
def test_ops_of_a_solver_refuse_what_they_would_read_wrong(backend, change, words):
    """A buffer that is not contiguous was copied before the slope was put into it, and the copy was read."""
    y, slopes = torch.zeros(6, 4), torch.zeros(2, 6, 4)
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    given = {"slopes": slopes, "slope": y, "row": 1, "y": y, "weights": weights, "step": 0.1}
    given |= {"steps": None} | change
    with pytest.raises(RuntimeError, match=words):
        torch.ops.pyflowkern.rk_stage(**given)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.pyflowkern.rk_last(**given, y1=y, rtol=1.0, atol=1.0, sizes=[])


def test_the_norm_has_no_gradient(backend):
    y, y1, slopes = make((3, 4))
    norm = rk_error(y.requires_grad_(), y1, slopes, WEIGHTS, 0.3, **ALLOWED)
    assert not norm.requires_grad


# --- bad input -----------------------------------------------------------------------------------


def combine(y=None, slopes=None, weights=(1.0,), step=0.1):
    y = torch.zeros(4, 3) if y is None else y
    return rk_combine(y, torch.zeros(2, 4, 3) if slopes is None else slopes, weights, step)


def error(y1=None, weights=(1.0,), rtol=0.1, atol=0.1, **more):
    y = torch.zeros(4, 3)
    y1 = y if y1 is None else y1
    return rk_error(y, y1, torch.zeros(2, 4, 3), weights, 0.1, rtol=rtol, atol=atol, **more)


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda: combine(y=torch.zeros(4, 3, dtype=torch.int64)), TypeError, "y must be a float"),
        (lambda: combine(y=1.0), TypeError, "y must be a torch.Tensor"),
        (lambda: combine(slopes=torch.zeros(2, 4, 3).double()), TypeError, "dtype of y"),
        (lambda: combine(slopes=torch.zeros(2, 3, 4)), ValueError, "slopes must have shape"),
        (lambda: combine(weights=(1.0, 1.0, 1.0)), ValueError, "weights must be at most 2"),
        (lambda: combine(step=torch.zeros(3)), ValueError, "step must be"),
        (lambda: combine(step=torch.zeros(4, 1)), ValueError, "step must be"),
        (
            lambda: rk_combine(torch.ones(()), torch.ones(2), (1.0,), torch.ones(1)),
            ValueError,
            "step",
        ),
        (lambda: combine(step="1"), TypeError, "step must be a number"),
        (lambda: error(y1=torch.zeros(3, 4)), ValueError, "y1 must have the shape"),
        (lambda: error(y1=torch.zeros(4, 3).double()), TypeError, "y1 must have the dtype"),
        (lambda: error(rtol=-1.0), ValueError, "rtol must be at least 0"),
        (lambda: error(atol=math.nan), ValueError, "atol must be at least 0"),
        (lambda: error(sizes=[10, 3]), ValueError, "sizes must be"),
        (lambda: error(sizes=[-1]), ValueError, "sizes must be"),
    ],
)
def test_bad_input(backend, call, kind, match):
    with pytest.raises(kind, match=match):
        call()
