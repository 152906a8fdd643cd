"""spline_coupling: splits, layouts, and what torch asks of an op."""

import itertools

import pytest
import torch
from laws import jacobian_log_det, law, normal

from pyflowkern.core.codes import SplineFlag
from pyflowkern.ops import (
    SplineMap,
    channel_split_sizes,
    checkerboard_mask,
    rational_quadratic_spline,
    spline,
    spline_coupling,
    spline_coupling_reference,
    spline_reference,
)

SMAP = SplineMap(bins=4)
SPLITS = ["channel", "checkerboard", "space", "channels"]


def case(split, shape, swap, dtype=torch.float64, smap=SMAP):
    """Return x, parameters and the split as the op takes it."""
    n, c, *space = shape
    x = 2 * normal(*shape, dtype=dtype)
    moved = c
    if split == "channel":
        moved = channel_split_sizes(c, swap)[1]
    elif split == "space":
        split = normal(*shape[1:], seed=3) > 0
    elif split == "channels":
        split = normal(c, seed=4) > 0
        split[0], split[1] = True, False
        moved = int((split ^ swap).sum())
    return x, 0.5 * normal(n, moved * smap.params, *space, seed=1, dtype=dtype), split


def check(x, params, smap=SMAP, **options):
    law(
        lambda a, b: spline_coupling(a, b, smap, **options),
        lambda a, b: spline_coupling_reference(a, b, smap, **options),
        (x, params),
        floor={torch.float64: 1e4, torch.float32: 64.0}.get(x.dtype, 4.0),  # see test_spline.py
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_every_split(backend, split, channels_last):
    for shape, swap, inverse in itertools.product(
        [(2, 6, 4, 5), (3, 5, 3, 3)], (False, True), (False, True)
    ):
        for dtype in (torch.float64, torch.float32):
            x, p, where = case(split, shape, swap, dtype)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
                p = p.contiguous(memory_format=torch.channels_last)
            check(x, p, split=where, swap=swap, inverse=inverse)


@pytest.mark.parametrize("split", ["channel", "channels"])
@pytest.mark.parametrize("shape", [(0, 4), (1, 2), (129, 3), (64, 10), (2, 7, 11), (2, 3, 40, 40)])
def test_awkward_shapes(backend, split, shape):
    for swap, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        x, p, where = case(split, shape, swap, dtype)
        check(x, p, split=where, swap=swap)


@pytest.mark.parametrize("kind", ["linear", "quadratic", "cubic"])
def test_other_kinds(backend, kind):
    smap = SplineMap(kind, bins=5)
    x, p, _ = case("channel", (3, 4, 3, 5), False, smap=smap)
    check(x, p, smap)


def test_what_passes_is_untouched(backend):
    for split, swap in itertools.product(SPLITS, (False, True)):
        x, p, where = case(split, (3, 6, 4, 4), swap, torch.float32)
        y, log_det = spline_coupling(x, p, SMAP, split=where, swap=swap)
        mask = checkerboard_mask((6, 4, 4)) if split == "checkerboard" else where
        if split == "channel":
            mask = torch.arange(6) >= 3
        mask = (mask if mask.dim() == 3 else mask.view(-1, 1, 1)).expand(6, 4, 4) ^ swap
        assert torch.equal(y[:, ~mask], x[:, ~mask])
        assert not torch.equal(y[:, mask], x[:, mask])
        back, minus = spline_coupling(y, p, SMAP, split=where, swap=swap, inverse=True)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-4)  # slopes as small as 1e-2
        torch.testing.assert_close(minus, -log_det, rtol=1e-3, atol=1e-3)


def test_full_mask_over_channels(backend):
    """Parameters for every channel, of which those that pass are not read."""
    x, mask = normal(3, 5), torch.tensor([True, False, True, True, False])
    p = normal(3, 5 * SMAP.params, seed=1)
    check(x, p, split=mask)
    compact = p.view(3, 5, -1)[:, mask].reshape(3, -1)
    for a, b in zip(
        spline_coupling(x, p, SMAP, split=mask),
        spline_coupling(x, compact, SMAP, split=mask),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_unused_parameters_cannot_do_harm(backend):
    x, p, _ = case("checkerboard", (2, 3, 4, 4), False)
    mask = checkerboard_mask((3, 4, 4))
    rows = p.view(2, 3, SMAP.params, 4, 4)
    p = torch.where(mask.unsqueeze(1), rows, torch.nan).view_as(p).requires_grad_()
    x.requires_grad_()
    y, log_det = spline_coupling(x, p, SMAP, split="checkerboard")
    gx, gp = torch.autograd.grad(y.sum() + log_det.sum(), (x, p))
    for t in (y, log_det, gx, gp):
        assert torch.isfinite(t).all()
    assert not gp.view(2, 3, SMAP.params, 4, 4).masked_select(~mask.unsqueeze(1)).any()


def test_coupling_is_the_spline_of_its_part(backend):
    x, p, _ = case("channel", (4, 6), False, torch.float32)
    y, log_det = spline_coupling(x, p, SMAP)
    part, same = spline(x[:, 3:], p.view(4, 3, -1), SMAP)
    assert torch.equal(y[:, 3:], part)
    torch.testing.assert_close(log_det, same)


def test_log_det_is_that_of_the_jacobian(backend):
    for split in SPLITS:
        x, p, where = case(split, (1, 3, 2, 2), False)
        _, log_det = spline_coupling(x, p, SMAP, split=where)
        expected = jacobian_log_det(
            lambda v, p=p, where=where: spline_coupling(v, p, SMAP, split=where)[0], x
        )
        torch.testing.assert_close(log_det, expected)


def test_gradgradcheck(backend):
    smap = SplineMap(bins=2)
    for split, inverse in itertools.product(["channel", "checkerboard"], (False, True)):
        x, p, where = case(split, (2, 2, 2, 2), False, smap=smap)

        def run(a, b, where=where, inverse=inverse):
            return spline_coupling(a, b, smap, split=where, inverse=inverse)

        torch.autograd.gradgradcheck(run, (x.requires_grad_(), p.requires_grad_()), fast_mode=True)


# --- what torch asks of an op -------------------------------------------------------------------------------


def test_memory_kept_is_that_of_the_inputs():
    x, p = normal(64, 8).requires_grad_(), normal(64, 8, SMAP.params).requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
    ):
        spline(x, p, SMAP)
    assert sum(kept.values()) == x.nbytes + p.nbytes


def test_autocast_keeps_a_float32_log_det(backend):
    x, p, _ = case("channel", (4, 6), False, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = spline_coupling(x, p.bfloat16(), SMAP)
    assert y.dtype == log_det.dtype == torch.float32
    y, log_det = spline_coupling(x.bfloat16(), p.bfloat16(), SMAP)
    assert (y.dtype, log_det.dtype) == (torch.bfloat16, torch.float32)
    y, log_det = spline(x.bfloat16(), p.view(4, 3, -1).repeat(1, 2, 1), SMAP)
    assert (y.dtype, log_det.dtype) == (torch.bfloat16, torch.float32)


def test_opcheck():
    op = torch.ops.pyflowkern.spline.default
    x, p, _ = case("channel", (2, 4, 3, 3), False)
    coupling, inverse, swap = SplineFlag.COUPLING, SplineFlag.INVERSE, SplineFlag.SWAP
    tail = (None, None, None, *SMAP.form, SMAP.numbers)
    x, p = x.requires_grad_(), p.requires_grad_()
    torch.library.opcheck(op, (x, None, p, *tail, coupling.value))
    torch.library.opcheck(op, (x, None, p, *tail, (coupling | inverse | swap).value))
    mask = checkerboard_mask((4, 3, 3))
    full = torch.cat([p, p], 1).detach().requires_grad_()
    torch.library.opcheck(op, (x, mask, full, *tail, coupling.value))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(op, (last, None, p, *tail, coupling.value))
    v, packed = normal(3, 5).requires_grad_(), normal(3, 5, SMAP.params).requires_grad_()
    torch.library.opcheck(op, (v, None, packed, *tail, 0))
    torch.library.opcheck(op, (v, None, packed, *tail, SplineFlag.ELEMENTWISE.value))
    parts = [t.detach().clone().requires_grad_() for t in SMAP.split(packed)]
    torch.library.opcheck(op, (v, None, None, *parts, *tail[3:], inverse.value))


@pytest.mark.slow
def test_compiles_whole():
    x, p, _ = case("channel", (4, 6), False, torch.float32)
    mask = torch.tensor([True, False, True, False, True, False])

    def step(a, b):
        y, log_det = spline_coupling(a, b, SMAP)
        z, more = spline_coupling(y, b, SMAP, split=mask, inverse=True)
        u, last = rational_quadratic_spline(z[:, :3], *SMAP.split(b.view(4, 3, -1)))
        return u.sum() + z.square().sum() + (log_det + more + last).sum()

    compiled = torch.compile(step, fullgraph=True)
    grads = []
    for f in (step, compiled):
        a, b = x.clone().requires_grad_(), p.clone().requires_grad_()
        grads.append(torch.autograd.grad(f(a, b), (a, b)))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def test_functional_transforms():
    """vmap, jacrev and jvp go through the public function by its reference."""
    x, p = normal(4, 3), normal(4, 3, SMAP.params, seed=1)

    def one(v, q):
        return spline(v[None], q[None], SMAP)[0][0]

    jacobian = torch.func.vmap(torch.func.jacrev(one))(x, p)
    _, terms = spline_reference(x, p, SMAP, elementwise=True)
    torch.testing.assert_close(jacobian.diagonal(dim1=1, dim2=2), terms.exp())
    _, tangent = torch.func.jvp(lambda v: spline(v, p, SMAP)[0], (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, terms.exp())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "x must be a floating-point"),
        ({"x": torch.zeros(4)}, ValueError, "batch axis"),
        ({"params": torch.zeros(2, 21)}, ValueError, r"params must have shape \(2, 22\)"),
        ({"params": torch.zeros(2, 22).long()}, TypeError, "params must be a floating"),
        ({"spline_map": "rational_quadratic"}, TypeError, "must be a SplineMap, got str"),
        ({"split": "rows"}, ValueError, "split must be"),
        ({"split": torch.ones(4)}, TypeError, "a boolean tensor"),
        ({"split": torch.ones(4).bool()}, ValueError, r"params must have shape \(2, 44\)"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"x": torch.zeros(2, 4), "params": torch.zeros(2, 22), "spline_map": SMAP}
    with pytest.raises(error, match=words):
        spline_coupling(**(arguments | change))


def test_bad_shapes_of_parts():
    x, w, d = torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3, 3)
    for parts, words in (
        ((w[:1], w, d), "widths must have the shape of x"),
        ((w, w[..., :3], d), r"heights must have shape \(2, 3, 4\)"),
        ((w, w, w), r"derivatives must have shape \(2, 3, 3\)"),
        ((torch.zeros(2, 3, 65), torch.zeros(2, 3, 65), d), "bins must be from 2 to 64"),
    ):
        with pytest.raises(ValueError, match=words):
            rational_quadratic_spline(x, *parts)
    with pytest.raises(ValueError, match="params must have shape"):
        spline(x, w, SMAP)
