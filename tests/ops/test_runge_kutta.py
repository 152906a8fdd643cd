"""rk_combine and rk_error: the sums over the stages, their order, zero weights, rows, segments, gradients."""

import math

import pytest
import torch
from laws import normal

import pyflowkern
from pyflowkern.ops import (
    rk_combine,
    rk_combine_reference,
    rk_error,
    rk_error_reference,
    runge_kutta,
)

FLOATS = [torch.float32, torch.float64]
SHAPES = [(1,), (7,), (3, 5), (512, 2), (2, 3, 129), (1030,), (70_000,), (5, 2000)]
WEIGHTS = (0.2, 0.0, -1.5, 0.75, 0.0)  # one stage more is there, and not to be read
ALLOWED = {"rtol": 1e-3, "atol": 1e-4}


def make(shape, dtype=torch.float64, stages=6):
    """A state, the state after it and slopes."""
    y, slopes = normal(*shape, seed=1), normal(stages, *shape, seed=2)
    return y.to(dtype), (y + 0.1 * normal(*shape, seed=3)).to(dtype), slopes.to(dtype)


def steps(y, seed=4):
    return 0.1 + normal(y.shape[0], seed=seed).abs()


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, shape, dtype):
    y, y1, slopes = make(shape, dtype)
    exact = [t.double() for t in (y, y1, slopes)]
    eps = torch.finfo(dtype).eps
    for step in (0.3, torch.tensor(0.3, dtype=torch.float64), steps(y)):
        value = rk_combine(y, slopes, WEIGHTS, step)
        assert value.dtype == dtype
        assert value.shape == y.shape
        wanted = rk_combine_reference(exact[0], exact[2], WEIGHTS, step)
        # a rounding of each of five terms, of the step and of the sum
        size = exact[0].abs() + 3 * exact[2].abs().sum(0)
        assert ((value.double() - wanted).abs() <= 8 * eps * size).all()
        norm = rk_error(y, y1, slopes, WEIGHTS, step, **ALLOWED)
        wanted = rk_error_reference(*exact, WEIGHTS, step, **ALLOWED)
        assert norm.dtype == torch.float64
        # the norm of the roundings: a few of each term before they cancel; squares are summed in double
        whole = [abs(w) for w in WEIGHTS]
        most = rk_error_reference(*exact[:2], exact[2].abs(), whole, step, **ALLOWED)
        assert ((norm - wanted).abs() <= 8 * eps * most).all()


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


def test_threads_do_not_matter(backend):
    for shape, step in (((150_001,), 0.3), ((40, 5001), steps(torch.zeros(40)))):
        y, y1, slopes = make(shape, torch.float32)
        found = []
        before = torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(
                [
                    rk_combine(y, slopes, WEIGHTS, step),
                    rk_error(y, y1, slopes, WEIGHTS, step, **ALLOWED),
                ]
            )
        torch.set_num_threads(before)
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


def test_layouts(backend):
    y, y1, slopes = make((6, 8), torch.float32)
    expected = (
        rk_combine(y, slopes, WEIGHTS, 0.3),
        rk_error(y, y1, slopes, WEIGHTS, 0.3, **ALLOWED),
    )
    for turn in (
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda t: torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view(t.shape),
    ):
        args = turn(y), turn(slopes), WEIGHTS, 0.3
        torch.testing.assert_close(rk_combine(*args), expected[0])
        norm = rk_error(turn(y), turn(y1), *args[1:], **ALLOWED)
        torch.testing.assert_close(norm, expected[1])


def test_empty(backend):
    for shape in ((0,), (0, 3), (3, 0)):
        y, y1, slopes = make(shape)
        assert rk_combine(y, slopes, WEIGHTS, 0.3).shape == shape
        assert rk_error(y, y1, slopes, WEIGHTS, 0.3, **ALLOWED) == 0
        h = steps(y)
        assert rk_combine(y, slopes, WEIGHTS, h).shape == shape
        assert torch.equal(rk_error(y, y1, slopes, WEIGHTS, h, **ALLOWED), torch.zeros_like(h))


def test_many_stages(backend):
    """More slopes than a kernel takes as arguments: the reference."""
    y, y1, slopes = make((5,), stages=40)
    weights = [1.0 / (i + 1) for i in range(40)]
    torch.testing.assert_close(
        rk_combine(y, slopes, weights, 0.1), y + 0.1 * (torch.tensor(weights).double() @ slopes)
    )
    assert rk_error(y, y1, slopes, weights, 0.1, **ALLOWED) > 0


# --- inside a solver -----------------------------------------------------------------------------


def served(op):
    if not runge_kutta.kernel_serves(op, torch.ones(1)):
        pytest.skip("the reference has no op")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", [0, 3, 4])
def test_the_slope_that_came_last_is_put_into_its_row(backend, shape, row):
    served("rk_stage")
    y, y1, slopes = make(shape)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device="cpu")
    ops = torch.ops.pyflowkern
    for sizes in ([], [1]):
        for step in (0.3, steps(y)):
            number, h = (step, None) if isinstance(step, float) else (0.0, step)
            for slope in (normal(*shape, seed=7), normal(*shape, seed=7).float()):
                kept = slopes.clone()
                kept[row] = slope
                wanted = rk_combine_reference(y, kept, WEIGHTS, step)
                buffer = slopes.clone()
                value = ops.rk_stage.default(buffer, slope, row, y, weights, number, h)
                torch.testing.assert_close(value, wanted)
                assert torch.equal(buffer, kept)
                buffer = slopes.clone()
                args = y, y1, weights, number, h, 1e-3, 1e-4, sizes
                norm = ops.rk_last.default(buffer, slope, row, *args)
                wanted = rk_error_reference(y, y1, kept, WEIGHTS, step, sizes=sizes, **ALLOWED)
                torch.testing.assert_close(norm, wanted)
                assert torch.equal(buffer, kept)


# --- gradients, torch's own checks ---------------------------------------------------------------


def test_gradients(backend):
    y, _, slopes = make((3, 4))
    y.requires_grad_(), slopes.requires_grad_()
    for step in (0.3, torch.tensor(0.3, dtype=torch.float64), steps(y.detach())):
        h = step.requires_grad_() if isinstance(step, torch.Tensor) else None

        def f(y, slopes, h, step=step):
            return rk_combine(y, slopes, WEIGHTS, step if h is None else h)

        assert torch.autograd.gradcheck(f, (y, slopes, h))
        assert torch.autograd.gradgradcheck(f, (y, slopes, h))


def test_the_norm_has_no_gradient(backend):
    y, y1, slopes = make((3, 4))
    norm = rk_error(y.requires_grad_(), y1, slopes, WEIGHTS, 0.3, **ALLOWED)
    assert not norm.requires_grad


def test_opcheck(backend):
    served("rk_combine")
    ops = torch.ops.pyflowkern
    y, y1, slopes = make((3, 4))
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device="cpu")
    for step in ((0.3, None), (0.0, steps(y)), (0.0, torch.tensor(0.3, dtype=torch.float64))):
        leaves = y.clone().requires_grad_(), slopes.clone().requires_grad_()
        torch.library.opcheck(ops.rk_combine.default, (*leaves, weights, *step))
        rest = y, y1, weights, *step, 1e-3, 1e-4, [3, 1]
        torch.library.opcheck(ops.rk_error.default, (y, y1, slopes, *rest[2:]))
        torch.library.opcheck(ops.rk_stage.default, (slopes, y1, 2, y, weights, *step))
        torch.library.opcheck(ops.rk_last.default, (slopes, y1, 2, *rest))


@pytest.mark.slow
def test_compiles_into_one_graph(backend):
    y, y1, slopes = make((3, 4))

    def f(y, slopes):
        value = rk_combine(y, slopes, WEIGHTS, 0.3)
        return value, rk_error(y, y1, slopes, WEIGHTS, 0.3, **ALLOWED)

    for a, b in zip(torch.compile(f, fullgraph=True)(y, slopes), f(y, slopes), strict=True):
        torch.testing.assert_close(a, b)


def test_functional_transforms_take_the_reference(backend):
    y, _, slopes = make((3, 4))
    found = torch.func.vmap(lambda y, k: rk_combine(y, k, WEIGHTS, 0.3), in_dims=(0, 1))(y, slopes)
    torch.testing.assert_close(found, rk_combine(y, slopes, WEIGHTS, 0.3))


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


def test_public_names():
    public = {name for name in runge_kutta.__all__ if name.startswith("rk_")}
    assert public <= set(pyflowkern.ops.__all__)
