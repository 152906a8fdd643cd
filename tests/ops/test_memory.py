"""What kernels read and write: sizes of zero, masks of nothing, memory that nobody filled."""

import ctypes
import itertools

import pytest
import torch
from laws import normal

from pyflowkern import _library, ops, use_reference
from pyflowkern.ops import MaskedLayer, MaskedPlan, ScaleMap, SplineMap
from pyflowkern.ops.field_time import at_time

KINDS = ["rational_quadratic", "linear", "quadratic", "cubic"]
LAYOUTS = ["blocked", "interleaved", "feature_major", "blocked_raw_first"]
SHAPES = [(0, 3), (3, 0), (0, 0), (2, 3, 0), (2, 0, 3), (0, 2, 3, 3), (2, 3, 2, 0), (2, 0, 2, 2)]


def results(function, tensors, dtype):
    """Return everything that an op gives: its outputs and the gradients of all its tensors."""
    torch.manual_seed(0)
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    found = function(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    smooth = [y for y in outputs if y.requires_grad]
    inputs = [t for t in leaves if t is not None]
    grads = []
    if smooth:
        cotangents = [torch.ones_like(y) for y in smooth]
        grads = list(torch.autograd.grad(smooth, inputs, cotangents, allow_unused=True))
    return outputs, grads


def check(function, *tensors, dtypes=(torch.float32, torch.float64, torch.bfloat16)):
    """Compare an op with its reference; an element that no kernel wrote would be NaN."""
    for dtype in dtypes:
        outputs, grads = results(function, tensors, dtype)
        with use_reference():
            expected, expected_grads = results(function, tensors, dtype)
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
        for a, b in itertools.zip_longest(outputs + grads, expected + expected_grads):
            if a is None or b is None:  # of what does not matter: none, or zeros
                assert all(t is None or not t.any() for t in (a, b))
                continue
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_fresh_memory_of_the_cpu_kernels_is_full_of_nan():
    """The fixture ``backend`` relies on this switch of the library."""
    library = ctypes.CDLL(str(_library._loaded["cpu"]))
    x = torch.zeros(2, 3)
    before = library.pyflowkern_fresh_is_nan(1)
    try:
        unread = torch.ops.pyflowkern.normal_log_prob_backward(torch.ones(2), x, None, None, 1)
        assert unread[0].isfinite().all()  # what kernels write is written
        assert library.pyflowkern_fresh_is_nan(1) == 1
    finally:
        library.pyflowkern_fresh_is_nan(before)


# --- splines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inverse", [False, True])
def test_splines_of_no_features(backend, kind, inverse):
    smap = SplineMap(kind, bins=3)
    for shape, elementwise in itertools.product(SHAPES, (False, True)):
        check(
            lambda x, p, e=elementwise: ops.spline(x, p, smap, inverse=inverse, elementwise=e),
            torch.zeros(shape),
            torch.zeros(*shape, smap.params),
        )


def test_rational_quadratic_splines_of_no_features(backend):
    for shape, elementwise in itertools.product(SHAPES, (False, True)):
        check(
            lambda *t, e=elementwise: ops.rational_quadratic_spline(*t, elementwise=e),
            torch.zeros(shape),
            torch.zeros(*shape, 4),
            torch.zeros(*shape, 4),
            torch.zeros(*shape, 3),
        )


@pytest.mark.parametrize("inverse", [False, True])
def test_spline_couplings_of_no_elements(backend, inverse):
    smap = SplineMap(bins=3)
    for shape in ((2, 2, 0), (0, 2), (0, 3, 2, 2), (2, 3, 0, 2)):
        n, c, *space = shape
        for swap in (False, True):
            moved = ops.channel_split_sizes(c, swap)[1]
            check(
                lambda x, p, s=swap: ops.spline_coupling(x, p, smap, swap=s, inverse=inverse),
                torch.zeros(shape),
                torch.zeros(n, moved * smap.params, *space),
            )


def masks(shape):
    """Yield masks of an event, and whether to swap them: of nothing, of all, and of one element."""
    nothing = torch.zeros(shape, dtype=torch.bool)
    one = nothing.clone()
    one.view(-1)[0] = True
    yield from itertools.product((nothing, ~nothing, one), (False, True))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 2, 2)])
def test_masks_that_transform_nothing(backend, shape, inverse):
    n, c, *space = shape
    smap, x = SplineMap(bins=3), normal(*shape)
    formats = [torch.contiguous_format] + [torch.channels_last] * (len(shape) == 4)
    for fmt, (mask, swap) in itertools.product(
        formats, itertools.chain(masks(shape[1:]), masks(shape[1:2]))
    ):
        options = {"split": mask, "swap": swap, "inverse": inverse}
        given = x.contiguous(memory_format=fmt)
        check(
            lambda x, p, o=options: ops.spline_coupling(x, p, smap, **o),
            given,
            normal(n, c * smap.params, *space, seed=1),
        )
        for layout in LAYOUTS:
            last = (c, *space, 2) if layout.startswith("feature") else (2 * c, *space)
            check(
                lambda x, p, o=options, layout=layout: ops.affine_coupling(
                    x, p, params_layout=layout, **o
                ),
                given,
                normal(n, *last, seed=1),
            )
    nothing = torch.zeros(c, dtype=torch.bool)
    y, log_det = ops.spline_coupling(x, normal(n, c * smap.params, *space), smap, split=nothing)
    assert torch.equal(y, x)
    assert not log_det.any()


def test_a_checkerboard_of_one_pixel(backend):
    smap, x = SplineMap(bins=3), normal(3, 2, 1, 1)
    for swap in (False, True):
        options = {"split": "checkerboard", "swap": swap}
        check(
            lambda x, p, o=options: ops.spline_coupling(x, p, smap, **o),
            x,
            normal(3, 2 * smap.params, 1, 1, seed=1),
        )
        check(
            lambda x, p, o=options: ops.affine_coupling(x, p, **o), x, normal(3, 4, 1, 1, seed=1)
        )


# --- every other op ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_elementwise_ops_of_no_elements(backend, shape):
    x, channels = torch.zeros(shape), torch.zeros(shape[1])
    for inverse in (False, True):
        for name in ("exp", "tanh", "softplus", "additive"):
            raw = None if name == "additive" else torch.zeros(shape)
            check(
                lambda x, u, t, i=inverse, m=name: ops.affine(x, u, t, scale_map=m, inverse=i),
                x,
                raw,
                torch.zeros(shape),
            )
        check(lambda x, i=inverse: ops.logit(x, alpha=0.05, inverse=i), x)
        check(
            lambda x, s, b, i=inverse: ops.actnorm(x, s, b, inverse=i),
            x,
            channels,
            channels,
            dtypes=(torch.float32, torch.float64),
        )
    check(ops.channel_moments, x)
    check(ops.normal_log_prob, x)
    for other in (torch.zeros(shape), torch.zeros(shape[1:])):
        check(lambda x, m, s: ops.normal_log_prob(x, m, s), x, other, other)
    check(
        lambda x, d: ops.normal_log_prob(x, log_det=d),
        x,
        torch.ones(shape[0]),
        dtypes=(torch.float32, torch.float64),
    )
    for alpha in (None, 0.05):
        levels = torch.zeros(shape, dtype=torch.uint8)
        y, log_det = ops.dequantize(levels, seed=0, alpha=alpha)
        assert y.shape == shape
        with use_reference():
            torch.testing.assert_close(log_det, ops.dequantize(levels, seed=0, alpha=alpha)[1])
        assert ops.quantize(y, alpha=alpha).shape == shape
    check(lambda e, j: ops.hutchinson_trace(e, j, with_norm=True), x, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_of_no_elements(backend, shape):
    c = shape[1]
    for inverse in (False, True):
        check(
            lambda x, w, d, b, i=inverse: ops.invertible_linear(x, w, d, b, inverse=i),
            torch.zeros(shape),
            torch.eye(c),
            torch.tensor(0.5),
            torch.ones(c),
            dtypes=(torch.float32, torch.float64),
        )
        check(
            lambda x, s, b, w, d, i=inverse: ops.glow_step(x, s, b, w, d, inverse=i),
            torch.zeros(shape),
            torch.ones(c),
            torch.ones(c),
            torch.eye(c),
            torch.tensor(0.5),
            dtypes=(torch.float32, torch.float64),
        )


def test_small_matrices(backend):
    plain = (torch.float32, torch.float64)
    for c in (0, 1, 5):
        order, sign = torch.arange(c), torch.ones(c)
        for inverse in (False, True):
            check(
                lambda a, b, d, i=inverse, o=order, s=sign: ops.plu_matrix(
                    o, a, b, d, s.to(a.dtype), inverse=i
                ),
                normal(c, c),
                normal(c, c, seed=1),
                normal(c, seed=2),
                dtypes=plain,
            )
        for batch in ((), (0,), (2, 0), (3,)):
            check(ops.slogdet_inverse, torch.eye(c).expand(*batch, c, c), dtypes=plain)
        for k in (0, 2):
            check(ops.householder_matrix, torch.ones(k, c), dtypes=plain)


def test_couplings_of_no_elements(backend):
    for shape in ((2, 2, 0), (0, 2), (0, 3, 2, 2), (2, 3, 0, 2)):
        n, c, *space = shape
        for swap, name in itertools.product((False, True), ("tanh", "additive")):
            moved = ops.channel_split_sizes(c, swap)[1]
            each = 1 if name == "additive" else 2
            check(
                lambda x, p, s=swap, m=name: ops.affine_coupling(x, p, swap=s, scale_map=m),
                torch.zeros(shape),
                torch.zeros(n, each * moved, *space),
            )


PLAIN = (torch.float32, torch.float64)


def test_networks_of_no_samples_or_units(backend):
    for n, features, hidden in itertools.product((0, 2), (0, 3), (0, 4)):
        weights = normal(hidden, features), normal(hidden, hidden), normal(2, hidden)
        biases = normal(hidden, seed=1), normal(hidden, seed=2), normal(2, seed=3)
        check(
            lambda x, *t: ops.relu_network(x, t[:3], t[3:]),
            normal(n, features, seed=4),
            *weights,
            *biases,
            dtypes=PLAIN,
        )


def test_fields_of_no_samples_or_units(backend):
    for n, d, hidden in itertools.product((0, 2), (0, 3), (0, 4)):
        sizes = [(hidden, d), (hidden, hidden), (d, hidden)]
        weights = [normal(*s, seed=i) for i, s in enumerate(sizes)]
        biases = [normal(s[0], seed=5 + i) for i, s in enumerate(sizes)]
        for first in (0, 1):  # two hidden layers, and one
            w, b = weights[:1] + weights[1 + first :], biases[:1] + biases[1 + first :]
            k = len(w)
            options = [{"method": "exact"}, {"probe": torch.tensor(7), "probes": 2}]
            for o, regularizers in itertools.product(options, (False, True)):
                check(
                    lambda x, *t, o=o, k=k, r=regularizers: ops.field_divergence(
                        x, t[:k], t[k:], regularizers=r, **o
                    ),
                    normal(n, d, seed=9),
                    *w,
                    *b,
                    dtypes=PLAIN,
                )


def test_field_layers_of_no_elements(backend):
    for (n, c, *space), k in itertools.product(
        ((0, 3), (2, 0), (2, 3, 0), (0, 3, 2, 2)), (0, 1, 2)
    ):
        for shape in ((c,), (n, c), (1, c, *space), (n, c, *space)):
            if len(space) == 0 and len(shape) == 2 and shape[0] == 1:
                continue
            check(
                lambda p, b, g, k=k: ops.field_layer(p, b, g, tangents=k),
                normal((1 + k) * n, c, *space),
                normal(*shape, seed=1),
                normal(*shape, seed=2),
                dtypes=PLAIN,
            )


def test_parameters_of_no_time_or_units(backend):
    for time, out, rows in itertools.product(
        (torch.tensor(0.5), normal(0), normal(3)), (0, 4), (1, 3)
    ):

        def both(t, b, r):
            biases, gates = at_time(t, [b], [r])
            return (*biases, *gates)

        check(both, time, normal(out, seed=1), normal(rows, out, seed=2), dtypes=PLAIN)


def test_runge_kutta_of_no_elements(backend):
    for shape, step in itertools.product(((0, 3), (3, 0), (0, 0)), (0.1, "each")):
        h = torch.full((shape[0],), 0.1, dtype=torch.float64) if step == "each" else step
        for dtype in PLAIN:
            y, slopes = torch.zeros(shape, dtype=dtype), torch.zeros(2, *shape, dtype=dtype)
            assert ops.rk_combine(y, slopes, [0.5, 0.5], h).shape == shape
            found = ops.rk_error(y, y, slopes, [0.5, -0.5], h, rtol=1e-3, atol=1e-3)
            with use_reference():
                expected = ops.rk_error(y, y, slopes, [0.5, -0.5], h, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_autoregressive_inverses_of_no_samples_or_units(backend):
    for n, features, hidden in itertools.product((0, 2), (1, 3), (0, 4)):
        degrees = 1 + torch.arange(hidden) % max(1, features - 1)
        rank = torch.arange(features)
        for transform, outputs in (("affine", 2), (SplineMap(bins=3), SplineMap(bins=3).params)):
            plan = MaskedPlan(
                [
                    MaskedLayer(degrees[:, None] > rank),
                    MaskedLayer(
                        (rank[:, None] >= degrees).repeat_interleave(outputs, 0), activation="relu"
                    ),
                ],
                features,
            )
            check(
                lambda z, w0, w1, b0, b1, plan=plan, t=transform: ops.autoregressive_inverse(
                    z, [w0, w1], [b0, b1], plan, transform=t
                ),
                normal(n, features),
                normal(hidden, features, seed=1) / 4,
                normal(features * outputs, hidden, seed=2) / 4,
                normal(hidden, seed=3) / 4,
                normal(features * outputs, seed=4) / 4,
                dtypes=PLAIN,
            )


@pytest.mark.parametrize("shape", [(5, 1), (5, 7), (3, 3, 5), (2, 5, 3, 3), (1, 1025)])
def test_odd_sizes_are_written_whole(backend, shape):
    """Sizes that are no whole number of vectors, packs, blocks or warps."""
    x, c = normal(*shape), shape[1]
    scale = ScaleMap("softplus", eps=1e-3)
    check(
        lambda x, u, t: ops.affine(x, u, t, scale_map=scale),
        x,
        normal(*shape, seed=1),
        normal(*shape, seed=2),
    )
    check(ops.actnorm, x, normal(c, seed=1), normal(c, seed=2), dtypes=PLAIN)
    check(ops.normal_log_prob, x, normal(*shape[1:], seed=1), normal(*shape[1:], seed=2))
    check(lambda x: ops.logit(x.sigmoid(), alpha=0.05), x)
    for kind in KINDS:
        smap = SplineMap(kind, bins=3)
        check(lambda x, p, s=smap: ops.spline(x, p, s), x, normal(*shape, smap.params, seed=1))
