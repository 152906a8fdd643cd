"""The spline functions of nflows and normflows by our ops: their numbers and gradients, and none of their crashes."""

import math
import sys

import normflows.utils.splines as normflows_splines
import pytest
import torch
from nflows.transforms import splines as nflows_splines
from nflows.transforms.base import InputOutsideDomain

from pyflowkern.interop import nflows as ours
from pyflowkern.interop import normflows as ours_normflows

SHAPE, BINS = (5, 3, 2), 6
KINDS = {  # numbers of raw parameters, with tails and without
    "rational_quadratic_spline": ((BINS, BINS, BINS - 1), (BINS, BINS, BINS + 1)),
    "linear_spline": ((BINS,), (BINS,)),
    "quadratic_spline": ((BINS, BINS - 1), (BINS, BINS + 1)),
    "cubic_spline": ((BINS, BINS, 1, 1), (BINS, BINS, 1, 1)),
}
#: ``left, right, bottom, top``
BOXES = [(0.0, 1.0, 0.0, 1.0), (-2.0, 2.0, -2.0, 2.0), (1.0, 3.0, -1.0, 1.0)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def made(counts, shape=SHAPE):
    return [torch.randn(*shape, n, dtype=torch.float64) for n in counts]


def compare(f, g, x, params, near=1e-10, **settings):
    """Values and gradients, of weights that are not all the same."""
    found = []
    weights = [torch.randn_like(x) for _ in range(2)]
    for function in (f, g):
        leaves = [t.clone().requires_grad_() for t in (x, *params)]
        pair = function(*leaves, **settings)
        total = sum((w * part).sum() for w, part in zip(weights, pair, strict=True))
        found.append((*pair, *torch.autograd.grad(total, leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near)


def inverse_is_undone(f, x, params, **settings):
    y, log_det = f(x, *params, **settings)
    back, minus = f(y, *params, inverse=True, **settings)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(minus, -log_det, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_with_tails(kind, inverse):
    name = "unconstrained_" + kind
    x, params = 2 * torch.randn(SHAPE, dtype=torch.float64), made(KINDS[kind][0])
    for bound in (1.0, 3.0):
        if inverse and kind == "linear_spline":  # nflows moves the last knot by 1e-6 there
            inverse_is_undone(getattr(ours, name), x, params, tail_bound=bound)
        else:
            compare(getattr(ours, name), getattr(nflows_splines, name), x, params,
                    inverse=inverse, tail_bound=bound)  # fmt: skip


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_box(kind, box):
    left, right, bottom, _ = box
    settings = dict(zip(("left", "right", "bottom", "top"), box, strict=True))
    f, g, counts = getattr(ours, kind), getattr(nflows_splines, kind), KINDS[kind][1]
    x = left + (right - left) * torch.rand(SHAPE, dtype=torch.float64)
    compare(f, g, x, made(counts), **settings)
    inverse_is_undone(f, x, made(counts), **settings)
    if (
        kind != "linear_spline" and left == bottom
    ):  # nflows compares inverse inputs with left and right
        compare(f, g, x, made(counts), near=1e-8, inverse=True, **settings)


def test_other_shapes_and_numbers():
    f, g = ours.rational_quadratic_spline, nflows_splines.rational_quadratic_spline
    x = torch.rand(7, dtype=torch.float64)
    compare(f, g, x, made(KINDS["rational_quadratic_spline"][1], (7,)),
            min_bin_width=0.02, min_derivative=0.1)  # fmt: skip
    compare(f, g, x, made(KINDS["rational_quadratic_spline"][1], (7,)), top=4.0)
    inverse_is_undone(f, x, made(KINDS["rational_quadratic_spline"][1], (7,)), top=4.0)
    f, g = ours.quadratic_spline, nflows_splines.quadratic_spline
    for inverse in (False, True):
        compare(f, g, x, made((BINS, BINS - 1), (7,)), inverse=inverse)


def test_identity_starts_as_in_the_present_nflows():
    """Derivatives are ``m + softplus(beta u) / beta`` with ``beta = log(2) / (1 - m)``; the ends stay raw."""
    beta, least = math.log(2) / (1 - 1e-3), 1e-3
    end = math.log(math.expm1(1 - least))

    def by_hand(x, widths, heights, inner, inverse=False):
        raw = torch.nn.functional.pad(inner, (1, 1), value=end)
        slope = torch.nn.functional.softplus(beta * raw) / beta
        raw = slope + torch.log(-torch.expm1(-slope))
        inside = x.abs() <= 1
        y, log_det = nflows_splines.rational_quadratic_spline(
            x.clamp(-1, 1), widths, heights, raw, inverse, -1.0, 1.0, -1.0, 1.0
        )
        return torch.where(inside, y, x), torch.where(inside, log_det, 0.0)

    def function(*args, **settings):
        return ours.unconstrained_rational_quadratic_spline(
            *args, enable_identity_init=True, **settings
        )

    x, params = (
        torch.randn(SHAPE, dtype=torch.float64),
        made(KINDS["rational_quadratic_spline"][0]),
    )
    compare(function, by_hand, x, params)
    compare(function, by_hand, x, params, inverse=True)
    x = torch.rand(SHAPE, dtype=torch.float64)
    zeros = [torch.zeros_like(p) for p in made(KINDS["rational_quadratic_spline"][1])]
    y, log_det = ours.rational_quadratic_spline(x, *zeros, enable_identity_init=True)
    torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
    assert log_det.abs().max() < 1e-12


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("tails", "derivatives"),
    [("linear", BINS - 1), ("circular", BINS), (["linear", "circular"], BINS + 1)],
)
def test_normflows(tails, derivatives, inverse):
    name = "unconstrained_rational_quadratic_spline"
    f, g = getattr(ours_normflows, name), getattr(normflows_splines, name)
    x = 2 * torch.randn(SHAPE, dtype=torch.float64)
    params = made((BINS, BINS, derivatives))
    for bound in (1.0, torch.tensor([1.5, 2.5], dtype=torch.float64)):
        compare(f, g, x, params, inverse=inverse, tails=tails, tail_bound=bound)


def test_normflows_in_boxes_of_each_element():
    f, g = ours_normflows.rational_quadratic_spline, normflows_splines.rational_quadratic_spline
    params = made(KINDS["rational_quadratic_spline"][1])
    low, wide, high = torch.randn(SHAPE).double(), *(0.5 + torch.rand(2, *SHAPE)).double()
    box = {"left": low, "right": low + wide, "bottom": -low, "top": high - low}
    part = torch.rand(SHAPE, dtype=torch.float64)
    compare(f, g, low + wide * part, params, **box)
    compare(f, g, high * part - low, params, inverse=True, **box)
    y, log_det = f(torch.full(SHAPE, 2.0).double(), *params)  # outside: normflows fails
    assert y.isnan().all()
    assert log_det.isnan().all()


def test_inputs_outside_of_the_box_are_an_error_of_the_library(monkeypatch):
    params = [p[0, 0] for p in made((BINS,))]
    for x in (torch.tensor([1.5, 0.5]), torch.tensor([0.5, -0.1])):
        with pytest.raises(InputOutsideDomain):
            ours.linear_spline(x, params[0].float())
    monkeypatch.setitem(sys.modules, "nflows.transforms.base", None)
    with pytest.raises(ValueError, match="must lie in"):
        ours.linear_spline(torch.tensor([1.5, 0.5]), params[0].float())


def test_float32_does_not_crash_where_nflows_does():
    """Some of its log-determinants are not finite, and its last bin is passed at a large bound."""
    x = torch.rand(20000, 1)
    widths, heights, slopes = (20 * torch.randn(20000, 1, n) for n in (BINS, BINS, BINS + 1))
    _, log_det = nflows_splines.rational_quadratic_spline(x, widths, heights, slopes, inverse=True)
    assert not log_det.isfinite().all()
    y, log_det = ours.rational_quadratic_spline(x, widths, heights, slopes, inverse=True)
    assert y.isfinite().all()
    assert log_det.isfinite().all()
    edge = torch.full((2, 1), 64.0)
    params = [torch.zeros(2, 1, n) for n in (BINS, BINS, BINS - 1)]
    with pytest.raises((IndexError, RuntimeError)):
        nflows_splines.unconstrained_rational_quadratic_spline(edge, *params, tail_bound=64.0)
    y, _ = ours.unconstrained_rational_quadratic_spline(edge, *params, tail_bound=64.0)
    assert torch.equal(y, edge)
    poisoned = torch.tensor([[0.3], [math.nan]])
    y, _ = ours.unconstrained_linear_spline(poisoned, torch.zeros(2, 1, 4))
    assert y[0].isfinite()
    assert y[1].isnan()
    empty, _ = ours.linear_spline(torch.rand(0, 2), torch.zeros(0, 2, 4))
    assert empty.shape == (0, 2)


def test_wrong_arguments():
    x, widths, slopes = torch.rand(3), torch.zeros(3, 4), torch.zeros(3, 5)
    with pytest.raises(ValueError, match="min_bin_width must be at most"):
        ours.rational_quadratic_spline(x, widths, widths, slopes, min_bin_width=0.3)
    with pytest.raises(ValueError, match="tails must be 'linear'"):
        ours.unconstrained_linear_spline(x, widths, tails="circular")
    with pytest.raises(ValueError, match="leaves the"):
        ours.linear_spline(x, widths, top=2.0)
    with pytest.raises(ValueError, match="an entry for each feature"):
        ours_normflows.unconstrained_rational_quadratic_spline(
            x[:, None], widths[:, None], widths[:, None], slopes[:, None], tails=["linear"] * 2
        )
