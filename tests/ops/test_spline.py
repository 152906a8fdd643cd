"""spline and rational_quadratic_spline: every kind, tail and parameterization against float64 and autograd."""

import itertools

import pytest
import torch
from laws import jacobian_log_det, law, normal

from pyflowkern.ops import (
    SplineMap,
    rational_quadratic_spline,
    rational_quadratic_spline_reference,
    spline,
    spline_reference,
)
from pyflowkern.ops.spline_map import KINDS, PARAMETERIZATIONS, TAILS

#: Roundings of the largest entry allowed on top of twice plain PyTorch's error. A bin of a fiftieth of the interval
#: makes 50 of one rounding of x, and which element that hits is another one here than there. In float64 the reference
#: is the exact value, and has no error to compare with. test_spline_map.py holds float32 to what is possible.
ROUNDINGS = {torch.float64: 1e4, torch.float32: 64.0}
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def every_map(bins=5, **options):
    """All combinations that exist."""
    found = []
    for kind, tails, parameterization in itertools.product(KINDS, TAILS, PARAMETERIZATIONS):
        try:
            found.append(
                SplineMap(kind, bins, tails=tails, parameterization=parameterization, **options)
            )
        except ValueError:
            continue
    return found


def name(smap):
    return f"{smap.kind}-{smap.tails}-{smap.parameterization}"


MAPS = every_map()
each_map = pytest.mark.parametrize("smap", MAPS, ids=name)


def inputs(smap, *shape, dtype=torch.float64, scale=0.5):
    """Elements inside of the interval and, where there are tails, outside; parameters."""
    x = normal(*shape, seed=3).to(dtype)
    x = torch.sigmoid(x) if smap.tails == "none" else 2 * x
    return x, scale * normal(*shape, smap.params, seed=1, dtype=dtype)


def check(x, params, smap, **options):
    """Value and gradients against float64, within twice the error of plain PyTorch at that dtype."""
    law(
        lambda a, b: spline(a, b, smap, **options),
        lambda a, b: spline_reference(a, b, smap, **options),
        (x, params),
        floor=ROUNDINGS.get(x.dtype, 4.0) * max(1.0, smap.bins / 4),
    )


def test_the_combinations_that_exist():
    assert len(MAPS) == 10 + 4 + 4 + 3


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_map
def test_every_map(backend, smap, dtype):
    x, p = inputs(smap, 7, 5, dtype=dtype)
    for inverse in (False, True):
        check(x, p, smap, inverse=inverse)


@pytest.mark.parametrize("bins", [2, 3, 8, 16, 64])
def test_every_number_of_bins(backend, bins):
    for smap in (
        SplineMap(bins=bins),
        SplineMap(bins=bins, tails="circular", scale=0.3),
        SplineMap(bins=bins, tails="affine", parameterization="softclip", bound=5.0),
        SplineMap("quadratic", bins=max(bins, 3)),  # of two bins it is the identity
        SplineMap("cubic", bins=bins, tails="affine"),
    ):
        for dtype, inverse in itertools.product((torch.float64, torch.float32), (False, True)):
            x, p = inputs(smap, 9, 4, dtype=dtype)
            check(x, p, smap, inverse=inverse)


@pytest.mark.parametrize(
    "shape", [(1,), (5,), (3, 129), (127, 3), (2, 1000), (1, 2100), (2, 3, 4, 5), (0, 4)], ids=str
)
def test_awkward_shapes(backend, shape):
    for dtype in (torch.float32, torch.bfloat16):
        smap = SplineMap(bins=8)
        x, p = inputs(smap, *shape, dtype=dtype)
        check(x, p, smap)
        law(
            lambda a, *b: rational_quadratic_spline(a, *b),
            lambda a, *b: rational_quadratic_spline_reference(a, *b),
            (x, *(t.clone() for t in smap.split(p))),
            floor=ROUNDINGS.get(dtype, 4.0),
        )


@each_map
def test_elementwise_terms(backend, smap):
    x, p = inputs(smap, 3, 4, 2)
    y, terms = spline(x, p, smap, elementwise=True)
    same, log_det = spline(x, p, smap)
    assert torch.equal(y, same)
    assert terms.shape == x.shape
    torch.testing.assert_close(terms.flatten(1).sum(1), log_det)
    check(x, p, smap, elementwise=True)
    check(x.float(), p.float(), smap, elementwise=True, inverse=True)


@each_map
def test_inverse_undoes_forward(backend, smap):
    x, p = inputs(smap, 50, 4)
    y, log_det = spline(x, p, smap)
    back, minus = spline(y, p, smap, inverse=True)
    if smap.tails == "circular":
        x = torch.remainder(x + smap.bound, 2 * smap.bound) - smap.bound
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(minus, -log_det, rtol=0, atol=1e-8)


@each_map
def test_log_det_is_that_of_the_jacobian(backend, smap):
    x, p = inputs(smap, 1, 6)
    for inverse in (False, True):
        _, log_det = spline(x, p, smap, inverse=inverse)
        expected = jacobian_log_det(
            lambda v, inverse=inverse: spline(v, p, smap, inverse=inverse)[0], x
        )
        torch.testing.assert_close(log_det, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_parameters(backend, dtype):
    """Views of packed parameters, expanded, sliced and transposed ones give what their copies give."""
    smap = SplineMap(bins=8)
    x, p = inputs(smap, 6, 5, dtype=dtype)
    parts = smap.split(p)
    expected = rational_quadratic_spline(x, *(t.clone() for t in parts))
    cases = {
        "views": (x, *parts),
        "transposed": (x, *(t.transpose(0, 1).contiguous().transpose(0, 1) for t in parts)),
        "strided": (x, *(torch.stack([t, t], -1)[..., 0] for t in parts)),
        "x": (torch.stack([x, x], 1)[:, 1], *parts),
        "unaligned": (
            x,
            *(torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t) for t in parts),
        ),
    }
    for case, tensors in cases.items():
        got = rational_quadratic_spline(*tensors)
        torch.testing.assert_close(got, expected, msg=lambda text, case=case: f"{case}: {text}")
    one = p[:1, :1].expand(6, 5, -1)
    torch.testing.assert_close(spline(x, one, smap), spline(x, one.contiguous(), smap))


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_strided_parameters(backend, inverse):
    smap = SplineMap(bins=8)
    x, p = inputs(smap, 20, 5, dtype=torch.float32)
    grads = []
    for split in (False, True):
        q = p.clone().requires_grad_()
        if split:
            y, log_det = rational_quadratic_spline(x, *smap.split(q), inverse=inverse)
        else:
            y, log_det = spline(x, q, smap, inverse=inverse)
        grads.append(torch.autograd.grad(y.square().sum() + log_det.sum(), q)[0])
    torch.testing.assert_close(*grads)


@each_map
def test_gradcheck_and_gradgradcheck(backend, smap):
    smap = SplineMap(smap.kind, 3, tails=smap.tails, parameterization=smap.parameterization)
    x, p = (t.requires_grad_() for t in inputs(smap, 2, 3))
    for inverse in (False, True):

        def run(a, b, inverse=inverse):
            return spline(a, b, smap, inverse=inverse)

        torch.autograd.gradcheck(run, (x, p))
        torch.autograd.gradgradcheck(run, (x, p), fast_mode=True)


@pytest.mark.parametrize("smap", every_map(bins=8), ids=name)
def test_identity(backend, smap):
    x, _ = inputs(smap, 30, 4, dtype=torch.float32)
    raw = smap.identity_raw().expand(30, 4, -1)
    if smap.tails == "circular":
        x = torch.remainder(x + 3, 6) - 3
    for inverse in (False, True):
        y, log_det = spline(x, raw, smap, inverse=inverse)
        # knots and outputs round by some units of the bound; cubic roots take the square root of it nowhere
        torch.testing.assert_close(y, x, rtol=0, atol=4e-6)
        torch.testing.assert_close(log_det, torch.zeros(30), rtol=0, atol=2e-5)


@each_map
def test_bad_sample_stays_alone(backend, smap):
    x, p = inputs(smap, 3, 4, dtype=torch.float32)
    good = spline(x, p, smap)
    for poison in (torch.nan, torch.inf, -torch.inf):
        for where in ("x", "params"):
            bad_x, bad_p = x.clone(), p.clone()
            (bad_x if where == "x" else bad_p)[1] = poison
            bad_x.requires_grad_(), bad_p.requires_grad_()
            y, log_det = spline(bad_x, bad_p, smap)
            assert torch.equal(y[[0, 2]], good[0][[0, 2]])
            assert torch.equal(log_det[[0, 2]], good[1][[0, 2]])
            grads = torch.autograd.grad(y.sum() + log_det.sum(), (bad_x, bad_p))
            assert all(torch.isfinite(g[[0, 2]]).all() for g in grads)


def test_nan_is_not_hidden(backend):
    for smap in MAPS:
        x, p = inputs(smap, 2, 3, dtype=torch.float32)
        for inverse in (False, True):
            y, log_det = spline(torch.full_like(x, torch.nan), p, smap, inverse=inverse)
            assert y.isnan().all()
            assert log_det.isnan().all() or smap.kind == "linear"  # whose slope does not ask for x


def test_outside_without_tails_is_nan(backend):
    smap = SplineMap(tails="none")
    x = torch.tensor([[0.0, 1.0], [-1e-6, 0.5], [0.5, 1.1]])
    _, p = inputs(smap, 3, 2, dtype=torch.float32)
    for inverse in (False, True):
        y, log_det = spline(x, p, smap, inverse=inverse)
        assert y.isnan().tolist() == [[False, False], [True, False], [False, True]]
        assert log_det.isnan().tolist() == [False, True, True]


def test_same_bits_for_any_thread_count_and_batch():
    smap = SplineMap(bins=8)
    x, p = inputs(smap, 400, 33, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            a, b = x.clone().requires_grad_(), p.clone().requires_grad_()
            y, log_det = spline(a, b, smap)
            results.append((y, log_det, *torch.autograd.grad(y.sum() + log_det.sum(), (a, b))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))
    y, log_det = spline(x[123:130], p[123:130], smap)
    assert torch.equal(y, results[0][0][123:130])
    assert torch.equal(log_det, results[0][1][123:130])
