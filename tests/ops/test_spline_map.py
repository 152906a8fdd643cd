"""The splines of other libraries, written as those libraries compute them; and how exact ours are in float32."""

import math

import pytest
import torch
from laws import normal
from torch.nn.functional import pad, softmax, softplus

from pyflowkern.ops import SplineMap, rational_quadratic_spline, spline

EPS = 2.0**-23


# --- parameterisations --------------------------------------------------------------------------------------


def textbook(x, xs, ys, d):
    """Durkan et al. 2019, equations 4 and 5, of one knot sequence an element."""
    k = (x[..., None] >= xs[..., 1:-1]).sum(-1, keepdim=True)
    x0, x1, y0, y1, d0, d1 = (t.gather(-1, k + i)[..., 0] for t in (xs, ys, d) for i in (0, 1))
    s, xi = (y1 - y0) / (x1 - x0), (x - x0) / (x1 - x0)
    below = s + (d1 + d0 - 2 * s) * xi * (1 - xi)
    y = y0 + (y1 - y0) * (s * xi**2 + d0 * xi * (1 - xi)) / below
    slope = s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2) / below**2
    return y, slope.log()


def knots(sizes, low):
    return torch.cat([low, low + sizes.cumsum(-1)], -1)


def nflows(w, h, d, bound=3.0, least=1e-3, scale=1.0):
    bins, low = w.shape[-1], torch.full_like(w[..., :1], -bound)
    xs, ys = (
        knots(2 * bound * (least + (1 - least * bins) * softmax(scale * u, -1)), low)
        for u in (w, h)
    )
    d = least + softplus(pad(d, (1, 1), value=math.log(math.exp(1 - least) - 1)))
    return xs, ys, d


def normflows_circular(w, h, d):
    d = torch.cat([d, d[..., :1]], -1)
    xs, ys, _ = nflows(w, h, d[..., 1:-1])
    return xs, ys, 1e-3 + softplus(d)


def zuko(w, h, d, bound=5.0, slope=1e-3):
    w, h = (u / (1 + abs(2 * u / math.log(slope))) for u in (w, h))
    xs, ys = (bound * (2 * pad(softmax(u, -1), (1, 0)).cumsum(-1) - 1) for u in (w, h))
    return xs, ys, torch.exp(pad(d / (1 + abs(d / math.log(slope))), (1, 1)))


def freia(w, h, rest, bound=3.0, least=0.1):
    """The default domain; `rest` is the lowest output, the leftmost input and the derivatives."""
    bottom, left, d = rest[..., :1] - bound, rest[..., 1:2] - bound, rest[..., 2:]
    shift = math.log(math.exp(2 * bound / w.shape[-1] - least) - 1)
    w, h = (least + softplus(u + shift) for u in (w, h))
    end = h.sum(-1, keepdim=True) / w.sum(-1, keepdim=True)
    inner = softplus(d + math.log(math.e - 1))
    return knots(w, left), knots(h, bottom), torch.cat([end, inner, end], -1)


def freia_identity_tails(w, h, rest, bound=3.0):
    total = 2 * bound * softplus(rest[..., :1] + math.log(math.e - 1))
    inner = softplus(rest[..., 1:] + math.log(math.e - 1))
    xs, ys = (knots(total * softmax(u, -1), -total / 2) for u in (w, h))
    return xs, ys, pad(inner, (1, 1), value=1.0)


LAYERS = {
    "nflows": (SplineMap(bins=6), nflows),
    "nflows, hidden 16": (SplineMap(bins=6, scale=0.25), lambda *p: nflows(*p, scale=0.25)),
    "normflows, circular": (SplineMap(bins=6, tails="circular"), normflows_circular),
    "zuko": (SplineMap(bins=6, bound=5.0, parameterization="softclip"), zuko),
    "FrEIA": (
        SplineMap(
            bins=10,
            tails="affine",
            parameterization="domain",
            min_bin_width=0.1,
            min_bin_height=0.1,
            min_derivative=0.0,
        ),
        freia,
    ),
    "FrEIA, identity tails": (
        SplineMap(bins=10, parameterization="domain", min_derivative=0.0),
        freia_identity_tails,
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_splines_of_other_libraries(backend, layer):
    smap, formula = LAYERS[layer]
    x = torch.linspace(-0.9, 0.9, 60, dtype=torch.float64).view(20, 3)
    p = 0.3 * normal(20, 3, smap.params, seed=1)  # no learned interval ends within
    y, terms = spline(x, p, smap, elementwise=True)
    expected, expected_terms = textbook(x, *formula(*smap.split(p)))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms, expected_terms, rtol=1e-9, atol=1e-9)


def test_tails_of_a_learned_domain(backend):
    smap, formula = LAYERS["FrEIA"]
    x, p = normal(20, 3).sign() * 50, normal(20, 3, smap.params, seed=1)
    xs, ys, d = formula(*smap.split(p))
    y, terms = spline(x, p, smap, elementwise=True)
    torch.testing.assert_close(y, d[..., 0] * (x - xs[..., 0]) + ys[..., 0])
    torch.testing.assert_close(terms, d[..., 0].log())


def test_smooth_at_the_bound():
    """Linear tails go on with derivative 1; nflows' quadratic splines do not quite."""
    for smap, smooth in (
        (SplineMap(), True),
        (SplineMap("quadratic"), True),
        (SplineMap("quadratic", edge=0.25), False),
    ):
        x = torch.tensor([[-3.0, 3.0]], dtype=torch.float64)
        p = normal(1, 2, smap.params)
        y, terms = spline(x, p, smap, elementwise=True)
        torch.testing.assert_close(y, x)
        assert torch.allclose(terms, torch.zeros(1, 2).double(), atol=1e-9) is smooth


def test_circular_ends_meet(backend):
    smap = SplineMap(tails="circular")
    p = normal(1, 1, smap.params).expand(1, 4, -1)
    x = torch.tensor([[-3.0, 3.0, 9.0, 3 - 1e-12]], dtype=torch.float64)
    y, terms = spline(x, p, smap, elementwise=True)
    torch.testing.assert_close(y[0, :3], torch.full((3,), -3.0).double())
    torch.testing.assert_close(y[0, 3], torch.tensor(3.0).double())
    torch.testing.assert_close(terms, terms[:, :1].expand(1, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "quartic"}, "kind must be one of"),
        ({"tails": "open"}, "tails must be one of"),
        ({"parameterization": "exp"}, "parameterization must be one of"),
        ({"bins": 1}, "bins must be from 2 to 64"),
        ({"bound": 0.0}, "bound must be positive"),
        ({"scale": math.inf}, "scale must be positive and finite"),
        ({"min_derivative": 1.0}, "min_derivative must be"),
        ({"min_bin_width": 0.125}, "min_bin_width must be at least 0 and below 0.125"),
        ({"min_bin_height": -1.0}, "min_bin_height must be at least 0"),
        ({"edge": 1.0}, "edge must be"),
        ({"kind": "cubic", "tails": "circular"}, "no circular tails"),
        ({"kind": "linear", "parameterization": "softclip"}, "belongs to rational_quadratic"),
        ({"parameterization": "domain", "tails": "none"}, "linear or affine tails"),
        ({"parameterization": "softclip", "min_derivative": 0.0}, "must be positive"),
    ],
)
def test_bad_maps(options, words):
    with pytest.raises(ValueError, match=words):
        SplineMap(**options)


def test_split_wants_all_numbers():
    with pytest.raises(ValueError, match="23 numbers on the last axis"):
        SplineMap().split(torch.zeros(2, 22))


# --- backward stability -------------------------------------------------------------------------------------


def draws(smap, size, n=100_000):
    """Inputs over more than the interval, with its ends and their neighbours; parameters N(0, size^2)."""
    ends = torch.tensor([-smap.bound, smap.bound])
    ends = torch.cat(
        [ends, *(torch.nextafter(ends, torch.full((2,), v)) for v in (0.0, 9.0, -9.0))]
    )
    x = (torch.rand(n) * 2 - 1) * 4 / 3 * smap.bound
    x[: 50 * len(ends)] = ends.repeat(50)
    return x, size * torch.randn(n, smap.params)


@pytest.mark.parametrize("size", [1.0, 5.0, 20.0, 100.0])
@pytest.mark.parametrize(
    "smap",
    [
        SplineMap(),
        SplineMap(bins=10, tails="affine"),
        SplineMap(bins=64),
        SplineMap(parameterization="softclip"),
    ],
    ids=lambda m: f"{m.bins}-{m.tails}-{m.parameterization}",
)
def test_backward_stable_in_float32(backend, request, smap, size):
    """|f32(x) - f(x)| <= 4 eps B (1 + slope), |f(inverse32(y)) - y| <= 16 eps B (1 + slope); all finite.

    A bound on the round trip would be wrong: slopes reach 1e-7, where rounding y alone moves x by more than 0.1.
    """
    reference = request.node.callspec.params["backend"] == "reference"
    allowed = 16 if reference else 4  # its sums of widths and heights are plain ones
    n = 20_000 if reference or smap.bins == 64 else 100_000
    x, p = draws(smap, size, n)
    exact = p.double()
    y, terms = spline(x, p, smap, elementwise=True)
    want, log_slope = spline(x.double(), exact, smap, elementwise=True)
    # tails that are not flat multiply what lies beyond the bound
    unit = EPS * smap.bound * (1 + log_slope.exp())
    assert ((y - want).abs() <= allowed * unit).all()
    back, minus = spline(x, p, smap, inverse=True, elementwise=True)
    again, log_slope = spline(back.double(), exact, smap, elementwise=True)
    unit = EPS * smap.bound * (1 + log_slope.exp())
    assert ((again - x).abs() <= 16 * unit).all()
    assert torch.isfinite(terms).all()
    assert torch.isfinite(minus).all()


@pytest.mark.parametrize("size", [1.0, 5.0, 20.0, 100.0])
def test_gradients_stay_finite(backend, size):
    smap = SplineMap()
    x, p = draws(smap, size, 20_000)
    for inverse in (False, True):
        a, b = x.clone().requires_grad_(), p.clone().requires_grad_()
        y, log_det = spline(a, b, smap, inverse=inverse)
        grads = torch.autograd.grad(y.sum() + log_det.sum(), (a, b))
        for t in (y, log_det, *grads):
            assert torch.isfinite(t).all()


def test_knots_are_exact_for_equal_sizes(backend):
    """An input on a knot, where a bin search may go either way."""
    w, d = torch.zeros(9, 1, 8), torch.randn(9, 1, 7)
    x = torch.linspace(-3, 3, 9)[:, None]
    y, _ = rational_quadratic_spline(x, w, w, d)
    torch.testing.assert_close(y, x, rtol=0, atol=4 * EPS * 3)
